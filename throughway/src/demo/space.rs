//! The demonstration's IOMMU address spaces: containers, or IOASes of one iommufd.

use std::sync::Arc;

use anyhow::Result;
use clap::ValueEnum;
use iommu::{IoAddressSpace, IoasTarget, RamCopies, Type1Target};
use memory_map::{DmaTarget, IovaRange};
use serde::Serialize;
use sim_host::{SimContainer, SimFunction, SimHost, SimIoas};

/// How the IOMMU is programmed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Containers, as of VFIO type1
    Type1,
    /// Address spaces of one iommufd
    Iommufd,
}

impl Kind {
    /// What an address space is called.
    pub const fn noun(self) -> &'static str {
        match self {
            Self::Type1 => "container",
            Self::Iommufd => "IOAS",
        }
    }

    /// What several are called.
    pub const fn plural(self) -> &'static str {
        match self {
            Self::Type1 => "containers",
            Self::Iommufd => "IOASes",
        }
    }
}

/// One address space.
pub struct Space {
    name: String,
    /// As the simulated host names it in its records.
    label: String,
    behind: Behind,
}

enum Behind {
    Container(Arc<SimContainer>),
    Ioas(Arc<SimIoas>),
}

/// A mapping that a simulated IOMMU really holds.
pub struct Held {
    pub iova: IovaRange,
    /// Of what: `ram0`, or a function's name and BAR.
    pub object: Arc<str>,
    /// Whether it leads somewhere: the kernel has not revoked what is behind it.
    pub alive: bool,
}

/// All of them. Those of an iommufd copy each other's RAM.
pub struct Spaces {
    spaces: Vec<Space>,
    copies: RamCopies,
}

impl Spaces {
    /// One for each of these sets of functions, which join it.
    pub fn new(kind: Kind, host: &SimHost, sets: [&[&SimFunction]; 2]) -> Result<Self> {
        let iommufd = host.open_iommufd();
        let mut spaces = Vec::new();
        for (number, functions) in sets.into_iter().enumerate() {
            let (label, behind) = match kind {
                Kind::Type1 => {
                    let container = host.container(functions)?;
                    let label = container.id().to_string();
                    (label, Behind::Container(Arc::new(container)))
                }
                Kind::Iommufd => {
                    let ioas = iommufd.ioas();
                    for function in functions {
                        ioas.attach(function)?;
                    }
                    ioas.allow(&ioas.ranges()?.allowed)?;
                    (ioas.to_string(), Behind::Ioas(Arc::new(ioas)))
                }
            };
            spaces.push(Space {
                name: format!("{} {number}", kind.noun()),
                label,
                behind,
            });
        }
        Ok(Self {
            spaces,
            copies: RamCopies::new(),
        })
    }

    /// The one of that number.
    pub fn get(&self, number: usize) -> Option<&Space> {
        self.spaces.get(number)
    }

    /// Its target, to be registered.
    #[expect(
        unsafe_code,
        reason = "simulated address spaces take any number for an address"
    )]
    pub fn target(&self, space: &Space) -> Box<dyn DmaTarget> {
        match &space.behind {
            Behind::Container(container) => {
                // SAFETY: the container is simulated: host addresses are looked up in a table and
                // never followed, so no backing can give a wrong one.
                let target = unsafe { Type1Target::new(container.clone()) };
                Box::new(target)
            }
            Behind::Ioas(ioas) => {
                // SAFETY: the address space is simulated, as above, and writes to no file.
                let target = unsafe { IoasTarget::new(ioas.clone(), self.copies.clone()) };
                Box::new(target)
            }
        }
    }
}

impl Space {
    /// For people: `container 0`, `IOAS 0`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// As the simulated host names it.
    pub fn label(&self) -> &str {
        &self.label
    }

    /// What its IOMMU really holds.
    pub fn held(&self) -> Vec<Held> {
        match &self.behind {
            Behind::Container(container) => {
                let mappings = container.mappings().into_iter();
                let held = mappings.map(|mapping| Held {
                    iova: mapping.iova,
                    object: mapping.object,
                    alive: true,
                });
                held.collect()
            }
            Behind::Ioas(ioas) => {
                let mappings = ioas.mappings().into_iter();
                let held = mappings.map(|mapping| Held {
                    iova: mapping.iova,
                    object: mapping.object,
                    alive: !mapping.dead,
                });
                held.collect()
            }
        }
    }
}
