//! What came of a case.

use std::fmt;
use std::io;

use dma_engine::EngineError;

/// Why a case did not pass.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Complaint {
    /// The host did something else.
    #[error("expected {expected}, got {got}")]
    Failed {
        /// What the contract says.
        expected: String,
        /// What was seen.
        got: String,
    },
    /// This host has nothing to try it on.
    #[error("skipped: {0}")]
    Skipped(String),
}

impl From<EngineError> for Complaint {
    fn from(error: EngineError) -> Self {
        let mut got = error.to_string();
        let mut cause = std::error::Error::source(&error);
        while let Some(error) = cause {
            got = format!("{got}: {error}");
            cause = error.source();
        }
        Self::Failed {
            expected: "the engine to do its work".into(),
            got,
        }
    }
}

impl From<io::Error> for Complaint {
    /// For what belongs to the bench, not to the contract.
    fn from(error: io::Error) -> Self {
        Self::Failed {
            expected: "the bench to work".into(),
            got: shown(&error),
        }
    }
}

/// How a case ended.
pub type Verdict = Result<(), Complaint>;

/// One case and how it ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CaseResult {
    /// The case.
    pub name: &'static str,
    /// How it ended.
    pub verdict: Verdict,
}

impl fmt::Display for CaseResult {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.verdict {
            Ok(()) => write!(f, "{} … ok", self.name),
            Err(complaint @ Complaint::Failed { .. }) => {
                write!(f, "{} … FAILED: {complaint}", self.name)
            }
            Err(complaint @ Complaint::Skipped(_)) => write!(f, "{} … {complaint}", self.name),
        }
    }
}

/// An error number by its name, as far as the contract knows it.
fn shown(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(errno) => name(errno),
        None => error.to_string(),
    }
}

fn name(errno: i32) -> String {
    let name = match errno {
        libc::EPERM => "EPERM",
        libc::ENOENT => "ENOENT",
        libc::EIO => "EIO",
        libc::EAGAIN => "EAGAIN",
        libc::ENOMEM => "ENOMEM",
        libc::EFAULT => "EFAULT",
        libc::EBUSY => "EBUSY",
        libc::EEXIST => "EEXIST",
        libc::ENODEV => "ENODEV",
        libc::EINVAL => "EINVAL",
        libc::ENOSPC => "ENOSPC",
        libc::ENOTTY => "ENOTTY",
        libc::EOVERFLOW => "EOVERFLOW",
        other => return format!("errno {other}"),
    };
    name.into()
}

/// The call must be refused with `errno`.
///
/// # Errors
/// Where it was not.
pub(crate) fn refused<T: fmt::Debug>(result: io::Result<T>, errno: i32) -> Verdict {
    refused_with_one_of(result, &[errno])
}

/// The call must be refused with one of `errnos`, where kernels differ.
///
/// # Errors
/// Where it was not.
pub(crate) fn refused_with_one_of<T: fmt::Debug>(result: io::Result<T>, errnos: &[i32]) -> Verdict {
    let got = match &result {
        Err(error) if error.raw_os_error().is_some_and(|e| errnos.contains(&e)) => return Ok(()),
        Err(error) => shown(error),
        Ok(value) => format!("success ({value:?})"),
    };
    let names: Vec<_> = errnos.iter().copied().map(name).collect();
    Err(Complaint::Failed {
        expected: names.join(" or "),
        got,
    })
}

/// The call must succeed.
///
/// # Errors
/// Where it did not.
pub(crate) fn granted<T>(result: io::Result<T>) -> Result<T, Complaint> {
    result.map_err(|error| Complaint::Failed {
        expected: "success".into(),
        got: shown(&error),
    })
}

/// What was seen must be what the contract says.
///
/// # Errors
/// Where it was not.
pub(crate) fn same<T: PartialEq + fmt::Debug>(what: &str, got: T, expected: T) -> Verdict {
    if got == expected {
        Ok(())
    } else {
        Err(Complaint::Failed {
            expected: format!("{what} {expected:x?}"),
            got: format!("{got:x?}"),
        })
    }
}

/// What was seen must be anything but that.
///
/// # Errors
/// Where it was just that.
pub(crate) fn other<T: PartialEq + fmt::Debug>(what: &str, got: T, unwanted: T) -> Verdict {
    if got == unwanted {
        Err(Complaint::Failed {
            expected: format!("{what} other than {unwanted:x?}"),
            got: "just that".into(),
        })
    } else {
        Ok(())
    }
}
