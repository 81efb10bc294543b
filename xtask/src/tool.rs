//! cargo-deny, in one version, built into the cache the first time it is needed.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, ensure};
use lab::cache::{Cache, CacheError, EntryName};

use crate::workspace;

const NAME: &str = "cargo-deny";
const VERSION: &str = "0.20.2";

/// The command that starts cargo-deny: the one on PATH if it has our version, else the cache's.
pub fn cargo_deny() -> anyhow::Result<Command> {
    if on_path() {
        return Ok(Command::new(NAME));
    }
    let cache = Cache::from_environment()?;
    let entry = cache.entry(&EntryName::new(NAME, VERSION), install)?;
    Ok(Command::new(entry.join("bin").join(NAME)))
}

fn on_path() -> bool {
    let version = Command::new(NAME).arg("--version").output();
    version.is_ok_and(|output| {
        String::from_utf8_lossy(&output.stdout).trim() == format!("{NAME} {VERSION}")
    })
}

/// What installing may fail with. The cache wants one type that can hold its own errors.
#[derive(Debug)]
struct InstallError(anyhow::Error);

impl From<CacheError> for InstallError {
    fn from(error: CacheError) -> Self {
        Self(error.into())
    }
}

impl From<InstallError> for anyhow::Error {
    fn from(InstallError(error): InstallError) -> Self {
        error
    }
}

fn install(folder: &Path) -> Result<(), InstallError> {
    install_into(folder).map_err(InstallError)
}

fn install_into(folder: &Path) -> anyhow::Result<()> {
    eprintln!("xtask: building {NAME} {VERSION} into the cache, once; this takes some minutes");
    let status = Command::new(workspace::cargo_program())
        .args(["install", "--locked", NAME, "--version", VERSION, "--root"])
        .arg(folder)
        .arg("--target-dir")
        .arg(folder.join("build"))
        .env_remove("RUSTFLAGS")
        .env_remove("CARGO_TARGET_DIR")
        .status()
        .context("cannot run `cargo install`")?;
    ensure!(
        status.success(),
        "`cargo install {NAME} --version {VERSION}` failed ({status})"
    );
    std::fs::remove_dir_all(folder.join("build")).context("cannot remove its build folder")
}
