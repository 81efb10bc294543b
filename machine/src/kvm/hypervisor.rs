//! What the host's KVM offers, asked for once.

use std::ffi::CString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use kvm_bindings::{CpuId, KVM_API_VERSION, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::{Cap, Kvm};

use super::Vm;
use super::vm::{KvmError, io_error};

/// What has to be there, with the name that KVM's documentation gives it.
const NEEDED: [(Cap, &str); 9] = [
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Pit2, "KVM_CAP_PIT2"),
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::SetIdentityMapAddr, "KVM_CAP_SET_IDENTITY_MAP_ADDR"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::IrqRouting, "KVM_CAP_IRQ_ROUTING"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
];

/// Why there is no KVM to be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HypervisorError {
    /// No such file.
    #[error(
        "{path} is not there: load the module (modprobe kvm_intel or kvm_amd), or turn on the \
         processor's virtualisation in the firmware's settings"
    )]
    Missing {
        /// Where it was looked for.
        path: PathBuf,
    },
    /// The file may not be opened.
    #[error("{path} may not be opened: become a member of its group (usually kvm), or root")]
    NotPermitted {
        /// Which.
        path: PathBuf,
    },
    /// It cannot be opened for another reason.
    #[error("{path} cannot be opened")]
    Open {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// What was opened is no KVM, or one of another age.
    #[error("{path} answers with version {found} of KVM's interface, not {KVM_API_VERSION}")]
    Version {
        /// Which.
        path: PathBuf,
        /// What it said.
        found: i32,
    },
    /// Something is missing that every KVM on x86-64 has had for long.
    #[error("the host's KVM lacks {0}: use a newer kernel, or another host")]
    Lacks(&'static str),
    /// KVM does not tell what processors can do.
    #[error(transparent)]
    Kvm(#[from] KvmError),
}

/// The host's KVM.
#[derive(Debug)]
pub struct Hypervisor {
    kvm: Kvm,
    cpuid: CpuId,
    address_bits: u8,
}

impl Hypervisor {
    /// Opens KVM and asks what it can do. `path` is `/dev/kvm`.
    ///
    /// # Errors
    /// See [`HypervisorError`].
    pub fn open(path: &Path) -> Result<Self, HypervisorError> {
        let open = |source: io::Error| {
            let path = path.to_owned();
            match source.kind() {
                io::ErrorKind::NotFound => HypervisorError::Missing { path },
                io::ErrorKind::PermissionDenied => HypervisorError::NotPermitted { path },
                _ => HypervisorError::Open { path, source },
            }
        };
        let name = CString::new(path.as_os_str().as_bytes())
            .map_err(|_| open(io::ErrorKind::InvalidInput.into()))?;
        let kvm = Kvm::new_with_path(name).map_err(|error| open(io_error(error)))?;
        let found = kvm.get_api_version();
        if found.cast_unsigned() != KVM_API_VERSION {
            let path = path.to_owned();
            return Err(HypervisorError::Version { path, found });
        }
        for (capability, name) in NEEDED {
            if !kvm.check_extension(capability) {
                return Err(HypervisorError::Lacks(name));
            }
        }
        let cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(|error| KvmError::new("asking what processors can do", error))?;
        let address_bits = super::cpuid::address_bits(&cpuid);
        Ok(Self {
            kvm,
            cpuid,
            address_bits,
        })
    }

    /// How wide a guest-physical address is, in bits.
    #[must_use]
    pub const fn address_bits(&self) -> u8 {
        self.address_bits
    }

    /// How many processors a machine can have.
    #[must_use]
    pub fn most_processors(&self) -> usize {
        self.kvm.get_max_vcpus()
    }

    /// Makes a machine: no processors, no memory; interrupt controllers and timer are there.
    ///
    /// # Errors
    /// Where KVM refuses.
    pub fn create(&self) -> Result<Vm, KvmError> {
        Vm::new(&self.kvm, self.cpuid.clone(), self.address_bits)
    }
}
