//! What the kernel tells of a process that runs a virtual machine.

use std::fs;
use std::io;

use serde_json::{Map, Value, json};

/// Mappings at least so large are the guest's RAM: no other that has pages is.
const RAM_KIB: u64 = 128 << 10;
const KVM: &str = "/sys/kernel/debug/kvm";

/// Its resident memory by `/proc/PID/smaps`, in KiB: the guest's RAM, and of the rest what it has
/// written itself and what it shares with files.
pub fn memory(pid: u32) -> io::Result<Value> {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    Ok(json!({
        "smaps": resident(&smaps),
        "VmRSS": number(&status, "VmRSS:"),
        "RssAnon": number(&status, "RssAnon:"),
        "RssFile": number(&status, "RssFile:"),
        "RssShmem": number(&status, "RssShmem:"),
    }))
}

/// How many threads it has, those of the kernel's that count as its own among them.
pub fn threads(pid: u32) -> io::Result<Value> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    Ok(json!(number(&status, "Threads:")))
}

/// KVM's counters of its virtual machine; nothing where debugfs is not mounted.
pub fn kvm_counters(pid: u32) -> io::Result<Value> {
    let Ok(machines) = fs::read_dir(KVM) else {
        return Ok(Value::Null);
    };
    let prefix = format!("{pid}-");
    let mut counters = Map::new();
    for machine in machines {
        let machine = machine?;
        if !machine.file_name().to_string_lossy().starts_with(&prefix) {
            continue;
        }
        for file in fs::read_dir(machine.path())? {
            let file = file?;
            let text = fs::read_to_string(file.path()).unwrap_or_default();
            if let Ok(count) = text.trim().parse::<u64>() {
                counters.insert(file.file_name().to_string_lossy().into(), count.into());
            }
        }
    }
    Ok(counters.into())
}

/// The number behind a name at a line's start.
fn number(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse().ok()
}

/// Sums up a `smaps`.
fn resident(smaps: &str) -> Value {
    let (mut size, mut rss) = (0, 0);
    let (mut ram, mut written, mut shared) = (0, 0, 0);
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let (name, number) = (words.next().unwrap_or_default(), words.next());
        let number = number.and_then(|number| number.parse().ok()).unwrap_or(0);
        // In the kernel's order.
        match name {
            "Size:" => size = number,
            "Rss:" => rss = number,
            "Anonymous:" if size >= RAM_KIB => ram += rss,
            "Anonymous:" => {
                written += number;
                shared += rss.saturating_sub(number);
            }
            _ => {}
        }
    }
    json!({ "RAM": ram, "its own": written, "of files": shared })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_is_told_from_the_rest() {
        let smaps = "\
7f0000000000-7f0020000000 rw-s 00000000 00:01 1030 /memfd:ram (deleted)
Size:             524288 kB
Rss:              131072 kB
Anonymous:             0 kB
555500000000-555500100000 r-xp 00000000 00:02 7 /lab/bin/throughway
Size:               1024 kB
Rss:                 800 kB
Anonymous:             8 kB
";
        let told = resident(smaps);
        assert_eq!(
            told,
            json!({ "RAM": 131_072, "its own": 8, "of files": 792 })
        );
    }

    #[test]
    fn numbers_are_found_by_their_names() {
        let status = "VmRSS:\t  1234 kB\nThreads:\t7\n";
        assert_eq!(number(status, "VmRSS:"), Some(1234));
        assert_eq!(number(status, "Threads:"), Some(7));
        assert_eq!(number(status, "RssAnon:"), None);
    }
}
