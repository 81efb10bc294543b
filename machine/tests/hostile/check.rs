//! What the IOMMUs really hold against what the map says, page by page. The map's ledgers are not
//! asked.

use std::collections::{BTreeMap, BTreeSet};

use machine::platform::{ECAM, ECAM_SIZE, IO_APIC, KVM_PAGES};
use memory_map::{Access, Reach, Reason};

use crate::rig::{APERTURE_LAST, Behind, PAGE, Part, RAM_SIZE, RESERVED, Rig};

/// Of which object a page is, and where in it.
type Pages = BTreeMap<u64, (String, u64)>;

/// What a comparison has found.
#[derive(Debug, Default)]
pub struct Findings {
    /// Where the IOMMUs and the map differ, or the map says what it should not.
    pub wrong: Vec<String>,
    /// The reasons that the reach gave, without their details.
    pub reasons: BTreeSet<String>,
    /// How many pages of functions' BARs are mapped.
    pub bar_pages: usize,
}

pub fn compare(rig: &Rig) -> Findings {
    let mut findings = Findings::default();
    let mut held = [Pages::new(), Pages::new()];
    let [type1, iommufd] = &mut held;
    let found = rig.host.mappings().into_iter();
    for it in found.map(|it| (it.iova, it.access, it.object, it.offset)) {
        enter(type1, &it.2, (it.0.start().raw(), it.0.last().raw()), it.3);
        if it.1 != Access::ReadWrite {
            findings.wrong.push(format!("{} is read-only", it.0));
        }
    }
    for it in rig.host.ioas_mappings() {
        let range = (it.iova.start().raw(), it.iova.last().raw());
        enter(iommufd, &it.object, range, it.offset);
        if it.access != Access::ReadWrite || it.dead {
            findings.wrong.push(format!("{}: {it:?}", it.iova));
        }
    }

    let by_view = by_view(rig);
    for (target, held) in rig.targets.iter().zip(&held) {
        let name = if target.id() == rig.targets[0].id() {
            "type1"
        } else {
            "iommufd"
        };
        differ(held, &by_view, &format!("{name}, view"), &mut findings);
        let by_reach = by_reach(rig, target.id(), &mut findings);
        differ(held, &by_reach, &format!("{name}, reach"), &mut findings);
        let ram = held.values().filter(|(label, _)| label == "ram0").count();
        if ram as u64 != 2 * RAM_SIZE / PAGE {
            findings.wrong.push(format!("{name}: {ram} pages of RAM"));
        }
        for at in held.keys().filter(|at| is_platform(**at)) {
            findings
                .wrong
                .push(format!("{name}: {at:#x} is the platform's"));
        }
        findings.bar_pages += held.len() - ram;
    }
    findings
}

fn enter(pages: &mut Pages, label: &str, (start, last): (u64, u64), offset: u64) {
    for into in (0..=last - start).step_by(0x1000) {
        pages.insert(start + into, (label.to_owned(), offset + into));
    }
}

fn differ(held: &Pages, said: &Pages, what: &str, findings: &mut Findings) {
    for (at, page) in held {
        if said.get(at) != Some(page) {
            let wrong = format!("{what}: {at:#x} holds {page:x?}, not {:x?}", said.get(at));
            findings.wrong.push(wrong);
        }
    }
    for (at, page) in said.iter().filter(|(at, _)| !held.contains_key(at)) {
        let wrong = format!("{what}: {at:#x} holds nothing, not {page:x?}");
        findings.wrong.push(wrong);
    }
}

/// Whether an IOMMU of this host may hold the page at all.
fn is_allowed(page: u64) -> bool {
    let reserved = |(start, size): &(u64, u64)| (*start..start + size).contains(&page);
    page <= APERTURE_LAST && !RESERVED.iter().any(reserved)
}

/// Whether a page is one that the machine keeps to itself.
fn is_platform(page: u64) -> bool {
    let ecam = ECAM.raw()..ECAM.raw() + ECAM_SIZE;
    let apics = [IO_APIC.raw(), KVM_PAGES.raw()];
    ecam.contains(&page) || apics.contains(&page)
}

/// Whether the page at this offset of a region can be mapped.
fn page_of(behind: &Behind, offset: u64) -> Option<(String, u64)> {
    let whole = |(start, end): &Part| *start <= offset && offset + PAGE <= *end;
    let mappable = behind.mappable.iter().any(whole);
    mappable.then(|| (behind.label.clone(), behind.offset + offset))
}

/// The pages that the guest sees whole, and that the IOMMU may hold.
fn by_view(rig: &Rig) -> Pages {
    let mut pages = Pages::new();
    for seen in rig.map.view() {
        let Some(behind) = rig.behind.get(&seen.region) else {
            continue;
        };
        let Some(whole) = seen.range.shrink_to(PAGE) else {
            continue;
        };
        for at in (whole.start().raw()..=whole.last().raw()).step_by(0x1000) {
            let offset = seen.offset + (at - seen.range.start().raw());
            if let Some(page) = page_of(behind, offset).filter(|_| is_allowed(at)) {
                pages.insert(at, page);
            }
        }
    }
    pages
}

/// The pages that the reach says are there.
fn by_reach(rig: &Rig, target: memory_map::TargetId, findings: &mut Findings) -> Pages {
    let mut pages = Pages::new();
    for entry in rig.map.reach() {
        let Some(behind) = rig.behind.get(&entry.region) else {
            continue;
        };
        if entry.target != target {
            continue;
        }
        let (missing, mapped) = match entry.reach {
            Reach::Mapped => (Vec::new(), None),
            Reach::Partly { mapped, missing } => (missing, Some(mapped)),
            Reach::Unavailable(reason) => {
                note(&reason, &entry.region_name, findings);
                continue;
            }
        };
        let range = rig.map.region(entry.region).unwrap().range.unwrap();
        let before = pages.len();
        for at in (range.start().raw()..=range.last().raw()).step_by(0x1000) {
            let there = page_of(behind, at - range.start().raw());
            let is_missing = missing.iter().any(|missing| {
                missing.range.start().raw() <= at + (PAGE - 1) && missing.range.last().raw() >= at
            });
            if let Some(page) = there.filter(|_| !is_missing) {
                pages.insert(at, page);
            }
        }
        let bytes = (pages.len() - before) as u64 * PAGE;
        if mapped.is_some_and(|mapped| mapped != bytes) {
            let wrong = format!("{}: {mapped:x?} bytes, not {bytes:#x}", entry.region_name);
            findings.wrong.push(wrong);
        }
        for missing in missing {
            note(&missing.reason, &entry.region_name, findings);
        }
    }
    pages
}

fn note(reason: &Reason, region: &memory_map::RegionName, findings: &mut Findings) {
    // What is never true of a host on which nothing fails, once all is quiet.
    if matches!(
        reason,
        Reason::Kernel { .. }
            | Reason::Revoked
            | Reason::Quarantined
            | Reason::Pending
            | Reason::NoHostAddress(_)
            | Reason::EntryLimit { .. }
    ) {
        findings.wrong.push(format!("{region}: {reason}"));
    }
    let text = format!("{reason:?}");
    let end = text.find([' ', '{']).unwrap_or(text.len());
    findings.reasons.insert(text[..end].to_owned());
}
