//! The IOMMU's rules one by one, and the whole against a page table that is obviously right.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::physical::Storage;
use crate::sparse::SparseMemory;

const RAM_PAGES: u64 = 8;

fn range(start: u64, size: u64) -> IovaRange {
    IovaRange::new(Iova::new(start), size).unwrap()
}

fn object(label: &str, owner: Option<crate::physical::BarOwner>) -> Arc<PhysicalObject> {
    Arc::new(PhysicalObject {
        label: label.into(),
        base: 0,
        storage: Storage::Memory(SparseMemory::new(RAM_PAGES * PAGE)),
        owner,
    })
}

struct Rig {
    domain: Domain,
    space: AddressSpace,
    ram: HostVa,
    locked: Locked,
}

impl Rig {
    fn new() -> Self {
        let mut space = AddressSpace::new();
        let (_, ram) = space.map(object("ram", None), 0, RAM_PAGES * PAGE).unwrap();
        Self {
            domain: Domain::new(
                PAGE,
                vec![range(0, 0x10_0000), range(0x20_0000, 0x10_0000)],
                4,
            ),
            space,
            ram,
            locked: Locked {
                pages: 0,
                limit: None,
            },
        }
    }

    fn map(&mut self, start: u64, pages: u64) -> Result<(), i32> {
        self.map_at(range(start, pages * PAGE), self.ram)
    }

    fn map_at(&mut self, iova: IovaRange, vaddr: HostVa) -> Result<(), i32> {
        let locked = Locked {
            pages: self.domain.locked_pages(),
            ..self.locked
        };
        self.domain
            .map(&self.space, locked, iova, vaddr, Access::ReadWrite)
            .map_err(Errno::raw)
    }

    fn unmap(&mut self, start: u64, size: u64) -> Result<u64, i32> {
        self.domain.unmap(range(start, size)).map_err(Errno::raw)
    }
}

#[test]
fn misaligned_numbers_are_refused_and_aligned_ones_are_not() {
    let mut rig = Rig::new();
    let va = rig.ram;
    assert_eq!(rig.map_at(range(0x10, PAGE), va), Err(EINVAL));
    assert_eq!(rig.map_at(range(0, PAGE + 1), va), Err(EINVAL));
    assert_eq!(
        rig.map_at(range(0, PAGE), HostVa::new(va.raw() + 1)),
        Err(EINVAL)
    );
    let last = HostVa::new(u64::MAX - (PAGE - 1));
    assert_eq!(rig.map_at(range(0, 2 * PAGE), last), Err(EINVAL));
    assert_eq!(rig.map(0, 1), Ok(()));
    assert_eq!(rig.unmap(1, PAGE), Err(EINVAL));
    assert_eq!(rig.unmap(0, PAGE + 1), Err(EINVAL));
    assert_eq!(rig.unmap(0, PAGE), Ok(PAGE));
}

#[test]
fn larger_pages_are_enforced() {
    let mut rig = Rig::new();
    rig.domain.page = 4 * PAGE;
    assert_eq!(rig.map(PAGE, 4), Err(EINVAL));
    assert_eq!(rig.map(0, 1), Err(EINVAL));
    assert_eq!(rig.map(0, 4), Ok(()));
}

#[test]
fn only_allowed_ranges_take_mappings() {
    let mut rig = Rig::new();
    for start in [0x10_0000, 0xf_f000, 0x1f_f000, 0x2f_f000] {
        assert_eq!(rig.map(start, 2), Err(EINVAL), "{start:#x}");
    }
    assert_eq!(rig.map(0xf_f000, 1), Ok(()));
    assert_eq!(rig.map(0x20_0000, 1), Ok(()));
}

#[test]
fn a_group_that_joins_takes_its_ranges_away() {
    let mut rig = Rig::new();
    rig.map(0x4000, 1).unwrap();
    let free = range(0x8000, 0x2000);
    assert_eq!(
        rig.domain.reserve(&[range(0x4000, 1)]).map_err(Errno::raw),
        Err(EINVAL)
    );
    assert_eq!(rig.domain.allowed().len(), 2);
    rig.domain.reserve(&[free]).unwrap();
    assert_eq!(
        rig.domain.allowed(),
        [
            range(0, 0x8000),
            range(0xa000, 0xf_6000),
            range(0x20_0000, 0x10_0000)
        ]
    );
    assert_eq!(rig.map(0x9000, 1), Err(EINVAL));
    assert_eq!(rig.map(0xa000, 1), Ok(()));
    let all = IovaRange::from_inclusive(Iova::new(0), Iova::new(u64::MAX - 1)).unwrap();
    let mut empty = Domain::new(PAGE, vec![range(0, PAGE)], 1);
    assert!(empty.reserve(&[all]).is_err());
}

#[test]
fn the_entry_limit_holds_and_frees_up() {
    let mut rig = Rig::new();
    for page in 0..4 {
        rig.map(page * PAGE, 1).unwrap();
    }
    assert_eq!(rig.domain.entries_left(), 0);
    assert_eq!(rig.map(0x8000, 1), Err(ENOSPC));
    assert_eq!(rig.map(0x15_0000, 1), Err(ENOSPC));
    assert_eq!(rig.map(0, 1), Err(EEXIST));
    rig.unmap(0, PAGE).unwrap();
    assert_eq!(rig.map(0x8000, 1), Ok(()));
}

#[test]
fn only_ram_counts_as_locked_memory() {
    let mut rig = Rig::new();
    let gate = Arc::new(crate::gate::Gate::new(crate::gate::COMMAND_MEMORY));
    let bar = object(
        "bar",
        Some(crate::physical::BarOwner {
            function: "f".into(),
            bar: assigned_pci::BarIndex::ALL[0],
            gate: Arc::clone(&gate),
        }),
    );
    let (_, bar) = rig.space.map(bar, 0, RAM_PAGES * PAGE).unwrap();
    rig.locked.limit = Some(4);
    assert_eq!(rig.map(0, 5), Err(ENOMEM));
    assert_eq!(rig.map_at(range(0x8000, 8 * PAGE), bar), Ok(()));
    assert_eq!(rig.map(0, 4), Ok(()));
    assert_eq!(rig.map(0x2_0000, 1), Err(ENOMEM));
    gate.set_command(0);
    assert_eq!(rig.map_at(range(0x2_0000, PAGE), bar), Err(EFAULT));
    rig.unmap(0, 4 * PAGE).unwrap();
    assert_eq!(rig.domain.locked_pages(), 0);
    assert_eq!(rig.map(0x2_0000, 1), Ok(()));
    rig.domain.unmap_all();
    assert_eq!(rig.domain.locked_pages(), 0);
}

#[test]
fn nothing_is_mapped_where_nothing_is() {
    let mut rig = Rig::new();
    assert_eq!(rig.map_at(range(0, PAGE), HostVa::new(0x1000)), Err(EFAULT));
    assert_eq!(rig.map(0, RAM_PAGES + 1), Err(EFAULT));
    assert_eq!(rig.domain.mappings().count(), 0);
    let ram = rig.ram;
    rig.space.unmap(ram);
    assert_eq!(rig.map(0, 1), Err(EFAULT));
}

#[test]
fn an_unmap_never_cuts_a_mapping() {
    let mut rig = Rig::new();
    rig.map(0x4000, 4).unwrap();
    rig.map(0xa000, 1).unwrap();
    for (start, pages) in [(4, 1), (5, 2), (7, 1), (7, 4), (0, 5), (5, 8)] {
        assert_eq!(
            rig.unmap(start * PAGE, pages * PAGE),
            Err(EINVAL),
            "{start}+{pages}"
        );
        assert_eq!(rig.domain.mappings().count(), 2);
    }
    assert_eq!(rig.unmap(0, 4 * PAGE), Ok(0));
    assert_eq!(rig.unmap(0, 16 * PAGE), Ok(5 * PAGE));
    assert_eq!(rig.unmap(0, 16 * PAGE), Ok(0));
}

#[test]
fn holes_are_cut_out_of_ranges() {
    let whole = [range(0x1000, 0x9000)];
    assert_eq!(
        exclude(&whole, &[range(0x3000, 0x1000)]),
        [range(0x1000, 0x2000), range(0x4000, 0x6000)]
    );
    assert_eq!(
        exclude(&whole, &[range(0, 0x2000)]),
        [range(0x2000, 0x8000)]
    );
    assert_eq!(
        exclude(&whole, &[range(0x9000, 0x2000)]),
        [range(0x1000, 0x8000)]
    );
    assert_eq!(exclude(&whole, &[range(0, 0x1_0000)]), []);
    assert_eq!(exclude(&whole, &[range(0xa000, 0x1000)]), whole);
    let top = range(u64::MAX - 0xfff, 0x1000);
    assert_eq!(exclude(&[top], &[top]), []);
}

/// What a random test does to the IOMMU.
#[derive(Debug, Clone)]
enum Step {
    Map {
        start: u64,
        pages: u64,
        from: u64,
        access: Access,
    },
    Unmap {
        start: u64,
        pages: u64,
    },
    UnmapAll,
}

fn step() -> impl Strategy<Value = Step> {
    let access = prop_oneof![Just(Access::ReadOnly), Just(Access::ReadWrite)];
    prop_oneof![
        8 => (0..24u64, 1..5u64, 0..RAM_PAGES, access).prop_map(|(start, pages, from, access)| {
            Step::Map { start, pages, from, access }
        }),
        6 => (0..24u64, 1..12u64).prop_map(|(start, pages)| Step::Unmap { start, pages }),
        1 => Just(Step::UnmapAll),
    ]
}

/// One page of the naive model: which mapping it belongs to, which page of RAM it shows.
type NaivePage = (u64, u64, Access);

/// Page by page, with nothing clever about it. Pages 16 and 17 are reserved.
#[derive(Default)]
struct Naive {
    pages: BTreeMap<u64, NaivePage>,
    made: u64,
}

const NAIVE_ENTRIES: usize = 5;
const NAIVE_LOCKED: usize = 14;

impl Naive {
    fn map(&mut self, start: u64, pages: u64, from: u64, access: Access) -> Result<(), i32> {
        let wanted = start..start + pages;
        let entries: std::collections::BTreeSet<u64> =
            self.pages.values().map(|(id, ..)| *id).collect();
        if wanted.clone().any(|page| self.pages.contains_key(&page)) {
            return Err(EEXIST);
        }
        if entries.len() >= NAIVE_ENTRIES {
            return Err(ENOSPC);
        }
        if wanted.clone().any(|page| (16..18).contains(&page)) {
            return Err(EINVAL);
        }
        for (pinned, page) in (1..).zip(from..from + pages) {
            if page >= RAM_PAGES {
                return Err(EFAULT);
            }
            if self.pages.len() + pinned > NAIVE_LOCKED {
                return Err(ENOMEM);
            }
        }
        self.made += 1;
        for (page, shown) in wanted.zip(from..) {
            self.pages.insert(page, (self.made, shown, access));
        }
        Ok(())
    }

    fn unmap(&mut self, start: u64, pages: u64) -> Result<u64, i32> {
        let wanted = start..start + pages;
        let inside = |page: &u64| wanted.contains(page);
        let ids: Vec<u64> = self
            .pages
            .iter()
            .filter(|(page, _)| inside(page))
            .map(|(_, (id, ..))| *id)
            .collect();
        if self
            .pages
            .iter()
            .any(|(page, (id, ..))| ids.contains(id) && !inside(page))
        {
            return Err(EINVAL);
        }
        self.pages.retain(|page, _| !inside(page));
        Ok(u64::try_from(ids.len()).unwrap() * PAGE)
    }
}

proptest! {
    #[test]
    fn behaves_like_a_naive_page_table(steps in prop::collection::vec(step(), 1..60)) {
        let mut rig = Rig::new();
        let allowed = [range(0, 16 * PAGE), range(18 * PAGE, 32 * PAGE)];
        let limit = u32::try_from(NAIVE_ENTRIES).unwrap();
        rig.domain = Domain::new(PAGE, allowed.to_vec(), limit);
        let mut naive = Naive::default();
        for step in steps {
            match step {
                Step::Map { start, pages, from, access } => {
                    let locked = Locked {
                        pages: rig.domain.locked_pages(),
                        limit: Some(u64::try_from(NAIVE_LOCKED).unwrap()),
                    };
                    let iova = range(start * PAGE, pages * PAGE);
                    let va = HostVa::new(rig.ram.raw() + from * PAGE);
                    let got = rig.domain.map(&rig.space, locked, iova, va, access);
                    prop_assert_eq!(got.map_err(Errno::raw), naive.map(start, pages, from, access));
                }
                Step::Unmap { start, pages } => {
                    prop_assert_eq!(
                        rig.unmap(start * PAGE, pages * PAGE),
                        naive.unmap(start, pages)
                    );
                }
                Step::UnmapAll => {
                    let bytes = u64::try_from(naive.pages.len()).unwrap() * PAGE;
                    naive.pages.clear();
                    prop_assert_eq!(rig.domain.unmap_all(), bytes);
                }
            }
            for page in 0..48 {
                let found = rig.domain.find(Iova::new(page * PAGE + 0x123)).map(|mapping| {
                    let into = page - mapping.iova.start().raw() / PAGE;
                    (mapping.offset / PAGE + into, mapping.access)
                });
                let expected = naive.pages.get(&page).map(|(_, shown, access)| (*shown, *access));
                prop_assert_eq!(found, expected, "page {}", page);
            }
            prop_assert_eq!(
                rig.domain.locked_pages(),
                u64::try_from(naive.pages.len()).unwrap()
            );
        }
    }
}
