//! `iommu_witness`: whether the IOMMU holds what `throughway run` tells of its map.
//!
//! ```text
//! iommu_witness PID TOLD FUNCTIONS=REACHED...
//! ```
//!
//! PID is the process whose RAM it is, TOLD a file with what it has said, of which the last
//! snapshot counts, and each further argument an address space: its functions, and behind the `=`
//! those whose BARs are in it, each separated by commas. It prints one JSON object. The exit status
//! is 0 if everything is as it should be, 1 if not, and 2 if it could not be seen.

mod ram;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use lab::witness::context;
use lab::witness::differences::{bars_in, between, untrue};
use lab::witness::facts::{Facts, FunctionFacts, Limits};
use lab::witness::io_page_table::IoPageTable;
use lab::witness::rule;
use lab::witness::told::Told;
use serde_json::{Value, json};

/// What the guest's RAM is called.
const RAM: &str = "throughway-ram";
const DEBUG: &str = "/sys/kernel/debug/iommu/intel";
const DEVICES: &str = "/sys/bus/pci/devices";
/// How many differences of an address space are told; more are counted.
const EXAMPLES: usize = 8;

type Failure = Box<dyn std::error::Error>;

/// An address space, as the arguments have it.
struct Space {
    functions: Vec<String>,
    reached: BTreeSet<String>,
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match look(&arguments) {
        Ok((found, same)) => {
            println!("{found}");
            if same {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            }
        }
        Err(error) => {
            eprintln!("iommu_witness: {error}");
            ExitCode::from(2)
        }
    }
}

fn look(arguments: &[String]) -> Result<(Value, bool), Failure> {
    let [pid, told, spaces @ ..] = arguments else {
        return Err("give PID, TOLD and FUNCTIONS=REACHED".into());
    };
    let pid: u32 = pid.parse()?;
    let told = Told::last_of(&read(told)?).ok_or("nothing is told of the map")?;
    let spaces: Vec<Space> = spaces
        .iter()
        .map(|text| space(text))
        .collect::<Result<_, _>>()?;
    let first = spaces.first().and_then(|space| space.functions.first());
    let first = first.ok_or("there is no address space to look at")?;
    let mut functions = BTreeMap::new();
    for name in spaces.iter().flat_map(|space| &space.functions) {
        let folder = device(name);
        let config = fs::read(folder.join("config"))?;
        let facts = FunctionFacts::new(&read(folder.join("resource"))?, &config);
        functions.insert(name.clone(), facts);
    }
    let facts = Facts {
        ram: ram::physical_addresses(pid, RAM)?,
        functions,
        limits: limits(first)?,
    };
    let roots = context::roots(&read(Path::new(DEBUG).join("dmar_translation_struct"))?);
    let mut found = Vec::new();
    let mut same = true;
    for space in &spaces {
        let (one, well) = one_space(space, &told, &facts, &roots)?;
        found.push(one);
        same &= well;
    }
    Ok((json!({ "same": same, "spaces": found }), same))
}

/// What each domain that the functions of an address space are in holds.
fn one_space(
    space: &Space,
    told: &Told,
    facts: &Facts,
    roots: &BTreeMap<String, u64>,
) -> Result<(Value, bool), Failure> {
    let should = rule::pages(told, facts, &space.reached)?;
    let mut domains: BTreeMap<u64, Vec<String>> = BTreeMap::new();
    for function in &space.functions {
        let root = roots.get(function);
        let root = root.ok_or_else(|| format!("the IOMMU walks no table for {function}"))?;
        domains.entry(*root).or_default().push(function.clone());
    }
    let (mut found, mut same) = (Vec::new(), true);
    for (root, functions) in &domains {
        let first = functions.first().ok_or("a domain without functions")?;
        let held = table(first, *root)?;
        let differences = between(&held, &should);
        let untrue = untrue(&told.pairs, functions, &held, facts);
        same &= differences.is_empty() && untrue.is_empty();
        let examples = differences.iter().take(EXAMPLES);
        let mut kinds: BTreeMap<&str, usize> = BTreeMap::new();
        for difference in &differences {
            *kinds.entry(difference.kind()).or_default() += 1;
        }
        let bars: BTreeMap<String, usize> = bars_in(&held, facts)
            .into_iter()
            .map(|((function, bar), pages)| (format!("{function} BAR{bar}"), pages))
            .collect();
        found.push(json!({
            "functions": functions,
            "pages": held.pages.len(),
            "bars": bars,
            "differences": kinds,
            "examples": examples.map(ToString::to_string).collect::<Vec<_>>(),
            "untrue": untrue,
        }));
    }
    Ok((json!(found), same))
}

fn space(text: &str) -> Result<Space, Failure> {
    let parts = text.split_once('=');
    let (functions, reached) = parts.ok_or_else(|| format!("{text:?} has no ="))?;
    let names = |list: &str| {
        let names = list.split(',').filter(|name| !name.is_empty());
        names.map(str::to_owned).collect::<Vec<_>>()
    };
    Ok(Space {
        functions: names(functions),
        reached: names(reached).into_iter().collect(),
    })
}

fn device(function: &str) -> PathBuf {
    Path::new(DEVICES).join(function)
}

/// What is mapped for a function. The kernel shows it by its own books, so where the topmost table
/// is has to be what the context entry says.
fn table(function: &str, root: u64) -> Result<IoPageTable, Failure> {
    let folder = Path::new(DEBUG).join(function);
    let table = IoPageTable::read(&read(folder.join("domain_translation_struct"))?)?;
    if table.function != function || table.root != root {
        let (other, there) = (&table.function, table.root);
        let what = format!("the table of {function} at {root:#x} is {other}'s at {there:#x}");
        return Err(what.into());
    }
    Ok(table)
}

fn limits(function: &str) -> Result<Limits, Failure> {
    let folder = device(function);
    let reserved = read(folder.join("iommu_group/reserved_regions"))?;
    let capability = read(folder.join("iommu/intel-iommu/cap"))?;
    let limits = Limits::new(&reserved, &capability);
    Ok(limits.ok_or("the IOMMU's limits are not what they should look like")?)
}

fn read(path: impl AsRef<Path>) -> Result<String, Failure> {
    let path = path.as_ref();
    fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()).into())
}
