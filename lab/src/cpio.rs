//! The archive format of an initramfs: cpio, "newc" variant.
//!
//! Only what the kernel's unpacker needs: folders, files, symbolic links and character devices,
//! all owned by root. See `Documentation/driver-api/early-userspace/buffer-format.rst`.

use std::io::{self, Write};

const FOLDER: u32 = 0o040_000;
const FILE: u32 = 0o100_000;
const LINK: u32 = 0o120_000;
const CHARACTER_DEVICE: u32 = 0o020_000;

/// Writes an archive, entry by entry. [`Archive::finish`] completes it.
#[derive(Debug)]
pub struct Archive<W> {
    out: W,
    entries: u32,
}

impl<W: Write> Archive<W> {
    /// An empty archive.
    pub fn new(out: W) -> Self {
        Self { out, entries: 0 }
    }

    /// Adds a folder. Folders come before what is in them.
    ///
    /// # Errors
    /// The writer's.
    pub fn folder(&mut self, path: &str, permissions: u32) -> io::Result<()> {
        self.entry(path, FOLDER | permissions, (0, 0), &[])
    }

    /// Adds a file.
    ///
    /// # Errors
    /// The writer's, and [`io::ErrorKind::FileTooLarge`] from 4 GiB on.
    pub fn file(&mut self, path: &str, permissions: u32, content: &[u8]) -> io::Result<()> {
        self.entry(path, FILE | permissions, (0, 0), content)
    }

    /// Adds a symbolic link.
    ///
    /// # Errors
    /// The writer's.
    pub fn link(&mut self, path: &str, target: &str) -> io::Result<()> {
        self.entry(path, LINK | 0o777, (0, 0), target.as_bytes())
    }

    /// Adds a character device.
    ///
    /// # Errors
    /// The writer's.
    pub fn character_device(
        &mut self,
        path: &str,
        permissions: u32,
        major: u32,
        minor: u32,
    ) -> io::Result<()> {
        self.entry(path, CHARACTER_DEVICE | permissions, (major, minor), &[])
    }

    /// Ends the archive and gives the writer back.
    ///
    /// # Errors
    /// The writer's.
    pub fn finish(mut self) -> io::Result<W> {
        self.entry("TRAILER!!!", 0, (0, 0), &[])?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn entry(
        &mut self,
        path: &str,
        mode: u32,
        (major, minor): (u32, u32),
        content: &[u8],
    ) -> io::Result<()> {
        let too_large = || io::Error::from(io::ErrorKind::FileTooLarge);
        let path = path.trim_start_matches('/');
        let size = u32::try_from(content.len()).map_err(|_| too_large())?;
        // The name is counted with the NUL that ends it.
        let name_size = u32::try_from(path.len())
            .ok()
            .and_then(|n| n.checked_add(1))
            .ok_or_else(too_large)?;
        self.entries = self.entries.saturating_add(1);
        let fields = [
            self.entries, // inode
            mode,
            0, // uid
            0, // gid
            1, // links
            0, // modification time: none, so that equal contents give equal archives
            size,
            0, // device, major and minor
            0,
            major,
            minor,
            name_size,
            0, // checksum, unused in this variant
        ];
        let mut head = b"070701".to_vec();
        for field in fields {
            write!(head, "{field:08x}")?;
        }
        head.extend(path.as_bytes());
        head.push(0);
        self.padded(&head)?;
        self.padded(content)
    }

    /// Header with name, and content, are each padded to four bytes.
    fn padded(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.out.write_all(bytes)?;
        let padding = bytes.len().next_multiple_of(4).saturating_sub(bytes.len());
        self.out.write_all(&[0; 4][..padding])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Path, mode, device, content.
    type ReadBack = (String, u32, (u32, u32), Vec<u8>);

    fn read(mut bytes: &[u8]) -> Vec<ReadBack> {
        let mut entries = Vec::new();
        loop {
            assert_eq!(&bytes[..6], b"070701");
            let field = |i: usize| {
                let text = std::str::from_utf8(&bytes[6 + 8 * i..14 + 8 * i]).unwrap();
                u32::from_str_radix(text, 16).unwrap()
            };
            let (size, name_size) = (field(6) as usize, field(11) as usize);
            let name = &bytes[110..110 + name_size];
            assert_eq!(name.last(), Some(&0));
            let start = (110 + name_size).next_multiple_of(4);
            let name = String::from_utf8(name[..name_size - 1].to_vec()).unwrap();
            if name == "TRAILER!!!" {
                assert_eq!(start, bytes.len());
                return entries;
            }
            let content = bytes[start..start + size].to_vec();
            entries.push((name, field(1), (field(9), field(10)), content));
            bytes = &bytes[(start + size).next_multiple_of(4)..];
        }
    }

    #[test]
    fn entries_are_read_back_as_written() {
        let mut archive = Archive::new(Vec::new());
        archive.folder("/dev", 0o755).unwrap();
        archive
            .character_device("dev/console", 0o600, 5, 1)
            .unwrap();
        for length in 0..9 {
            archive
                .file(&"f".repeat(length + 1), 0o755, &vec![b'x'; length])
                .unwrap();
        }
        archive.link("sh", "busybox").unwrap();
        let entries = read(&archive.finish().unwrap());
        assert_eq!(entries.len(), 12);
        assert_eq!(entries[0], ("dev".into(), 0o040_755, (0, 0), vec![]));
        assert_eq!(
            entries[1],
            ("dev/console".into(), 0o020_600, (5, 1), vec![])
        );
        for (length, entry) in entries[2..11].iter().enumerate() {
            assert_eq!(entry.1, 0o100_755);
            assert_eq!(entry.3, vec![b'x'; length]);
        }
        assert_eq!(entries[11].1, 0o120_777);
        assert_eq!(entries[11].3, b"busybox");
    }

    #[test]
    fn equal_contents_give_equal_archives() {
        let make = || {
            let mut archive = Archive::new(Vec::new());
            archive.file("a", 0o644, b"1").unwrap();
            archive.finish().unwrap()
        };
        assert_eq!(make(), make());
    }
}
