//! What a nested machine is to be like, and how QEMU is told.

use std::ffi::OsString;
use std::path::Path;
use std::time::Duration;

use crate::disk::Disk;
use crate::initramfs::GuestFile;
use crate::run_directory::RunDirectory;

/// The IOMMU of a nested machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Iommu {
    /// Intel's, with interrupt remapping. Its faults are in QEMU's trace.
    #[default]
    Intel,
    /// Intel's with addresses of 39 bits, as old and small processors have it: nothing above
    /// 512 GiB can be mapped.
    Intel39Bit,
    /// AMD's, with its reserved hole below 1 TiB, and without interrupt remapping: VFIO wants
    /// `allow_unsafe_interrupts`. For what can be mapped where, not for DMA: QEMU 10.0 does not
    /// translate what devices do as this one should. Its faults are in no trace.
    Amd,
}

impl Iommu {
    /// QEMU's device.
    fn device(self) -> &'static str {
        match self {
            Self::Intel => "intel-iommu,intremap=on,device-iotlb=on",
            Self::Intel39Bit => "intel-iommu,intremap=on,device-iotlb=on,aw-bits=39",
            Self::Amd => "amd-iommu,intremap=off",
        }
    }

    /// What the kernel must be told to run behind it.
    fn kernel_options(self) -> &'static str {
        match self {
            Self::Intel | Self::Intel39Bit => "intel_iommu=on",
            // QEMU loses the interrupts of the I/O APIC behind this IOMMU, the serial ports' among
            // them. Those of the older controller arrive.
            Self::Amd => "noapic",
        }
    }
}

impl std::str::FromStr for Iommu {
    type Err = String;

    /// Reads `intel`, `intel-39-bit` or `amd`.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "intel" => Ok(Self::Intel),
            "intel-39-bit" => Ok(Self::Intel39Bit),
            "amd" => Ok(Self::Amd),
            other => Err(format!("{other:?} is none of intel, intel-39-bit and amd")),
        }
    }
}

/// The shape of a nested machine: what is in it beside its chipset.
#[derive(Debug, Clone)]
pub struct Spec {
    /// Its IOMMU.
    pub iommu: Iommu,
    /// Disks, for devices that name them as their `drive`.
    pub disks: Vec<Disk>,
    /// QEMU `-object` values.
    pub objects: Vec<String>,
    /// QEMU `-device` values. Every PCI function but the chipset's, bridges and IOMMUs is bound to vfio-pci.
    pub devices: Vec<String>,
    /// Whether it is to hold what a guest boots from, see [`GUEST_KERNEL`](crate::initramfs::GUEST_KERNEL).
    pub guest: bool,
    /// Files for the nested machine.
    pub files: Vec<GuestFile>,
    /// Options for its kernel's command line, behind the lab's own.
    pub kernel_options: Vec<String>,
    /// Its memory, in QEMU's notation.
    pub memory: String,
    /// How long it may take until it runs commands.
    pub boot_limit: Duration,
    /// Whether the logs stay when all went well, too.
    pub keep_logs: bool,
    /// Whether its clock counts its processor's instructions, each as a nanosecond, instead of
    /// time. What its programs take for times are then numbers of instructions, the same ones
    /// however busy this machine is; what its devices do takes no time.
    pub counts_instructions: bool,
}

impl Default for Spec {
    /// Intel's IOMMU, no devices, 2 GiB, two minutes.
    fn default() -> Self {
        Self {
            iommu: Iommu::default(),
            disks: vec![],
            objects: vec![],
            devices: vec![],
            guest: false,
            files: vec![],
            kernel_options: vec![],
            memory: "2G".to_owned(),
            boot_limit: Duration::from_secs(120),
            keep_logs: false,
            counts_instructions: false,
        }
    }
}

impl Spec {
    /// QEMU's arguments for such a machine.
    pub(crate) fn arguments(&self, directory: &RunDirectory, image: &Path) -> Vec<OsString> {
        // All processors on one thread: with a thread for each, QEMU 10.0 now and then aborts
        // (`iotlb_to_section`) when a BAR moves under load. It boots as fast.
        // What a guest takes is told in instructions of the only processor.
        let alone = self.guest && self.counts_instructions;
        let processors = if alone { "1" } else { "2" };
        let mut arguments: Vec<OsString> = [
            "-nodefaults",
            "-no-user-config",
            "-no-reboot",
            "-display",
            "none",
            "-vga",
            "none",
            "-net",
            "none",
            "-accel",
            "tcg,thread=single",
            "-machine",
            "q35,kernel-irqchip=split",
            "-cpu",
            "EPYC,+svm,+npt",
            "-smp",
            processors,
            "-m",
            &self.memory,
            "-device",
            self.iommu.device(),
            "-chardev",
            "stdio,id=channel,signal=off,mux=off",
            "-chardev",
            &format!("file,id=console,path={}", in_option(&directory.console())),
            "-serial",
            "chardev:console",
            "-serial",
            "chardev:channel",
            "-chardev",
            &format!(
                "socket,id=monitor,server=on,wait=off,path={}",
                in_option(&directory.monitor())
            ),
            "-mon",
            "chardev=monitor,mode=control",
            "-trace",
            "vtd_dmar_fault",
            "-append",
            &self.command_line(),
        ]
        .map(OsString::from)
        .into();
        if self.counts_instructions {
            arguments.extend(["-icount", "shift=0,sleep=off"].map(OsString::from));
        }
        for (option, path) in [
            ("-kernel", image.to_owned()),
            ("-initrd", directory.initramfs()),
            ("-D", directory.trace()),
        ] {
            arguments.extend([option.into(), path.into()]);
        }
        for disk in &self.disks {
            let path = in_option(&directory.disk(&disk.id));
            let drive = format!("file={path},format=raw,if=none,id={}", disk.id);
            arguments.extend(["-drive".into(), drive.into()]);
        }
        for (option, values) in [("-object", &self.objects), ("-device", &self.devices)] {
            for value in values {
                arguments.extend([option.into(), value.into()]);
            }
        }
        arguments
    }

    fn command_line(&self) -> String {
        // Whether the timer interrupts in time depends on how busy this machine is: the kernel must
        // not conclude from it that it never does.
        let own = "console=ttyS0 panic=-1 no_timer_check quiet";
        let options = self.kernel_options.iter().map(String::as_str);
        [own, self.iommu.kernel_options()]
            .into_iter()
            .chain(options)
            .collect::<Vec<_>>()
            .join(" ")
    }
}

/// A path as a part of a QEMU option, where a comma separates unless it is doubled.
fn in_option(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_devices_use_comes_before_them_and_the_iommu_before_all() {
        let directory = RunDirectory::new().unwrap();
        let spec = Spec {
            objects: vec!["memory-backend-memfd,id=shm,size=4M".into()],
            disks: vec!["disk0=1".parse().unwrap()],
            devices: vec!["ivshmem-plain,memdev=shm".into()],
            iommu: Iommu::Intel39Bit,
            ..Spec::default()
        };
        let arguments = spec.arguments(&directory, Path::new("/k"));
        let at = |start: &str| {
            arguments
                .iter()
                .position(|a| a.to_str().unwrap().contains(start))
                .unwrap()
        };
        assert!(at("intel-iommu") < at("memory-backend-memfd"));
        assert!(at("memory-backend-memfd") < at("ivshmem-plain"));
        assert!(at("id=disk0") < at("ivshmem-plain"));
        assert!(at("aw-bits=39") == at("intel-iommu"));
    }

    #[test]
    fn instructions_are_counted_only_if_wanted() {
        let directory = RunDirectory::new().unwrap();
        for counts_instructions in [false, true] {
            let spec = Spec {
                counts_instructions,
                ..Spec::default()
            };
            let arguments = spec.arguments(&directory, Path::new("/k"));
            assert_eq!(
                arguments.iter().any(|a| a == "-icount"),
                counts_instructions
            );
        }
    }

    #[test]
    fn the_kernels_options_come_last_so_that_they_win() {
        let spec = Spec {
            kernel_options: vec!["intel_iommu=off".into(), "quiet".into()],
            ..Spec::default()
        };
        let line = spec.command_line();
        assert!(line.ends_with(" intel_iommu=off quiet"), "{line}");
        assert!(!Spec::default().command_line().ends_with(' '));
    }

    #[test]
    fn commas_in_paths_are_doubled() {
        assert_eq!(in_option(Path::new("/tmp/a,b")), "/tmp/a,,b");
    }
}
