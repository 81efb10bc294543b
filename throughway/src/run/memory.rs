//! `--memory`: how much RAM, and of which pages.

use std::fmt;
use std::str::FromStr;

use anyhow::{Context, Result};
use host_memory::{HugePage, Ram};

/// Which pages RAM is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Pages {
    /// Ordinary ones.
    #[default]
    Ordinary,
    /// Ordinary ones that the kernel joins where it can.
    Transparent,
    /// Huge ones that were reserved.
    Huge(HugePage),
}

/// The guest's RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    /// In bytes.
    pub size: u64,
    pub pages: Pages,
}

impl Memory {
    /// Makes it.
    pub fn make(self) -> Result<Ram> {
        let name = c"throughway-ram";
        let ram = match self.pages {
            Pages::Ordinary => Ram::memfd(name, self.size),
            Pages::Transparent => Ram::memfd_transparent(name, self.size),
            Pages::Huge(page) => Ram::memfd_huge(name, self.size, page),
        };
        ram.context("making the guest's RAM failed")
    }
}

impl FromStr for Memory {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut size = None;
        let mut pages = Pages::default();
        for (number, part) in text.split(',').enumerate() {
            match part.split_once('=') {
                Some(("size", value)) => size = Some(bytes(value)?),
                Some(("hugepages", value)) => {
                    pages = match value {
                        "off" => Pages::Ordinary,
                        "transparent" => Pages::Transparent,
                        "2M" => Pages::Huge(HugePage::Size2M),
                        "1G" => Pages::Huge(HugePage::Size1G),
                        other => {
                            return Err(format!(
                                "{other:?} is none of the huge pages off, transparent, 2M and 1G"
                            ));
                        }
                    };
                }
                None if number == 0 => size = Some(bytes(part)?),
                _ => return Err(format!("{part:?} is neither size=SIZE nor hugepages=PAGES")),
            }
        }
        let size = size.ok_or("no size: size=4G, for example")?;
        let unit = match pages {
            Pages::Huge(HugePage::Size1G) => 1 << 30,
            _ => machine::layout::RAM_UNIT,
        };
        if size == 0 || !size.is_multiple_of(unit) {
            let unit = unit >> 20;
            return Err(format!(
                "{text:?}: the size has to be a multiple of {unit} MiB"
            ));
        }
        Ok(Self { size, pages })
    }
}

impl fmt::Display for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} MiB", self.size >> 20)?;
        match self.pages {
            Pages::Ordinary => Ok(()),
            Pages::Transparent => f.write_str(" of transparent huge pages"),
            Pages::Huge(page) => write!(f, " of {page} pages"),
        }
    }
}

/// A number of bytes with a suffix of K, M, G or T, in powers of 1024.
fn bytes(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.chars().last() {
        Some('K') => (text.trim_end_matches('K'), 10),
        Some('M') => (text.trim_end_matches('M'), 20),
        Some('G') => (text.trim_end_matches('G'), 30),
        Some('T') => (text.trim_end_matches('T'), 40),
        _ => {
            return Err(format!(
                "{text:?} is no size with its unit, such as 512M or 4G"
            ));
        }
    };
    let number: u64 = digits
        .parse()
        .map_err(|_| format!("{text:?} is no size with its unit, such as 512M or 4G"))?;
    number
        .checked_mul(1 << shift)
        .ok_or_else(|| format!("{text} is more than there can be"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units_and_pages_have_names() {
        let memory: Memory = "size=4G,hugepages=2M".parse().unwrap();
        assert_eq!(memory.size, 4 << 30);
        assert_eq!(memory.pages, Pages::Huge(HugePage::Size2M));
        assert_eq!(memory.to_string(), "4096 MiB of 2 MiB pages");
        let memory: Memory = "512M".parse().unwrap();
        assert_eq!((memory.size, memory.pages), (512 << 20, Pages::Ordinary));
        let memory: Memory = "hugepages=transparent,size=6M".parse().unwrap();
        assert_eq!(memory.pages, Pages::Transparent);
    }

    #[test]
    fn nonsense_is_refused_by_name() {
        for (text, said) in [
            ("", "unit"),
            ("4096", "unit"),
            ("size=G", "unit"),
            ("size=0M", "multiple of 2 MiB"),
            ("3M", "multiple of 2 MiB"),
            ("size=1026M,hugepages=1G", "multiple of 1024 MiB"),
            ("hugepages=2M", "no size"),
            ("1G,hugepages=3M", "off, transparent, 2M and 1G"),
            ("1G,colour=red", "neither size"),
            ("99999999999T", "more than"),
            ("-1G", "unit"),
        ] {
            let error = text.parse::<Memory>().unwrap_err();
            assert!(error.contains(said), "{text}: {error}");
        }
    }
}
