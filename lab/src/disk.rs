//! Disks for the nested machine, with contents that tell where they are from.
//!
//! Every eight bytes of a new disk hold, little-endian, [`word_at`] their own offset: whoever reads
//! a block can tell which one it is, and that it is not somebody else's zeros. A disk is a file of
//! the run and ends with it.

use std::borrow::Cow;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

/// A disk of the nested machine: what QEMU's `-device nvme,drive=ID` wants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// The drive's identifier for QEMU, of letters, digits, `-` and `_`.
    pub id: Cow<'static, str>,
    /// Its size in MiB.
    pub mib: u16,
}

/// Why a text describes no disk.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is no disk: wanted is ID=MIB, such as disk0=16, with MIB from 1 to 65535")]
pub struct DiskError(String);

impl std::str::FromStr for Disk {
    type Err = DiskError;

    /// Reads `ID=MIB`.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let of_ids = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_');
        text.split_once('=')
            .and_then(|(id, mib)| {
                let mib = mib.parse().ok().filter(|&mib| mib > 0)?;
                let sound = id.starts_with(|c: char| c.is_ascii_alphabetic());
                (sound && id.chars().all(of_ids)).then(|| Self {
                    id: Cow::Owned(id.to_owned()),
                    mib,
                })
            })
            .ok_or_else(|| DiskError(text.to_owned()))
    }
}

/// What the eight bytes at an offset of a new disk hold, little-endian. The offset is in bytes and
/// a multiple of eight.
#[must_use]
pub fn word_at(offset: u64) -> u64 {
    // Neither all zeros nor all ones, wherever it is; the offset is in the low bits.
    offset ^ 0x7477_0000_0000_0000
}

impl Disk {
    /// Writes the disk's first contents.
    pub(crate) fn write(&self, path: &Path) -> io::Result<()> {
        let mut file = BufWriter::new(File::create(path)?);
        let mut block = Vec::with_capacity(1 << 20);
        for mib in 0..u64::from(self.mib) {
            block.clear();
            for word in 0..(1_u64 << 17) {
                block.extend(word_at((mib << 20) | (word << 3)).to_le_bytes());
            }
            file.write_all(&block)?;
        }
        file.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_are_read_from_text() {
        let disk: Disk = "disk0=16".parse().unwrap();
        assert_eq!((disk.id.as_ref(), disk.mib), ("disk0", 16));
        for text in [
            "disk0", "=16", "d=", "d=0", "d=65536", "d,x=1", "0d=1", "d=-1",
        ] {
            let error = text.parse::<Disk>().unwrap_err().to_string();
            assert!(error.contains(text), "{error}");
        }
    }

    #[test]
    fn every_word_tells_its_offset() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        let disk: Disk = "d=2".parse().unwrap();
        disk.write(&path).unwrap();
        let content = std::fs::read(&path).unwrap();
        assert_eq!(content.len(), 2 << 20);
        for (word, offset) in content.chunks_exact(8).zip((0_u64..).step_by(8)) {
            assert_eq!(word, word_at(offset).to_le_bytes(), "at {offset:#x}");
        }
    }
}
