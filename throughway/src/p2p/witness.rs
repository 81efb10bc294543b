//! Who saw a blocked access, besides the one who compares the data.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

use anyhow::Result;
use memory_map::Gpa;

/// How long the kernel may take to print a fault.
const PATIENCE: Duration = Duration::from_millis(500);
const INTERVAL: Duration = Duration::from_millis(10);
/// What marks the lines of the kernel's IOMMU drivers.
const DRIVERS: [&str; 3] = ["DMAR:", "AMD-Vi:", "arm-smmu"];
const O_NONBLOCK: i32 = 0o4000;

/// Begins to look for evidence. Called before an access is tried.
pub type Source<'s> = dyn FnMut() -> Result<Box<dyn Evidence>> + 's;

/// What is seen of one access.
pub trait Evidence {
    /// In words, after the access: what is known of a fault of `function` at `at`.
    fn describe(&mut self, function: &str, at: Gpa) -> String;
}

/// Looks into the kernel's log, from now on.
pub fn kernel_log() -> Result<Box<dyn Evidence>> {
    // Not being allowed to read it is no error: the data are still compared.
    let open = || -> std::io::Result<File> {
        let mut options = OpenOptions::new();
        let mut log = options
            .read(true)
            .custom_flags(O_NONBLOCK)
            .open("/dev/kmsg")?;
        log.seek(SeekFrom::End(0))?;
        Ok(log)
    };
    Ok(Box::new(KernelLog(open().ok())))
}

struct KernelLog(Option<File>);

impl Evidence for KernelLog {
    fn describe(&mut self, function: &str, at: Gpa) -> String {
        let data = "by comparing the data; the kernel's log";
        let Some(log) = &mut self.0 else {
            return format!("{data} cannot be read");
        };
        let deadline = Instant::now() + PATIENCE;
        // One record is read at a time, and is at most this long.
        let mut record = vec![0; 8192];
        while Instant::now() < deadline {
            match log.read(&mut record) {
                Ok(len) => {
                    let text = record.get(..len).unwrap_or_default();
                    if let Some(line) = fault_line(&String::from_utf8_lossy(text), function, at) {
                        return line;
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    std::thread::sleep(INTERVAL);
                }
                // Records were overwritten before they were read: the next read goes on.
                Err(error) if error.kind() == ErrorKind::BrokenPipe => {}
                Err(_) => break,
            }
        }
        format!("{data} names no fault (it limits how many it prints)")
    }
}

/// The message of a record of the kernel's log (`Documentation/ABI/testing/dev-kmsg`), if it is
/// about a fault of `function` in the page of `at`.
fn fault_line(record: &str, function: &str, at: Gpa) -> Option<String> {
    let message = record.lines().next()?.split_once(';')?.1;
    // The drivers leave out the domain, or print it.
    let short = function.split_once(':').map_or(function, |(_, rest)| rest);
    let page = at.raw() & !0xfff;
    let names_page = message
        .split(|c: char| !c.is_ascii_alphanumeric())
        .any(|word| {
            let digits = word.strip_prefix("0x").unwrap_or(word);
            u64::from_str_radix(digits, 16).is_ok_and(|address| address & !0xfff == page)
        });
    let driver = DRIVERS.iter().any(|driver| message.contains(driver));
    (driver && message.contains(short) && names_page).then(|| message.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const RECORD: &str = "3,1234,5678901,-;DMAR: [DMA Write NO_PASID] Request device [00:05.0] \
                          fault addr 0x4002000 [fault reason 0x05] PTE Write access is not set\n \
                          SUBSYSTEM=pci\n";

    #[test]
    fn a_fault_is_recognised_by_device_and_page() {
        let line = fault_line(RECORD, "0000:00:05.0", Gpa::new(0x400_2abc)).unwrap();
        assert!(line.starts_with("DMAR: [DMA Write"));
        assert!(line.ends_with("not set"));
        assert_eq!(
            fault_line(RECORD, "0000:00:06.0", Gpa::new(0x400_2000)),
            None
        );
        assert_eq!(
            fault_line(RECORD, "0000:00:05.0", Gpa::new(0x400_3000)),
            None
        );
        let amd = "3,1,2,-;vfio-pci 0000:01:00.0: AMD-Vi: Event logged [IO_PAGE_FAULT \
                   domain=0x0012 address=0xe0001000 flags=0x0020]";
        assert!(fault_line(amd, "0000:01:00.0", Gpa::new(0xe000_1000)).is_some());
        assert_eq!(fault_line("nonsense", "0000:01:00.0", Gpa::new(0)), None);
    }
}
