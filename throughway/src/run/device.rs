//! `--device`: a function that the guest gets.

use std::str::FromStr;

use vfio_sys::Bdf;

/// One value of `--device`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    pub bdf: Bdf,
    /// What it is called in what is printed.
    pub id: Option<String>,
}

impl Device {
    /// What it is called.
    pub fn name(&self) -> String {
        match &self.id {
            Some(id) => format!("{id} ({})", self.bdf),
            None => self.bdf.to_string(),
        }
    }
}

impl FromStr for Device {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (bdf, options) = match text.split_once(',') {
            Some((bdf, options)) => (bdf, Some(options)),
            None => (text, None),
        };
        let bdf: Bdf = bdf.parse().map_err(|error| format!("{error}"))?;
        let mut id = None;
        for option in options.into_iter().flat_map(|options| options.split(',')) {
            match option.split_once('=') {
                Some(("id", name)) if !name.is_empty() => id = Some(name.to_owned()),
                _ => return Err(format!("{option:?} is not id=NAME, which is all there is")),
            }
        }
        Ok(Self { bdf, id })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_may_have_a_name() {
        let device: Device = "0000:01:00.0".parse().unwrap();
        assert_eq!(device.name(), "0000:01:00.0");
        let device: Device = "01:00.0,id=gpu0".parse().unwrap();
        assert_eq!(device.name(), "gpu0 (0000:01:00.0)");
        for text in ["", "gpu0", "01:00.0,", "01:00.0,id=", "01:00.0,name=a"] {
            assert!(text.parse::<Device>().is_err(), "{text}");
        }
    }
}
