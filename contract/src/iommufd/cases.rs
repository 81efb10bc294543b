//! The cases, and how they are run.

use std::sync::Arc;

use iommu::IoAddressSpace;
use memory_map::{Access, IovaRange};

use super::{
    Bench, Function, IommufdHost, address_cases, attach_cases, copy_cases, dma_buf_cases,
    dma_cases, limit_cases, map_cases, placement_cases, random_cases, reset_cases, target_cases,
    unmap_cases,
};
use crate::cases::PAGE;
use crate::verdict::{granted, same};
use crate::{CaseResult, Complaint, Verdict};

/// An address space, as the cases see it.
pub(crate) type Space = Arc<dyn IoAddressSpace>;

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

/// All cases but [`resetting_cases`], in the order in which they are run.
#[must_use]
pub fn cases() -> Vec<Case> {
    cases![
        map_cases::unaligned_iova_is_einval,
        map_cases::unaligned_size_is_einval,
        map_cases::unaligned_file_offset_is_einval,
        map_cases::same_range_again_is_eexist,
        map_cases::overlaps_are_eexist,
        map_cases::neighbours_are_no_overlap,
        map_cases::same_file_twice_is_allowed,
        map_cases::msi_window_is_einval,
        map_cases::around_the_msi_window_is_einval,
        map_cases::next_to_the_msi_window_is_allowed,
        map_cases::first_and_last_page_of_every_allowed_range_map,
        map_cases::past_the_aperture_is_einval,
        map_cases::across_the_end_of_the_aperture_is_einval,
        map_cases::past_the_end_of_the_file_is_einval,
        map_cases::a_file_that_is_no_memory_is_einval,
        map_cases::misalignment_is_found_before_overlap,
        map_cases::reserved_windows_are_found_before_overlap,
        map_cases::overlap_is_found_before_the_end_of_the_file,
        map_cases::read_only_memory_maps,
        map_cases::ranges_tell_what_may_be_mapped,
        map_cases::huge_pages_are_on_and_can_be_turned_off_while_nothing_is_mapped,
        map_cases::huge_pages_cannot_be_turned_off_while_something_is_mapped,
        address_cases::memory_without_a_file_maps_by_its_address,
        address_cases::nothing_at_the_address_is_efault,
        address_cases::a_bars_address_is_efault,
        address_cases::unaligned_address_is_einval,
        address_cases::address_that_wraps_is_eoverflow,
        address_cases::overlap_is_found_before_missing_memory,
        unmap_cases::unmap_returns_the_bytes,
        unmap_cases::unmapping_nothing_is_enoent,
        unmap_cases::unmapping_twice_is_enoent,
        unmap_cases::cutting_off_the_front_is_enoent,
        unmap_cases::cutting_off_the_end_is_enoent,
        unmap_cases::cutting_out_the_middle_is_enoent,
        unmap_cases::cutting_the_last_of_several_is_enoent_and_the_others_are_gone,
        unmap_cases::cutting_the_first_of_several_is_enoent_and_unmaps_nothing,
        unmap_cases::one_unmap_takes_several_mappings_and_gaps,
        unmap_cases::unmap_needs_no_alignment,
        unmap_cases::unmap_all_takes_everything,
        unmap_cases::unmap_all_of_nothing_returns_zero,
        unmap_cases::what_was_unmapped_can_be_mapped_again,
        copy_cases::copies_lead_to_the_same_memory,
        copy_cases::copying_what_is_not_mapped_is_enoent,
        copy_cases::copying_across_a_gap_is_enoent,
        copy_cases::a_part_of_a_mapping_can_be_copied,
        copy_cases::neighbours_are_copied_as_two_mappings,
        copy_cases::copying_read_only_memory_to_be_written_is_eperm,
        copy_cases::copying_for_less_access_is_allowed,
        copy_cases::copying_onto_a_mapping_is_eexist,
        copy_cases::copying_to_a_reserved_or_misaligned_place_is_einval,
        copy_cases::a_missing_source_is_found_before_a_bad_place,
        copy_cases::a_copy_outlives_its_source,
        copy_cases::copies_within_an_address_space_are_allowed,
        copy_cases::copying_from_a_destroyed_address_space_is_enoent,
        attach_cases::without_a_device_everything_is_allowed,
        attach_cases::without_a_device_nothing_is_pinned,
        attach_cases::what_cannot_be_pinned_keeps_devices_out,
        attach_cases::a_mapping_in_a_reserved_window_keeps_devices_out,
        attach_cases::a_misaligned_mapping_keeps_devices_out,
        attach_cases::a_promise_keeps_devices_out,
        attach_cases::a_promise_of_what_is_reserved_is_eaddrinuse,
        attach_cases::impossible_promises_are_einval,
        attach_cases::promises_limit_no_mapping_at_a_fixed_address,
        attach_cases::ranges_widen_when_the_last_device_is_detached,
        attach_cases::a_detached_device_reaches_nothing,
        attach_cases::a_moved_device_reaches_what_is_mapped_there,
        attach_cases::a_device_stays_where_it_was_if_it_reserves_what_is_mapped_there,
        attach_cases::a_device_stays_where_it_was_if_what_is_mapped_there_cannot_be_pinned,
        attach_cases::a_device_leaves_only_when_all_is_pinned_where_it_goes,
        attach_cases::a_device_moves_by_itself_or_not_at_all,
        attach_cases::a_group_moves_in_one_step,
        attach_cases::devices_of_one_group_cannot_be_apart,
        limit_cases::locked_memory_limit_is_enomem,
        limit_cases::locked_memory_is_given_back,
        limit_cases::same_file_twice_is_locked_twice,
        limit_cases::a_copy_is_locked_once,
        limit_cases::a_bar_is_no_locked_memory,
        limit_cases::attaching_past_the_limit_is_enomem,
        limit_cases::the_end_of_the_file_is_found_before_the_locked_memory_limit,
        dma_cases::bytes_move_through_mappings,
        dma_cases::transfers_cross_mappings,
        dma_cases::nothing_moves_where_nothing_is_mapped,
        dma_cases::nothing_arrives_after_unmap,
        dma_cases::nothing_is_read_after_unmap,
        dma_cases::read_only_memory_takes_no_writes,
        dma_cases::bytes_reach_memory_without_a_file,
        dma_cases::nothing_moves_without_bus_mastering,
        dma_cases::addresses_above_4_gib_are_reached,
        dma_buf_cases::a_bar_maps_as_a_whole_and_in_slices,
        dma_buf_cases::past_the_end_of_the_bar_is_einval,
        dma_buf_cases::unaligned_offset_in_the_bar_is_einval,
        dma_buf_cases::overlap_of_a_bar_is_eexist,
        dma_buf_cases::ram_reaches_the_bar_and_back,
        dma_buf_cases::a_slice_shows_its_part_of_the_bar,
        dma_buf_cases::a_read_only_bar_takes_no_writes,
        dma_buf_cases::nothing_arrives_in_an_unmapped_bar,
        dma_buf_cases::a_revoked_bar_is_enodev,
        dma_buf_cases::revocation_is_found_before_misalignment_and_overlap,
        dma_buf_cases::the_end_of_the_bar_is_found_before_revocation,
        dma_buf_cases::a_bar_that_is_decoded_again_maps,
        dma_buf_cases::a_mapping_is_dead_after_decoding_was_off,
        dma_buf_cases::a_dead_mapping_keeps_its_place_and_unmaps_whole,
        dma_buf_cases::a_mapping_made_anew_leads_to_the_bar,
        dma_buf_cases::a_mapping_is_dead_in_every_address_space,
        dma_buf_cases::a_copy_of_a_dead_mapping_succeeds_and_leads_nowhere,
        dma_buf_cases::a_copy_of_a_revoked_bar_succeeds_and_leads_nowhere,
        dma_buf_cases::a_bar_revoked_before_a_device_was_attached_leads_nowhere,
        dma_buf_cases::ram_is_not_revoked,
        random_cases::random_calls_end_as_the_model_says,
        target_cases::a_bar_follows_the_map_into_two_address_spaces,
        target_cases::ram_in_two_targets_is_locked_once,
        target_cases::a_bar_that_was_revoked_is_made_anew_in_both,
        target_cases::a_bar_that_is_revoked_is_unavailable_and_ram_stays,
        target_cases::a_bar_that_is_partly_covered_maps_what_is_visible,
        placement_cases::ram_beyond_the_aperture_is_refused_before_anything_is_done,
        placement_cases::ram_in_a_reserved_window_is_refused_before_anything_is_done,
        placement_cases::a_bar_beyond_the_aperture_is_out_of_reach_until_it_is_back,
        placement_cases::a_file_open_for_reading_is_mapped_for_writing,
    ]
}

/// The cases for which the function with the BAR must be such that it can be reset, by itself and
/// through its config space, and put to sleep.
#[must_use]
pub fn resetting_cases() -> Vec<Case> {
    cases![
        reset_cases::a_mapping_is_dead_after_a_reset,
        reset_cases::a_mapping_is_dead_after_a_function_level_reset,
        reset_cases::a_mapping_is_dead_after_a_hot_reset_whatever_it_says,
        reset_cases::a_mapping_is_dead_after_sleep,
        reset_cases::a_sleeping_functions_bar_is_enodev,
        reset_cases::a_reset_without_decoding_leaves_the_bar_revoked,
    ]
}

/// Tries `cases`, each on a fresh iommufd, and tells of each as soon as it has ended.
pub fn run(
    host: &dyn IommufdHost,
    cases: &[Case],
    mut tell: impl FnMut(&CaseResult),
) -> Vec<CaseResult> {
    cases
        .iter()
        .map(|case| {
            let verdict = match host.bench() {
                Ok(mut bench) => (case.run)(&mut *bench),
                Err(error) => Err(Complaint::Failed {
                    expected: "a fresh iommufd".into(),
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

/// Maps RAM from page `page` on, for reading and writing, which must succeed.
pub(crate) fn map_ram(bench: &dyn Bench, iova: IovaRange, page: u64) -> Verdict {
    map_ram_into(bench, &bench.ioas(), iova, page)
}

/// The same into another address space.
pub(crate) fn map_ram_into(bench: &dyn Bench, ioas: &Space, iova: IovaRange, page: u64) -> Verdict {
    let offset = page.saturating_mul(PAGE);
    granted(ioas.map_file(iova, bench.ram(), offset, Access::ReadWrite))
}

/// The unmap must succeed and return that many bytes.
pub(crate) fn unmaps(ioas: &Space, iova: IovaRange, bytes: u64) -> Verdict {
    same("bytes unmapped", granted(ioas.unmap(iova))?, bytes)
}

/// Attaches a function that is attached elsewhere. Of two that share a group, the other one is
/// detached, since they cannot be apart.
pub(crate) fn move_to(bench: &dyn Bench, function: Function, ioas: &Space) -> Verdict {
    if bench.share_a_group() {
        granted(bench.detach(match function {
            Function::Engine => Function::Memory,
            Function::Memory => Function::Engine,
        }))?;
    }
    granted(bench.attach(function, ioas))
}

/// Nothing may be mapped in all of it.
pub(crate) fn nothing_is_mapped(ioas: &Space) -> Verdict {
    same("bytes mapped", granted(ioas.unmap_all())?, 0)
}
