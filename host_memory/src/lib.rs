//! What backs a region: memfd, huge pages, anonymous memory, a device BAR.
//!
//! The embedder makes a [`Ram`] or a [`DeviceBar`] and hands it to
//! [`Backing::new`](memory_map::Backing::new), which owns it from then on. The map asks it for a
//! host address when a target needs one, and gets a [`Mapping`] that it drops when no target
//! does.
//!
//! ```
//! use host_memory::Ram;
//! use memory_map::Backing;
//!
//! # fn main() -> Result<(), host_memory::HostMemoryError> {
//! let ram = Backing::new(Ram::memfd(c"guest-ram", 2 << 20)?);
//! // The VMM's own reads and writes go through the object, not through an address.
//! if let Some(ram) = ram.downcast_ref::<Ram>() {
//!     ram.write(0x1000, b"hello")?;
//! }
//! # Ok(())
//! # }
//! ```
//!
//! What this crate does not do: it lays nothing out (that is `memory_map`), it opens no devices
//! (that is `vfio_sys`, which uses [`Mapping`] for its own maps too, so that there is one owner
//! of mapped memory in the workspace), and it never makes a Rust reference to a byte that a
//! guest or a device can change.

mod device_bar;
mod error;
mod huge_page;
mod mapping;
mod ram;

pub use device_bar::{DeviceBar, ExportDmaBuf};
pub use error::{HostMemoryError, NotWritable};
pub use huge_page::HugePage;
pub use mapping::{Mapping, page_size};
pub use ram::Ram;
