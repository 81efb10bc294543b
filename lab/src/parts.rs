//! What a nested machine is made of, all on this machine's disk.

use std::path::PathBuf;

use crate::apt::Packages;
use crate::build::BuildError;
use crate::cache::Cache;
use crate::kernel::{Kernel, KernelChoice, KernelError};
use crate::package::PackageError;
use crate::qemu::Qemu;
use crate::shell;

/// The programs built from this workspace, linked statically.
#[derive(Debug, Clone)]
pub struct Programs {
    /// `lab_init`, PID 1.
    pub init: PathBuf,
    /// `guest`, PID 1 of a guest in it.
    pub guest: PathBuf,
    /// Those on the nested machine's PATH, `guest` among them.
    pub others: Vec<PathBuf>,
}

/// What a nested machine is made of.
#[derive(Debug, Clone)]
pub struct Parts {
    /// The emulator.
    pub qemu: Qemu,
    /// The kernel with its modules.
    pub kernel: Kernel,
    /// A static busybox.
    pub busybox: PathBuf,
    /// The workspace's own.
    pub programs: Programs,
}

/// Why a part is missing.
#[derive(Debug, thiserror::Error)]
pub enum PartsError {
    /// The shell.
    #[error(transparent)]
    Package(#[from] PackageError),
    /// QEMU.
    #[error(transparent)]
    Qemu(#[from] BuildError),
    /// The kernel.
    #[error(transparent)]
    Kernel(#[from] KernelError),
}

impl Parts {
    /// Gathers the parts and fetches into the cache what is not there yet.
    ///
    /// # Errors
    /// When something cannot be had; the error says what.
    pub fn obtain(
        cache: &Cache,
        kernel: &KernelChoice,
        programs: Programs,
    ) -> Result<Self, PartsError> {
        let (qemu, kernel, busybox) = fetch(cache, kernel)?;
        Ok(Self {
            qemu,
            kernel,
            busybox,
            programs,
        })
    }
}

/// Fetches into the cache what is not there yet: emulator, kernel and shell.
///
/// # Errors
/// When something cannot be had; the error says what.
pub fn fetch(cache: &Cache, kernel: &KernelChoice) -> Result<(Qemu, Kernel, PathBuf), PartsError> {
    let mut packages = Packages::new(cache);
    Ok((
        Qemu::obtain(&mut packages)?,
        Kernel::obtain(kernel, &mut packages)?,
        shell::obtain(&mut packages)?,
    ))
}
