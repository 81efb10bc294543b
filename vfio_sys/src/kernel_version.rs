//! Which kernel this is, for the messages that say which one is needed.

use std::fmt;
use std::fs;

/// The version of a Linux kernel, as far as features depend on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KernelVersion {
    /// 7, of 7.3.4.
    pub major: u32,
    /// 3, of 7.3.4.
    pub minor: u32,
}

impl KernelVersion {
    /// The version of that number.
    #[must_use]
    pub const fn new(major: u32, minor: u32) -> Self {
        Self { major, minor }
    }

    /// The running kernel's; `None` where it cannot be told, as without `/proc`.
    #[must_use]
    pub fn running() -> Option<Self> {
        Self::parse(&fs::read_to_string("/proc/sys/kernel/osrelease").ok()?)
    }

    /// Of a release such as `7.3.4-amd64` or `6.19-rc1`.
    fn parse(release: &str) -> Option<Self> {
        let mut numbers = release.split(|c: char| !c.is_ascii_digit());
        Some(Self {
            major: numbers.next()?.parse().ok()?,
            minor: numbers.next()?.parse().ok()?,
        })
    }
}

impl fmt::Display for KernelVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// Why a feature is not there: the kernel is too old for it, or built without it.
pub(crate) fn missing(
    feature: &str,
    found: Option<KernelVersion>,
    needed: KernelVersion,
    option: &str,
) -> String {
    match found {
        Some(found) if found < needed => {
            format!("the kernel is too old for {feature}: it is Linux {found}, needed is {needed}")
        }
        Some(found) => format!(
            "the kernel has no {feature}, which Linux {needed} has and this one ({found}) should: \
             it was built without {option}"
        ),
        None => format!("the kernel has no {feature}: needed is Linux {needed} with {option}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_as_they_come() {
        for (release, version) in [
            ("7.3.4\n", Some((7, 3))),
            ("6.19-rc1", Some((6, 19))),
            ("6.12.117-amd64", Some((6, 12))),
            ("7", None),
            ("", None),
            ("next-2026", None),
        ] {
            let found = KernelVersion::parse(release);
            assert_eq!(found.map(|it| (it.major, it.minor)), version, "{release}");
        }
        assert!(KernelVersion::running().is_some());
        assert!(KernelVersion::new(6, 9) < KernelVersion::new(6, 13));
    }

    #[test]
    fn a_missing_feature_names_what_was_found_and_what_is_needed() {
        let needed = KernelVersion::new(6, 13);
        let old = missing("X", Some(KernelVersion::new(6, 12)), needed, "CONFIG_X");
        assert!(old.contains("6.12") && old.contains("6.13"), "{old}");
        assert!(!old.contains("CONFIG_X"), "{old}");
        let without = missing("X", Some(KernelVersion::new(7, 3)), needed, "CONFIG_X");
        assert!(without.contains("CONFIG_X"), "{without}");
    }
}
