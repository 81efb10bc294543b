//! The ioctls of `linux/iommufd.h`: one unsafe call and one function each.
//!
//! Every one of the structs begins with `size`, its length in bytes. The kernel reads and writes
//! no more than that; where it knows a longer struct, it takes the rest for zeroes, and where it
//! knows a shorter one, it insists that the rest is zero (`E2BIG`). A request that reaches a file
//! of another kind is refused with `ENOTTY`; so is one that the kernel is too old for.
#![expect(unsafe_code, reason = "ioctls")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;

use iommufd_bindings::iommufd::{
    IOMMUFD_CMD_DESTROY, IOMMUFD_CMD_IOAS_ALLOC, IOMMUFD_CMD_IOAS_ALLOW_IOVAS,
    IOMMUFD_CMD_IOAS_COPY, IOMMUFD_CMD_IOAS_IOVA_RANGES, IOMMUFD_CMD_IOAS_MAP,
    IOMMUFD_CMD_IOAS_MAP_FILE, IOMMUFD_CMD_IOAS_UNMAP, IOMMUFD_CMD_OPTION, IOMMUFD_TYPE,
    iommu_destroy, iommu_ioas_alloc, iommu_ioas_allow_iovas, iommu_ioas_copy,
    iommu_ioas_iova_ranges, iommu_ioas_map, iommu_ioas_map_file, iommu_ioas_unmap,
    iommu_iova_range, iommu_option, iommufd_ioas_map_flags_IOMMU_IOAS_MAP_FIXED_IOVA,
    iommufd_ioas_map_flags_IOMMU_IOAS_MAP_READABLE,
    iommufd_ioas_map_flags_IOMMU_IOAS_MAP_WRITEABLE,
};
use memory_map::{Access, HostVa, Iova, IovaRange};

/// `_IO(IOMMUFD_TYPE, command)`. The header uses no other form: the length is in `size`.
const fn request(command: u32) -> libc::Ioctl {
    libc::_IO(IOMMUFD_TYPE as u32, command)
}

pub(crate) const DESTROY: libc::Ioctl = request(IOMMUFD_CMD_DESTROY);
pub(crate) const IOAS_ALLOC: libc::Ioctl = request(IOMMUFD_CMD_IOAS_ALLOC);
pub(crate) const IOAS_ALLOW_IOVAS: libc::Ioctl = request(IOMMUFD_CMD_IOAS_ALLOW_IOVAS);
pub(crate) const IOAS_COPY: libc::Ioctl = request(IOMMUFD_CMD_IOAS_COPY);
pub(crate) const IOAS_IOVA_RANGES: libc::Ioctl = request(IOMMUFD_CMD_IOAS_IOVA_RANGES);
pub(crate) const IOAS_MAP: libc::Ioctl = request(IOMMUFD_CMD_IOAS_MAP);
pub(crate) const IOAS_UNMAP: libc::Ioctl = request(IOMMUFD_CMD_IOAS_UNMAP);
pub(crate) const OPTION: libc::Ioctl = request(IOMMUFD_CMD_OPTION);
pub(crate) const IOAS_MAP_FILE: libc::Ioctl = request(IOMMUFD_CMD_IOAS_MAP_FILE);

/// What an ioctl returned, or its errno.
fn checked(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// `IOMMU_IOAS_MAP_*` for a mapping at an address of our choice.
const fn flags(access: Access) -> u32 {
    let always = iommufd_ioas_map_flags_IOMMU_IOAS_MAP_FIXED_IOVA
        | iommufd_ioas_map_flags_IOMMU_IOAS_MAP_READABLE;
    match access {
        Access::ReadOnly => always,
        Access::ReadWrite => always | iommufd_ioas_map_flags_IOMMU_IOAS_MAP_WRITEABLE,
    }
}

/// `IOMMU_DESTROY` of any object.
pub(crate) fn destroy(iommufd: BorrowedFd<'_>, id: u32) -> io::Result<()> {
    let destroy = iommu_destroy {
        size: size::<iommu_destroy>(),
        id,
    };
    // SAFETY: the kernel reads `size` bytes of a struct of that size.
    checked(unsafe { libc::ioctl(iommufd.as_raw_fd(), DESTROY, ptr::from_ref(&destroy)) })
}

/// `IOMMU_IOAS_ALLOC`; returns the object's id.
pub(crate) fn ioas_alloc(iommufd: BorrowedFd<'_>) -> io::Result<u32> {
    let mut alloc = iommu_ioas_alloc {
        size: size::<iommu_ioas_alloc>(),
        ..Default::default()
    };
    // SAFETY: the kernel reads and writes `size` bytes of a struct of that size, which is ours.
    checked(unsafe { libc::ioctl(iommufd.as_raw_fd(), IOAS_ALLOC, ptr::from_mut(&mut alloc)) })?;
    Ok(alloc.out_ioas_id)
}

/// What `IOMMU_IOAS_IOVA_RANGES` tells besides the ranges.
pub(crate) struct RangesTold {
    /// How many ranges there are.
    pub total: u32,
    /// What IOVAs are multiples of.
    pub alignment: u64,
}

/// `IOMMU_IOAS_IOVA_RANGES`: fills `ranges` as far as it goes. Where it is too short, the result
/// says how many there are, and the kernel's `EMSGSIZE` is no error here.
pub(crate) fn ioas_iova_ranges(
    iommufd: BorrowedFd<'_>,
    ioas: u32,
    ranges: &mut [iommu_iova_range],
) -> io::Result<RangesTold> {
    let mut told = iommu_ioas_iova_ranges {
        size: size::<iommu_ioas_iova_ranges>(),
        ioas_id: ioas,
        // A longer slice is not used to its end.
        num_iovas: u32::try_from(ranges.len()).unwrap_or(u32::MAX),
        allowed_iovas: ranges.as_mut_ptr().expose_provenance() as u64,
        ..Default::default()
    };
    // SAFETY: the kernel reads and writes `size` bytes of a struct of that size, which is ours,
    // and at most `num_iovas` elements at `allowed_iovas`: a slice of as many, borrowed mutably,
    // of plain numbers.
    let result = checked(unsafe {
        libc::ioctl(
            iommufd.as_raw_fd(),
            IOAS_IOVA_RANGES,
            ptr::from_mut(&mut told),
        )
    });
    match result {
        Err(error) if error.raw_os_error() != Some(libc::EMSGSIZE) => Err(error),
        _ => Ok(RangesTold {
            total: told.num_iovas,
            alignment: told.out_iova_alignment,
        }),
    }
}

/// `IOMMU_IOAS_ALLOW_IOVAS`.
pub(crate) fn ioas_allow_iovas(
    iommufd: BorrowedFd<'_>,
    ioas: u32,
    ranges: &[iommu_iova_range],
) -> io::Result<()> {
    let allow = iommu_ioas_allow_iovas {
        size: size::<iommu_ioas_allow_iovas>(),
        ioas_id: ioas,
        num_iovas: u32::try_from(ranges.len())
            .map_err(|_| io::Error::from_raw_os_error(libc::E2BIG))?,
        allowed_iovas: ranges.as_ptr().expose_provenance() as u64,
        ..Default::default()
    };
    // SAFETY: the kernel reads `size` bytes of a struct of that size, and `num_iovas` elements at
    // `allowed_iovas`, a slice of as many, which is borrowed.
    checked(unsafe { libc::ioctl(iommufd.as_raw_fd(), IOAS_ALLOW_IOVAS, ptr::from_ref(&allow)) })
}

/// `IOMMU_IOAS_MAP` of the memory at `vaddr`.
///
/// # Safety
/// As for [`Ioas::map`](crate::Ioas::map).
pub(crate) unsafe fn ioas_map(
    iommufd: BorrowedFd<'_>,
    ioas: u32,
    iova: IovaRange,
    vaddr: HostVa,
    access: Access,
) -> io::Result<()> {
    let mut map = iommu_ioas_map {
        size: size::<iommu_ioas_map>(),
        flags: flags(access),
        ioas_id: ioas,
        user_va: vaddr.raw(),
        length: iova.size(),
        iova: iova.start().raw(),
        ..Default::default()
    };
    // SAFETY: the kernel reads and writes `size` bytes of a struct of that size, which is ours.
    // What the mapping itself does to the memory at `vaddr`, the caller vouches for.
    checked(unsafe { libc::ioctl(iommufd.as_raw_fd(), IOAS_MAP, ptr::from_mut(&mut map)) })
}

/// `IOMMU_IOAS_MAP_FILE` of the file from `offset` on.
pub(crate) fn ioas_map_file(
    iommufd: BorrowedFd<'_>,
    ioas: u32,
    iova: IovaRange,
    file: BorrowedFd<'_>,
    offset: u64,
    access: Access,
) -> io::Result<()> {
    let mut map = iommu_ioas_map_file {
        size: size::<iommu_ioas_map_file>(),
        flags: flags(access),
        ioas_id: ioas,
        fd: file.as_raw_fd(),
        start: offset,
        length: iova.size(),
        iova: iova.start().raw(),
    };
    // SAFETY: the kernel reads and writes `size` bytes of a struct of that size, which is ours,
    // and takes its own reference to the file, which is borrowed. Devices then change the file's
    // contents, as any process that has it open may; no memory of ours is named.
    checked(unsafe { libc::ioctl(iommufd.as_raw_fd(), IOAS_MAP_FILE, ptr::from_mut(&mut map)) })
}

/// Whether there is an `IOMMU_IOAS_MAP_FILE` at all: a struct that is shorter than any is refused
/// with `EINVAL` by a kernel that knows the request, and with `ENOTTY` by one that does not.
pub(crate) fn has_ioas_map_file(iommufd: BorrowedFd<'_>) -> io::Result<bool> {
    let mut map = iommu_ioas_map_file {
        size: size::<u32>(),
        ..Default::default()
    };
    // SAFETY: the kernel reads and writes at most `size` bytes of a struct that is longer, and
    // refuses it.
    let result =
        unsafe { libc::ioctl(iommufd.as_raw_fd(), IOAS_MAP_FILE, ptr::from_mut(&mut map)) };
    match checked(result) {
        Err(error) if error.raw_os_error() == Some(libc::ENOTTY) => Ok(false),
        Err(error) if error.raw_os_error() != Some(libc::EINVAL) => Err(error),
        _ => Ok(true),
    }
}

/// `IOMMU_IOAS_COPY` of what `source` has from `from` on, as many bytes as `iova` has.
pub(crate) fn ioas_copy(
    iommufd: BorrowedFd<'_>,
    ioas: u32,
    iova: IovaRange,
    source: u32,
    from: Iova,
    access: Access,
) -> io::Result<()> {
    let mut copy = iommu_ioas_copy {
        size: size::<iommu_ioas_copy>(),
        flags: flags(access),
        dst_ioas_id: ioas,
        src_ioas_id: source,
        length: iova.size(),
        dst_iova: iova.start().raw(),
        src_iova: from.raw(),
    };
    // SAFETY: the kernel reads and writes `size` bytes of a struct of that size, which is ours.
    // Whatever it then maps was mapped before, and stays pinned by the copy.
    checked(unsafe { libc::ioctl(iommufd.as_raw_fd(), IOAS_COPY, ptr::from_mut(&mut copy)) })
}

/// `IOMMU_IOAS_UNMAP`; returns how many bytes had been mapped.
pub(crate) fn ioas_unmap(
    iommufd: BorrowedFd<'_>,
    ioas: u32,
    iova: u64,
    length: u64,
) -> io::Result<u64> {
    let mut unmap = iommu_ioas_unmap {
        size: size::<iommu_ioas_unmap>(),
        ioas_id: ioas,
        iova,
        length,
    };
    // SAFETY: the kernel reads and writes `size` bytes of a struct of that size, which is ours.
    checked(unsafe { libc::ioctl(iommufd.as_raw_fd(), IOAS_UNMAP, ptr::from_mut(&mut unmap)) })?;
    Ok(unmap.length)
}

/// `IOMMU_OPTION` of an object, or of the iommufd itself (`object` zero): sets `value`, or gets
/// it. Returns the value.
pub(crate) fn option(
    iommufd: BorrowedFd<'_>,
    option: u32,
    operation: u16,
    object: u32,
    value: u64,
) -> io::Result<u64> {
    let mut asked = iommu_option {
        size: size::<iommu_option>(),
        option_id: option,
        op: operation,
        object_id: object,
        val64: value,
        ..Default::default()
    };
    // SAFETY: the kernel reads and writes `size` bytes of a struct of that size, which is ours.
    checked(unsafe { libc::ioctl(iommufd.as_raw_fd(), OPTION, ptr::from_mut(&mut asked)) })?;
    Ok(asked.val64)
}

/// The size of a struct for its `size`.
#[expect(
    clippy::cast_possible_truncation,
    reason = "there is no fallible conversion in a constant; the assertion stands in for it"
)]
const fn size<T>() -> u32 {
    assert!(size_of::<T>() <= u32::MAX as usize);
    size_of::<T>() as u32
}
