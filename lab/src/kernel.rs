//! The kernel of the nested machine: a stock Debian one, one built here from Debian's sources, or
//! one the user built.

mod built;
mod configuration;
mod stock;

use std::fs;
use std::io;
use std::path::PathBuf;

use crate::apt::Packages;
use crate::build::BuildError;
use crate::package::{Package, PackageError};

/// A kernel that can be booted.
#[derive(Debug, Clone)]
pub struct Kernel {
    /// The image.
    pub image: PathBuf,
    /// The same kernel as an ELF file with a PVH entry, if there is one.
    pub elf: Option<PathBuf>,
    /// Its modules, in the order of loading.
    pub modules: Vec<PathBuf>,
    /// What it is, for messages.
    pub description: String,
}

/// A kernel that the lab gets by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum OwnKernel {
    /// Debian's, of the series 6.12: VFIO by groups, no iommufd.
    Stock,
    /// Built here from Debian's sources of a newer one, with the configuration in
    /// `lab/kernel/iommufd.config`: groups, cdev and iommufd, BARs as dma-bufs.
    Iommufd,
}

impl OwnKernel {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Stock, Self::Iommufd];

    /// Its name, as users write it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Stock => "stock",
            Self::Iommufd => "iommufd",
        }
    }
}

impl std::str::FromStr for OwnKernel {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::ALL
            .into_iter()
            .find(|kernel| kernel.name() == text)
            .ok_or_else(|| format!("{text:?} is neither `stock` nor `iommufd`"))
    }
}

/// Which kernel the user wants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KernelChoice {
    /// One of the lab's own.
    Own(OwnKernel),
    /// An image with everything built in.
    Image(PathBuf),
}

impl std::str::FromStr for KernelChoice {
    type Err = std::convert::Infallible;

    /// Reads `stock`, `iommufd`, or anything else as a path.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(text
            .parse()
            .map_or_else(|_| Self::Image(text.into()), Self::Own))
    }
}

/// Why there is no kernel.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// Its package could not be had.
    #[error(transparent)]
    Package(#[from] PackageError),
    /// It could not be built, or unpacked.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// The user's is not there.
    #[error("no kernel image at {path}")]
    Image {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The source does not offer what the configuration asks for.
    #[error(
        "{package} does not take these lines of lab/kernel/iommufd.config:\n    {}",
        .lines.join("\n    ")
    )]
    Configuration {
        /// The source's package.
        package: Package,
        /// The lines, each with what there is instead.
        lines: Vec<String>,
    },
    /// A module is compressed in a way that is not understood.
    #[error("cannot decompress {path}: {reason}")]
    Compression {
        /// The module.
        path: PathBuf,
        /// Why.
        reason: String,
    },
}

impl From<crate::cache::CacheError> for KernelError {
    fn from(error: crate::cache::CacheError) -> Self {
        Self::Package(error.into())
    }
}

impl Kernel {
    /// The kernel the user wants, fetched or built if need be. One that is in the cache is used
    /// without asking the mirror.
    ///
    /// # Errors
    /// When the image is not there, its package cannot be had, or it cannot be built.
    pub fn obtain(choice: &KernelChoice, packages: &mut Packages<'_>) -> Result<Self, KernelError> {
        match choice {
            KernelChoice::Own(OwnKernel::Stock) => stock::obtain(packages),
            KernelChoice::Own(OwnKernel::Iommufd) => built::obtain(packages),
            KernelChoice::Image(path) => {
                let absent = |source| KernelError::Image {
                    path: path.clone(),
                    source,
                };
                fs::File::open(path).map_err(absent)?;
                Ok(Self {
                    image: std::path::absolute(path).map_err(absent)?,
                    elf: None,
                    modules: vec![],
                    description: path.display().to_string(),
                })
            }
        }
    }
}
