//! `type1-contract`: the contract, tried on the kernel that this runs on.

use std::io::{self, Write};
use std::process::ExitCode;

use clap::Parser;
use contract::{CaseResult, Complaint, RealHost, cases, run};
use serde::Serialize;
use vfio_sys::Bdf;

/// Holds the kernel's VFIO type1 to the contract that the simulated host keeps too.
///
/// Both functions must be bound to vfio-pci, and nobody else may use them. Ends with status 0
/// only if every case passes.
#[derive(Debug, Parser)]
#[command(name = "type1-contract")]
struct Arguments {
    /// A function with a DMA engine: QEMU's edu, with dma_mask=0xffffffffffffffff.
    engine: Bdf,
    /// A function with a memory BAR of at least 64 KiB: QEMU's ivshmem-plain.
    memory: Bdf,
    /// One JSON object instead of lines.
    #[arg(long)]
    json: bool,
    /// Only the cases whose names contain this.
    #[arg(long, default_value = "")]
    filter: String,
}

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

fn main() -> anyhow::Result<ExitCode> {
    let arguments = Arguments::parse();
    let chosen = |case: &contract::Case| case.name.contains(&arguments.filter);
    anyhow::ensure!(
        cases().iter().any(chosen),
        "no case has {:?} in its name",
        arguments.filter
    );
    let host = RealHost::new(arguments.engine, arguments.memory);
    let mut out = io::stdout().lock();
    let mut written = Ok(());
    let results = run(&host, &arguments.filter, |result| {
        if !arguments.json && written.is_ok() {
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
    if arguments.json {
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
