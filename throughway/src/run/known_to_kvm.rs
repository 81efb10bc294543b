//! The functions' files that KVM was told of, until it forgets them.

use std::cell::RefCell;
use std::io;
use std::os::fd::BorrowedFd;

use anyhow::{Context, Result};
use machine::kvm::{AssignedFile, AssignedFiles};
use vfio_sys::Bdf;

use crate::host::Announce;

/// KVM, as one who wants to know of devices. It keeps each file open that it was told of.
pub struct KnownToKvm {
    files: AssignedFiles,
    /// With the functions that were opened by each and are still used.
    announced: RefCell<Vec<(AssignedFile, Vec<Bdf>)>>,
}

impl KnownToKvm {
    pub fn new(files: AssignedFiles) -> Self {
        Self {
            files,
            announced: RefCell::default(),
        }
    }

    /// Has it forget the file that a function was opened by, unless others were opened by it too.
    pub fn forget(&self, function: Bdf) -> Result<()> {
        let mut announced = self.announced.borrow_mut();
        for (_, functions) in announced.iter_mut() {
            functions.retain(|known| *known != function);
        }
        while let Some(unused) = announced
            .iter()
            .position(|(_, functions)| functions.is_empty())
        {
            let (file, _) = announced.swap_remove(unused);
            self.files
                .forget(file)
                .with_context(|| format!("KVM does not forget {function}"))?;
        }
        Ok(())
    }
}

impl Announce for KnownToKvm {
    fn add(&self, functions: &[Bdf], file: BorrowedFd<'_>) -> io::Result<()> {
        let file = self.files.add(file)?;
        self.announced.borrow_mut().push((file, functions.to_vec()));
        Ok(())
    }

    fn forget_all(&self) -> io::Result<()> {
        self.announced.borrow_mut().clear();
        self.files.forget_all()
    }
}
