//! Contents that tell which test they are of, and which place in it.

/// The eight bytes at an offset (in bytes, a multiple of eight) of the pattern numbered `seed`.
pub fn word(seed: u64, offset: u64) -> u64 {
    // The finisher of SplitMix64: neighbours and neighbouring seeds have nothing in common.
    let mut z = seed
        .wrapping_mul(0x9e37_79b9_7f4a_7c15)
        .wrapping_add(offset)
        .wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_word_of_some_patterns_is_there_twice() {
        let mut words: Vec<u64> = (0..64)
            .flat_map(|seed| (0..512).map(move |at| word(seed, at * 8)))
            .collect();
        words.sort_unstable();
        words.dedup();
        assert_eq!(words.len(), 64 * 512);
    }
}
