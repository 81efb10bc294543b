//! The configuration of the built kernel: a fragment that lives in the repository.
//!
//! `make olddefconfig` drops without a word what a source does not know or what lacks something it
//! depends on. So what came out is compared with what was asked for.

/// The fragment, as the repository has it.
pub(super) const FRAGMENT: &str = include_str!("../../kernel/iommufd.config");

/// The lines of the fragment that do not hold in a finished configuration, each with what holds
/// instead.
pub(super) fn not_taken(fragment: &str, finished: &str) -> Vec<String> {
    let mut lines = Vec::new();
    for (symbol, line) in wishes(fragment) {
        let is = finished
            .lines()
            .find(|line| symbol_of(line) == Some(symbol));
        // An option that is off is written as a comment, or not at all if nothing offers it.
        let holds = match is {
            Some(is) => is == line,
            None => line.starts_with('#'),
        };
        if !holds {
            let is = is.unwrap_or("unknown, or hidden by what it depends on");
            lines.push(format!("{line}  (it is: {is})"));
        }
    }
    lines
}

/// The options the fragment sets, on or off: the symbol and the whole line.
fn wishes(fragment: &str) -> impl Iterator<Item = (&str, &str)> {
    fragment
        .lines()
        .filter_map(|line| symbol_of(line).map(|symbol| (symbol, line)))
}

/// The symbol of `CONFIG_X=value` or `# CONFIG_X is not set`.
fn symbol_of(line: &str) -> Option<&str> {
    let symbol = match line.strip_prefix("# ") {
        Some(rest) => rest.strip_suffix(" is not set")?,
        None => line.split_once('=')?.0,
    };
    let of_symbols = |c: char| c.is_ascii_alphanumeric() || c == '_';
    (symbol.starts_with("CONFIG_") && symbol.chars().all(of_symbols)).then_some(symbol)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_that_names_an_option_sets_it_and_each_once() {
        let mut seen = std::collections::BTreeSet::new();
        for line in FRAGMENT.lines() {
            match symbol_of(line) {
                Some(symbol) => assert!(seen.insert(symbol), "twice: {line}"),
                None => assert!(!line.contains("CONFIG_"), "sets nothing: {line}"),
            }
        }
        assert!(seen.contains("CONFIG_IOMMUFD"), "{seen:?}");
    }

    #[test]
    fn what_is_not_taken_is_told_with_what_is_there() {
        let fragment = "# why\nCONFIG_A=y\nCONFIG_B=y\nCONFIG_C=4\n# CONFIG_D is not set\n\
                        # CONFIG_E is not set\n# CONFIG_F is not set\nCONFIG_G=y\n";
        let finished = "CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_C=8\nCONFIG_D=y\n\
                        # CONFIG_E is not set\nCONFIG_GG=y\n";
        assert_eq!(
            not_taken(fragment, finished),
            [
                "CONFIG_B=y  (it is: # CONFIG_B is not set)",
                "CONFIG_C=4  (it is: CONFIG_C=8)",
                "# CONFIG_D is not set  (it is: CONFIG_D=y)",
                "CONFIG_G=y  (it is: unknown, or hidden by what it depends on)",
            ]
        );
        assert!(not_taken(fragment, fragment).is_empty());
    }
}
