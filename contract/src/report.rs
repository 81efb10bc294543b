//! What a contract's program prints.

use std::io::{self, Write};
use std::process::ExitCode;

use serde::Serialize;

use crate::{CaseResult, Complaint};

/// How one case ended.
#[derive(Debug, Serialize)]
struct CaseReport {
    name: &'static str,
    ok: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    expected: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    got: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    skipped: Option<String>,
}

impl From<&CaseResult> for CaseReport {
    fn from(result: &CaseResult) -> Self {
        let mut report = Self {
            name: result.name,
            ok: result.verdict.is_ok(),
            expected: None,
            got: None,
            skipped: None,
        };
        match &result.verdict {
            Ok(()) => {}
            Err(Complaint::Failed { expected, got }) => {
                report.expected = Some(expected.clone());
                report.got = Some(got.clone());
            }
            Err(Complaint::Skipped(reason)) => report.skipped = Some(reason.clone()),
        }
        report
    }
}

/// How all ended.
#[derive(Debug, Serialize)]
struct Report {
    ok: bool,
    passed: usize,
    failed: usize,
    skipped: usize,
    cases: Vec<CaseReport>,
}

/// Has `run` try the cases, which tells of each as soon as it has ended, and prints how they ended
/// to standard output: as lines, or as one JSON object. The status is success only if every case
/// passed.
///
/// # Errors
/// Where standard output cannot be written.
pub fn report(
    json: bool,
    run: impl FnOnce(&mut dyn FnMut(&CaseResult)) -> Vec<CaseResult>,
) -> io::Result<ExitCode> {
    let mut out = io::stdout().lock();
    let mut written = Ok(());
    let results = run(&mut |result| {
        if !json && written.is_ok() {
            written = writeln!(out, "{result}").and_then(|()| out.flush());
        }
    });
    written?;
    let cases: Vec<CaseReport> = results.iter().map(CaseReport::from).collect();
    let passed = cases.iter().filter(|case| case.ok).count();
    let skipped = cases.iter().filter(|case| case.skipped.is_some()).count();
    let report = Report {
        ok: passed == cases.len(),
        passed,
        failed: cases.len().saturating_sub(passed).saturating_sub(skipped),
        skipped,
        cases,
    };
    if json {
        serde_json::to_writer_pretty(&mut out, &report)?;
        writeln!(out)?;
    } else {
        write!(out, "{} passed, {} failed", report.passed, report.failed)?;
        match report.skipped {
            0 => writeln!(out)?,
            skipped => writeln!(out, ", {skipped} skipped")?,
        }
    }
    out.flush()?;
    Ok(if report.ok {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
