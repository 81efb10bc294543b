//! Disjoint stretches of addresses in order: the cells of the view, the entries of a ledger, the
//! pages of a region.
//!
//! ```text
//!   starts of blocks   [0, 0x9000, 0x24000, ...]
//!                       |    |        |
//!   blocks              v    v        v
//!     starts           [0, 0x1000, ..]  up to BLOCK, searched without touching
//!     values           [V, V, ..]       the values
//! ```
//! What the map asks is mostly "what lies at or below this address", and then the next ones. Two
//! binary searches over plain numbers answer that, and a walk goes through memory in order. A
//! stretch that is put in or taken out moves half a block at the most; blocks that have become
//! small are joined, so the memory depends on how much there is, not on what there was.

/// A value that knows where its stretch ends.
pub(crate) trait Stretch {
    /// The last address; not below the first.
    fn last(&self) -> u64;
}

/// How many stretches a block holds at the most.
const BLOCK: usize = 64;

/// Two neighbours that together hold no more than this become one block.
const SMALL: usize = BLOCK / 2;

#[derive(Debug, Clone)]
struct Block<V> {
    /// Sorted, never empty.
    starts: Vec<u64>,
    /// One for each start.
    values: Vec<V>,
}

/// Stretches by their first address.
#[derive(Debug, Clone)]
pub(crate) struct Stretches<V> {
    /// The first start of each block.
    firsts: Vec<u64>,
    blocks: Vec<Block<V>>,
    len: usize,
}

impl<V> Default for Stretches<V> {
    fn default() -> Self {
        Self {
            firsts: Vec::new(),
            blocks: Vec::new(),
            len: 0,
        }
    }
}

impl<V> Stretches<V> {
    pub(crate) const fn len(&self) -> usize {
        self.len
    }

    pub(crate) const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The block in which `address` would lie.
    fn block_of(&self, address: u64) -> usize {
        let above = self.firsts.partition_point(|&first| first <= address);
        above.saturating_sub(1)
    }

    /// The block and the place in it of the last stretch that starts at or below `address`.
    fn place_at_or_below(&self, address: u64) -> Option<(usize, usize)> {
        let block = self.block_of(address);
        let starts = &self.blocks.get(block)?.starts;
        let above = starts.partition_point(|&start| start <= address);
        Some((block, above.checked_sub(1)?))
    }

    /// The last stretch that starts at or below `address`, though it may end before.
    pub(crate) fn at_or_below(&self, address: u64) -> Option<(u64, &V)> {
        let (block, place) = self.place_at_or_below(address)?;
        let block = self.blocks.get(block)?;
        Some((*block.starts.get(place)?, block.values.get(place)?))
    }

    /// The same, to be changed.
    pub(crate) fn at_or_below_mut(&mut self, address: u64) -> Option<(u64, &mut V)> {
        let (block, place) = self.place_at_or_below(address)?;
        let block = self.blocks.get_mut(block)?;
        Some((*block.starts.get(place)?, block.values.get_mut(place)?))
    }

    /// The last stretch that starts below `address`.
    pub(crate) fn below(&self, address: u64) -> Option<(u64, &V)> {
        self.at_or_below(address.checked_sub(1)?)
    }

    /// The same, to be changed.
    pub(crate) fn below_mut(&mut self, address: u64) -> Option<(u64, &mut V)> {
        self.at_or_below_mut(address.checked_sub(1)?)
    }

    /// The stretch that starts at `start`.
    pub(crate) fn get(&self, start: u64) -> Option<&V> {
        let (at, value) = self.at_or_below(start)?;
        (at == start).then_some(value)
    }

    /// All of them, by address.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (u64, &V)> {
        self.blocks
            .iter()
            .flat_map(|block| block.starts.iter().copied().zip(&block.values))
    }

    /// Those that start at `address` or above.
    pub(crate) fn starting_from(&self, address: u64) -> impl Iterator<Item = (u64, &V)> {
        let block = self.block_of(address);
        let rest = self.blocks.get(block..).unwrap_or_default();
        let skipped = rest
            .first()
            .map_or(0, |first| first.starts.partition_point(|&at| at < address));
        Walk::new(rest, skipped)
    }

    /// Those that start in `start..=last`, to be changed.
    pub(crate) fn starting_in_mut(
        &mut self,
        start: u64,
        last: u64,
    ) -> impl Iterator<Item = (u64, &mut V)> {
        let block = self.block_of(start);
        let rest = self.blocks.get_mut(block..).unwrap_or_default();
        rest.iter_mut()
            .take_while(move |block| block.starts.first().is_some_and(|&first| first <= last))
            .flat_map(move |block| {
                let from = block.starts.partition_point(|&at| at < start);
                let all = block.starts.iter().copied().zip(&mut block.values);
                all.skip(from).take_while(move |(at, _)| *at <= last)
            })
    }

    /// Puts a stretch at `start`, in place of one that starts there, which is returned.
    pub(crate) fn insert(&mut self, start: u64, value: V) -> Option<V> {
        let blocks = self.blocks.len();
        // What comes in order needs no search, and fills its blocks.
        if let Some(highest) = self.blocks.last_mut()
            && highest.starts.last().is_some_and(|&last| last < start)
        {
            if highest.starts.len() < BLOCK {
                highest.starts.push(start);
                highest.values.push(value);
                self.len = self.len.saturating_add(1);
            } else {
                let mut block = Block::with_room();
                block.starts.push(start);
                block.values.push(value);
                self.insert_block(blocks, block);
            }
            return None;
        }
        let at = self.block_of(start);
        let Some(block) = self.blocks.get_mut(at) else {
            // A table of a few stretches takes no more than it needs.
            let block = Block {
                starts: vec![start],
                values: vec![value],
            };
            self.insert_block(0, block);
            return None;
        };
        let place = block.starts.partition_point(|&other| other < start);
        if let Some(there) = block.values.get_mut(place)
            && block.starts.get(place) == Some(&start)
        {
            return Some(std::mem::replace(there, value));
        }
        if block.starts.len() < BLOCK {
            block.starts.insert(place, start);
            block.values.insert(place, value);
            self.len = self.len.saturating_add(1);
            if place == 0 {
                self.first_has_changed(at);
            }
        } else {
            let mut upper = Block::with_room();
            upper.starts.extend(block.starts.drain(BLOCK / 2..));
            upper.values.extend(block.values.drain(BLOCK / 2..));
            self.len = self.len.saturating_sub(upper.values.len());
            self.insert_block(at.saturating_add(1), upper);
            return self.insert(start, value);
        }
        None
    }

    /// Takes out the stretch that starts at `start`.
    pub(crate) fn remove(&mut self, start: u64) -> Option<V> {
        self.remove_if(start, |_| true)
    }

    /// Takes out the stretch that starts at `start` if it is as `wanted`.
    pub(crate) fn remove_if(&mut self, start: u64, wanted: impl FnOnce(&V) -> bool) -> Option<V> {
        let (at, place) = self.place_at_or_below(start)?;
        let block = self.blocks.get_mut(at)?;
        if block.starts.get(place) != Some(&start) || !block.values.get(place).is_some_and(wanted) {
            return None;
        }
        block.starts.remove(place);
        let value = block.values.remove(place);
        self.len = self.len.saturating_sub(1);
        if block.starts.len() < SMALL {
            self.join(at);
        }
        if place == 0 {
            self.first_has_changed(at);
        }
        Some(value)
    }

    /// Drops a block that has become empty, or joins it to a neighbour where both are small.
    fn join(&mut self, at: usize) {
        let is_empty = |at: usize| self.blocks.get(at).is_some_and(|b| b.starts.is_empty());
        if is_empty(at) {
            self.blocks.remove(at);
            self.firsts.remove(at);
            return;
        }
        let size = |at: usize| self.blocks.get(at).map(|block| block.starts.len());
        let joins = |lower: usize, upper: usize| {
            let sum = size(lower)?.checked_add(size(upper)?)?;
            (sum <= SMALL).then_some((lower, upper))
        };
        let with_above = joins(at, at.saturating_add(1));
        let pair = with_above.or_else(|| joins(at.checked_sub(1)?, at));
        if let Some((lower, upper)) = pair {
            let mut gone = self.blocks.remove(upper);
            self.firsts.remove(upper);
            if let Some(kept) = self.blocks.get_mut(lower) {
                kept.starts.append(&mut gone.starts);
                kept.values.append(&mut gone.values);
            }
        }
    }

    fn insert_block(&mut self, at: usize, block: Block<V>) {
        self.len = self.len.saturating_add(block.values.len());
        self.firsts
            .insert(at, block.starts.first().copied().unwrap_or_default());
        self.blocks.insert(at, block);
    }

    fn first_has_changed(&mut self, at: usize) {
        let first = self.blocks.get(at).and_then(|block| block.starts.first());
        if let (Some(known), Some(&first)) = (self.firsts.get_mut(at), first) {
            *known = first;
        }
    }

    /// All values, by address.
    pub(crate) fn into_values(self) -> impl Iterator<Item = V> {
        self.blocks.into_iter().flat_map(|block| block.values)
    }
}

impl<V: Stretch> Stretches<V> {
    /// Those that overlap `start..=last`, by address.
    pub(crate) fn overlapping(&self, start: u64, last: u64) -> impl Iterator<Item = (u64, &V)> {
        let (block, place) = self.place_at_or_below(start).unwrap_or_default();
        let rest = self.blocks.get(block..).unwrap_or_default();
        let mut walk = Walk::new(rest, place);
        // The one at or below may end before, and the table may only start above.
        let below = walk
            .peek()
            .is_some_and(|(at, value)| at < start && value.last() < start);
        if below {
            walk.next();
        }
        walk.take_while(move |(at, _)| *at <= last)
    }
}

impl<V> Block<V> {
    /// Empty, with room for all that it may ever hold.
    fn with_room() -> Self {
        Self {
            starts: Vec::with_capacity(BLOCK),
            values: Vec::with_capacity(BLOCK),
        }
    }
}

/// A walk over blocks.
struct Walk<'a, V> {
    starts: std::slice::Iter<'a, u64>,
    values: std::slice::Iter<'a, V>,
    rest: std::slice::Iter<'a, Block<V>>,
}

impl<'a, V> Walk<'a, V> {
    /// Over `blocks`, without the first `skipped` of the first.
    fn new(blocks: &'a [Block<V>], skipped: usize) -> Self {
        let mut rest = blocks.iter();
        let (starts, values) = rest.next().map_or((&[][..], &[][..]), |first| {
            (
                first.starts.get(skipped..).unwrap_or_default(),
                first.values.get(skipped..).unwrap_or_default(),
            )
        });
        Self {
            starts: starts.iter(),
            values: values.iter(),
            rest,
        }
    }

    fn peek(&self) -> Option<(u64, &'a V)> {
        let mut peeked = Walk {
            starts: self.starts.clone(),
            values: self.values.clone(),
            rest: self.rest.clone(),
        };
        peeked.next()
    }
}

impl<'a, V> Iterator for Walk<'a, V> {
    type Item = (u64, &'a V);

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let (Some(&start), Some(value)) = (self.starts.next(), self.values.next()) {
                return Some((start, value));
            }
            let block = self.rest.next()?;
            self.starts = block.starts.iter();
            self.values = block.values.iter();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    impl Stretch for u64 {
        fn last(&self) -> u64 {
            *self
        }
    }

    /// What is kept of the table's shape.
    fn check_shape(table: &Stretches<u64>) -> Result<(), TestCaseError> {
        prop_assert_eq!(table.firsts.len(), table.blocks.len());
        for (first, block) in table.firsts.iter().zip(&table.blocks) {
            prop_assert_eq!(Some(first), block.starts.first());
            prop_assert_eq!(block.starts.len(), block.values.len());
            prop_assert!(block.starts.len() <= BLOCK);
        }
        // Two small neighbours would have been joined.
        for pair in table.blocks.windows(2) {
            prop_assert!(pair[0].starts.len() + pair[1].starts.len() > SMALL);
        }
        Ok(())
    }

    proptest! {
        #[test]
        fn it_answers_as_a_tree_of_the_same_stretches_does(
            steps in prop::collection::vec((0_u64..600, 0_u64..3, any::<bool>()), 1..1500),
            shrinks in prop::collection::vec(0_u64..600, 0..400),
            at in 0_u64..2000,
            size in 0_u64..900,
        ) {
            let mut table = Stretches::default();
            let mut tree: BTreeMap<u64, u64> = BTreeMap::new();
            // Stretches of one to three addresses, one in every three.
            for (slot, length, put) in steps.into_iter().chain(shrinks.into_iter().map(|s| (s, 0, false))) {
                let start = 3 * slot;
                if put {
                    prop_assert_eq!(table.insert(start, start + length), tree.insert(start, start + length));
                } else {
                    prop_assert_eq!(table.remove_if(start, |_| false), None);
                    prop_assert_eq!(table.remove(start), tree.remove(&start));
                }
                check_shape(&table)?;
            }
            prop_assert_eq!(table.len(), tree.len());
            prop_assert_eq!(table.is_empty(), tree.is_empty());
            prop_assert!(table.iter().eq(tree.iter().map(|(k, v)| (*k, v))));
            let floor = tree.range(..=at).next_back().map(|(k, v)| (*k, v));
            prop_assert_eq!(table.at_or_below(at), floor);
            prop_assert_eq!(table.below(at), tree.range(..at).next_back().map(|(k, v)| (*k, v)));
            prop_assert_eq!(table.get(at), tree.get(&at));
            prop_assert!(table.starting_from(at).eq(tree.range(at..).map(|(k, v)| (*k, v))));
            let last = at + size;
            let naive = tree.iter().filter(|(k, v)| **k <= last && at <= **v);
            prop_assert!(table.overlapping(at, last).eq(naive.map(|(k, v)| (*k, v))));
            for (_, value) in table.starting_in_mut(at, last) {
                *value += 7;
            }
            for (_, value) in tree.range_mut(at..=last) {
                *value += 7;
            }
            if let Some((_, value)) = table.below_mut(at) {
                *value += 9;
            }
            if let Some((_, value)) = tree.range_mut(..at).next_back() {
                *value += 9;
            }
            prop_assert!(table.into_values().eq(tree.into_values()));
        }
    }

    #[test]
    fn what_comes_in_order_fills_its_blocks() {
        let mut table = Stretches::default();
        for start in 0..10 * BLOCK as u64 {
            table.insert(start, start);
        }
        assert_eq!(table.blocks.len(), 10);
        for start in 0..10 * BLOCK as u64 {
            table.remove(start);
        }
        assert!(table.blocks.is_empty() && table.firsts.is_empty());
    }

    #[test]
    fn both_ends_of_the_address_space_are_addresses_like_any_other() {
        let mut table = Stretches::default();
        assert_eq!(table.below(0), None);
        table.insert(u64::MAX, u64::MAX);
        table.insert(0, 0);
        assert_eq!(table.at_or_below(u64::MAX), Some((u64::MAX, &u64::MAX)));
        assert_eq!(table.below(u64::MAX), Some((0, &0)));
        assert_eq!(table.overlapping(0, u64::MAX).count(), 2);
        assert_eq!(table.overlapping(1, u64::MAX - 1).count(), 0);
    }
}
