use std::collections::VecDeque;
use std::io;
use std::sync::Mutex;

use host_memory::Ram;
use memory_map::{
    Access, Gpa, GpaRange, HostVa, Priority, RegionKind, RegionManager, RegionSpec, SubMapping,
    TargetOptions,
};
use vfio_sys::Type1Info;

use super::*;

/// A container that counts what it is asked and answers what it is told to.
#[derive(Debug)]
struct Mock {
    info: Type1Info,
    /// Answers to come; without one, all goes well.
    maps: Mutex<VecDeque<i32>>,
    unmaps: Mutex<VecDeque<Result<u64, i32>>>,
    seen: Mutex<Seen>,
}

#[derive(Debug, Default)]
struct Seen {
    mapped: Vec<(IovaRange, HostVa, Access)>,
    unmapped: Vec<IovaRange>,
}

impl Mock {
    fn new() -> Self {
        Self {
            info: Type1Info {
                page_sizes: 0x4020_1000,
                allowed: vec![iova(0, 0xfee0_0000), iova(0xfef0_0000, 1 << 40)],
                entries_left: Some(10),
            },
            maps: Mutex::default(),
            unmaps: Mutex::default(),
            seen: Mutex::default(),
        }
    }

    fn refuse_map(&self, errno: i32) {
        self.maps.lock().unwrap().push_back(errno);
    }

    fn answer_unmap(&self, answer: Result<u64, i32>) {
        self.unmaps.lock().unwrap().push_back(answer);
    }
}

impl Type1Container for Mock {
    fn info(&self) -> io::Result<Type1Info> {
        let seen = self.seen.lock().unwrap();
        let in_use = seen.mapped.len() - seen.unmapped.len();
        let mut info = self.info.clone();
        info.entries_left = info
            .entries_left
            .map(|left| left - u32::try_from(in_use).unwrap());
        Ok(info)
    }

    unsafe fn map_dma(&self, iova: IovaRange, vaddr: HostVa, access: Access) -> io::Result<()> {
        if let Some(errno) = self.maps.lock().unwrap().pop_front() {
            return Err(io::Error::from_raw_os_error(errno));
        }
        self.seen.lock().unwrap().mapped.push((iova, vaddr, access));
        Ok(())
    }

    fn unmap_dma(&self, iova: IovaRange) -> io::Result<u64> {
        match self.unmaps.lock().unwrap().pop_front() {
            Some(Err(errno)) => return Err(io::Error::from_raw_os_error(errno)),
            Some(Ok(bytes)) => return Ok(bytes),
            None => {}
        }
        self.seen.lock().unwrap().unmapped.push(iova);
        Ok(iova.size())
    }

    fn unmap_all(&self) -> io::Result<u64> {
        Ok(0)
    }
}

fn iova(start: u64, size: u64) -> IovaRange {
    IovaRange::new(Iova::new(start), size).unwrap()
}

fn target(container: &Arc<Mock>) -> Type1Target<Mock> {
    // SAFETY: the container is none, so no device ever sees the memory.
    unsafe { Type1Target::new(container.clone()) }
}

/// A target that keeps the requests it gets: only the map can make host addresses.
struct Recorder(Arc<Mutex<Vec<MapRequest>>>);

impl DmaTarget for Recorder {
    fn limits(&self) -> Result<TargetLimits, Errno> {
        target(&Arc::new(Mock::new())).limits()
    }
    fn needs_host_address(&self, _backing: &Backing) -> bool {
        true
    }
    fn map(&mut self, request: &MapRequest) -> Result<(), TargetError> {
        self.0.lock().unwrap().push(request.clone());
        Ok(())
    }
    fn unmap(&mut self, _range: IovaRange) -> Result<(), TargetError> {
        Ok(())
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

fn ram() -> Backing {
    Backing::new(Ram::memfd(c"ram", 0x4000).unwrap())
}

/// A request for 16 KiB at 1 MiB, with its host address.
fn request(kind: RegionKind) -> MapRequest {
    let map = RegionManager::new();
    let mut change = map.change();
    let region = change.add(spec(&ram(), 0x10_0000, kind));
    change.enable(region);
    change.commit().unwrap();
    let requests = Arc::new(Mutex::new(Vec::new()));
    let _handle = map
        .register(
            Box::new(Recorder(requests.clone())),
            TargetOptions::new("recorder"),
        )
        .unwrap();
    let request = requests.lock().unwrap()[0].clone();
    assert_eq!(request.iova, iova(0x10_0000, 0x4000));
    request
}

fn hint(error: &TargetError) -> String {
    let TargetError::Refused(Reason::Kernel {
        hint: Some(hint), ..
    }) = error
    else {
        panic!("no hint: {error:?}");
    };
    hint.to_string()
}

#[test]
fn the_limits_are_the_containers() {
    let limits = target(&Arc::new(Mock::new())).limits().unwrap();
    assert_eq!(limits.page_size, 0x1000);
    assert_eq!(limits.allowed.len(), 2);
    assert_eq!(limits.entry_limit, Some(10));
    assert_eq!(limits.largest_mapping, 1 << 30);
    assert!(limits.read_only && limits.device_memory && limits.unmap_spans);
}

#[test]
fn the_entry_limit_stays_right_while_mappings_are_held() {
    let container = Arc::new(Mock::new());
    let mut target = target(&container);
    let request = request(RegionKind::Ram);
    target.map(&request).unwrap();
    assert_eq!(container.info().unwrap().entries_left, Some(9));
    assert_eq!(target.limits().unwrap().entry_limit, Some(10));
    target.unmap(request.iova).unwrap();
    assert_eq!(target.limits().unwrap().entry_limit, Some(10));
}

#[test]
fn page_sizes_of_all_kinds() {
    for (page_sizes, expected) in [
        (0, 0x1000),
        (0x200, 0x1000),
        (0x1_0000 | 0x2000_0000, 0x1_0000),
        (1 << 63, 1 << 63),
    ] {
        let mut mock = Mock::new();
        mock.info.page_sizes = page_sizes;
        let limits = target(&Arc::new(mock)).limits().unwrap();
        assert_eq!(limits.page_size, expected, "{page_sizes:#x}");
        assert!(limits.largest_mapping >= expected);
    }
}

#[test]
fn a_kernel_that_tells_no_ranges_and_no_limit() {
    let mut mock = Mock::new();
    mock.info.allowed.clear();
    mock.info.entries_left = None;
    let limits = target(&Arc::new(mock)).limits().unwrap();
    assert!(!limits.allowed.is_empty());
    assert_eq!(limits.entry_limit, None);
    if cfg!(target_arch = "x86_64") {
        let msi = iova(0xfee0_0000, 0x10_0000);
        assert!(!limits.allowed.iter().any(|range| range.overlaps(&msi)));
    }
}

#[test]
fn the_largest_mapping_is_a_power_of_two() {
    let container = Arc::new(Mock::new());
    let limits = target(&container)
        .with_largest_mapping(0x20_0000)
        .unwrap()
        .limits();
    assert_eq!(limits.unwrap().largest_mapping, 0x20_0000);
    for bytes in [0, 0x800, 0x3000, u64::MAX] {
        assert_eq!(
            target(&container).with_largest_mapping(bytes).unwrap_err(),
            InvalidLargestMapping { bytes }
        );
    }
}

#[test]
fn a_mapping_is_made_from_the_host_address_and_the_offset() {
    let container = Arc::new(Mock::new());
    let mut target = target(&container);
    let mut request = request(RegionKind::Ram);
    let base = request.host.as_ref().unwrap().address();
    request.offset = 0x1000;
    request.iova = iova(0x20_0000, 0x2000);
    request.access = Access::ReadOnly;
    target.map(&request).unwrap();
    assert_eq!(
        container.seen.lock().unwrap().mapped,
        [(
            request.iova,
            base.checked_add(0x1000).unwrap(),
            Access::ReadOnly
        )]
    );
}

#[test]
fn what_lies_outside_the_backing_is_never_mapped() {
    let container = Arc::new(Mock::new());
    let mut target = target(&container);
    let mut request = request(RegionKind::Ram);
    for offset in [0x1000, u64::MAX - 0xfff] {
        request.offset = offset;
        assert!(matches!(target.map(&request), Err(TargetError::Refused(_))));
    }
    request.offset = 0;
    request.host = None;
    assert!(matches!(
        target.map(&request),
        Err(TargetError::Refused(Reason::NoHostAddress(_)))
    ));
    assert!(container.seen.lock().unwrap().mapped.is_empty());
    assert_eq!(target.held(), 0);
}

#[test]
fn a_refused_map_leaves_nothing_recorded_and_keeps_its_errno() {
    let container = Arc::new(Mock::new());
    let mut target = target(&container);
    let request = request(RegionKind::Ram);
    for raw in [
        libc::EEXIST,
        libc::EINVAL,
        libc::ENOSPC,
        libc::ENOMEM,
        libc::EFAULT,
        libc::EPERM,
    ] {
        container.refuse_map(raw);
        let error = target.map(&request).unwrap_err();
        let TargetError::Refused(Reason::Kernel { errno, .. }) = error else {
            panic!("{error:?}");
        };
        assert_eq!(errno.raw(), raw);
        assert_eq!(target.held(), 0);
    }
    // And a retry does something.
    target.map(&request).unwrap();
    assert_eq!(target.held(), 1);
}

#[test]
fn refusals_say_what_to_do() {
    let container = Arc::new(Mock::new());
    let mut target = target(&container);
    let ram = request(RegionKind::Ram);
    let bar = request(RegionKind::DeviceMemory);
    for (raw, request, text) in [
        (libc::ENOSPC, &ram, "dma_entry_limit"),
        (libc::ENOMEM, &ram, "RLIMIT_MEMLOCK"),
        (libc::EFAULT, &bar, "does not decode memory"),
        (libc::EFAULT, &ram, "cannot be pinned"),
        (libc::EEXIST, &ram, "other than this target"),
        (libc::EINVAL, &ram, "reserved"),
    ] {
        container.refuse_map(raw);
        let hint = hint(&target.map(request).unwrap_err());
        assert!(hint.contains(text), "{raw}: {hint}");
    }
}

#[test]
fn an_unmap_of_the_wrong_size_is_unknown_and_keeps_the_memory() {
    let container = Arc::new(Mock::new());
    let mut target = target(&container);
    let request = request(RegionKind::Ram);
    target.map(&request).unwrap();
    for bytes in [0, 0x1000, 0x8000] {
        container.answer_unmap(Ok(bytes));
        assert_eq!(
            target.unmap(request.iova),
            Err(TargetError::Unknown(Errno::new(libc::EIO)))
        );
        assert_eq!(target.held(), 1, "its memory may still be mapped");
    }
}

#[test]
fn a_refused_unmap_keeps_the_mapping() {
    let container = Arc::new(Mock::new());
    let mut target = target(&container);
    let request = request(RegionKind::Ram);
    target.map(&request).unwrap();
    container.answer_unmap(Err(libc::EINVAL));
    let error = target.unmap(request.iova).unwrap_err();
    assert!(hint(&error).contains("cut a mapping in two"));
    assert_eq!(target.held(), 1);
    target.unmap(request.iova).unwrap();
    assert_eq!(target.held(), 0);
}

#[test]
fn one_unmap_takes_several_mappings_and_no_neighbour() {
    let container = Arc::new(Mock::new());
    let mut target = target(&container);
    let mut request = request(RegionKind::Ram);
    for start in [0x10_0000, 0x10_4000, 0x10_8000] {
        request.iova = iova(start, 0x4000);
        target.map(&request).unwrap();
    }
    target.unmap(iova(0x10_0000, 0x8000)).unwrap();
    assert_eq!(target.held(), 1);
    assert_eq!(container.seen.lock().unwrap().unmapped.len(), 1);
    target.unmap(iova(0x10_8000, 0x4000)).unwrap();
    assert_eq!(target.held(), 0);
}

/// Whether the host address of a request's backing is still mapped.
fn is_mapped(name: &str) -> bool {
    std::fs::read_to_string("/proc/self/maps")
        .unwrap()
        .contains(name)
}

fn named_request(name: &std::ffi::CStr) -> MapRequest {
    let map = RegionManager::new();
    let mut change = map.change();
    let backing = Backing::new(Ram::memfd(name, 0x4000).unwrap());
    let region = change.add(spec(&backing, 0x10_0000, RegionKind::Ram));
    change.enable(region);
    change.commit().unwrap();
    let requests = Arc::new(Mutex::new(Vec::new()));
    let _handle = map
        .register(
            Box::new(Recorder(requests.clone())),
            TargetOptions::new("recorder"),
        )
        .unwrap();
    requests.lock().unwrap().remove(0)
}

#[test]
fn the_target_keeps_the_host_address_until_it_is_unmapped() {
    let container = Arc::new(Mock::new());
    let mut target = target(&container);
    let request = named_request(c"kept-by-target");
    let range = request.iova;
    target.map(&request).unwrap();
    drop(request);
    assert!(is_mapped("kept-by-target"));
    target.unmap(range).unwrap();
    assert!(!is_mapped("kept-by-target"));
}

#[test]
fn a_dropped_target_unmaps_and_lets_go() {
    let container = Arc::new(Mock::new());
    let mut target = target(&container);
    target.map(&named_request(c"let-go-by-drop")).unwrap();
    drop(target);
    assert_eq!(container.seen.lock().unwrap().unmapped.len(), 1);
    assert!(!is_mapped("let-go-by-drop"));
}

#[test]
fn what_cannot_be_unmapped_at_drop_stays_in_memory() {
    let container = Arc::new(Mock::new());
    let mut target = target(&container);
    target.map(&named_request(c"never-let-go")).unwrap();
    container.answer_unmap(Err(libc::EIO));
    drop(target);
    assert!(is_mapped("never-let-go"));
}
