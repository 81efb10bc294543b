//! What lies around the processors, as they see it.

use memory_map::Gpa;

/// An access of a processor that the hypervisor does not carry out itself.
#[derive(Debug)]
pub enum Access<'a> {
    /// A read; what is there is to be filled in.
    Read(&'a mut [u8]),
    /// A write of these bytes.
    Write(&'a [u8]),
}

/// Ports, config space, trapped memory. Called by all processors at once. An access has 1, 2, 4 or
/// 8 bytes, at ports at most 4.
pub trait Board: Send + Sync {
    /// The guest accesses a port.
    fn port(&self, port: u16, access: Access<'_>);

    /// The guest accesses an address that has no memory slot.
    fn memory(&self, gpa: Gpa, access: Access<'_>);

    /// The hypervisor could not get at the memory behind a slot (`EFAULT`). `before` is how often in
    /// a row that has happened to this processor already. Whether it is worth trying again.
    fn memory_fault(&self, before: u32) -> bool;
}
