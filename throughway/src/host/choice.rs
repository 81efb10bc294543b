//! Which way of programming the IOMMU is taken.

use anyhow::{Error, Result, anyhow};
use clap::ValueEnum;
use serde::Serialize;

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Iommu {
    /// iommufd where host, kernel and devices offer all of it, type1 otherwise; says which and why
    Auto,
    /// VFIO groups and containers
    Type1,
    /// VFIO's character devices and address spaces of an iommufd
    Iommufd,
}

/// What was taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    Type1,
    Iommufd,
}

impl Kind {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Type1 => "type1",
            Self::Iommufd => "iommufd",
        }
    }
}

/// What was taken, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Choice {
    pub chosen: Kind,
    pub because: String,
}

/// That a BAR is not exported as a dma-buf: all else of iommufd may be there.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct BarNotExported(pub String);

/// The ways there are. Each leaves nothing behind where it fails.
pub trait Ways {
    /// What comes of them.
    type Opened;

    /// By groups and containers.
    fn type1(&mut self) -> Result<Self::Opened>;

    /// By character devices and an iommufd; every BAR has to be exported, or need not be.
    ///
    /// A BAR that had to be exported and is not is [`BarNotExported`].
    fn iommufd(&mut self, every_bar: bool) -> Result<Self::Opened>;

    /// Whether BARs are to be mapped at all.
    fn wants_bars(&self) -> bool;
}

/// Takes what was asked for, or the best there is.
pub fn choose<W: Ways>(asked: Iommu, ways: &mut W) -> Result<(W::Opened, Choice)> {
    let (opened, chosen, because) = match asked {
        Iommu::Type1 => (ways.type1()?, Kind::Type1, "it was asked for".to_owned()),
        Iommu::Iommufd => (
            ways.iommufd(false)?,
            Kind::Iommufd,
            "it was asked for".to_owned(),
        ),
        Iommu::Auto => best(ways)?,
    };
    Ok((opened, Choice { chosen, because }))
}

fn best<W: Ways>(ways: &mut W) -> Result<(W::Opened, Kind, String)> {
    let wants_bars = ways.wants_bars();
    let without: Error = match ways.iommufd(wants_bars) {
        Ok(opened) => {
            let bars = if wants_bars {
                "every BAR that can be mapped is exported as a dma-buf"
            } else {
                "no BAR is to be mapped"
            };
            let because = format!(
                "every function has a character device, the kernel maps files (Linux 6.13), and \
                 {bars}"
            );
            return Ok((opened, Kind::Iommufd, because));
        }
        Err(error) => error,
    };
    match ways.type1() {
        Ok(opened) => Ok((
            opened,
            Kind::Type1,
            format!("iommufd is not to be had: {without:#}"),
        )),
        Err(error) if without.is::<BarNotExported>() => {
            let opened = ways.iommufd(false)?;
            let because = format!(
                "type1, which would reach every BAR, is not to be had ({error:#}); by iommufd not \
                 all can be reached: {without:#}"
            );
            Ok((opened, Kind::Iommufd, because))
        }
        Err(error) => Err(anyhow!(
            "{error:#}\niommufd is not to be had either: {without:#}"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A host where each way works, or says why not.
    struct Host {
        type1: Result<(), &'static str>,
        iommufd: Result<(), &'static str>,
        bars: Result<(), &'static str>,
        wants_bars: bool,
    }

    const GOOD: Host = Host {
        type1: Ok(()),
        iommufd: Ok(()),
        bars: Ok(()),
        wants_bars: true,
    };

    impl Ways for Host {
        type Opened = Kind;

        fn type1(&mut self) -> Result<Kind> {
            self.type1.map_err(Error::msg)?;
            Ok(Kind::Type1)
        }

        fn iommufd(&mut self, every_bar: bool) -> Result<Kind> {
            self.iommufd.map_err(Error::msg)?;
            if every_bar {
                self.bars.map_err(|why| BarNotExported(why.to_owned()))?;
            }
            Ok(Kind::Iommufd)
        }

        fn wants_bars(&self) -> bool {
            self.wants_bars
        }
    }

    fn chosen(asked: Iommu, mut host: Host) -> Choice {
        let (opened, choice) = choose(asked, &mut host).unwrap();
        assert_eq!(opened, choice.chosen);
        choice
    }

    #[test]
    fn what_is_asked_for_is_taken_or_fails() {
        assert_eq!(chosen(Iommu::Type1, GOOD).chosen, Kind::Type1);
        let bars = Err("no dma-buf");
        let choice = chosen(Iommu::Iommufd, Host { bars, ..GOOD });
        assert_eq!(choice.chosen, Kind::Iommufd);
        let iommufd = Err("no cdev");
        let error = choose(Iommu::Iommufd, &mut Host { iommufd, ..GOOD }).unwrap_err();
        assert_eq!(error.to_string(), "no cdev");
    }

    #[test]
    fn auto_takes_iommufd_where_all_of_it_is_there() {
        let choice = chosen(Iommu::Auto, GOOD);
        assert_eq!(choice.chosen, Kind::Iommufd);
        assert!(choice.because.contains("dma-buf"), "{}", choice.because);
        let bars = Err("no dma-buf");
        let wants_bars = false;
        let choice = chosen(
            Iommu::Auto,
            Host {
                bars,
                wants_bars,
                ..GOOD
            },
        );
        assert_eq!(choice.chosen, Kind::Iommufd);
    }

    #[test]
    fn auto_takes_type1_where_something_is_missing_and_says_what() {
        let iommufd = Err("no cdev");
        let choice = chosen(Iommu::Auto, Host { iommufd, ..GOOD });
        assert_eq!(choice.chosen, Kind::Type1);
        assert_eq!(choice.because, "iommufd is not to be had: no cdev");
        let bars = Err("BAR0 is not exported");
        let choice = chosen(Iommu::Auto, Host { bars, ..GOOD });
        assert_eq!(choice.chosen, Kind::Type1);
        assert!(choice.because.contains("BAR0 is not exported"));
    }

    #[test]
    fn auto_takes_what_there_is_of_iommufd_rather_than_nothing() {
        let (type1, bars) = (Err("no groups"), Err("BAR0 is not exported"));
        let choice = chosen(
            Iommu::Auto,
            Host {
                type1,
                bars,
                ..GOOD
            },
        );
        assert_eq!(choice.chosen, Kind::Iommufd);
        for said in ["no groups", "BAR0 is not exported"] {
            assert!(choice.because.contains(said), "{}", choice.because);
        }
    }

    #[test]
    fn where_nothing_works_both_reasons_are_told() {
        let (type1, iommufd) = (Err("no groups"), Err("no cdev"));
        let error = choose(
            Iommu::Auto,
            &mut Host {
                type1,
                iommufd,
                ..GOOD
            },
        )
        .unwrap_err();
        assert!(error.to_string().starts_with("no groups"), "{error}");
        assert!(error.to_string().contains("no cdev"), "{error}");
    }
}
