//! What a controller and its first namespace say of themselves (section 5.15).

use super::prp::{self, PAGE};

/// How large the data are that Identify gives.
pub(super) const SIZE: usize = 4096;

/// A controller and its first namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NvmeIdentity {
    /// The model, as it calls itself; what is not printable ASCII is left out.
    pub model: String,
    /// The size of a block in bytes: 512, 1024, 2048 or 4096.
    pub block_size: u64,
    /// How many blocks the first namespace has.
    pub blocks: u64,
    /// How many bytes one command can move, in whole blocks.
    pub max_transfer: u64,
}

/// What is needed of the controller's data.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct ControllerData {
    pub model: String,
    pub max_transfer: u64,
}

impl ControllerData {
    pub fn read(data: &[u8; SIZE]) -> Self {
        let model: String = data[24..64]
            .iter()
            .filter(|byte| matches!(byte, 0x20..=0x7e))
            .map(|byte| char::from(*byte))
            .collect();
        // MDTS: a power of two, in pages; zero for no limit.
        let limit = match data[77] {
            0 => u64::MAX,
            power => PAGE.checked_shl(power.into()).unwrap_or(0),
        };
        // A limit that shifts everything out is above ours.
        let limit = if limit == 0 { u64::MAX } else { limit };
        Self {
            model: model.trim().to_owned(),
            max_transfer: limit.min(prp::MOST),
        }
    }
}

/// What is needed of the namespace's data.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct NamespaceData {
    pub block_size: u64,
    pub blocks: u64,
}

impl NamespaceData {
    /// The data, or what is not supported of what they say.
    pub fn read(data: &[u8; SIZE]) -> Result<Self, String> {
        let [a, b, c, d, e, f, g, h, ..] = *data;
        let blocks = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
        if blocks == 0 {
            return Err("has no namespace 1, or an empty one".into());
        }
        // FLBAS: bits 3:0 and, since 2.0, 6:5 above them.
        let format = usize::from(data[26] & 0xf | (data[26] & 0x60) >> 1);
        let at = 128 + 4 * format;
        let [metadata_low, metadata_high, power, _] = data
            .get(at..)
            .and_then(|rest| rest.first_chunk())
            .copied()
            .unwrap_or_default();
        if (metadata_low, metadata_high) != (0, 0) {
            return Err("has a namespace with metadata".into());
        }
        if !(9..=12).contains(&power) {
            return Err(format!("has blocks of 2^{power} bytes, not 512 to 4096"));
        }
        let block_size = 1_u64 << power;
        if blocks.checked_mul(block_size).is_none() {
            return Err(format!("says that it has {blocks:#x} blocks"));
        }
        Ok(Self { block_size, blocks })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn namespace(
        blocks: u64,
        format: u8,
        entry: (usize, [u8; 4]),
    ) -> Result<NamespaceData, String> {
        let mut data = [0; SIZE];
        data[..8].copy_from_slice(&blocks.to_le_bytes());
        data[26] = format;
        data[128 + 4 * entry.0..][..4].copy_from_slice(&entry.1);
        NamespaceData::read(&data)
    }

    #[test]
    fn the_format_in_use_counts() {
        let found = namespace(100, 3, (3, [0, 0, 12, 0])).unwrap();
        assert_eq!((found.blocks, found.block_size), (100, 4096));
        // Formats above 16 have their upper bits apart.
        let found = namespace(7, 0x21, (17, [0, 0, 9, 0])).unwrap();
        assert_eq!(found.block_size, 512);
    }

    #[test]
    fn nonsense_is_refused() {
        assert!(namespace(0, 0, (0, [0, 0, 9, 0])).is_err());
        assert!(namespace(u64::MAX, 0, (0, [0, 0, 9, 0])).is_err());
        assert!(namespace(9, 0, (0, [8, 0, 9, 0])).is_err());
        for power in [0, 8, 13, 64, 255] {
            let error = namespace(9, 0, (0, [0, 0, power, 0])).unwrap_err();
            assert!(error.contains(&power.to_string()), "{error}");
        }
        assert!(NamespaceData::read(&[0xff; SIZE]).is_err());
    }

    #[test]
    fn every_limit_of_a_transfer_is_taken() {
        let mut data = [0; SIZE];
        data[24..64].fill(b' ');
        data[24..30].copy_from_slice(b"a\nb\x1b\xff~");
        assert_eq!(ControllerData::read(&data).model, "ab~");
        for (power, most) in [(0, prp::MOST), (1, 0x2000), (7, 0x8_0000), (9, prp::MOST)] {
            data[77] = power;
            assert_eq!(ControllerData::read(&data).max_transfer, most, "{power}");
        }
        for power in [51, 52, 63, 64, 255] {
            data[77] = power;
            assert_eq!(ControllerData::read(&data).max_transfer, prp::MOST);
        }
    }
}
