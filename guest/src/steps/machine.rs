//! The machine as the guest finds it.

use std::fs::{self, File};
use std::io::Read;

use anyhow::{Context, bail, ensure};
use assigned_pci::HostFunction;
use serde_json::{Value, json};

use super::found;
use crate::function::Function;
use crate::report::Findings;

/// Every PCI function: ids, class, driver, capabilities' ids, resets and BARs.
pub fn devices() -> anyhow::Result<Findings> {
    let mut all = Vec::new();
    for function in Function::all()? {
        let (vendor, device) = function.id();
        let mut bars = Vec::new();
        for bar in function.bars() {
            bars.push(json!({
                "bar": bar.index.get(),
                "address": function.address(*bar)?,
                "size": bar.size,
                "wide": bar.wide,
                "prefetchable": bar.prefetchable,
            }));
        }
        let resets = fs::read_to_string(function.folder().join("reset_method"));
        all.push(json!({
            "function": function.name(),
            "id": format!("{vendor:04x}:{device:04x}"),
            "class": format!("{:06x}", function.class()),
            "command": function.command()?,
            "driver": function.driver(),
            "resets": resets.unwrap_or_default().trim_end(),
            "bars": bars,
        }));
    }
    Ok(found([("functions", json!(all))]))
}

/// Processors, RAM, windows, and what the kernel has said of errors.
pub fn machine() -> anyhow::Result<Findings> {
    let cpus = fs::read_to_string("/proc/cpuinfo").context("reading /proc/cpuinfo")?;
    let cpus = cpus
        .lines()
        .filter(|line| line.starts_with("processor"))
        .count();
    let memory = fs::read_to_string("/proc/meminfo").context("reading /proc/meminfo")?;
    let total = memory
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"));
    let iomem = fs::read_to_string("/proc/iomem").context("reading /proc/iomem")?;
    let uptime = fs::read_to_string("/proc/uptime").context("reading /proc/uptime")?;
    Ok(found([
        ("cpus", json!(cpus)),
        (
            "memory",
            total.map_or(Value::Null, |total| json!(total.trim())),
        ),
        ("iomem", json!(iomem.lines().collect::<Vec<_>>())),
        ("uptime", json!(uptime.split_whitespace().next())),
    ]))
}

/// Waits until Enter is pressed on the console.
pub fn enter() -> anyhow::Result<Findings> {
    let mut line = String::new();
    let length = std::io::stdin().read_line(&mut line);
    let length = length.context("reading a line from the console")?;
    ensure!(length > 0, "the console has ended");
    Ok(Findings::new())
}

/// An event of an input device (`struct input_event` of 64-bit machines): time, type, code, value.
const EVENT: usize = 24;
/// `EV_KEY`, `KEY_POWER`, pressed.
const PRESSED: [u8; 8] = [1, 0, 116, 0, 1, 0, 0, 0];

/// Waits until the power button is pressed.
pub fn power_button() -> anyhow::Result<Findings> {
    let folder = "/sys/class/input";
    for entry in fs::read_dir(folder).with_context(|| format!("reading {folder}"))? {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_str().unwrap_or_default();
        let label = fs::read_to_string(entry.path().join("device/name")).unwrap_or_default();
        if !name.starts_with("event") || label.trim_end() != "Power Button" {
            continue;
        }
        let path = format!("/dev/input/{name}");
        let mut device = File::open(&path).with_context(|| format!("opening {path}"))?;
        crate::report::say("button-wait", true, found([("device", json!(path))]));
        loop {
            let mut event = [0; EVENT];
            device
                .read_exact(&mut event)
                .with_context(|| format!("reading {path}"))?;
            if event.ends_with(&PRESSED) {
                return Ok(found([("device", json!(path))]));
            }
        }
    }
    bail!("the machine has no power button")
}
