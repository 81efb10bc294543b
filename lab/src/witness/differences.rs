//! Where what is held is not what should be, and whether who is said to reach whom does.

use std::collections::BTreeMap;
use std::fmt;

use super::facts::Facts;
use super::io_page_table::{IoPage, IoPageTable};
use super::rule::Pages;
use super::told::Pair;

/// One page that is not as it should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Difference {
    /// It should be there and is not.
    Missing {
        /// Its I/O virtual address.
        iova: u64,
        /// Where it should lead.
        should: u64,
    },
    /// It should not be there and is.
    Extra {
        /// Its I/O virtual address.
        iova: u64,
        /// Where it leads.
        physical: u64,
    },
    /// It leads elsewhere.
    Elsewhere {
        /// Its I/O virtual address.
        iova: u64,
        /// Where it should lead.
        should: u64,
        /// Where it leads.
        physical: u64,
    },
    /// It cannot be read, or not be written to.
    Rights {
        /// Its I/O virtual address.
        iova: u64,
        /// What it is.
        page: IoPage,
    },
}

impl Difference {
    /// Its kind in a word.
    #[must_use]
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Missing { .. } => "missing",
            Self::Extra { .. } => "extra",
            Self::Elsewhere { .. } => "elsewhere",
            Self::Rights { .. } => "rights",
        }
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing { iova, should } => {
                write!(f, "{iova:#x} is missing and should lead to {should:#x}")
            }
            Self::Extra { iova, physical } => {
                write!(
                    f,
                    "{iova:#x} should not be there and leads to {physical:#x}"
                )
            }
            Self::Elsewhere {
                iova,
                should,
                physical,
            } => write!(f, "{iova:#x} leads to {physical:#x} and not to {should:#x}"),
            Self::Rights { iova, page } => {
                write!(f, "{iova:#x}: read {}, write {}", page.read, page.write)
            }
        }
    }
}

/// All differences, by address.
#[must_use]
pub fn between(held: &IoPageTable, should: &Pages) -> Vec<Difference> {
    let mut found = Vec::new();
    for (&iova, &page) in &held.pages {
        let physical = page.physical;
        match should.get(&iova) {
            None => found.push(Difference::Extra { iova, physical }),
            Some(&should) if should != physical => found.push(Difference::Elsewhere {
                iova,
                should,
                physical,
            }),
            Some(_) if !(page.read && page.write) => found.push(Difference::Rights { iova, page }),
            Some(_) => {}
        }
    }
    let missing = should
        .iter()
        .filter(|(iova, _)| !held.pages.contains_key(iova));
    found.extend(missing.map(|(&iova, &should)| Difference::Missing { iova, should }));
    found
}

/// How many pages of each BAR are held, by function and number, wherever they are.
#[must_use]
pub fn bars_in(held: &IoPageTable, facts: &Facts) -> BTreeMap<(String, usize), usize> {
    let mut found = BTreeMap::new();
    for page in held.pages.values() {
        for (name, function) in &facts.functions {
            let mut bars = function.bars.iter();
            if let Some((bar, _)) = bars.find(|(_, range)| range.contains(&page.physical)) {
                let count: &mut usize = found.entry((name.clone(), *bar)).or_default();
                *count += 1;
            }
        }
    }
    found
}

/// What is said of those that `held` serves and is not so, in words: a BAR that is mapped has to be
/// there with each page that can be mapped, one that is unavailable with none, and one that is
/// partly there with some. Of each of the others' BARs something has to be said.
#[must_use]
pub fn untrue(
    pairs: &[Pair],
    functions: &[String],
    held: &IoPageTable,
    facts: &Facts,
) -> Vec<String> {
    let bars = bars_in(held, facts);
    let mut found = Vec::new();
    for pair in pairs.iter().filter(|pair| functions.contains(&pair.from)) {
        let there = bars.get(&(pair.to.clone(), pair.bar)).copied();
        let there = there.unwrap_or_default();
        let function = facts.functions.get(&pair.to);
        let all = function.map_or(0, |function| function.mappable_pages(pair.bar));
        let holds = match &*pair.reach {
            "mapped" => there == all && all > 0,
            "partly" => 0 < there && there < all,
            _ => there == 0,
        };
        if !holds {
            let Pair {
                from,
                to,
                bar,
                reach,
            } = pair;
            found.push(format!(
                "{from} -> {to} BAR{bar} is said to be {reach}, and {there} of {all} pages are held"
            ));
        }
    }
    for from in functions {
        for (to, function) in facts.functions.iter().filter(|(to, _)| *to != from) {
            for bar in function.bars.keys() {
                let told = pairs
                    .iter()
                    .filter(|pair| (&pair.from, &pair.to, pair.bar) == (from, to, *bar));
                let told = told.count();
                if told != 1 {
                    found.push(format!("{from} -> {to} BAR{bar} is told of {told} times"));
                }
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::witness::rule::pages;
    use crate::witness::rule::tests::{all, facts, segment, told};
    use crate::witness::told::Segment;

    const BAR: u64 = 0xfd00_0000;

    /// Two pages of RAM, and all of the BAR of `a` at 0x8000 that can be mapped.
    fn held() -> IoPageTable {
        let rights = |physical| IoPage {
            physical,
            read: true,
            write: true,
        };
        let pages = [
            (0, 0x7000),
            (0x1000, 0x3000),
            (0x8000, BAR),
            (0xa000, BAR + 0x2000),
            (0xb000, BAR + 0x3000),
        ];
        IoPageTable {
            function: "a".to_owned(),
            root: 0,
            pages: pages.map(|(at, physical)| (at, rights(physical))).into(),
        }
    }

    fn view() -> [Segment; 2] {
        [
            segment(0, 0x1fff, "RAM 0", 0),
            segment(0x8000, 0xbfff, "a BAR2", 0),
        ]
    }

    fn found(held: &IoPageTable, view: &[Segment]) -> Vec<Difference> {
        between(held, &pages(&told(view), &facts(), &all()).unwrap())
    }

    #[test]
    fn a_table_that_holds_what_is_seen_differs_in_nothing() {
        assert_eq!(found(&held(), &view()), []);
    }

    #[test]
    fn a_page_too_few_too_many_elsewhere_or_without_a_right_is_found() {
        let mut short = held();
        short.pages.remove(&0xa000);
        let should = BAR + 0x2000;
        let missing = Difference::Missing {
            iova: 0xa000,
            should,
        };
        assert_eq!(found(&short, &view()), [missing]);

        let mut long = held();
        let page = long.pages[&0x8000];
        long.pages.insert(0xc000, page);
        let extra = Difference::Extra {
            iova: 0xc000,
            physical: BAR,
        };
        assert_eq!(found(&long, &view()), [extra]);

        let mut swapped = held();
        swapped.pages.insert(0x1000, page);
        let elsewhere = Difference::Elsewhere {
            iova: 0x1000,
            should: 0x3000,
            physical: BAR,
        };
        assert_eq!(found(&swapped, &view()), [elsewhere]);

        let mut read_only = held();
        let page = IoPage {
            write: false,
            ..page
        };
        read_only.pages.insert(0x8000, page);
        let rights = Difference::Rights { iova: 0x8000, page };
        assert_eq!(found(&read_only, &view()), [rights]);
    }

    #[test]
    fn a_view_from_before_or_after_a_move_is_found() {
        let [ram, bar] = view();
        let moved = Segment {
            first: 0x1_0000,
            last: 0x1_3fff,
            ..bar.clone()
        };
        // Three pages where it was, and three where it is.
        assert_eq!(found(&held(), &[ram.clone(), moved]).len(), 6);
        // It is off, and it is there the other way round.
        assert_eq!(found(&held(), std::slice::from_ref(&ram)).len(), 3);
        let shifted = Segment {
            offset: 0x2000,
            last: 0x9fff,
            ..bar
        };
        assert_eq!(found(&held(), &[ram, shifted]).len(), 4);
    }

    #[test]
    fn what_is_said_of_the_reach_has_to_be_so() {
        let pair = |to: &str, bar, reach: &str| Pair {
            from: "b".to_owned(),
            to: to.to_owned(),
            bar,
            reach: reach.to_owned(),
        };
        let wrong = |pairs: &[Pair], held: &IoPageTable| {
            untrue(pairs, &["b".to_owned()], held, &facts()).len()
        };
        let true_ones = [pair("a", 2, "mapped"), pair("b", 0, "unavailable")];
        assert_eq!(wrong(&true_ones, &held()), 0);
        assert_eq!(wrong(&[pair("a", 2, "partly")], &held()), 1);
        assert_eq!(wrong(&[pair("a", 2, "unavailable")], &held()), 1);
        assert_eq!(
            wrong(&[pair("a", 2, "mapped"), pair("b", 0, "mapped")], &held()),
            1
        );
        let mut part = held();
        part.pages.remove(&0xb000);
        assert_eq!(wrong(&[pair("a", 2, "partly")], &part), 0);
        assert_eq!(wrong(&[pair("a", 2, "mapped")], &part), 1);
        // Whom this table does not serve it says nothing of.
        let mut other = pair("a", 2, "unavailable");
        other.from = "a".to_owned();
        assert_eq!(wrong(&[other, pair("a", 2, "mapped")], &held()), 0);
        // Nothing is left out, and nothing told twice.
        assert_eq!(wrong(&[], &held()), 1);
        let twice = [pair("a", 2, "mapped"), pair("a", 2, "mapped")];
        assert_eq!(wrong(&twice, &held()), 1);
    }
}
