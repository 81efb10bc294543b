//! The address of a PCI function: domain, bus, device, function.

use std::fmt;
use std::str::FromStr;

/// The address of a PCI function on its host, such as `0000:00:05.0`.
///
/// ```
/// use vfio_sys::Bdf;
///
/// let bdf: Bdf = "00:05.0".parse()?;
/// assert_eq!(bdf.to_string(), "0000:00:05.0");
/// # Ok::<(), vfio_sys::InvalidBdf>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Bdf {
    // In this order, so that BDFs sort as `lspci` lists them.
    domain: u32,
    bus: u8,
    device: u8,
    function: u8,
}

/// What was given is no BDF.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{given:?} is no PCI address: one looks like 0000:00:05.0 or 00:05.0 (domain, bus, device up \
     to 1f and function up to 7, in hexadecimal); `lspci -D` lists them"
)]
pub struct InvalidBdf {
    /// What was given.
    pub given: String,
}

impl Bdf {
    /// The function `function` (0 to 7) of the device `device` (0 to 31), or `None` for numbers
    /// beyond those. Domains may have more than 16 bits (those of Intel VMD do).
    #[must_use]
    pub const fn new(domain: u32, bus: u8, device: u8, function: u8) -> Option<Self> {
        if device > 31 || function > 7 {
            return None;
        }
        Some(Self {
            domain,
            bus,
            device,
            function,
        })
    }

    /// The domain, called segment in ACPI.
    #[must_use]
    pub const fn domain(self) -> u32 {
        self.domain
    }

    /// The bus.
    #[must_use]
    pub const fn bus(self) -> u8 {
        self.bus
    }

    /// The device, 0 to 31.
    #[must_use]
    pub const fn device(self) -> u8 {
        self.device
    }

    /// The function, 0 to 7.
    #[must_use]
    pub const fn function(self) -> u8 {
        self.function
    }

    fn parse(text: &str) -> Option<Self> {
        let (bus_device, function) = text.split_once('.')?;
        let (domain_bus, device) = bus_device.rsplit_once(':')?;
        let (domain, bus) = match domain_bus.split_once(':') {
            Some((domain, bus)) => (hex(domain, 4..=8)?, bus),
            None => (0, domain_bus),
        };
        let byte = |text, digits: usize| u8::try_from(hex(text, digits..=digits)?).ok();
        Self::new(domain, byte(bus, 2)?, byte(device, 2)?, byte(function, 1)?)
    }
}

/// A hexadecimal number of so many digits and nothing else (no sign, which
/// [`u32::from_str_radix`] would take).
fn hex(text: &str, digits: std::ops::RangeInclusive<usize>) -> Option<u32> {
    let plain = digits.contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    plain.then(|| u32::from_str_radix(text, 16).ok())?
}

impl FromStr for Bdf {
    type Err = InvalidBdf;

    fn from_str(text: &str) -> Result<Self, InvalidBdf> {
        Self::parse(text).ok_or_else(|| InvalidBdf {
            given: text.to_owned(),
        })
    }
}

impl fmt::Display for Bdf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:04x}:{:02x}:{:02x}.{}",
            self.domain, self.bus, self.device, self.function
        )
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn both_forms_are_taken() {
        let bdf = Bdf::new(0, 0, 5, 0).unwrap();
        assert_eq!("0000:00:05.0".parse(), Ok(bdf));
        assert_eq!("00:05.0".parse(), Ok(bdf));
        assert_eq!(
            "10000:E1:1f.7".parse(),
            Ok(Bdf::new(0x10000, 0xe1, 31, 7).unwrap())
        );
    }

    #[test]
    fn anything_else_is_refused_and_shown_what_one_looks_like() {
        for given in [
            "",
            "5",
            "00:05",
            "00:05.8",
            "00:20.0",
            "0:05.0",
            "00:5.0",
            "000:00:05.0",
            "0000:00:05.0 ",
            "0000:00:05.00",
            "0000:00:+5.0",
            "+000:00:05.0",
            "0000:0g:05.0",
            "0000:00:05:0",
            "123456789:00:05.0",
            "0000:00:00:05.0",
            "é0:05.0",
        ] {
            let error = given.parse::<Bdf>().unwrap_err();
            assert_eq!(error.given, given);
            assert!(error.to_string().contains("0000:00:05.0"), "{error}");
        }
    }

    #[test]
    fn they_sort_as_lspci_lists_them() {
        let mut list: Vec<Bdf> = ["0001:00:00.0", "0000:00:1f.0", "0000:00:05.7", "00:05.0"]
            .map(|text| text.parse().unwrap())
            .into();
        list.sort();
        let texts: Vec<String> = list.iter().map(Bdf::to_string).collect();
        assert_eq!(
            texts,
            [
                "0000:00:05.0",
                "0000:00:05.7",
                "0000:00:1f.0",
                "0001:00:00.0"
            ]
        );
    }

    proptest! {
        #[test]
        fn what_is_displayed_is_parsed(domain: u32, bus: u8, device in 0u8..32, function in 0u8..8) {
            let bdf = Bdf::new(domain, bus, device, function).unwrap();
            prop_assert_eq!(bdf.to_string().parse(), Ok(bdf));
        }

        #[test]
        fn no_text_panics(text: String) {
            let _: Result<Bdf, InvalidBdf> = text.parse();
        }
    }
}
