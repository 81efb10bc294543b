//! Hosts and users that cannot have iommufd: each is told with what to do about it, and nothing
//! changes.

use super::bad_input::{NOT_DONE, commands_in, group_file};
use super::footprint::Footprint;
use super::p2p_run::{P2pRun, RAM_PAGES, p2p};
use super::unprivileged::{as_nobody, quoted};
use super::{EDU, IOMMUFD_KERNEL, IVSHMEM, SECOND_EDU, SECOND_IVSHMEM};
use crate::kernel::OwnKernel;
use crate::scenario::{Bench, Scenario, ScenarioError, ensure};

/// This file's scenarios on a kernel that has iommufd.
pub static SCENARIOS: &[Scenario] = shared_scenarios![
    on IOMMUFD_KERNEL;
    EDU_AND_IVSHMEM:
        missing_iommufd_is_named_with_what_to_load,
        file_without_permission_comes_with_the_command_that_gives_it,
        locked_memory_of_all_processes_is_told_with_the_need,
        device_without_vfio_comes_with_the_commands_that_bind_it,
        device_in_use_comes_with_the_command_that_finds_its_user;
    TWO_EDUS:
        locked_memory_of_another_process_of_the_user_counts;
];

/// And on one that has none of it.
pub static ON_THE_STOCK_KERNEL: &[Scenario] = shared_scenarios![
    on &[OwnKernel::Stock];
    EDU_AND_IVSHMEM:
        kernel_without_what_is_asked_for_is_named_with_the_one_that_is_needed;
];

const BY_IOMMUFD: [&str; 2] = ["--iommu", "iommufd"];

/// A run by iommufd must be refused with these words and change nothing. Gives all that was said.
fn refused(bench: &mut Bench, said: &[&str]) -> Result<String, ScenarioError> {
    let before = Footprint::take(bench)?;
    let told = bench.run_refused(&p2p(&BY_IOMMUFD, &[EDU, IVSHMEM]), NOT_DONE, said)?;
    before.ensure_same(bench)?;
    Ok(told)
}

/// The negative control of every refusal.
fn works(bench: &mut Bench) -> Result<(), ScenarioError> {
    let run = P2pRun::with(bench, &BY_IOMMUFD, &[EDU, IVSHMEM])?;
    ensure(run.ok && run.status.success(), || format!("{run:#?}"))
}

fn kernel_without_what_is_asked_for_is_named_with_the_one_that_is_needed(
    bench: &mut Bench,
) -> Result<(), ScenarioError> {
    let found = bench.shell("uname -r | cut -d. -f1-2")?;
    let found = format!("({})", found.trim());
    let said = [
        EDU,
        "VFIO character devices",
        "Linux 6.6",
        &found,
        "CONFIG_VFIO_DEVICE_CDEV",
    ];
    refused(bench, &said)?;
    let run = P2pRun::with(bench, &["--iommu", "type1"], &[EDU, IVSHMEM])?;
    ensure(run.ok, || format!("{run:#?}"))
}

fn missing_iommufd_is_named_with_what_to_load(bench: &mut Bench) -> Result<(), ScenarioError> {
    bench.shell("mv /dev/iommu /dev/iommu.away")?;
    let told = refused(
        bench,
        &[
            "/dev/iommu cannot be opened",
            "modprobe iommufd",
            "CONFIG_IOMMUFD",
        ],
    );
    bench.shell("mv /dev/iommu.away /dev/iommu")?;
    told?;
    works(bench)
}

/// Three files, one after the other; each is root's again afterwards.
fn file_without_permission_comes_with_the_command_that_gives_it(
    bench: &mut Bench,
) -> Result<(), ScenarioError> {
    // So little RAM that the limit on locked memory is not in the way.
    let options = [&BY_IOMMUFD[..], &["--exercise", "--memory", "4"]].concat();
    let run = p2p(&options, &[EDU, IVSHMEM]).join(" ");
    let files = [
        "/dev/iommu".to_owned(),
        cdev(bench, EDU)?,
        cdev(bench, IVSHMEM)?,
    ];
    for file in &files {
        let before = Footprint::take(bench)?;
        let permission = format!("no permission to open {file} for reading and writing");
        let told = bench.run_refused(&as_nobody(&run), NOT_DONE, &[&permission])?;
        before.ensure_same(bench)?;
        let command = told.split_once("have root do: ").and_then(|(_, rest)| {
            let end = rest.find(": Permission denied")?;
            rest.get(..end)
        });
        let command =
            command.ok_or_else(|| ScenarioError::unexpected(format!("no command in: {told}")))?;
        bench.shell(&format!("USER=nobody; {command}"))?;
    }
    bench.run_ok(&as_nobody(&run))?;
    bench.shell(&format!("chown root {}", files.join(" ")))?;
    works(bench)
}

fn locked_memory_of_all_processes_is_told_with_the_need(
    bench: &mut Bench,
) -> Result<(), ScenarioError> {
    let files = [
        "/dev/iommu".to_owned(),
        cdev(bench, EDU)?,
        cdev(bench, IVSHMEM)?,
    ]
    .join(" ");
    bench.shell(&format!("chown nobody {files}"))?;
    let run = p2p(&BY_IOMMUFD, &[EDU, IVSHMEM]).join(" ");
    // `su` keeps the limit that root has set, and drops root's CAP_IPC_LOCK.
    let limited = |kib: u32| format!("ulimit -l {kib}; exec {}", quoted(&as_nobody(&run)));
    let said = [
        "RLIMIT_MEMLOCK allows 8388608 bytes",
        "needs 67108864 more",
        "all processes of this user",
        "CAP_IPC_LOCK",
    ];
    let before = Footprint::take(bench)?;
    bench.run_refused(&["sh", "-c", &limited(8192)], NOT_DONE, &said)?;
    before.ensure_same(bench)?;
    // Negative control: 64 MiB and a page may be locked, and that is enough.
    bench.run_ok(&["sh", "-c", &limited(65_540)])?;
    bench.shell(&format!("chown root {files}"))?;
    before.ensure_same(bench)
}

/// Two processes of one user, with two functions each: one has its RAM pinned and is stopped, and
/// there is no room for the other one's, though there would be by itself.
fn locked_memory_of_another_process_of_the_user_counts(
    bench: &mut Bench,
) -> Result<(), ScenarioError> {
    let (first, second) = ([EDU, IVSHMEM], [SECOND_EDU, SECOND_IVSHMEM]);
    let mut files = vec!["/dev/iommu".to_owned()];
    for function in first.iter().chain(&second) {
        files.push(cdev(bench, function)?);
    }
    let files = files.join(" ");
    bench.shell(&format!("chown nobody {files}"))?;
    let before = Footprint::take(bench)?;
    let exercise = [&BY_IOMMUFD[..], &["--exercise"]].concat();
    // 64 MiB and a page for each; room for one and a half.
    let limited = |options: &[&str], functions: &[&str]| {
        let run = p2p(options, functions).join(" ");
        format!("ulimit -l 98304; exec {}", quoted(&as_nobody(&run)))
    };
    bench.shell(&format!(
        "({}) > /tmp/first 2>&1 & echo $! > /tmp/waited-for
         until pid=$(pidof throughway); do usleep 1000; done
         pinned() {{
             cat /proc/sys/vm/stat_refresh
             awk '/^nr_foll_pin_acquired/ {{ a = $2 }} /^nr_foll_pin_released/ {{ r = $2 }}
                  END {{ print a - r }}' /proc/vmstat
         }}
         until [ $(pinned) -ge {RAM_PAGES} ]; do usleep 1000; done
         kill -STOP $pid",
        limited(&exercise, &first),
    ))?;
    let run = ["sh", "-c", &limited(&BY_IOMMUFD, &second)];
    let said = ["needs 67108864 more", "all processes of this user"];
    let told = bench.run_refused(&run, NOT_DONE, &said);
    // The first one goes on as if nothing had been, and then there is room.
    bench.shell(
        "kill -CONT $(pidof throughway)
         while [ -d /proc/$(cat /tmp/waited-for) ]; do usleep 10000; done; rm /tmp/waited-for",
    )?;
    told?;
    let text = bench.shell("cat /tmp/first; rm /tmp/first")?;
    ensure(text.contains("every device reaches every other"), || text)?;
    bench.run_ok(&run)?;
    before.ensure_same(bench)?;
    bench.shell(&format!("chown root {files}")).map(drop)
}

fn device_without_vfio_comes_with_the_commands_that_bind_it(
    bench: &mut Bench,
) -> Result<(), ScenarioError> {
    let sysfs = format!("/sys/bus/pci/devices/{IVSHMEM}");
    bench.shell(&format!(
        "echo {IVSHMEM} > {sysfs}/driver/unbind; echo > {sysfs}/driver_override"
    ))?;
    let state = format!("{IVSHMEM} is not bound to vfio-pci: no driver has it");
    let told = refused(bench, &[&state, "as root"])?;
    // The driver is built in: there is nothing to load.
    let commands = commands_in(&told)?;
    let commands: Vec<&str> = commands
        .lines()
        .filter(|line| !line.starts_with("modprobe"))
        .collect();
    bench.shell(&commands.join("\n"))?;
    works(bench)
}

fn device_in_use_comes_with_the_command_that_finds_its_user(
    bench: &mut Bench,
) -> Result<(), ScenarioError> {
    let group = group_file(bench, IVSHMEM)?;
    // Who has the group keeps its devices from being bound. It lets go of it when its standard
    // input, a FIFO, is closed.
    bench.shell(&format!(
        "rm -f /tmp/hold; mkfifo /tmp/hold
         sh -c 'exec 3<>{group}; echo $$ > /tmp/holder; read end < /tmp/hold' > /dev/null 2>&1 &
         until [ -s /tmp/holder ]; do usleep 10000; done"
    ))?;
    let binding = format!("binding {IVSHMEM} to the iommufd failed");
    let told = refused(bench, &[&binding]);
    bench.shell(
        "echo > /tmp/hold
         while [ -d /proc/$(cat /tmp/holder) ]; do usleep 10000; done; rm /tmp/holder /tmp/hold",
    )?;
    told?;
    works(bench)
}

/// The file of a function's character device.
fn cdev(bench: &mut Bench, function: &str) -> Result<String, ScenarioError> {
    let name = bench.run_ok(&["ls", &format!("/sys/bus/pci/devices/{function}/vfio-dev")])?;
    Ok(format!("/dev/vfio/devices/{}", name.trim()))
}
