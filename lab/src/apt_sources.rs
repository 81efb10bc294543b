//! Where the machine's own apt gets its packages from.
//!
//! The lab writes no mirror down: it reads the sources that are configured here, in both of apt's
//! formats, keeps those of the running release itself, and adds that release's `-backports` suite
//! on the same mirror.

use std::fmt::Write as _;

/// One source of binary packages: a stanza of a `.sources` file or a line of a `.list` file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    /// Where; usually one.
    pub uris: Vec<String>,
    /// The suites, such as `bookworm-updates`.
    pub suites: Vec<String>,
    /// The components, such as `main`.
    pub components: Vec<String>,
    /// Further fields (`Signed-By`, `Trusted`, ...) with their text as it stands, continuation
    /// lines included.
    pub fields: Vec<(String, String)>,
}

/// Parses a `.sources` file (deb822). Stanzas that are disabled, malformed or without binary
/// packages are passed over, as apt does.
#[must_use]
pub fn parse_deb822(text: &str) -> Vec<Source> {
    let mut sources = Vec::new();
    let mut stanza: Vec<(String, String)> = Vec::new();
    for line in text.lines().chain([""]) {
        if line.starts_with('#') {
            continue;
        }
        if line.trim().is_empty() {
            sources.extend(source_from_stanza(std::mem::take(&mut stanza)));
        } else if line.starts_with([' ', '\t']) {
            if let Some((_, value)) = stanza.last_mut() {
                value.push('\n');
                value.push_str(line);
            }
        } else if let Some((name, value)) = line.split_once(':') {
            stanza.push((name.trim().to_owned(), value.trim().to_owned()));
        }
    }
    sources
}

fn source_from_stanza(stanza: Vec<(String, String)>) -> Option<Source> {
    let words = |value: &str| value.split_whitespace().map(str::to_owned).collect();
    let mut source = Source {
        uris: vec![],
        suites: vec![],
        components: vec![],
        fields: vec![],
    };
    let mut binary = false;
    for (name, value) in stanza {
        match name.to_ascii_lowercase().as_str() {
            "types" => binary = value.split_whitespace().any(|word| word == "deb"),
            "uris" => source.uris = words(&value),
            "suites" => source.suites = words(&value),
            "components" => source.components = words(&value),
            "enabled" if matches!(value.as_str(), "no" | "false" | "0" | "off" | "without") => {
                return None;
            }
            "enabled" => {}
            _ => source.fields.push((name, value)),
        }
    }
    (binary && !source.uris.is_empty() && !source.suites.is_empty()).then_some(source)
}

/// Parses a `.list` file (one source a line). Lines that are comments, malformed or without binary
/// packages are passed over.
#[must_use]
pub fn parse_one_line(text: &str) -> Vec<Source> {
    text.lines().filter_map(source_from_line).collect()
}

/// `deb [name=value ...] URI SUITE COMPONENT ...`
fn source_from_line(line: &str) -> Option<Source> {
    let line = line.split('#').next()?.trim();
    let rest = line.strip_prefix("deb")?;
    if !rest.starts_with([' ', '\t']) {
        return None;
    }
    let rest = rest.trim_start();
    let (options, rest) = match rest.strip_prefix('[') {
        Some(inside) => inside.split_once(']')?,
        None => ("", rest),
    };
    let fields = options
        .split_whitespace()
        .filter_map(|option| option.split_once('='))
        .map(|(name, value)| (field_of_option(name), value.replace(',', " ")))
        .collect();
    let mut words = rest.split_whitespace().map(str::to_owned);
    Some(Source {
        uris: vec![words.next()?],
        suites: vec![words.next()?],
        components: words.collect(),
        fields,
    })
}

/// The deb822 field of a one-line option; apt ignores case, only four differ in more than that.
fn field_of_option(option: &str) -> String {
    match option.to_ascii_lowercase().as_str() {
        "arch" => "Architectures".to_owned(),
        "lang" => "Languages".to_owned(),
        "target" => "Targets".to_owned(),
        _ => option.to_owned(),
    }
}

/// The sources that carry the release itself (its suites, component `main`), reduced to those, with
/// the `-backports` suite and the `further` ones added on the release's mirror unless they are
/// there already.
#[must_use]
pub fn of_release(all: &[Source], codename: &str, further: &[&str]) -> Vec<Source> {
    let own = |suite: &str| {
        suite == codename
            || suite
                .strip_prefix(codename)
                .is_some_and(|tail| matches!(tail, "-updates" | "-security" | "-backports"))
    };
    let mut kept: Vec<Source> = all
        .iter()
        .filter(|source| source.components.iter().any(|c| c == "main"))
        .filter(|source| !source.uris.iter().any(|uri| uri.starts_with("cdrom:")))
        .map(|source| Source {
            suites: source.suites.iter().filter(|s| own(s)).cloned().collect(),
            components: vec!["main".to_owned()],
            ..source.clone()
        })
        .filter(|source| !source.suites.is_empty())
        .collect();
    let backports = format!("{codename}-backports");
    for wanted in std::iter::once(backports.as_str()).chain(further.iter().copied()) {
        if kept.iter().any(|s| s.suites.iter().any(|s| s == wanted)) {
            continue;
        }
        for source in &mut kept {
            if source.suites.iter().any(|suite| suite == codename) {
                source.suites.push(wanted.to_owned());
            }
        }
    }
    kept
}

/// Writes sources in deb822 form, for their source packages too.
#[must_use]
pub fn to_deb822(sources: &[Source]) -> String {
    let mut text = String::new();
    for source in sources {
        let mut field = |name: &str, value: &str| {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "{name}: {value}");
        };
        field("Types", "deb deb-src");
        field("URIs", &source.uris.join(" "));
        field("Suites", &source.suites.join(" "));
        field("Components", &source.components.join(" "));
        for (name, value) in &source.fields {
            field(name, value);
        }
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEB822: &str = "\
# a comment
Types: deb deb-src
# another, inside
URIs: http://mirror.invalid/debian
Suites: bookworm bookworm-updates
Components: main contrib
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 abc

Types: deb-src
URIs: http://mirror.invalid/debian
Suites: bookworm
Components: main

Types: deb
Enabled: no
URIs: http://mirror.invalid/off
Suites: bookworm
Components: main

types: deb
uris: http://mirror.invalid/security
suites: bookworm-security
components: main";

    #[test]
    fn deb822_keeps_keys_and_passes_over_the_rest() {
        let sources = parse_deb822(DEB822);
        assert_eq!(sources.len(), 2);
        assert_eq!(sources[0].suites, ["bookworm", "bookworm-updates"]);
        assert_eq!(
            sources[0].fields,
            [(
                "Signed-By".to_owned(),
                "\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n abc".to_owned()
            )]
        );
        assert_eq!(sources[1].uris, ["http://mirror.invalid/security"]);
    }

    #[test]
    fn deb822_is_read_back_as_written() {
        let sources = parse_deb822(DEB822);
        assert_eq!(parse_deb822(&to_deb822(&sources)), sources);
    }

    #[test]
    fn one_line_options_become_fields() {
        let sources = parse_one_line(
            "deb [arch=amd64,arm64 signed-by=/k.gpg] http://mirror.invalid/debian bookworm main contrib # x\n\
             deb-src http://mirror.invalid/debian bookworm main\n\
             #deb http://mirror.invalid/debian bookworm main\n\
             deb\n\
             debris http://mirror.invalid bookworm main\n\
             deb [broken http://mirror.invalid bookworm main\n\
             deb\thttp://mirror.invalid/debian\tbookworm-updates\tmain\n",
        );
        assert_eq!(sources.len(), 2);
        assert_eq!(
            sources[0].fields,
            [
                ("Architectures".to_owned(), "amd64 arm64".to_owned()),
                ("signed-by".to_owned(), "/k.gpg".to_owned())
            ]
        );
        assert_eq!(sources[0].components, ["main", "contrib"]);
        assert_eq!(sources[1].suites, ["bookworm-updates"]);
    }

    #[test]
    fn only_the_release_is_kept_and_further_suites_are_added_once() {
        let all = parse_one_line(
            "deb http://mirror.invalid/debian bookworm main contrib\n\
             deb http://mirror.invalid/security bookworm-security main\n\
             deb http://other.invalid/ bookworm stable\n\
             deb http://other.invalid/ bookworm-pgdg main\n\
             deb cdrom:[Debian]/ bookworm main\n",
        );
        let kept = of_release(&all, "bookworm", &["newer"]);
        assert_eq!(kept.len(), 2);
        assert_eq!(kept[0].suites, ["bookworm", "bookworm-backports", "newer"]);
        assert_eq!(kept[0].components, ["main"]);
        assert_eq!(kept[1].suites, ["bookworm-security"]);
        assert_eq!(
            of_release(&kept[..1], "bookworm", &["bookworm-backports"])[0]
                .suites
                .len(),
            2
        );
    }
}
