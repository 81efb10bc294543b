//! Bytes to be moved: different for every transfer, so that what arrives can only have come from
//! there.

use assigned_pci::{AssignedFunction, BarIndex};

/// `len` bytes that depend on `seed` and look random.
pub fn pattern(seed: u64, len: usize) -> Vec<u8> {
    // SplitMix64, one step for eight bytes.
    let mut state = seed;
    let mut bytes = Vec::with_capacity(len.next_multiple_of(8));
    while bytes.len() < len {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = state;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bytes.extend((word ^ (word >> 31)).to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// Reads a piece of a BAR as the guest's processor would, without the IOMMU.
pub fn read_bar(function: &AssignedFunction, bar: BarIndex, offset: u64, len: usize) -> Vec<u8> {
    let mut data = vec![0; len];
    // What the host refuses reads as all ones, and is then not what was expected.
    let _refused = function.bar_read(bar, offset, &mut data);
    data
}

/// In words: how two runs of bytes compare.
pub fn comparison(found: &[u8], expected: &[u8]) -> String {
    let differ = found.iter().zip(expected).filter(|(a, b)| a != b).count();
    match differ {
        0 => format!("all {} bytes arrived", expected.len()),
        all if all == expected.len() => "not one byte arrived".into(),
        some => format!("{some} of {} bytes differ", expected.len()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_differ_by_seed_and_have_the_length_asked_for() {
        assert_eq!(pattern(1, 13).len(), 13);
        assert_eq!(pattern(1, 16)[..13], pattern(1, 13)[..]);
        assert_ne!(pattern(1, 16), pattern(2, 16));
    }
}
