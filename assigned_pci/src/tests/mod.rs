//! Scenarios of one function or two, against a fake host and a real map.

mod any_order;
mod capabilities;
mod creation;
mod cut_off;
mod dead;
mod decoding;
mod fake;
mod fake_interrupts;
mod filter;
mod firmware;
mod interrupts;
mod mastering;
mod mistakes;
mod moves;
mod registers;
mod revocation;
