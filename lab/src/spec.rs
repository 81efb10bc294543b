//! What a nested machine is to be like, and how QEMU is told.

use std::ffi::OsString;
use std::path::Path;
use std::time::Duration;

use crate::initramfs::GuestFile;
use crate::run_directory::RunDirectory;

/// The shape of a nested machine: what is in it beside its chipset.
#[derive(Debug, Clone)]
pub struct Spec {
    /// QEMU `-object` values.
    pub objects: Vec<String>,
    /// QEMU `-device` values. Every PCI function but the chipset's and bridges is bound to vfio-pci.
    pub devices: Vec<String>,
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
}

impl Default for Spec {
    /// No devices, 2 GiB, two minutes.
    fn default() -> Self {
        Self {
            objects: vec![],
            devices: vec![],
            files: vec![],
            kernel_options: vec![],
            memory: "2G".to_owned(),
            boot_limit: Duration::from_secs(120),
            keep_logs: false,
        }
    }
}

impl Spec {
    /// QEMU's arguments for such a machine.
    pub(crate) fn arguments(&self, directory: &RunDirectory, image: &Path) -> Vec<OsString> {
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
            "tcg,thread=multi",
            "-machine",
            "q35,kernel-irqchip=split",
            "-cpu",
            "EPYC,+svm,+npt",
            "-smp",
            "2",
            "-m",
            &self.memory,
            "-device",
            "intel-iommu,intremap=on,device-iotlb=on",
            "-chardev",
            "stdio,id=channel,signal=off,mux=off",
            "-chardev",
            &format!("file,id=console,path={}", in_option(&directory.console())),
            "-serial",
            "chardev:console",
            "-serial",
            "chardev:channel",
            "-trace",
            "vtd_dmar_fault",
            "-append",
            &self.command_line(),
        ]
        .map(OsString::from)
        .into();
        for (option, path) in [
            ("-kernel", image.to_owned()),
            ("-initrd", directory.initramfs()),
            ("-D", directory.trace()),
        ] {
            arguments.extend([option.into(), path.into()]);
        }
        for (option, values) in [("-object", &self.objects), ("-device", &self.devices)] {
            for value in values {
                arguments.extend([option.into(), value.into()]);
            }
        }
        arguments
    }

    fn command_line(&self) -> String {
        let own = "console=ttyS0 panic=-1 intel_iommu=on quiet";
        let options = self.kernel_options.iter().map(String::as_str);
        std::iter::once(own)
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
    fn objects_come_before_the_devices_that_use_them_and_the_iommu_before_both() {
        let directory = RunDirectory::new().unwrap();
        let spec = Spec {
            objects: vec!["memory-backend-memfd,id=shm,size=4M".into()],
            devices: vec!["ivshmem-plain,memdev=shm".into()],
            ..Spec::default()
        };
        let arguments = spec.arguments(&directory, Path::new("/k"));
        let at = |start: &str| {
            arguments
                .iter()
                .position(|a| a.to_str().unwrap().starts_with(start))
                .unwrap()
        };
        assert!(at("intel-iommu") < at("memory-backend-memfd"));
        assert!(at("memory-backend-memfd") < at("ivshmem-plain"));
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
