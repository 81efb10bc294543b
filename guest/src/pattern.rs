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

/// Numbers that follow from a seed.
#[derive(Debug)]
pub struct Numbers {
    seed: u64,
    count: u64,
}

impl Numbers {
    /// Those of a seed.
    pub fn new(seed: u64) -> Self {
        Self { seed, count: 0 }
    }

    /// The next one.
    pub fn next(&mut self) -> u64 {
        self.count = self.count.wrapping_add(8);
        word(self.seed, self.count)
    }

    /// The next one below a limit, which is not zero.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit.max(1)
    }

    /// One of several, unless there is none.
    pub fn pick<'i, T>(&mut self, items: &'i [T]) -> Option<&'i T> {
        let at = self.below(u64::try_from(items.len()).unwrap_or(u64::MAX));
        items.get(usize::try_from(at).unwrap_or(usize::MAX))
    }
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

    #[test]
    fn the_same_seed_gives_the_same_numbers() {
        let four = |seed| {
            let mut numbers = Numbers::new(seed);
            [(); 4].map(|()| numbers.next())
        };
        assert_eq!(four(3), four(3));
        assert_ne!(four(3), four(4));
    }
}
