//! The cases, and how they are run.

use iommu::Type1Container;
use memory_map::{Access, HostVa, Iova, IovaRange};

use crate::verdict::{granted, same};
use crate::{
    Bench, CaseResult, Complaint, Type1Host, Verdict, dma_cases, limit_cases, map_cases,
    random_cases, unmap_cases,
};

/// A page in bytes.
pub(crate) const PAGE: u64 = 0x1000;
/// Where the cases map things, unless it matters: far from every reserved window, and where a
/// device can reach that only has 32 address bits.
pub(crate) const AT: u64 = 0x4000_0000;
/// An address with nothing behind it in any process.
pub(crate) const NOWHERE: HostVa = HostVa::new(0x1000);
/// The window that x86 reserves for MSI, and how large it is.
pub(crate) const MSI: u64 = 0xfee0_0000;
pub(crate) const MSI_SIZE: u64 = 0x10_0000;

/// One thing that the contract says.
#[derive(Debug, Clone, Copy)]
pub struct Case {
    /// What it says.
    pub name: &'static str,
    pub(crate) run: fn(&mut dyn Bench) -> Verdict,
}

/// Makes [`Case`]s of functions, by their names.
macro_rules! cases {
    ($($module:ident :: $case:ident),* $(,)?) => {
        vec![$(Case { name: stringify!($case), run: $module::$case }),*]
    };
}

/// All cases, in the order in which they are run.
#[must_use]
pub fn cases() -> Vec<Case> {
    cases![
        map_cases::unaligned_iova_is_einval,
        map_cases::unaligned_address_is_einval,
        map_cases::unaligned_size_is_einval,
        map_cases::address_that_wraps_is_einval_or_eoverflow,
        map_cases::same_range_again_is_eexist,
        map_cases::overlap_at_the_front_is_eexist,
        map_cases::overlap_at_the_end_is_eexist,
        map_cases::overlap_inside_is_eexist,
        map_cases::overlap_around_is_eexist,
        map_cases::neighbours_are_no_overlap,
        map_cases::same_memory_twice_is_allowed,
        map_cases::msi_window_is_einval,
        map_cases::reaching_into_the_msi_window_is_einval,
        map_cases::reaching_out_of_the_msi_window_is_einval,
        map_cases::around_the_msi_window_is_einval,
        map_cases::next_to_the_msi_window_is_allowed,
        map_cases::first_and_last_page_of_every_allowed_range_map,
        map_cases::past_the_aperture_is_einval,
        map_cases::across_the_end_of_the_aperture_is_einval,
        map_cases::nothing_at_the_address_is_efault,
        map_cases::running_past_the_memory_is_efault_and_maps_nothing,
        map_cases::bar_maps_like_memory,
        map_cases::bar_that_is_not_decoded_is_efault,
        map_cases::bar_that_is_decoded_again_maps,
        map_cases::bar_access_without_decoding_is_eio,
        map_cases::without_an_iommu_everything_is_einval,
        map_cases::misalignment_is_found_before_overlap,
        map_cases::overlap_is_found_before_reserved_windows,
        map_cases::reserved_windows_are_found_before_missing_memory,
        map_cases::read_only_memory_maps,
        unmap_cases::unmap_returns_the_bytes,
        unmap_cases::unaligned_unmap_is_einval,
        unmap_cases::unmapping_nothing_returns_zero,
        unmap_cases::unmapping_a_reserved_window_returns_zero,
        unmap_cases::unmapping_past_the_aperture_returns_zero,
        unmap_cases::unmapping_twice_returns_zero,
        unmap_cases::cutting_off_the_front_is_einval,
        unmap_cases::cutting_off_the_end_is_einval,
        unmap_cases::cutting_out_the_middle_is_einval,
        unmap_cases::cutting_the_last_of_several_is_einval_and_unmaps_nothing,
        unmap_cases::cutting_the_first_of_several_is_einval_and_unmaps_nothing,
        unmap_cases::one_unmap_takes_several_mappings_and_gaps,
        unmap_cases::unmap_may_be_larger_than_the_mapping,
        unmap_cases::unmap_all_takes_everything,
        unmap_cases::unmap_all_of_nothing_returns_zero,
        unmap_cases::what_was_unmapped_can_be_mapped_again,
        limit_cases::info_tells_pages_ranges_and_entries,
        limit_cases::entries_left_counts_down_and_up,
        limit_cases::refused_maps_take_no_entry,
        limit_cases::locked_memory_limit_is_enomem,
        limit_cases::locked_memory_is_given_back,
        limit_cases::same_memory_twice_is_locked_twice,
        limit_cases::bar_is_no_locked_memory,
        limit_cases::missing_memory_is_found_before_the_locked_memory_limit,
        limit_cases::locked_memory_limit_is_found_before_missing_memory_further_on,
        limit_cases::entry_limit_is_enospc,
        dma_cases::bytes_move_through_mappings,
        dma_cases::transfers_cross_mappings,
        dma_cases::nothing_moves_where_nothing_is_mapped,
        dma_cases::nothing_arrives_after_unmap,
        dma_cases::nothing_is_read_after_unmap,
        dma_cases::nothing_arrives_after_unmap_all,
        dma_cases::read_only_memory_takes_no_writes,
        dma_cases::another_page_at_the_same_address_shows,
        dma_cases::ram_reaches_the_bar_and_back,
        dma_cases::nothing_arrives_in_an_unmapped_bar,
        dma_cases::a_mapped_bar_is_not_revoked_when_decoding_goes_off,
        dma_cases::nothing_moves_without_bus_mastering,
        dma_cases::addresses_above_4_gib_are_reached,
        random_cases::random_calls_end_as_the_model_says,
    ]
}

/// Tries all cases whose names contain `filter`, each on a fresh container, and tells of each as
/// soon as it has ended.
pub fn run(
    host: &dyn Type1Host,
    filter: &str,
    mut tell: impl FnMut(&CaseResult),
) -> Vec<CaseResult> {
    cases()
        .into_iter()
        .filter(|case| case.name.contains(filter))
        .map(|case| {
            let verdict = match host.bench() {
                Ok(mut bench) => (case.run)(&mut *bench),
                Err(error) => Err(Complaint::Failed {
                    expected: "a fresh container".into(),
                    got: error.to_string(),
                }),
            };
            let result = CaseResult {
                name: case.name,
                verdict,
            };
            tell(&result);
            result
        })
        .collect()
}

/// The `size` bytes from `start`.
pub(crate) fn range(start: u64, size: u64) -> Result<IovaRange, Complaint> {
    IovaRange::new(Iova::new(start), size).map_err(|error| Complaint::Failed {
        expected: "a range".into(),
        got: error.to_string(),
    })
}

/// Whole pages from page `page` after [`AT`].
pub(crate) fn pages(page: u64, count: u64) -> Result<IovaRange, Complaint> {
    range(
        AT.saturating_add(page.saturating_mul(PAGE)),
        count.saturating_mul(PAGE),
    )
}

/// The address of the bench's RAM, `page` pages on.
pub(crate) fn ram_page(bench: &dyn Bench, page: u64) -> HostVa {
    HostVa::new(
        bench
            .ram()
            .address
            .raw()
            .saturating_add(page.saturating_mul(PAGE)),
    )
}

/// Maps RAM from page `page` on, for reading and writing, which must succeed.
pub(crate) fn map_ram(bench: &dyn Bench, iova: IovaRange, page: u64) -> Verdict {
    granted(bench.map(iova, ram_page(bench, page), Access::ReadWrite))
}

/// The unmap must succeed and return that many bytes.
pub(crate) fn unmaps(container: &dyn Type1Container, iova: IovaRange, bytes: u64) -> Verdict {
    same("bytes unmapped", granted(container.unmap_dma(iova))?, bytes)
}
