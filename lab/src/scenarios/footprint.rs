//! What a program leaves on a host, as the kernel tells it.

use std::fmt;

use crate::scenario::{Bench, ScenarioError};

/// The commands that print it. The kernel sums up its page counters when it is asked to.
pub const SCRIPT: &str = r#"
    cat /proc/sys/vm/stat_refresh
    awk '/^nr_foll_pin_acquired/ { a = $2 } /^nr_foll_pin_released/ { r = $2 }
         END { print "pinned pages:", a - r }' /proc/vmstat
    [ ! -e /proc/modules ] || awk '$1 ~ /^vfio/ { print "users of " $1 ":", $3 }' /proc/modules
    echo "open files of VFIO: $(ls -l /proc/[0-9]*/fd 2>/dev/null | grep -cE 'vfio|/dev/iommu')"
    for device in /sys/bus/pci/devices/*; do
        echo "$device: $(readlink $device/driver), override $(cat $device/driver_override)"
        hexdump -C -n 64 $device/config
    done
"#;

/// Pinned pages, uses of VFIO's modules, open files, and each function's driver and configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Footprint(String);

impl Footprint {
    /// As it is now.
    pub fn take(bench: &mut Bench) -> Result<Self, ScenarioError> {
        Ok(Self(bench.shell(SCRIPT)?))
    }

    /// That it is the same now.
    pub fn ensure_same(&self, bench: &mut Bench) -> Result<(), ScenarioError> {
        let now = Self::take(bench)?;
        if now == *self {
            return Ok(());
        }
        Err(ScenarioError::unexpected(format!(
            "something is left.\nbefore:\n{self}\nafter:\n{now}"
        )))
    }

    /// The same but for what it says of a function, which is another one by now.
    pub fn without(&self, function: &str) -> Self {
        let mut left_out = false;
        let mut lines = Vec::new();
        for line in self.0.lines() {
            if let Some(device) = line.strip_prefix("/sys/bus/pci/devices/") {
                left_out = device.starts_with(function);
            }
            if !left_out {
                lines.push(line);
            }
        }
        Self(lines.join("\n"))
    }

    /// What a script printed that ran [`SCRIPT`].
    pub fn printed(text: &str) -> Self {
        Self(text.to_owned())
    }

    /// How many pages are pinned, for whatever purpose.
    pub fn pinned_pages(&self) -> Option<u64> {
        let line = |line: &str| line.strip_prefix("pinned pages: ")?.parse().ok();
        self.0.lines().find_map(line)
    }
}

impl fmt::Display for Footprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.trim_end())
    }
}

/// How many pages were pinned since the machine was booted, those that were let go among them.
pub fn pages_ever_pinned(bench: &mut Bench) -> Result<u64, ScenarioError> {
    let script = "cat /proc/sys/vm/stat_refresh
                  awk '/^nr_foll_pin_acquired/ { print $2 }' /proc/vmstat";
    let text = bench.shell(script)?;
    let number = text.trim().parse();
    number.map_err(|_| ScenarioError::unexpected(format!("no number: {text}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_function_is_left_out_with_all_that_is_said_of_it() {
        let [before, of_it, after] = [
            "pinned pages: 0\n/sys/bus/pci/devices/0000:00:05.0: x\n00000000 34\n",
            "/sys/bus/pci/devices/0000:01:00.0: y\n00000000 f4\n00000040\n",
            "/sys/bus/pci/devices/0000:02:00.0: z\n00000000 86",
        ];
        let all = Footprint(format!("{before}{of_it}{after}"));
        let rest = Footprint(format!("{before}{after}"));
        assert_eq!(all.without("0000:01:00.0"), rest);
        assert_eq!(rest.without("0000:01:00.0"), rest);
    }
}
