//! Who may reach whom.

use std::collections::{BTreeMap, BTreeSet};
use std::str::FromStr;

use anyhow::{Result, bail};
use memory_map::{Filter, Label};
use vfio_sys::Bdf;

/// One value of `--p2p`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum P2pChoice {
    /// Every function may reach every other.
    All,
    /// No function may reach another.
    None,
    /// Who may reach whom has to.
    Required,
    /// These may reach each other.
    Group { name: String, members: Vec<Bdf> },
}

impl FromStr for P2pChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let Some(group) = text.strip_prefix("group=") else {
            return match text {
                "all" => Ok(Self::All),
                "none" => Ok(Self::None),
                "required" => Ok(Self::Required),
                other => Err(format!(
                    "{other:?} is none of all, none, required and group=NAME:BDF,BDF"
                )),
            };
        };
        // A BDF has colons too; a name has none.
        let (name, list) = match group.split_once(':') {
            Some((name, list)) if !name.is_empty() && !list.is_empty() => (name, list),
            _ => {
                return Err(format!(
                    "{text:?} has no name or no functions: group=NAME:BDF,BDF"
                ));
            }
        };
        let members: Result<Vec<Bdf>, _> = list.split(',').map(str::parse).collect();
        Ok(Self::Group {
            name: name.to_owned(),
            members: members.map_err(|error| error.to_string())?,
        })
    }
}

/// Who may reach whom, of the functions that were named.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// Whether a pair that may and does not is an error.
    pub required: bool,
    /// For each function those that it may reach and itself; none where each may reach all.
    peers: Option<BTreeMap<Bdf, BTreeSet<Bdf>>>,
}

impl Policy {
    /// What the values of `--p2p` say of `functions`.
    pub fn new(choices: &[P2pChoice], functions: &[Bdf]) -> Result<Self> {
        let mut required = false;
        let mut all = false;
        let mut peers: Option<BTreeMap<Bdf, BTreeSet<Bdf>>> = None;
        let mut names = BTreeSet::new();
        for choice in choices {
            match choice {
                P2pChoice::All => all = true,
                P2pChoice::Required => required = true,
                P2pChoice::None => {
                    peers.get_or_insert_default();
                }
                P2pChoice::Group { name, members } => {
                    if !names.insert(name) {
                        bail!("--p2p names the group {name} twice: give all its functions at once");
                    }
                    let peers = peers.get_or_insert_default();
                    for member in members {
                        if !functions.contains(member) {
                            bail!(
                                "--p2p puts {member} into the group {name}, but it is none of the \
                                 functions to be opened: name it among them too"
                            );
                        }
                        peers.entry(*member).or_default().extend(members);
                    }
                }
            }
        }
        if all && peers.is_some() {
            bail!(
                "--p2p all goes with neither none nor a group: it is what they make exceptions of"
            );
        }
        if required && names.is_empty() && peers.is_some() {
            bail!("--p2p none and --p2p required contradict each other");
        }
        Ok(Self { required, peers })
    }

    /// Whether `from` may reach `to`.
    pub fn may_reach(&self, from: Bdf, to: Bdf) -> bool {
        let Some(peers) = &self.peers else {
            return true;
        };
        peers.get(&from).is_some_and(|peers| peers.contains(&to))
    }

    /// Whether any function may reach another.
    pub fn lets_any_reach_another(&self) -> bool {
        let Some(peers) = &self.peers else {
            return true;
        };
        peers.values().any(|peers| peers.len() > 1)
    }

    /// The same for an address space that `function` is attached to. Functions with the same
    /// filter may share one.
    pub fn filter_of(&self, function: Bdf) -> Filter {
        let Some(peers) = &self.peers else {
            return Filter::All;
        };
        match peers.get(&function) {
            Some(peers) if peers.len() > 1 => {
                // A BAR's label is its function's name.
                let labels = peers.iter().map(|peer| Label::from(peer.to_string()));
                Filter::Labelled(labels.collect())
            }
            _ => Filter::RamOnly,
        }
    }

    /// Refuses to tell functions apart that the IOMMU cannot. `functions` are those of one IOMMU
    /// group that were named, `all` the names of everything in it.
    pub fn check_group(&self, group: &str, functions: &[Bdf], all: &[String]) -> Result<()> {
        for (place, one) in functions.iter().enumerate() {
            for other in functions.iter().skip(place.saturating_add(1)) {
                let together = self.may_reach(*one, *other) && self.may_reach(*other, *one);
                if together && self.filter_of(*one) == self.filter_of(*other) {
                    continue;
                }
                let members = functions.iter().map(Bdf::to_string).collect::<Vec<_>>();
                bail!(
                    "--p2p tells {one} and {other} apart, but {group} has both (and in all {}): \
                     the functions of an IOMMU group share an address space, and nothing keeps \
                     them from reaching each other. Put them into the same groups, such as --p2p \
                     group=NAME:{}",
                    all.join(", "),
                    members.join(",")
                );
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: &str = "0000:00:05.0";
    const B: &str = "0000:00:06.0";
    const C: &str = "0000:00:07.0";

    fn bdf(text: &str) -> Bdf {
        text.parse().unwrap()
    }

    fn policy(choices: &[&str]) -> Result<Policy> {
        let choices: Vec<P2pChoice> = choices.iter().map(|text| text.parse().unwrap()).collect();
        Policy::new(&choices, &[bdf(A), bdf(B), bdf(C)])
    }

    #[test]
    fn values_are_read_and_what_is_wrong_with_them_is_told() {
        assert_eq!("all".parse(), Ok(P2pChoice::All));
        let group: P2pChoice = "group=fast:00:05.0,0000:00:06.0".parse().unwrap();
        let members = vec![bdf(A), bdf(B)];
        let name = "fast".to_owned();
        assert_eq!(group, P2pChoice::Group { name, members });
        for wrong in [
            "",
            "some",
            "group=",
            "group=x",
            "group=:00:05.0",
            "group=x:",
        ] {
            let error = wrong.parse::<P2pChoice>().unwrap_err();
            assert!(error.contains("group=NAME:BDF,BDF"), "{error}");
        }
        let error = "group=x:00:05.0,nonsense".parse::<P2pChoice>().unwrap_err();
        assert!(error.contains("\"nonsense\" is no PCI address"), "{error}");
    }

    #[test]
    fn without_a_word_everyone_may_reach_everyone() {
        for policy in [policy(&[]), policy(&["all"]), policy(&["required"])] {
            let policy = policy.unwrap();
            assert!(policy.may_reach(bdf(A), bdf(B)) && policy.lets_any_reach_another());
            assert_eq!(policy.filter_of(bdf(A)), Filter::All);
        }
        assert!(policy(&["required", "all"]).unwrap().required);
    }

    #[test]
    fn none_leaves_ram_only() {
        let policy = policy(&["none"]).unwrap();
        assert!(!policy.may_reach(bdf(A), bdf(B)) && !policy.lets_any_reach_another());
        assert_eq!(policy.filter_of(bdf(A)), Filter::RamOnly);
    }

    #[test]
    fn groups_reach_within_themselves_and_may_overlap() {
        let policy = policy(&["group=x:00:05.0,00:06.0", "group=y:00:06.0,00:07.0"]).unwrap();
        for (from, to, may) in [(A, B, true), (B, A, true), (B, C, true), (A, C, false)] {
            assert_eq!(policy.may_reach(bdf(from), bdf(to)), may, "{from} {to}");
        }
        let labels = |of: &str| match policy.filter_of(bdf(of)) {
            Filter::Labelled(labels) => labels.len(),
            other => panic!("{other:?}"),
        };
        assert_eq!((labels(A), labels(B), labels(C)), (2, 3, 2));
        assert!(!policy.required);
    }

    #[test]
    fn who_is_in_no_group_reaches_nobody() {
        let policy = policy(&["group=x:00:05.0,00:06.0", "group=alone:00:07.0"]).unwrap();
        assert_eq!(policy.filter_of(bdf(C)), Filter::RamOnly);
        assert!(policy.lets_any_reach_another());
    }

    #[test]
    fn contradictions_are_refused() {
        for (choices, said) in [
            (&["all", "none"][..], "neither none nor a group"),
            (&["all", "group=x:00:05.0"], "neither none nor a group"),
            (&["none", "required"], "contradict"),
            (&["group=x:00:05.0", "group=x:00:06.0"], "group x twice"),
            (&["group=x:00:05.0,00:1f.0"], "0000:00:1f.0"),
        ] {
            let error = policy(choices).unwrap_err().to_string();
            assert!(error.contains(said), "{error}");
        }
    }

    #[test]
    fn an_iommu_group_is_not_divided_and_its_members_are_named() {
        let all = [A, B, "0000:00:06.1"].map(str::to_owned);
        let check = |choices: &[&str]| {
            let group = "IOMMU group 7";
            policy(choices)
                .unwrap()
                .check_group(group, &[bdf(A), bdf(B)], &all)
        };
        check(&[]).unwrap();
        check(&["group=x:00:05.0,00:06.0"]).unwrap();
        for choices in [
            &["none"][..],
            &["group=x:00:05.0"],
            &["group=x:00:05.0,00:06.0", "group=y:00:06.0,00:07.0"],
        ] {
            let error = check(choices).unwrap_err().to_string();
            for said in [
                "IOMMU group 7",
                A,
                B,
                "0000:00:06.1",
                "group=NAME:0000:00:05.0,0000",
            ] {
                assert!(error.contains(said), "{error}");
            }
        }
    }
}
