use super::*;

fn all() -> [Ram; 3] {
    let size = 4 * page_size();
    [
        Ram::memfd(c"test", size).unwrap(),
        Ram::memfd_transparent(c"test", size).unwrap(),
        Ram::anonymous(size).unwrap(),
    ]
}

/// The same file, mapped apart from what is tested.
fn mapped(ram: &Ram) -> Mapping {
    let file = File::from(ram.file().unwrap().try_clone_to_owned().unwrap());
    Mapping::of_file(Arc::new(file), 0, ram.size(), Access::ReadWrite).unwrap()
}

#[test]
fn what_is_written_is_read() {
    for ram in all() {
        let mut data = [0xff; 16];
        ram.read(5, &mut data).unwrap();
        assert_eq!(data, [0; 16], "fresh memory is zeroed");
        ram.write(page_size() - 3, b"across pages").unwrap();
        let mut data = [0; 12];
        ram.read(page_size() - 3, &mut data).unwrap();
        assert_eq!(&data, b"across pages");
    }
}

#[test]
fn the_file_and_its_mapping_show_the_same_bytes() {
    let ram = Ram::memfd(c"test", 2 * page_size()).unwrap();
    let mapping = mapped(&ram);
    ram.write(100, b"by the file").unwrap();
    let mut data = [0; 11];
    mapping.read(100, &mut data).unwrap();
    assert_eq!(&data, b"by the file");
    mapping.write(page_size(), b"by the map").unwrap();
    let mut data = [0; 10];
    ram.read(page_size(), &mut data).unwrap();
    assert_eq!(&data, b"by the map");
}

#[test]
fn a_host_address_shows_the_memory() {
    for ram in all() {
        ram.write(8, &0x1234_5678_9abc_def0u64.to_ne_bytes())
            .unwrap();
        let mapping = ram.map_host().unwrap();
        let address = mapping.address().checked_add(8).unwrap();
        let pointer =
            std::ptr::with_exposed_provenance::<u64>(usize::try_from(address.raw()).unwrap());
        // SAFETY: eight aligned bytes in a mapping that is held.
        let seen = unsafe { pointer.read_volatile() };
        assert_eq!(seen, 0x1234_5678_9abc_def0);
    }
}

#[test]
fn a_memfd_is_mapped_by_its_file_and_anonymous_memory_is_not() {
    let [memfd, _, anonymous] = all();
    let file = BackingObject::file(&memfd).unwrap();
    assert_eq!(file.offset, 0);
    let length = File::from(file.fd.try_clone_to_owned().unwrap());
    assert_eq!(length.metadata().unwrap().len(), memfd.size());
    let none = BackingObject::file(&anonymous).unwrap_err();
    assert_eq!(none, NoFile::Anonymous);
}

#[test]
fn anonymous_memory_survives_its_host_addresses() {
    let ram = Ram::anonymous(page_size()).unwrap();
    ram.write(0, b"kept").unwrap();
    let first = ram.map_host().unwrap().address();
    let guard = ram.map_host().unwrap();
    assert_eq!(guard.address(), first);
    let mut data = [0; 4];
    ram.read(0, &mut data).unwrap();
    assert_eq!(&data, b"kept");
}

#[test]
fn a_memfd_can_neither_shrink_nor_grow() {
    let ram = Ram::memfd(c"test", 2 * page_size()).unwrap();
    let file = File::from(ram.file().unwrap().try_clone_to_owned().unwrap());
    for size in [page_size(), 3 * page_size()] {
        assert_eq!(
            file.set_len(size).unwrap_err().raw_os_error(),
            Some(libc::EPERM)
        );
    }
}

#[test]
fn a_file_that_is_handed_in_is_sealed_and_checked() {
    let page = page_size();
    let file = create_memfd(c"theirs", 0).unwrap();
    file.set_len(2 * page).unwrap();
    let theirs = file.try_clone().unwrap();
    let fd = || OwnedFd::from(file.try_clone().unwrap());
    assert!(matches!(
        Ram::from_fd(fd(), 3 * page),
        Err(HostMemoryError::FileTooSmall { .. })
    ));
    assert!(matches!(
        Ram::from_fd(fd(), page + 1),
        Err(HostMemoryError::SizeMisaligned { .. })
    ));
    assert!(matches!(Ram::from_fd(fd(), 0), Err(HostMemoryError::Empty)));
    let ram = Ram::from_fd(fd(), 2 * page).unwrap();
    theirs.write_all_at(b"shared", 0).unwrap();
    let mut data = [0; 6];
    ram.read(0, &mut data).unwrap();
    assert_eq!(&data, b"shared");
    assert!(theirs.set_len(page).is_err(), "it must not shrink any more");
}

#[test]
fn a_file_that_cannot_be_written_is_no_ram() {
    let page = page_size();
    let file = create_memfd(c"theirs", 0).unwrap();
    file.set_len(page).unwrap();
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let refused = |file: File| match Ram::from_fd(file.into(), page) {
        Err(HostMemoryError::NotWritable(why)) => why,
        other => panic!("{other:?}"),
    };
    assert_eq!(refused(File::open(&path).unwrap()), NotWritable::Mode);
    let written = File::options().write(true).open(&path).unwrap();
    assert_eq!(refused(written), NotWritable::Mode);
    // Negative control, before it is sealed.
    Ram::from_fd(file.try_clone().unwrap().into(), page).unwrap();
    for seal in [libc::F_SEAL_FUTURE_WRITE, libc::F_SEAL_WRITE] {
        add_seals(&file, seal).unwrap();
        assert_eq!(refused(file.try_clone().unwrap()), NotWritable::Sealed);
    }
    let text = HostMemoryError::NotWritable(NotWritable::Sealed).to_string();
    assert!(text.contains("leave out F_SEAL_WRITE"), "{text}");
}

#[test]
fn a_file_sealed_to_its_size_is_ram_unless_it_is_too_small() {
    let page = page_size();
    let file = create_memfd(c"theirs", 0).unwrap();
    file.set_len(page).unwrap();
    seal(&file).unwrap();
    let fd = || OwnedFd::from(file.try_clone().unwrap());
    Ram::from_fd(fd(), page).unwrap();
    let error = Ram::from_fd(fd(), 2 * page).unwrap_err();
    assert!(matches!(error, HostMemoryError::FileTooSmall { .. }));
}

#[test]
fn a_pipe_is_no_memory() {
    let (reader, _writer) = io::pipe().unwrap();
    assert!(Ram::from_fd(reader.into(), page_size()).is_err());
}

#[test]
fn sizes_that_memory_cannot_have() {
    let page = page_size();
    assert!(matches!(Ram::memfd(c"t", 0), Err(HostMemoryError::Empty)));
    assert!(matches!(
        Ram::memfd(c"t", page - 1),
        Err(HostMemoryError::SizeMisaligned { .. })
    ));
    assert!(matches!(
        Ram::memfd(c"t", 0u64.wrapping_sub(page)),
        Err(HostMemoryError::TooLarge { .. })
    ));
    assert!(matches!(
        Ram::memfd_huge(c"t", page, HugePage::Size2M),
        Err(HostMemoryError::SizeMisaligned {
            page: 0x20_0000,
            ..
        })
    ));
}

#[test]
fn bounds_are_kept() {
    for ram in all() {
        let size = ram.size();
        for (offset, length) in [(size, 1), (size - 1, 2), (u64::MAX, 2)] {
            let mut data = vec![0; length];
            assert!(matches!(
                ram.read(offset, &mut data),
                Err(HostMemoryError::OutOfBounds { .. })
            ));
            assert!(matches!(
                ram.write(offset, &data),
                Err(HostMemoryError::OutOfBounds { .. })
            ));
        }
    }
}

/// Needs no huge pages: far more are asked for than any machine has.
#[test]
fn missing_huge_pages_say_how_to_get_some() {
    for page in [HugePage::Size2M, HugePage::Size1G] {
        let pages = 1 << 22;
        let error = Ram::memfd_huge(c"t", pages * page.bytes(), page).unwrap_err();
        let HostMemoryError::HugePagesUnavailable { .. } = error else {
            panic!("{error:?}");
        };
        let text = error.to_string();
        assert!(text.contains("nr_hugepages"), "{text}");
        assert!(text.contains("4194304"), "{text}");
    }
}
