//! The kernel's modules.

use std::fs;

use lab::initramfs::MODULE_ORDER;
use rustix::io::Errno;

use crate::Problems;

/// Loads the modules the host has put in, in its order.
pub fn load_all(problems: &mut Problems) {
    let what = format!("reading {MODULE_ORDER}");
    let Some(order) = problems.check(&what, fs::read_to_string(MODULE_ORDER)) else {
        return;
    };
    for path in order.lines() {
        let what = format!("loading {path}");
        if let Some(image) = problems.check(&what, fs::read(path)) {
            match rustix::system::init_module(&image, c"") {
                // Built in, or loaded by something else.
                Ok(()) | Err(Errno::EXIST) => {}
                Err(error) => problems.note(format!("{what}: {error}")),
            }
        }
    }
}
