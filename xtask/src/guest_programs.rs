//! The programs of this workspace that run in the nested machine.
//!
//! They are linked statically, so that they need nothing there: the glibc target with
//! `+crt-static`. They are built in a folder of their own, because other flags would throw the
//! developer's own build away.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, bail, ensure};
use lab::parts::Programs;
use serde_json::Value;

use crate::workspace;

const TARGET: &str = "x86_64-unknown-linux-gnu";
/// The packages whose programs go into the nested machine.
const PACKAGES: [&str; 4] = ["throughway", "contract", "guest", "lab"];
/// PID 1's program.
const INIT: &str = "lab_init";
/// PID 1's program of a guest in the nested machine.
const GUEST: &str = "guest";

/// Builds them.
pub fn build() -> anyhow::Result<Programs> {
    eprintln!("xtask: building the nested machine's programs");
    let mut command = Command::new(workspace::cargo_program());
    command
        .args([
            "build",
            "--release",
            "--locked",
            "--bins",
            "--target",
            TARGET,
        ])
        .args(["--message-format", "json-render-diagnostics"])
        .current_dir(workspace::root())
        .env("CARGO_TARGET_DIR", workspace::target()?.join("lab-guest"))
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        // They travel to each machine: half the size is a shorter boot.
        .env("CARGO_PROFILE_RELEASE_STRIP", "debuginfo")
        .stdin(Stdio::null())
        .stderr(Stdio::inherit());
    for package in PACKAGES {
        command.args(["--package", package]);
    }
    let output = command.output().context("cannot run `cargo build`")?;
    ensure!(
        output.status.success(),
        "building the nested machine's programs failed ({})",
        output.status
    );
    let (mut init, mut guest) = (None, None);
    let mut others = Vec::new();
    for (name, path) in executables(&String::from_utf8_lossy(&output.stdout)) {
        match name.as_str() {
            INIT => {
                init = Some(path);
                continue;
            }
            GUEST => guest = Some(path.clone()),
            _ => {}
        }
        others.push(path);
    }
    match (init, guest) {
        (Some(init), Some(guest)) => Ok(Programs {
            init,
            guest,
            others,
        }),
        _ => bail!("cargo built no {INIT} or no {GUEST}"),
    }
}

/// The programs cargo reports: name and path.
fn executables(messages: &str) -> Vec<(String, PathBuf)> {
    messages
        .lines()
        .filter_map(|line| {
            let message: Value = serde_json::from_str(line).ok()?;
            let name = message.pointer("/target/name")?.as_str()?.to_owned();
            let path = message.get("executable")?.as_str()?.into();
            (message.get("reason")? == "compiler-artifact").then_some((name, path))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_programs_are_picked_from_cargos_messages() {
        let messages = r#"
{"reason":"compiler-artifact","target":{"name":"lab"},"executable":null}
{"reason":"compiler-artifact","target":{"name":"lab_init"},"executable":"/t/lab_init"}
{"reason":"build-finished","success":true}
not json"#;
        assert_eq!(
            executables(messages),
            [("lab_init".to_owned(), PathBuf::from("/t/lab_init"))]
        );
    }
}
