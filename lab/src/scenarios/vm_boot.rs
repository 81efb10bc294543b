//! Guests of `throughway run` and their platform: the other kernel, the other way to enter one, the
//! other pages, the power button, interrupts.

use std::time::{Duration, Instant};

use super::footprint::Footprint;
use super::running_vm::{RunningVm, terminal_before_and_after};
use super::virtual_machine::{ALL, blocked_where_nobody_is, nobodies};
use super::vm_run::VmRun;
use super::{EDU, IOMMUFD_KERNEL, IVSHMEM};
use crate::initramfs::GUEST_ELF;
use crate::scenario::{Bench, Scenario, ScenarioError, ensure};

/// This file's scenarios for a guest's kernel that has a power button's driver and is there as an
/// ELF file.
pub static SCENARIOS: &[Scenario] = shared_scenarios![
    on IOMMUFD_KERNEL;
    VIRTUAL_MACHINE:
        vm_is_booted_by_pvh,
        vm_has_ram_of_huge_pages_by_type1,
        vm_has_ram_of_huge_pages_by_iommufd,
        vm_turns_itself_off_when_its_power_button_is_pressed,
        vm_that_does_not_listen_ends_at_the_second_signal,
        vm_that_does_not_listen_ends_when_its_time_is_over,
        vm_on_a_terminal_gets_control_c_and_ends_by_control_a_x,
        vm_interrupt_that_is_sent_to_nobody_is_lost_and_said,
];

/// Those for Debian's kernel, as the host and as the guest.
pub static ON_THE_STOCK_KERNEL: &[Scenario] = shared_scenarios![
    VIRTUAL_MACHINE: vm_devices_reach_each_other_on_the_stock_kernel,
];

fn vm_is_booted_by_pvh(bench: &mut Bench) -> Result<(), ScenarioError> {
    let before = Footprint::take(bench)?;
    let run = VmRun {
        kernel: GUEST_ELF,
        ..VmRun::new("iommufd", &[EDU, IVSHMEM], "p2p,poweroff")
    };
    let lines = run.run_well(bench, &["boot", "p2p", "end"])?;
    lines.list("p2p", "moved", 1)?;
    before.ensure_same(bench)
}

fn vm_has_ram_of_huge_pages_by_type1(bench: &mut Bench) -> Result<(), ScenarioError> {
    has_ram_of_huge_pages(bench, "type1")
}

fn vm_has_ram_of_huge_pages_by_iommufd(bench: &mut Bench) -> Result<(), ScenarioError> {
    has_ram_of_huge_pages(bench, "iommufd")
}

/// Of reserved ones: refused where there are none, taken while it runs, free after it.
fn has_ram_of_huge_pages(bench: &mut Bench, iommu: &str) -> Result<(), ScenarioError> {
    const PAGES: u32 = 256;
    let run = VmRun {
        memory: "size=512M,hugepages=2M",
        ..VmRun::new(iommu, &[EDU, IVSHMEM], "p2p,wait")
    };
    let refused = run.run(bench)?;
    let advice = format!("{PAGES} huge pages of 2 MiB are not to be had");
    ensure(
        !refused.status.success() && refused.said.contains(&advice),
        || format!("ended with {}: {}", refused.status, refused.said),
    )?;
    reserve_huge_pages(bench, PAGES)?;
    let before = Footprint::take(bench)?;
    let (vm, lines) = RunningVm::start_until_it_waits(bench, &run)?;
    lines.ensure_steps(&["boot", "p2p", "end"])?;
    lines.list("p2p", "moved", 1)?;
    ensure_free_huge_pages(bench, 0)?;
    vm.send(bench, "TERM")?;
    vm.send(bench, "TERM")?;
    let end = vm.await_end(bench)?;
    ensure(end.status.success(), || {
        format!("ended with {}: {}", end.status, end.said)
    })?;
    ensure_free_huge_pages(bench, PAGES)?;
    before.ensure_same(bench)?;
    reserve_huge_pages(bench, 0)
}

/// Has the nested machine's kernel reserve so many of 2 MiB.
fn reserve_huge_pages(bench: &mut Bench, pages: u32) -> Result<(), ScenarioError> {
    bench.shell(&format!("echo {pages} > /proc/sys/vm/nr_hugepages"))?;
    ensure_free_huge_pages(bench, pages)
}

fn ensure_free_huge_pages(bench: &mut Bench, pages: u32) -> Result<(), ScenarioError> {
    let free = bench.shell("awk '/^HugePages_Free/ { print $2 }' /proc/meminfo")?;
    ensure(free.trim() == pages.to_string(), || {
        format!("{} huge pages are free, not {pages}", free.trim())
    })
}

fn vm_turns_itself_off_when_its_power_button_is_pressed(
    bench: &mut Bench,
) -> Result<(), ScenarioError> {
    let before = Footprint::take(bench)?;
    let run = VmRun::new("iommufd", &[EDU, IVSHMEM], "button,poweroff");
    let vm = RunningVm::start(bench, &run)?;
    let waits = vm.await_step(bench, "button-wait", 1)?;
    waits.ensure_steps(&["boot", "button-wait"])?;
    vm.send(bench, "TERM")?;
    let end = vm.await_end(bench)?;
    let steps = ["boot", "button-wait", "button", "end"];
    end.lines.ensure_steps(&steps)?;
    ensure(
        end.status.success() && end.said.contains("the guest turned itself off"),
        || format!("ended with {}: {}", end.status, end.said),
    )?;
    before.ensure_same(bench)
}

/// How long a guest has for its power button. What ends sooner has not waited for that.
const GRACE: Duration = Duration::from_secs(30);

fn vm_that_does_not_listen_ends_at_the_second_signal(
    bench: &mut Bench,
) -> Result<(), ScenarioError> {
    let took = press_where_nobody_listens(bench, |bench, vm| {
        bench.run_ok(&["sleep", "2"])?;
        // The button alone does nothing to a guest that does not listen.
        vm.send(bench, "0")?;
        vm.send(bench, "TERM")
    })?;
    ensure(took < GRACE, || format!("it took {took:?}"))
}

fn vm_that_does_not_listen_ends_when_its_time_is_over(
    bench: &mut Bench,
) -> Result<(), ScenarioError> {
    let took = press_where_nobody_listens(bench, |_, _| Ok(()))?;
    // Its clock is not ours.
    ensure(took > GRACE * 9 / 10, || format!("it took {took:?}"))
}

/// Presses the power button of a guest that does not listen, does `then`, and gives how long it took
/// from the press until the machine had ended, all given back.
fn press_where_nobody_listens(
    bench: &mut Bench,
    then: impl FnOnce(&mut Bench, &RunningVm) -> Result<(), ScenarioError>,
) -> Result<Duration, ScenarioError> {
    let before = Footprint::take(bench)?;
    let run = VmRun::new("iommufd", &[EDU, IVSHMEM], "wait");
    let (vm, lines) = RunningVm::start_until_it_waits(bench, &run)?;
    lines.ensure_steps(&["boot", "end"])?;
    let pressed = Instant::now();
    vm.send(bench, "TERM")?;
    then(bench, &vm)?;
    let end = vm.await_end(bench)?;
    let took = pressed.elapsed();
    ensure(
        end.status.success() && end.said.contains("the machine was told to end"),
        || format!("ended with {}: {}", end.status, end.said),
    )?;
    before.ensure_same(bench)?;
    Ok(took)
}

fn vm_on_a_terminal_gets_control_c_and_ends_by_control_a_x(
    bench: &mut Bench,
) -> Result<(), ScenarioError> {
    const CONTROL_A: &str = r"\001";
    const CONTROL_C: &str = r"\003";
    let footprint = Footprint::take(bench)?;
    let vm = RunningVm::start_on_terminal(bench, &VmRun::new("iommufd", &[EDU, IVSHMEM], "wait"))?;
    vm.await_step(bench, "end", 1)?;
    let meanwhile = vm.terminal(bench)?;
    // The guest's own terminal shows what it is sent.
    vm.type_in(bench, CONTROL_C)?;
    vm.await_on_console(bench, "^C")?;
    vm.type_in(bench, &format!("{CONTROL_A}a"))?;
    vm.await_on_console(bench, "^A")?;
    vm.send(bench, "0")?;
    vm.type_in(bench, &format!("{CONTROL_A}x"))?;
    let end = vm.await_end(bench)?;
    ensure(
        end.status.success() && end.said.contains("the machine was told to end"),
        || format!("ended with {}: {}", end.status, end.said),
    )?;
    let [before, after] = terminal_before_and_after(bench)?;
    ensure(before == after && before != meanwhile, || {
        format!("the terminal before, meanwhile and after:\n{before}\n{meanwhile}\n{after}")
    })?;
    footprint.ensure_same(bench)
}

fn vm_interrupt_that_is_sent_to_nobody_is_lost_and_said(
    bench: &mut Bench,
) -> Result<(), ScenarioError> {
    let end = VmRun::new("iommufd", &[EDU, IVSHMEM], "msi,poweroff").run(bench)?;
    end.lines.ensure_steps(&["boot", "msi", "end"])?;
    let said =
        format!("{EDU}: an interrupt was sent where no interrupt controller is, and is lost");
    ensure(end.status.success() && end.said.contains(&said), || {
        format!("ended with {}: {}", end.status, end.said)
    })
}

fn vm_devices_reach_each_other_on_the_stock_kernel(bench: &mut Bench) -> Result<(), ScenarioError> {
    let steps = ["p2p", "nobody", "move", "flr", "p2p", "poweroff"];
    let mut told = vec!["boot"];
    told.extend(&steps[..steps.len() - 1]);
    told.push("end");
    let steps = steps.join(",");
    let run = VmRun::new("type1", &ALL, &steps);
    // An nvme that the firmware has looked at masters the bus until it has been closed once.
    run.rehearse(bench)?;
    let before = Footprint::take(bench)?;
    let lines = run.run_well(bench, &told)?;
    before.ensure_same(bench)?;
    lines.list("p2p", "moved", 2)?;
    lines.list("move", "moves", 8)?;
    let tried = nobodies(&lines.all());
    ensure(tried.len() >= 12, || format!("few controls: {tried:x?}"))?;
    blocked_where_nobody_is(&tried, &bench.dmar_faults()?)
}
