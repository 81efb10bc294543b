//! One command in a nested machine.

use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

use lab::cache::Cache;
use lab::machine::{Invocation, Machine, Stream};
use lab::parts::Parts;
use lab::spec::Spec;

use crate::{RunArgs, guest_files, guest_programs};

/// How long the machine may take to power off after its command.
const POWER_OFF_LIMIT: Duration = Duration::from_secs(30);

/// Boots a machine, runs the command and gives its exit status.
pub fn run(args: &RunArgs) -> anyhow::Result<ExitCode> {
    let spec = Spec {
        iommu: args.iommu,
        disks: args.disks.clone(),
        kernel_options: args.kernel_options.clone(),
        objects: args.objects.clone(),
        devices: args.devices.clone(),
        guest: args.guest,
        files: guest_files(&args.files)?,
        memory: args.memory.clone(),
        keep_logs: args.keep_logs,
        counts_instructions: args.count_instructions,
        ..Spec::default()
    };
    let programs = guest_programs::build()?;
    let cache = Cache::from_environment()?;
    let parts = Parts::obtain(&cache, &args.kernel, programs)?;

    let mut machine = Machine::boot(&parts, &spec)?;
    eprintln!(
        "lab: {} up after {:.1} s; bound to vfio-pci: {}",
        parts.kernel.description,
        machine.boot_time().as_secs_f64(),
        match machine.bound() {
            [] => "nothing".to_owned(),
            bound => bound.join(" "),
        }
    );
    for problem in machine.problems() {
        eprintln!("lab: {problem}");
    }
    let status = machine.stream(
        &Invocation::new(&args.command),
        Duration::from_secs(args.timeout),
        &mut |stream, bytes| {
            // A reader of ours that has gone does not change what the command does.
            let _ = match stream {
                Stream::Stdout => {
                    let mut out = std::io::stdout().lock();
                    out.write_all(bytes).and_then(|()| out.flush())
                }
                Stream::Stderr => std::io::stderr().lock().write_all(bytes),
            };
        },
    )?;
    machine.shut_down(POWER_OFF_LIMIT)?;
    Ok(ExitCode::from(status.code()))
}
