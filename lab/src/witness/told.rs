//! What `throughway run --json` tells at SIGUSR1.

use serde_json::Value;

/// A stretch of addresses in which the guest sees one region.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    /// Its first address.
    pub first: u64,
    /// Its last one.
    pub last: u64,
    /// The region's name: of a BAR `FUNCTION BARn`.
    pub region: String,
    /// Whether it is RAM.
    pub ram: bool,
    /// Where in the region it starts, in bytes.
    pub offset: u64,
}

/// Whether one function reaches a BAR of another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pair {
    /// The one.
    pub from: String,
    /// The other.
    pub to: String,
    /// The BAR's number.
    pub bar: usize,
    /// `mapped`, `partly` or `unavailable`.
    pub reach: String,
}

/// All of it that is compared.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Told {
    /// By address.
    pub view: Vec<Segment>,
    /// Every ordered pair of functions, by BAR.
    pub pairs: Vec<Pair>,
}

impl Told {
    /// Reads the object; `None` where it has other fields.
    #[must_use]
    pub fn read(value: &Value) -> Option<Self> {
        let list = |name| value.get(name).and_then(Value::as_array);
        let view = list("view")?.iter().map(segment);
        let pairs = list("pairs")?.iter().map(pair);
        Some(Self {
            view: view.collect::<Option<_>>()?,
            pairs: pairs.collect::<Option<_>>()?,
        })
    }

    /// Reads the last such object, each in a line of its own, from all that was said.
    #[must_use]
    pub fn last_of(said: &str) -> Option<Self> {
        let mut lines = said.lines().rev();
        lines.find_map(|line| Self::read(&serde_json::from_str(line).ok()?))
    }
}

fn segment(value: &Value) -> Option<Segment> {
    Some(Segment {
        first: value.get("first")?.as_u64()?,
        last: value.get("last")?.as_u64()?,
        region: value.get("region")?.as_str()?.to_owned(),
        ram: match value.get("kind")?.as_str()? {
            "ram" => true,
            "device" => false,
            _ => return None,
        },
        offset: value.get("offset")?.as_u64()?,
    })
}

fn pair(value: &Value) -> Option<Pair> {
    let text = |name| Some(value.get(name)?.as_str()?.to_owned());
    Some(Pair {
        from: text("from")?,
        to: text("to")?,
        bar: usize::try_from(value.get("bar")?.as_u64()?).ok()?,
        reach: text("reach")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_of_several_is_read_among_other_lines() {
        let said = "throughway: something\r\n\
            {\"view\":[],\"functions\":[],\"pairs\":[]}\r\n\
            {\"view\":[{\"first\":0,\"last\":4095,\"region\":\"RAM 0\",\"kind\":\"ram\",\"offset\":0}],\
            \"pairs\":[{\"from\":\"a\",\"to\":\"b\",\"bar\":2,\"reach\":\"mapped\",\"reason\":null}]}\r\n\
            {\"ended\":\"told\"}\r\n";
        let told = Told::last_of(said).unwrap();
        assert_eq!(told.view[0].last, 4095);
        assert!(told.view[0].ram);
        assert_eq!((told.pairs[0].bar, &*told.pairs[0].reach), (2, "mapped"));
        assert_eq!(Told::last_of("{\"ended\":\"told\"}"), None);
        assert_eq!(Told::last_of("{\"view\":[{}],\"pairs\":[]}"), None);
    }
}
