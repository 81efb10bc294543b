//! What a step came to, for the checks.

use memory_map::{
    BackingId, ChangeError, Iova, IovaRange, Report, TargetId, TargetLimits, TargetName,
};

use crate::model::Model;
use crate::shape::Shape;

/// What a step came to.
#[derive(Debug, Default)]
pub struct Outcome {
    /// The model as the change would have it.
    pub wanted: Option<Model>,
    /// Whether it was a change of the guest's.
    pub guest: bool,
    /// Whether it made no sense.
    pub nonsense: bool,
    /// Backings that it said were revoked.
    pub revoked: Vec<BackingId>,
    /// Whether the one who watched cancelled.
    pub cancelled: bool,
    /// The target that was to be registered.
    pub newcomer: Option<(usize, Shape)>,
    /// The target that was unregistered.
    pub leaver: Option<usize>,
    /// The target whose limits were to change.
    pub limits: Option<(usize, TargetLimits)>,
    /// The report, if there is one.
    pub report: Option<Report>,
    /// The error.
    pub error: Option<ChangeError>,
}

impl Outcome {
    /// Takes the result in.
    pub(crate) fn take(&mut self, result: Result<Option<Report>, ChangeError>) {
        match result {
            Ok(report) => self.report = report,
            Err(error) => self.error = Some(error),
        }
    }

    /// Whether a change was to be undone, and the error says that not all of it was.
    #[must_use]
    pub const fn undo_fell_short(&self) -> bool {
        matches!(self.error, Some(ChangeError::UndoIncomplete { .. }))
    }

    /// Why a change was refused, whatever came of its undo.
    #[must_use]
    pub fn cause(&self) -> Option<&ChangeError> {
        let mut cause = self.error.as_ref()?;
        while let ChangeError::UndoIncomplete { cause: inner, .. } = cause {
            cause = inner;
        }
        Some(cause)
    }

    /// What the error says that an undo could not put back.
    #[must_use]
    pub fn not_put_back(&self) -> Vec<(TargetName, IovaRange)> {
        let mut lost = Vec::new();
        let mut error = self.error.as_ref();
        while let Some(ChangeError::UndoIncomplete {
            cause,
            target,
            range,
            ..
        }) = error
        {
            lost.push((target.clone(), *range));
            error = Some(cause);
        }
        lost
    }

    /// Whether it is told that RAM is missing in a target at some address.
    #[must_use]
    pub fn tells_missing_ram(&self, target: TargetId, at: Iova) -> bool {
        let report = self.report.as_ref().filter(|_| self.guest);
        let told = report.is_some_and(|report| {
            let mut missing = report.ram_missing.iter();
            missing.any(|(id, range, _)| *id == target && range.contains(at))
        });
        // The error names the first piece only.
        told || self.undo_fell_short()
    }
}
