//! Devices that come and go while the machine runs: the host pulls one out and plugs one in.

use super::footprint::Footprint;
use super::p2p_run::{P2pRun, TAKEN_BACK, p2p, ways};
use super::pluggable::{LIMIT, Pluggable, far_edu, far_ivshmem};
use super::{BOTH_KERNELS, EDU, FAR_EDU, IVSHMEM, kernel_log};
use crate::monitor::MonitorError;
use crate::scenario::{Bench, Scenario, ScenarioError, ensure};

/// This file's scenarios.
pub static SCENARIOS: &[Scenario] = shared_scenarios![
    on BOTH_KERNELS;
    ROOT_PORTS:
        device_that_nobody_holds_leaves_and_another_comes,
        peer_that_is_pulled_out_while_it_is_mapped_is_given_back,
        engine_that_is_pulled_out_is_given_back_and_the_others_go_on,
        device_that_is_not_there_cannot_leave;
];

fn device_that_nobody_holds_leaves_and_another_comes(
    bench: &mut Bench,
) -> Result<(), ScenarioError> {
    let pulled = far_edu();
    let sysfs = pulled.sysfs();
    // Negative control of "it has left".
    bench.run_ok(&["test", "-d", &sysfs])?;
    let monitor = bench.monitor()?;
    monitor.device_del(pulled.id)?;
    monitor.wait_until_deleted(pulled.id, LIMIT)?;
    bench.shell(&format!("[ ! -e {sysfs} ]"))?;
    kernel_log::ensure_clean(bench)?;
    pulled.plug_in(bench)?;
    kernel_log::ensure_clean(bench).map(drop)
}

/// Begins a run that holds everything, and waits until it does.
const BEGIN: &str = r#"
    rm -f /tmp/hold /tmp/held /tmp/said /tmp/status
    mkfifo /tmp/hold
    # It is open for writing for as long as this sleeps.
    sleep 1000 > /tmp/hold & echo $! > /tmp/sleeper
    { $run < /tmp/hold > /tmp/held 2> /tmp/said & echo $! > /tmp/pid; wait $! && s=0 || s=$?
      echo $s > /tmp/status; } > /dev/null 2>&1 &
    until grep -q 'stays mapped' /tmp/said; do
        [ ! -e /tmp/status ] || { cat /tmp/said >&2; exit 1; }
        usleep 10000
    done
"#;
/// Ends it, and prints what it printed. The exit status is its own.
const END: &str = r"
    echo > /tmp/hold
    kill $(cat /tmp/sleeper)
    until [ -e /tmp/status ]; do usleep 10000; done
    cat /tmp/said >&2
    cat /tmp/held
    exit $(cat /tmp/status)
";

/// Has a run hold `functions`, pulls one out, and gives what the run then says.
fn pulled_out_of_a_run(
    bench: &mut Bench,
    way: &str,
    options: &[&str],
    functions: &[&str],
    pulled: &Pluggable,
) -> Result<P2pRun, ScenarioError> {
    bench.forget_faults()?;
    let common = ["--json", "--exercise", "--hold", "--iommu", way];
    let options = [&common, options].concat();
    let run = p2p(&options, functions).join(" ");
    bench.shell(&format!(
        "run='{run}'
{BEGIN}"
    ))?;
    pulled.pull_out_of(bench, "cat /tmp/pid")?;
    bench.shell(&format!(
        "until grep -q 'wanted {} back, and has it' /tmp/said; do usleep 10000; done",
        pulled.function
    ))?;
    let run = P2pRun::of(bench, &["sh", "-c", END])?;
    ensure(run.ok && run.status.success(), || format!("{run:#?}"))?;
    run.ensure_way(way)?;
    let expected = [(pulled.function.to_owned(), Some("ok".to_owned()))];
    ensure(run.removed == expected, || format!("{:?}", run.removed))?;
    kernel_log::ensure_clean(bench)?;
    Ok(run)
}

/// Its BAR is in two address spaces, those of the two engines, and leaves both.
fn peer_that_is_pulled_out_while_it_is_mapped_is_given_back(
    bench: &mut Bench,
) -> Result<(), ScenarioError> {
    let pulled = far_ivshmem();
    let group = |name, edu| format!("group={name}:{edu},{IVSHMEM},{}", pulled.function);
    let (one, two) = (group("one", EDU), group("two", FAR_EDU));
    let options = ["--p2p", &one, "--p2p", &two];
    for way in ways(bench)? {
        let before = Footprint::take(bench)?.pinned_pages();
        let functions = [EDU, IVSHMEM, FAR_EDU, pulled.function];
        let run = pulled_out_of_a_run(bench, way, &options, &functions, &pulled)?;
        for from in [EDU, FAR_EDU] {
            run.ensure_exercised(from, IVSHMEM, 2)?;
            let gone = run.pair(from, pulled.function, 2)?;
            // It was reached before.
            ensure(
                gone.reach == "unavailable" && gone.exercised.as_deref() == Some("ok"),
                || format!("{gone:?}"),
            )?;
            let controls = run.blocked(from, TAKEN_BACK)?;
            ensure(controls.len() == 1, || format!("{controls:#?}"))?;
        }
        run.ensure_witnessed(&bench.dmar_faults()?)?;
        let after = Footprint::take(bench)?.pinned_pages();
        ensure(before == after, || {
            format!("{before:?} pages were pinned before, {after:?} are after")
        })?;
        pulled.plug_in(bench)?;
    }
    Ok(())
}

/// The engine is alone in its address space, which goes with it.
fn engine_that_is_pulled_out_is_given_back_and_the_others_go_on(
    bench: &mut Bench,
) -> Result<(), ScenarioError> {
    let pulled = far_edu();
    let one = format!("group=one:{EDU},{IVSHMEM}");
    let two = format!("group=two:{},{IVSHMEM}", pulled.function);
    let options = ["--p2p", &one, "--p2p", &two];
    for way in ways(bench)? {
        let functions = [EDU, IVSHMEM, pulled.function];
        let run = pulled_out_of_a_run(bench, way, &options, &functions, &pulled)?;
        run.ensure_exercised(EDU, IVSHMEM, 2)?;
        let gone = run.pair(pulled.function, IVSHMEM, 2)?;
        ensure(
            gone.reach == "unavailable" && gone.exercised.as_deref() == Some("ok"),
            || format!("{gone:?}"),
        )?;
        run.ensure_witnessed(&bench.dmar_faults()?)?;
        pulled.plug_in(bench)?;
    }
    Ok(())
}

fn device_that_is_not_there_cannot_leave(bench: &mut Bench) -> Result<(), ScenarioError> {
    match bench.monitor()?.device_del("nobody") {
        Err(MonitorError::Refused { class, .. }) if class == "DeviceNotFound" => Ok(()),
        other => Err(ScenarioError::unexpected(format!(
            "pulling out a device that is not there gave {other:?}"
        ))),
    }?;
    // The monitor is none the worse for it.
    let status = bench.monitor()?.query_status()?;
    ensure(status.running, || format!("{status:?}"))
}
