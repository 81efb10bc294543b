//! What backs a region: memfd, huge pages, anonymous memory, a device BAR.
