use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::sync::Mutex;

use host_memory::{DeviceBar, Ram};
use memory_map::{
    Access, Gpa, GpaRange, HostVa, Priority, Reach, RegionManager, RegionSpec, SubMapping,
    TargetOptions,
};
use vfio_sys::{IoasId, IoasRanges, IommufdId};

use super::*;

/// What an address space was asked to do.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Asked {
    /// The file is named by its inode.
    MapFile(IovaRange, u64, u64, Access),
    Map(IovaRange, Access),
    Copy(IovaRange, IoasId, Iova),
    Unmap(IovaRange),
}

/// An address space that records what it is asked and answers what it is told to.
#[derive(Debug)]
struct Fake {
    id: IoasId,
    iommufd: IommufdId,
    ranges: IoasRanges,
    /// Answers to come; without one, all goes well.
    maps: Mutex<VecDeque<i32>>,
    copies: Mutex<VecDeque<i32>>,
    unmaps: Mutex<VecDeque<Result<u64, i32>>>,
    asked: Mutex<Vec<Asked>>,
}

impl Fake {
    fn of(iommufd: IommufdId, id: u32) -> Arc<Self> {
        Arc::new(Self {
            id: IoasId::new(id),
            iommufd,
            ranges: IoasRanges {
                allowed: vec![iova(0, 0xfee0_0000), iova(0xfef0_0000, 1 << 40)],
                alignment: 0x1000,
            },
            maps: Mutex::default(),
            copies: Mutex::default(),
            unmaps: Mutex::default(),
            asked: Mutex::default(),
        })
    }

    fn new() -> Arc<Self> {
        Self::of(IommufdId::fresh(), 1)
    }

    fn asked(&self) -> Vec<Asked> {
        std::mem::take(&mut self.asked.lock().unwrap())
    }

    fn ask(&self, what: Asked, answers: &Mutex<VecDeque<i32>>) -> io::Result<()> {
        self.asked.lock().unwrap().push(what);
        match answers.lock().unwrap().pop_front() {
            Some(errno) => Err(io::Error::from_raw_os_error(errno)),
            None => Ok(()),
        }
    }
}

impl IoAddressSpace for Fake {
    fn id(&self) -> IoasId {
        self.id
    }

    fn iommufd(&self) -> IommufdId {
        self.iommufd
    }

    fn ranges(&self) -> io::Result<IoasRanges> {
        Ok(self.ranges.clone())
    }

    fn allow(&self, _ranges: &[IovaRange]) -> io::Result<()> {
        Ok(())
    }

    fn map_file(
        &self,
        iova: IovaRange,
        file: BorrowedFd<'_>,
        offset: u64,
        access: Access,
    ) -> io::Result<()> {
        let what = Asked::MapFile(iova, inode(file), offset, access);
        self.ask(what, &self.maps)
    }

    unsafe fn map(&self, iova: IovaRange, _vaddr: HostVa, access: Access) -> io::Result<()> {
        self.ask(Asked::Map(iova, access), &self.maps)
    }

    fn copy(&self, iova: IovaRange, source: IoasId, from: Iova, _access: Access) -> io::Result<()> {
        self.ask(Asked::Copy(iova, source, from), &self.copies)
    }

    fn unmap(&self, iova: IovaRange) -> io::Result<u64> {
        self.asked.lock().unwrap().push(Asked::Unmap(iova));
        match self.unmaps.lock().unwrap().pop_front() {
            Some(Err(errno)) => Err(io::Error::from_raw_os_error(errno)),
            Some(Ok(bytes)) => Ok(bytes),
            None => Ok(iova.size()),
        }
    }

    fn unmap_all(&self) -> io::Result<u64> {
        Ok(0)
    }

    fn huge_pages(&self) -> io::Result<bool> {
        Ok(true)
    }

    fn set_huge_pages(&self, _on: bool) -> io::Result<()> {
        Ok(())
    }
}

fn inode(file: BorrowedFd<'_>) -> u64 {
    let file = File::from(file.try_clone_to_owned().unwrap());
    file.metadata().unwrap().ino()
}

fn iova(start: u64, size: u64) -> IovaRange {
    IovaRange::new(Iova::new(start), size).unwrap()
}

fn target(ioas: &Arc<Fake>, copies: &RamCopies) -> IoasTarget<Fake> {
    // SAFETY: the address space is none, so no device ever sees the memory.
    unsafe { IoasTarget::new(ioas.clone(), copies.clone()) }
}

fn alone(ioas: &Arc<Fake>) -> IoasTarget<Fake> {
    target(ioas, &RamCopies::new())
}

const SIZE: u64 = 0x4000;

fn memfd() -> Backing {
    Backing::new(Ram::memfd(c"ram", SIZE).unwrap())
}

/// A BAR whose dma-buf is an ordinary file.
fn bar() -> Backing {
    let file = Arc::new(File::open("/dev/null").unwrap());
    let exported = Arc::clone(&file);
    let bar = DeviceBar::new(file, 0, SIZE, Access::ReadWrite).unwrap();
    Backing::new(bar.with_dma_buf(move || Ok(exported.as_fd().try_clone_to_owned().unwrap())))
}

fn request(backing: &Backing, kind: RegionKind) -> MapRequest {
    MapRequest {
        iova: iova(0x10_0000, SIZE),
        access: Access::ReadWrite,
        kind,
        backing: backing.clone(),
        offset: 0,
        host: None,
    }
}

fn spec(backing: &Backing, at: u64, kind: RegionKind) -> RegionSpec {
    RegionSpec {
        name: "region".into(),
        range: GpaRange::new(Gpa::new(at), backing.size()).unwrap(),
        priority: Priority(0),
        kind,
        access: Access::ReadWrite,
        shareable: false,
        label: None,
        sub_mappings: vec![SubMapping {
            offset: 0,
            size: backing.size(),
            backing: backing.clone(),
            backing_offset: 0,
        }],
    }
}

#[test]
fn limits_are_the_ranges_that_the_kernel_tells() {
    let ioas = Fake::new();
    let limits = alone(&ioas).limits().unwrap();
    assert_eq!(limits.page_size, 0x1000);
    assert_eq!(limits.allowed, ioas.ranges.allowed);
    assert_eq!(limits.entry_limit, None);
    assert_eq!(limits.largest_mapping, 1 << 30);
    assert!(limits.read_only && limits.device_memory && !limits.unmap_spans);
}

#[test]
fn without_a_device_the_page_is_the_maps_own() {
    let mut ioas = Arc::try_unwrap(Fake::new()).unwrap();
    ioas.ranges.alignment = 1;
    let limits = alone(&Arc::new(ioas)).limits().unwrap();
    assert_eq!(limits.page_size, GRANULE);
}

#[test]
fn ram_with_a_file_goes_by_the_file_and_needs_no_address() {
    let ioas = Fake::new();
    let mut target = alone(&ioas);
    let backing = memfd();
    assert!(!target.needs_host_address(&backing));
    let mut request = request(&backing, RegionKind::Ram);
    request.iova = iova(0x10_0000, 0x1000);
    request.offset = 0x2000;
    request.access = Access::ReadOnly;
    target.map(&request).unwrap();
    let file = inode(backing.file().unwrap().fd);
    assert_eq!(
        ioas.asked(),
        [Asked::MapFile(request.iova, file, 0x2000, Access::ReadOnly)]
    );
}

/// The whole map above the target: no host address is ever made.
#[test]
fn a_map_of_memfd_ram_makes_no_host_address() {
    #[derive(Debug)]
    struct NoAddress(Ram);
    impl memory_map::BackingObject for NoAddress {
        fn size(&self) -> u64 {
            memory_map::BackingObject::size(&self.0)
        }
        fn map_host(&self) -> Result<Box<dyn memory_map::HostMapping>, Errno> {
            panic!("nobody needs an address");
        }
        fn file(&self) -> Result<memory_map::BackingFile<'_>, NoFile> {
            memory_map::BackingObject::file(&self.0)
        }
    }
    let ioas = Fake::new();
    let map = RegionManager::new();
    let registered = map
        .register(Box::new(alone(&ioas)), TargetOptions::new("ioas"))
        .unwrap();
    let backing = Backing::new(NoAddress(Ram::memfd(c"ram", SIZE).unwrap()));
    let mut change = map.change();
    let region = change.add(spec(&backing, 0, RegionKind::Ram));
    change.enable(region);
    change.commit().unwrap();
    assert!(matches!(ioas.asked()[..], [Asked::MapFile(..)]));
    drop(registered);
    assert_eq!(ioas.asked(), [Asked::Unmap(iova(0, SIZE))]);
}

#[test]
fn ram_without_a_file_goes_by_its_address() {
    let ioas = Fake::new();
    let map = RegionManager::new();
    let target = alone(&ioas);
    let backing = Backing::new(Ram::anonymous(SIZE).unwrap());
    assert!(target.needs_host_address(&backing));
    let registered = map
        .register(Box::new(target), TargetOptions::new("ioas"))
        .unwrap();
    let mut change = map.change();
    let region = change.add(spec(&backing, 0, RegionKind::Ram));
    change.enable(region);
    change.commit().unwrap();
    assert_eq!(ioas.asked(), [Asked::Map(iova(0, SIZE), Access::ReadWrite)]);
    drop(registered);
}

#[test]
fn ram_without_a_file_and_an_address_is_refused() {
    let ioas = Fake::new();
    let backing = Backing::new(Ram::anonymous(SIZE).unwrap());
    let error = alone(&ioas).map(&request(&backing, RegionKind::Ram));
    assert_eq!(
        error,
        Err(TargetError::Refused(Reason::NoHostAddress(Errno::new(
            libc::EFAULT
        ))))
    );
    assert_eq!(ioas.asked(), []);
}

#[test]
fn a_bar_goes_by_its_dma_buf_and_never_by_its_address() {
    let ioas = Fake::new();
    let mut target = alone(&ioas);
    let backing = bar();
    assert!(!target.needs_host_address(&backing));
    target
        .map(&request(&backing, RegionKind::DeviceMemory))
        .unwrap();
    assert!(matches!(ioas.asked()[..], [Asked::MapFile(..)]));
}

#[test]
fn a_bar_without_a_dma_buf_is_a_reason_in_the_reach() {
    let ioas = Fake::new();
    let map = RegionManager::new();
    let _target = map
        .register(Box::new(alone(&ioas)), TargetOptions::new("ioas"))
        .unwrap();
    let file = Arc::new(File::open("/dev/null").unwrap());
    let bar = DeviceBar::new(file, 0, SIZE, Access::ReadWrite).unwrap();
    let backing = Backing::new(bar.with_dma_buf(|| Err("the kernel is too old".into())));
    let mut change = map.change();
    let region = change.add(spec(&backing, 0, RegionKind::DeviceMemory));
    change.enable(region);
    change.commit_guest().unwrap();
    let reach = map.reach();
    let Reach::Unavailable(Reason::NoDmaBufExport(why)) = &reach[0].reach else {
        panic!("{reach:?}");
    };
    assert_eq!(&**why, "the kernel is too old");
    assert_eq!(ioas.asked(), []);
}

#[test]
fn device_memory_in_no_file_is_not_mapped_by_its_address() {
    let ioas = Fake::new();
    let backing = Backing::new(Ram::anonymous(SIZE).unwrap());
    let error = alone(&ioas).map(&request(&backing, RegionKind::DeviceMemory));
    assert!(matches!(
        error,
        Err(TargetError::Refused(Reason::NoDmaBufExport(_)))
    ));
    assert_eq!(ioas.asked(), []);
}

#[test]
fn enodev_of_a_bar_is_revocation_and_of_ram_is_not() {
    let ioas = Fake::new();
    let mut target = alone(&ioas);
    ioas.maps.lock().unwrap().extend([libc::ENODEV; 2]);
    let error = target.map(&request(&bar(), RegionKind::DeviceMemory));
    assert_eq!(error, Err(TargetError::Revoked));
    let error = target.map(&request(&memfd(), RegionKind::Ram));
    assert!(matches!(
        error,
        Err(TargetError::Refused(Reason::Kernel { .. }))
    ));
    assert_eq!(target.held(), 0);
}

fn hint(errno: i32, kind: RegionKind) -> Option<String> {
    let ioas = Fake::new();
    ioas.maps.lock().unwrap().push_back(errno);
    let backing = match kind {
        RegionKind::Ram => memfd(),
        RegionKind::DeviceMemory => bar(),
    };
    match alone(&ioas).map(&request(&backing, kind)) {
        Err(TargetError::Refused(Reason::Kernel { errno: got, hint })) => {
            assert_eq!(got.raw(), errno);
            hint.map(|hint| hint.to_string())
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn refusals_say_what_to_do() {
    for (errno, kind, part) in [
        (libc::EEXIST, RegionKind::Ram, "other than this target"),
        (libc::EINVAL, RegionKind::Ram, "memfd"),
        (libc::EINVAL, RegionKind::DeviceMemory, "reserved"),
        (libc::EFAULT, RegionKind::Ram, "pinned"),
        (libc::ENOTTY, RegionKind::Ram, "6.13"),
        (libc::EOPNOTSUPP, RegionKind::DeviceMemory, "6.19"),
        (libc::ENOMEM, RegionKind::Ram, "RLIMIT_MEMLOCK"),
    ] {
        let hint = hint(errno, kind).unwrap();
        assert!(hint.contains(part), "{errno}: {hint}");
    }
    assert_eq!(hint(libc::ENOMEM, RegionKind::DeviceMemory), None);
}

#[test]
fn an_unmap_that_takes_down_another_length_is_of_unknown_outcome() {
    for bytes in [0, SIZE - 0x1000, SIZE + 0x1000] {
        let ioas = Fake::new();
        let mut target = alone(&ioas);
        let request = request(&memfd(), RegionKind::Ram);
        target.map(&request).unwrap();
        ioas.unmaps.lock().unwrap().push_back(Ok(bytes));
        let error = target.unmap(request.iova);
        assert_eq!(error, Err(TargetError::Unknown(Errno::new(libc::EIO))));
        assert_eq!(target.held(), 1, "its memory is kept");
        target.unmap(request.iova).unwrap();
        assert_eq!(target.held(), 0);
    }
}

#[test]
fn what_the_kernel_does_not_find_is_of_unknown_outcome_and_what_is_busy_is_refused() {
    let ioas = Fake::new();
    let mut target = alone(&ioas);
    let request = request(&memfd(), RegionKind::Ram);
    target.map(&request).unwrap();
    ioas.unmaps
        .lock()
        .unwrap()
        .extend([Err(libc::ENOENT), Err(libc::EBUSY)]);
    let error = target.unmap(request.iova);
    assert_eq!(error, Err(TargetError::Unknown(Errno::new(libc::ENOENT))));
    let error = target.unmap(request.iova);
    assert!(matches!(error, Err(TargetError::Refused(_))), "{error:?}");
    assert_eq!(target.held(), 1);
}

#[test]
fn the_kernel_is_asked_to_unmap_whole_single_mappings_only() {
    let ioas = Fake::new();
    let mut target = alone(&ioas);
    let backing = memfd();
    let mut first = request(&backing, RegionKind::Ram);
    first.iova = iova(0x10_0000, 0x2000);
    let mut second = first.clone();
    second.iova = iova(0x10_2000, 0x2000);
    target.map(&first).unwrap();
    target.map(&second).unwrap();
    ioas.asked();
    for range in [
        iova(0x10_0000, 0x4000),
        iova(0x10_0000, 0x1000),
        iova(0x10_1000, 0x1000),
        iova(0x10_0000, 0x3000),
        iova(0x0f_f000, 0x3000),
    ] {
        let error = target.unmap(range).unwrap_err();
        assert!(matches!(error, TargetError::Refused(_)), "{range}: {error}");
    }
    assert_eq!(ioas.asked(), []);
    target.unmap(first.iova).unwrap();
    target.unmap(second.iova).unwrap();
    assert_eq!(target.held(), 0);
}

#[test]
fn dropping_the_target_takes_down_what_is_left() {
    let ioas = Fake::new();
    let mut target = alone(&ioas);
    let request = request(&memfd(), RegionKind::Ram);
    target.map(&request).unwrap();
    ioas.asked();
    drop(target);
    assert_eq!(ioas.asked(), [Asked::Unmap(request.iova)]);
}

#[test]
fn memory_whose_unmap_fails_is_never_given_back() {
    let ioas = Fake::new();
    let mut target = alone(&ioas);
    let backing = memfd();
    let watch = watched();
    let request = MapRequest {
        backing: watch.0,
        ..request(&backing, RegionKind::Ram)
    };
    target.map(&request).unwrap();
    drop(request);
    ioas.unmaps.lock().unwrap().push_back(Err(libc::EBUSY));
    drop(target);
    assert_eq!(Arc::strong_count(&watch.1), 2, "the backing is still there");
}

/// RAM, and a witness of whether it is still there.
fn watched() -> (Backing, Arc<()>) {
    #[derive(Debug)]
    struct Watched(
        Ram,
        #[expect(dead_code, reason = "its count is the witness")] Arc<()>,
    );
    impl memory_map::BackingObject for Watched {
        fn size(&self) -> u64 {
            memory_map::BackingObject::size(&self.0)
        }
        fn map_host(&self) -> Result<Box<dyn memory_map::HostMapping>, Errno> {
            self.0.map_host()
        }
        fn file(&self) -> Result<memory_map::BackingFile<'_>, NoFile> {
            memory_map::BackingObject::file(&self.0)
        }
    }
    let alive = Arc::new(());
    let ram = Ram::memfd(c"ram", SIZE).unwrap();
    (Backing::new(Watched(ram, alive.clone())), alive)
}

#[test]
fn ram_of_the_same_iommufd_is_copied() {
    let iommufd = IommufdId::fresh();
    let (one, two) = (Fake::of(iommufd, 1), Fake::of(iommufd, 2));
    let copies = RamCopies::new();
    let (mut first, mut second) = (target(&one, &copies), target(&two, &copies));
    let backing = memfd();
    let there = request(&backing, RegionKind::Ram);
    first.map(&there).unwrap();
    let mut here = there.clone();
    here.iova = iova(0x20_0000, SIZE);
    second.map(&here).unwrap();
    assert_eq!(
        two.asked(),
        [Asked::Copy(here.iova, IoasId::new(1), there.iova.start())]
    );
    // A copy may be copied when the original is gone.
    first.unmap(there.iova).unwrap();
    one.asked();
    first.map(&there).unwrap();
    assert_eq!(
        one.asked(),
        [Asked::Copy(there.iova, IoasId::new(2), here.iova.start())]
    );
    assert_eq!(copies.offers(), 2);
    drop((first, second));
    assert_eq!(copies.offers(), 0);
}

/// As when RAM is cut in one address space after the other: the rest is pinned once.
#[test]
fn a_part_of_what_is_mapped_elsewhere_is_copied() {
    let iommufd = IommufdId::fresh();
    let (one, two) = (Fake::of(iommufd, 1), Fake::of(iommufd, 2));
    let copies = RamCopies::new();
    let (mut first, mut second) = (target(&one, &copies), target(&two, &copies));
    let backing = memfd();
    let whole = request(&backing, RegionKind::Ram);
    first.map(&whole).unwrap();
    let last = MapRequest {
        iova: iova(0x20_0000, 0x1000),
        offset: whole.offset + SIZE - 0x1000,
        ..whole.clone()
    };
    second.map(&last).unwrap();
    let at = whole.iova.start().checked_add(SIZE - 0x1000).unwrap();
    assert_eq!(two.asked(), [Asked::Copy(last.iova, IoasId::new(1), at)]);
}

#[test]
fn nothing_else_is_copied() {
    let iommufd = IommufdId::fresh();
    let (one, two) = (Fake::of(iommufd, 1), Fake::of(iommufd, 2));
    let stranger = Fake::of(IommufdId::fresh(), 3);
    let copies = RamCopies::new();
    let mut first = target(&one, &copies);
    let (mut second, mut third) = (target(&two, &copies), target(&stranger, &copies));
    let backing = memfd();
    let mut there = request(&backing, RegionKind::Ram);
    there.access = Access::ReadOnly;
    there.offset = 0x1000;
    there.iova = iova(0x10_0000, 0x2000);
    first.map(&there).unwrap();
    let bar = bar();
    let device = MapRequest {
        iova: iova(0x30_0000, SIZE),
        ..request(&bar, RegionKind::DeviceMemory)
    };
    first.map(&device).unwrap();
    // To be written, past its end, from before its start, larger, other memory, a BAR.
    let mut others = vec![there.clone(); 5];
    others[0].access = Access::ReadWrite;
    others[1].offset = 0x2000;
    others[2].offset = 0;
    others[3].iova = iova(0x10_0000, 0x3000);
    others[4].backing = memfd();
    others.push(device);
    for (nth, request) in others.iter().enumerate() {
        second.map(request).unwrap();
        assert!(
            matches!(two.asked()[..], [Asked::MapFile(..)]),
            "{nth} was copied"
        );
        second.unmap(request.iova).unwrap();
        two.asked();
    }
    // In another iommufd.
    third.map(&there).unwrap();
    assert!(matches!(stranger.asked()[..], [Asked::MapFile(..)]));
}

#[test]
fn a_copy_that_fails_is_mapped_instead() {
    let iommufd = IommufdId::fresh();
    let (one, two) = (Fake::of(iommufd, 1), Fake::of(iommufd, 2));
    let copies = RamCopies::new();
    let (mut first, mut second) = (target(&one, &copies), target(&two, &copies));
    let request = request(&memfd(), RegionKind::Ram);
    first.map(&request).unwrap();
    for errno in [libc::ENOENT, libc::ENOMEM] {
        two.copies.lock().unwrap().push_back(errno);
        second.map(&request).unwrap();
        assert!(matches!(
            two.asked()[..],
            [Asked::Copy(..), Asked::MapFile(..)]
        ));
        second.unmap(request.iova).unwrap();
        two.asked();
    }
}
