//! Huge pages: their sizes, and how to get some.

use std::fmt;

/// A size of huge page (`MFD_HUGE_*`, `linux/memfd.h`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum HugePage {
    /// 2 MiB.
    Size2M,
    /// 1 GiB. On x86 these are best reserved on the kernel command line.
    Size1G,
}

impl HugePage {
    /// The page's size in bytes.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        match self {
            Self::Size2M => 2 << 20,
            Self::Size1G => 1 << 30,
        }
    }

    /// The flags that ask `memfd_create` for it.
    pub(crate) const fn memfd_flags(self) -> libc::c_uint {
        libc::MFD_HUGETLB
            | match self {
                Self::Size2M => libc::MFD_HUGE_2MB,
                Self::Size1G => libc::MFD_HUGE_1GB,
            }
    }

    /// What an administrator does to have `pages` more of them.
    pub(crate) fn how_to_reserve(self, pages: u64) -> String {
        let kib = self.bytes() >> 10;
        let pool = format!("/sys/kernel/mm/hugepages/hugepages-{kib}kB");
        let live = format!(
            "see {pool}/free_hugepages, and reserve {pages} more as root with: \
             echo $(($(cat {pool}/nr_hugepages) + {pages})) > {pool}/nr_hugepages"
        );
        match self {
            Self::Size2M => live,
            Self::Size1G => format!(
                "{live}; or boot with hugepagesz=1G hugepages={pages}, before memory is fragmented"
            ),
        }
    }
}

impl fmt::Display for HugePage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Size2M => "2 MiB",
            Self::Size1G => "1 GiB",
        })
    }
}
