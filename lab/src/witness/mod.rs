//! What an IOMMU really holds, against what `throughway run` tells of its map, page by page and with
//! the exact physical addresses.
//!
//! It runs inside, as the program `iommu_witness`. Of the program that it watches it takes the view
//! and nothing else: neither its ledgers nor its system calls.
//!
//! ```text
//!   debugfs: context entries, and
//!   the tables that the IOMMU walks ------------> IoPageTable: what is held --+
//!                                                                             +-> Differences
//!   what is told at SIGUSR1 --------> Told: what is seen where --+            |
//!   the pages of its RAM's file,                                 +-> rule ----+
//!   the functions' resources, --> Facts: where that is in memory-+   what should be held
//!   capabilities and groups
//! ```

pub mod context;
pub mod differences;
pub mod facts;
pub mod io_page_table;
pub mod rule;
pub mod told;

/// The smallest page of an IOMMU, in bytes.
pub const PAGE: u64 = 0x1000;
