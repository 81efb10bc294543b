//! Functions that cannot be used: each is told with what to do about it, and nothing changes.

use super::footprint::Footprint;
use super::p2p_run::{P2pRun, p2p};
use super::{EDU, IVSHMEM, SECOND_EDU, SERIAL};
use crate::scenario::{Bench, Scenario, ScenarioError, ensure};

/// This file's scenarios.
pub static SCENARIOS: &[Scenario] = shared_scenarios![
    EDU_AND_IVSHMEM:
        missing_function_is_named,
        malformed_address_is_named,
        function_given_twice_is_refused,
        unbound_function_comes_with_the_commands_that_bind_it,
        group_in_use_comes_with_the_command_that_finds_its_user;
    TWO_EDUS:
        function_of_another_driver_comes_with_the_commands_that_bind_it,
        group_that_is_not_viable_names_who_is_in_the_way;
];

/// The status of a program that could not do what it was asked for.
pub const NOT_DONE: u8 = 2;

/// A run with these functions must be refused with these words and change nothing. Gives all that
/// was said.
pub fn refused(
    bench: &mut Bench,
    functions: &[&str],
    said: &[&str],
) -> Result<String, ScenarioError> {
    let before = Footprint::take(bench)?;
    let argv = p2p(&["--exercise"], functions);
    let told = bench.run_refused(&argv, NOT_DONE, said)?;
    before.ensure_same(bench)?;
    Ok(told)
}

/// The negative control of every refusal: the same machine does what it is properly asked for.
pub fn works(bench: &mut Bench, functions: &[&str]) -> Result<(), ScenarioError> {
    let run = P2pRun::with(bench, &[], functions)?;
    ensure(run.ok && run.status.success(), || format!("{run:#?}"))
}

/// The indented lines of a message: what it wants to be typed.
pub fn commands_in(message: &str) -> Result<String, ScenarioError> {
    let commands: Vec<&str> = message
        .lines()
        .filter_map(|line| line.strip_prefix("  "))
        .collect();
    ensure(!commands.is_empty(), || {
        format!("no commands in: {message}")
    })?;
    Ok(commands.join("\n"))
}

/// Lets modprobe find vfio-pci, as on any host. (The lab loads its modules without it.)
const MODPROBE_WORKS: &str = "
    modules=/lib/modules/$(uname -r)
    mkdir -p $modules
    echo /lab/modules/vfio-pci.ko: > $modules/modules.dep
";

fn missing_function_is_named(bench: &mut Bench) -> Result<(), ScenarioError> {
    let said = ["there is no PCI function 0000:00:1e.7", "lspci -D"];
    refused(bench, &[EDU, "0000:00:1e.7"], &said)?;
    works(bench, &[EDU, IVSHMEM])
}

fn malformed_address_is_named(bench: &mut Bench) -> Result<(), ScenarioError> {
    for address in [
        "nonsense",
        "0000:00:05",
        "00:20.0",
        "00:05.8",
        "0000:00:+5.0",
    ] {
        let quoted = format!("{address:?} is no PCI address");
        refused(bench, &[EDU, address], &[&quoted, "0000:00:05.0"])?;
    }
    works(bench, &["00:05.0", "00:06.0"])
}

fn function_given_twice_is_refused(bench: &mut Bench) -> Result<(), ScenarioError> {
    for again in [EDU, "00:05.0"] {
        refused(bench, &[EDU, IVSHMEM, again], &["named twice"])?;
    }
    works(bench, &[EDU, IVSHMEM])
}

fn unbound_function_comes_with_the_commands_that_bind_it(
    bench: &mut Bench,
) -> Result<(), ScenarioError> {
    bench.shell(MODPROBE_WORKS)?;
    let sysfs = format!("/sys/bus/pci/devices/{IVSHMEM}");
    bench.shell(&format!(
        "echo {IVSHMEM} > {sysfs}/driver/unbind; echo > {sysfs}/driver_override"
    ))?;
    let state = format!("{IVSHMEM} is not bound to vfio-pci: no driver has it");
    let told = refused(bench, &[EDU, IVSHMEM], &[&state, "as root"])?;
    bench.shell(&commands_in(&told)?)?;
    works(bench, &[EDU, IVSHMEM])
}

fn function_of_another_driver_comes_with_the_commands_that_bind_it(
    bench: &mut Bench,
) -> Result<(), ScenarioError> {
    bench.shell(MODPROBE_WORKS)?;
    give_serial_to_the_host(bench)?;
    let state = format!("{SERIAL} is not bound to vfio-pci: the driver serial has it");
    let told = refused(bench, &[EDU, SERIAL], &[&state])?;
    bench.shell(&commands_in(&told)?)?;
    works(bench, &[EDU, SERIAL])
}

fn group_that_is_not_viable_names_who_is_in_the_way(
    bench: &mut Bench,
) -> Result<(), ScenarioError> {
    give_serial_to_the_host(bench)?;
    let culprit = format!("bind them to vfio-pci too: {SERIAL} (driver serial).");
    let said = ["/dev/vfio/", "is not viable", &culprit];
    refused(bench, &[EDU, SECOND_EDU], &said)?;
    // The message's other advice: without a driver it is in nobody's way.
    let unbind = format!("echo {SERIAL} > /sys/bus/pci/devices/{SERIAL}/driver/unbind");
    bench.shell(&unbind)?;
    works(bench, &[EDU, SECOND_EDU])?;
    bench.shell(&format!(
        "echo vfio-pci > /sys/bus/pci/devices/{SERIAL}/driver_override
         echo {SERIAL} > /sys/bus/pci/drivers_probe"
    ))?;
    works(bench, &[EDU, SECOND_EDU])
}

fn give_serial_to_the_host(bench: &mut Bench) -> Result<(), ScenarioError> {
    let driver = bench.shell(&format!(
        "sysfs=/sys/bus/pci/devices/{SERIAL}
         echo {SERIAL} > $sysfs/driver/unbind
         echo serial > $sysfs/driver_override
         echo {SERIAL} > /sys/bus/pci/drivers_probe
         readlink $sysfs/driver"
    ))?;
    ensure(driver.trim_end().ends_with("/serial"), || {
        format!("the serial port's driver is {driver}")
    })
}

fn group_in_use_comes_with_the_command_that_finds_its_user(
    bench: &mut Bench,
) -> Result<(), ScenarioError> {
    let group = group_file(bench, IVSHMEM)?;
    // It lets go of the group when its standard input, a FIFO, is closed.
    bench.shell(&format!(
        "rm -f /tmp/hold; mkfifo /tmp/hold
         sh -c 'exec 3<>{group}; echo $$ > /tmp/holder; read end < /tmp/hold' > /dev/null 2>&1 &
         until [ -s /tmp/holder ]; do usleep 10000; done"
    ))?;
    let used = format!("{group} is used by another process");
    let find = format!("`fuser -v {group} /dev/vfio/devices/*`");
    let told = refused(bench, &[EDU, IVSHMEM], &[&used, &find]);
    bench.shell(
        "echo > /tmp/hold
         while [ -d /proc/$(cat /tmp/holder) ]; do usleep 10000; done; rm /tmp/holder /tmp/hold",
    )?;
    told?;
    works(bench, &[EDU, IVSHMEM])
}

/// The file of a function's group.
pub fn group_file(bench: &mut Bench, function: &str) -> Result<String, ScenarioError> {
    let link = format!("/sys/bus/pci/devices/{function}/iommu_group");
    let group = bench.run_ok(&["readlink", &link])?;
    let number = group.trim_end().rsplit('/').next().unwrap_or_default();
    Ok(format!("/dev/vfio/{number}"))
}
