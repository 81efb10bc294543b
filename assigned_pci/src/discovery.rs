//! What a host's function consists of, as far as it can be believed: read once, when the function
//! is assigned.

use memory_map::{
    Access, ChangeError, Errno, Gpa, GpaRange, InvalidChange, Label, RegionKind, RegionName,
    RegionSpec, SubMapping,
};

use crate::bar::{Bar, BarKind};
use crate::command::Command;
use crate::config_space::{BARS, COMMAND, ConfigReader, HEADER_TYPE, VENDOR_DEVICE};
use crate::{BarIndex, BarProblem, FunctionError, FunctionOptions, HostBar, VendorDevice};

/// What device it is, if it is one that can be assigned.
pub(crate) fn read_ids(config: &ConfigReader<'_>) -> Result<VendorDevice, FunctionError> {
    let vendor_device = VendorDevice {
        vendor: config.u16(VENDOR_DEVICE)?,
        device: config.u16(VENDOR_DEVICE | 2)?,
    };
    if vendor_device.vendor == u16::MAX {
        return Err(FunctionError::ReadsAllOnes {
            function: config.function.to_owned(),
        });
    }
    // Without the bit that says that the device has several functions.
    match config.u8(HEADER_TYPE)? & 0x7f {
        0 => Ok(vendor_device),
        header_type => Err(FunctionError::NotAnEndpoint {
            function: config.function.to_owned(),
            header_type,
        }),
    }
}

/// The BARs that there are: the type bits from config space, the rest from the host.
pub(crate) fn read_bars(config: &ConfigReader<'_>) -> Result<Vec<(Bar, HostBar)>, FunctionError> {
    let mut found = Vec::new();
    let mut upper_half = false;
    for (index, register) in BarIndex::ALL.into_iter().zip((BARS..).step_by(4)) {
        if std::mem::take(&mut upper_half) {
            continue;
        }
        let behind = config
            .host
            .bar(index)
            .map_err(|errno| FunctionError::BarQuery {
                function: config.function.to_owned(),
                bar: index,
                errno: Errno::from(errno),
            })?;
        if let Some(behind) = behind {
            let bar = BarKind::from_register(config.u32(register)?)
                .and_then(|kind| Bar::new(index, kind, behind.size))
                .map_err(|problem| bar_error(config.function, index, problem))?;
            upper_half = bar.kind().is_64_bit();
            found.push((bar, behind));
        }
    }
    Ok(found)
}

/// Makes the physical command register `off`, unless it is.
pub(crate) fn quiesce(config: &ConfigReader<'_>, off: Command) -> Result<(), FunctionError> {
    if Command::new(config.u16(COMMAND)?).is_as_off_as(off) {
        return Ok(());
    }
    config
        .host
        .config_write(COMMAND, &off.to_bytes())
        .map_err(|errno| FunctionError::CommandWrite {
            function: config.function.to_owned(),
            errno: Errno::from(errno),
        })
}

pub(crate) fn bar_error(function: &str, bar: BarIndex, problem: BarProblem) -> FunctionError {
    FunctionError::Bar {
        function: function.to_owned(),
        bar,
        problem,
    }
}

/// The region of a memory BAR.
pub(crate) fn region(
    function: &str,
    bar: &Bar,
    sub_mappings: Vec<SubMapping>,
    options: &FunctionOptions,
) -> Result<RegionSpec, ChangeError> {
    let range = GpaRange::new(Gpa::new(bar.address()), bar.size()).map_err(InvalidChange::from)?;
    Ok(RegionSpec {
        name: RegionName::from(format!("{function} {}", bar.index())),
        range,
        priority: options.priority,
        kind: RegionKind::DeviceMemory,
        access: Access::ReadWrite,
        shareable: false,
        label: Some(Label::from(function)),
        sub_mappings,
    })
}
