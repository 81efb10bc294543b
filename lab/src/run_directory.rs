//! The files of one run of the nested machine.
//!
//! A [`RunDirectory`] is a folder in the system's temporary folder. It goes away with its owner,
//! unless something went wrong or the user wants to look: then it is kept and named.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use tempfile::TempDir;

/// How much of a log is shown when the machine dies.
const TAIL_LINES: usize = 25;
/// What QEMU says in every run, once for each feature of the processor that it does not emulate.
const NOISE: &str = "warning: TCG doesn't support requested feature";
/// No more than this is read for it, in bytes.
const TAIL_BYTES: u64 = 64 << 10;

/// The files of one run.
#[derive(Debug)]
pub struct RunDirectory {
    folder: TempDir,
}

impl RunDirectory {
    /// A new, empty one.
    ///
    /// # Errors
    /// When the system's temporary folder does not take it.
    pub fn new() -> io::Result<Self> {
        let folder = tempfile::Builder::new()
            .prefix("throughway-lab-")
            .tempdir()?;
        Ok(Self { folder })
    }

    /// The folder.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// What the kernel says on its console.
    #[must_use]
    pub fn console(&self) -> PathBuf {
        self.path().join("console.log")
    }

    /// What QEMU's traces say.
    #[must_use]
    pub fn trace(&self) -> PathBuf {
        self.path().join("trace.log")
    }

    /// What QEMU itself says on its standard error.
    #[must_use]
    pub fn emulator(&self) -> PathBuf {
        self.path().join("qemu.log")
    }

    /// What the latest command wrote, both its streams as they came.
    #[must_use]
    pub fn command(&self) -> PathBuf {
        self.path().join("command.log")
    }

    /// The socket of QEMU's monitor.
    #[must_use]
    pub fn monitor(&self) -> PathBuf {
        self.path().join("monitor")
    }

    /// A disk.
    #[must_use]
    pub fn disk(&self, id: &str) -> PathBuf {
        self.path().join(format!("{id}.disk"))
    }

    /// The initramfs.
    #[must_use]
    pub fn initramfs(&self) -> PathBuf {
        self.path().join("initramfs.cpio")
    }

    /// Keeps the folder after this value is gone.
    pub fn keep(&mut self) {
        self.folder.disable_cleanup(true);
    }

    /// The last lines of what QEMU, the console and the latest command said, with headings.
    #[must_use]
    pub fn tail(&self) -> String {
        let mut text = String::new();
        for (title, path) in [
            ("QEMU", self.emulator()),
            ("console", self.console()),
            ("command", self.command()),
        ] {
            let tail =
                tail_of(&path).unwrap_or_else(|error| vec![format!("(unreadable: {error})")]);
            if tail.is_empty() {
                continue;
            }
            text.push_str(&format!("  end of {} ({}):\n", path.display(), title));
            for line in tail {
                text.push_str(&format!("    {line}\n"));
            }
        }
        if text.is_empty() {
            text.push_str("  neither QEMU nor the console said anything\n");
        }
        text
    }
}

fn tail_of(path: &Path) -> io::Result<Vec<String>> {
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(TAIL_BYTES)))?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<String> = text
        .lines()
        .map(printable)
        .filter(|line| !line.trim().is_empty() && !line.contains(NOISE))
        .collect();
    Ok(lines[lines.len().saturating_sub(TAIL_LINES)..].to_vec())
}

/// A console line without what would move the reader's cursor.
fn printable(line: &str) -> String {
    line.trim_end()
        .chars()
        .filter(|c| !c.is_control() || *c == '\t')
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tail_is_the_last_printable_lines() {
        let directory = RunDirectory::new().unwrap();
        std::fs::write(directory.emulator(), format!("qemu: {NOISE}: x\n")).unwrap();
        assert!(!directory.tail().contains("QEMU"));
        let lines: Vec<_> = (0..100).map(|n| format!("\u{1b}cline {n}\r\n\n")).collect();
        std::fs::write(directory.console(), lines.concat()).unwrap();
        let tail = directory.tail();
        assert!(tail.contains("cline 99\n") && tail.contains("cline 75\n"));
        assert!(!tail.contains("cline 74\n") && !tail.contains('\u{1b}'));
    }

    #[test]
    fn a_directory_goes_away_unless_it_is_kept() {
        let directory = RunDirectory::new().unwrap();
        let path = directory.path().to_owned();
        drop(directory);
        assert!(!path.exists());
        let mut directory = RunDirectory::new().unwrap();
        let path = directory.path().to_owned();
        directory.keep();
        drop(directory);
        assert!(path.exists());
        std::fs::remove_dir_all(path).unwrap();
    }
}
