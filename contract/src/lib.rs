//! One contract test-suite for type1, run on the simulated host and on a real kernel.
