//! What CI runs first.

use anyhow::Context;

use crate::tool;
use crate::workspace::{self, cargo};

/// Format, lints, documentation, and what the dependencies may be.
pub fn check() -> anyhow::Result<()> {
    cargo(&["fmt", "--all", "--check"], &[])?;
    cargo(
        &[
            "clippy",
            "--workspace",
            "--all-targets",
            "--locked",
            "--",
            "-D",
            "warnings",
        ],
        &[],
    )?;
    cargo(
        &["doc", "--workspace", "--no-deps", "--locked"],
        &[("RUSTDOCFLAGS", "-D warnings")],
    )?;
    deny()
}

/// cargo-deny without advisories: their database is not among the registries CI may use.
fn deny() -> anyhow::Result<()> {
    let mut command = tool::cargo_deny()?;
    eprintln!("xtask: cargo deny check licenses bans sources");
    let status = command
        .args(["--locked", "check", "licenses", "bans", "sources"])
        .current_dir(workspace::root())
        .status()
        .context("cannot run cargo-deny")?;
    anyhow::ensure!(status.success(), "cargo-deny failed ({status})");
    Ok(())
}
