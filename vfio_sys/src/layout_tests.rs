//! The structs, constants and request numbers that are used, held against the C headers of the
//! machine: the C compiler checks a program of assertions made from what Rust has.
//!
//! What is newer than the oldest headers that the project is built with (Linux 6.1) is also held
//! against the numbers themselves, in [`newer`], and against the headers where they are there. To
//! hold it against a kernel's own, `THROUGHWAY_UAPI=<its sources>/include/uapi`.

use std::mem::offset_of;
use std::process::Command;

use iommufd_bindings::iommufd::*;
use vfio_bindings::bindings::vfio::*;

use crate::{device_ioctls, ioctls, iommufd_ioctls};

/// C assertions, one to a line.
fn assertions() -> Vec<String> {
    let mut lines = Vec::new();
    macro_rules! offsets {
        ($($name:ident { $($field:ident $(as $c:literal)?),* }),* $(,)?) => {$($(
            let field = [stringify!($field) $(, $c)?];
            lines.push(format!(
                "offsetof(struct {}, {}) == {}",
                stringify!($name),
                field[field.len() - 1],
                offset_of!($name, $field)
            ));
            assert!(offset_of!($name, $field) <= size_of::<$name>());
        )*)*};
    }
    macro_rules! constants {
        ($($name:ident),* $(,)?) => {$(
            lines.push(format!("{} == {}", stringify!($name), $name));
        )*};
    }
    macro_rules! sizes {
        ($($name:ident),* $(,)?) => {$(
            lines.push(format!("sizeof(struct {}) == {}", stringify!($name), size_of::<$name>()));
        )*};
    }
    offsets! {
        vfio_info_cap_header { id, version, next },
        vfio_group_status { argsz, flags },
        vfio_device_info { argsz, flags, num_regions, num_irqs, cap_offset },
        vfio_region_info { argsz, flags, index, cap_offset, size, offset },
        vfio_region_info_cap_sparse_mmap { header, nr_areas, areas },
        vfio_region_sparse_mmap_area { offset, size },
        vfio_region_info_cap_type { header, type_ as "type", subtype },
        vfio_irq_info { argsz, flags, index, count },
        vfio_irq_set { argsz, flags, index, start, count, data },
        vfio_iommu_type1_info { argsz, flags, iova_pgsizes, cap_offset },
        vfio_iommu_type1_info_cap_iova_range { header, nr_iovas, iova_ranges },
        vfio_iova_range { start, end },
        vfio_iommu_type1_info_dma_avail { header, avail },
        vfio_iommu_type1_dma_map { argsz, flags, vaddr, iova, size },
        vfio_iommu_type1_dma_unmap { argsz, flags, iova, size, data },
        vfio_device_feature { argsz, flags, data },
        vfio_pci_hot_reset_info { argsz, flags, count, devices },
        vfio_pci_dependent_device { segment, bus, devfn },
        vfio_pci_hot_reset { argsz, flags, count, group_fds },
    }
    // Not vfio_device_info: it grew from 20 to 24 bytes in Linux 6.6.
    sizes! {
        vfio_info_cap_header, vfio_group_status, vfio_region_info, vfio_irq_info,
        vfio_region_sparse_mmap_area, vfio_region_info_cap_sparse_mmap, vfio_region_info_cap_type,
        vfio_iommu_type1_info, vfio_iova_range, vfio_iommu_type1_info_cap_iova_range,
        vfio_iommu_type1_info_dma_avail, vfio_iommu_type1_dma_map, vfio_iommu_type1_dma_unmap,
        vfio_device_feature, vfio_pci_dependent_device,
    }
    constants! {
        VFIO_API_VERSION, VFIO_TYPE1v2_IOMMU, VFIO_UNMAP_ALL,
        VFIO_GROUP_FLAGS_VIABLE, VFIO_GROUP_FLAGS_CONTAINER_SET,
        VFIO_DEVICE_FLAGS_RESET, VFIO_DEVICE_FLAGS_PCI, VFIO_DEVICE_FLAGS_CAPS,
        VFIO_REGION_INFO_FLAG_READ, VFIO_REGION_INFO_FLAG_WRITE, VFIO_REGION_INFO_FLAG_MMAP,
        VFIO_REGION_INFO_FLAG_CAPS, VFIO_REGION_INFO_CAP_SPARSE_MMAP, VFIO_REGION_INFO_CAP_TYPE,
        VFIO_REGION_INFO_CAP_MSIX_MAPPABLE,
        VFIO_PCI_BAR0_REGION_INDEX, VFIO_PCI_BAR5_REGION_INDEX, VFIO_PCI_ROM_REGION_INDEX,
        VFIO_PCI_CONFIG_REGION_INDEX, VFIO_PCI_VGA_REGION_INDEX,
        VFIO_PCI_INTX_IRQ_INDEX, VFIO_PCI_MSI_IRQ_INDEX, VFIO_PCI_MSIX_IRQ_INDEX,
        VFIO_PCI_ERR_IRQ_INDEX, VFIO_PCI_REQ_IRQ_INDEX,
        VFIO_IRQ_INFO_EVENTFD, VFIO_IRQ_INFO_MASKABLE, VFIO_IRQ_INFO_AUTOMASKED,
        VFIO_IRQ_INFO_NORESIZE,
        VFIO_IRQ_SET_DATA_NONE, VFIO_IRQ_SET_DATA_BOOL, VFIO_IRQ_SET_DATA_EVENTFD,
        VFIO_IRQ_SET_ACTION_MASK, VFIO_IRQ_SET_ACTION_UNMASK, VFIO_IRQ_SET_ACTION_TRIGGER,
        VFIO_IOMMU_INFO_PGSIZES, VFIO_IOMMU_INFO_CAPS, VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE,
        VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL,
        VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE, VFIO_DMA_UNMAP_FLAG_ALL,
        VFIO_DEVICE_FEATURE_GET, VFIO_DEVICE_FEATURE_PROBE,
    }
    for (name, request) in [
        ("VFIO_GET_API_VERSION", ioctls::GET_API_VERSION),
        ("VFIO_CHECK_EXTENSION", ioctls::CHECK_EXTENSION),
        ("VFIO_SET_IOMMU", ioctls::SET_IOMMU),
        ("VFIO_GROUP_GET_STATUS", ioctls::GROUP_GET_STATUS),
        ("VFIO_GROUP_SET_CONTAINER", ioctls::GROUP_SET_CONTAINER),
        ("VFIO_GROUP_UNSET_CONTAINER", ioctls::GROUP_UNSET_CONTAINER),
        ("VFIO_GROUP_GET_DEVICE_FD", ioctls::GROUP_GET_DEVICE_FD),
        ("VFIO_DEVICE_GET_INFO", ioctls::DEVICE_GET_INFO),
        (
            "VFIO_DEVICE_GET_REGION_INFO",
            ioctls::DEVICE_GET_REGION_INFO,
        ),
        ("VFIO_DEVICE_GET_IRQ_INFO", ioctls::DEVICE_GET_IRQ_INFO),
        ("VFIO_DEVICE_SET_IRQS", ioctls::DEVICE_SET_IRQS),
        ("VFIO_DEVICE_RESET", ioctls::DEVICE_RESET),
        ("VFIO_IOMMU_GET_INFO", ioctls::IOMMU_GET_INFO),
        ("VFIO_IOMMU_MAP_DMA", ioctls::IOMMU_MAP_DMA),
        ("VFIO_IOMMU_UNMAP_DMA", ioctls::IOMMU_UNMAP_DMA),
        (
            "VFIO_DEVICE_GET_PCI_HOT_RESET_INFO",
            device_ioctls::GET_PCI_HOT_RESET_INFO,
        ),
        ("VFIO_DEVICE_PCI_HOT_RESET", device_ioctls::PCI_HOT_RESET),
        ("VFIO_DEVICE_FEATURE", device_ioctls::FEATURE),
    ] {
        lines.push(format!("{name} == {request}"));
    }
    lines
}

/// What is newer: the C expression, what Rust has for it, and what it is.
fn newer() -> Vec<(String, u64, u64)> {
    let mut lines = Vec::new();
    let number = |number: usize| u64::try_from(number).unwrap();
    macro_rules! structs {
        ($($name:ident = $size:literal { $($field:ident = $offset:literal),* }),* $(,)?) => {$(
            lines.push((
                format!("sizeof(struct {})", stringify!($name)),
                number(size_of::<$name>()),
                $size,
            ));
            $(lines.push((
                format!("offsetof(struct {}, {})", stringify!($name), stringify!($field)),
                number(offset_of!($name, $field)),
                $offset,
            ));)*
        )*};
    }
    structs! {
        iommu_destroy = 8 { size = 0, id = 4 },
        iommu_ioas_alloc = 12 { size = 0, flags = 4, out_ioas_id = 8 },
        iommu_iova_range = 16 { start = 0, last = 8 },
        iommu_ioas_iova_ranges = 32 {
            size = 0, ioas_id = 4, num_iovas = 8, allowed_iovas = 16, out_iova_alignment = 24
        },
        iommu_ioas_allow_iovas = 24 { size = 0, ioas_id = 4, num_iovas = 8, allowed_iovas = 16 },
        iommu_ioas_map = 40 {
            size = 0, flags = 4, ioas_id = 8, user_va = 16, length = 24, iova = 32
        },
        iommu_ioas_map_file = 40 {
            size = 0, flags = 4, ioas_id = 8, fd = 12, start = 16, length = 24, iova = 32
        },
        iommu_ioas_copy = 40 {
            size = 0, flags = 4, dst_ioas_id = 8, src_ioas_id = 12, length = 16, dst_iova = 24,
            src_iova = 32
        },
        iommu_ioas_unmap = 24 { size = 0, ioas_id = 4, iova = 8, length = 16 },
        iommu_option = 24 { size = 0, option_id = 4, op = 8, object_id = 12, val64 = 16 },
        vfio_device_bind_iommufd = 24 {
            argsz = 0, flags = 4, iommufd = 8, out_devid = 12, token_uuid_ptr = 16
        },
        vfio_device_attach_iommufd_pt = 16 { argsz = 0, flags = 4, pt_id = 8, pasid = 12 },
        vfio_device_detach_iommufd_pt = 12 { argsz = 0, flags = 4, pasid = 8 },
        vfio_region_dma_range = 16 { offset = 0, length = 8 },
        vfio_device_feature_dma_buf = 16 {
            region_index = 0, open_flags = 4, flags = 8, nr_ranges = 12, dma_ranges = 16
        },
    }
    for (name, rust, value) in [
        ("IOMMU_DESTROY", iommufd_ioctls::DESTROY, 0x3b80),
        ("IOMMU_IOAS_ALLOC", iommufd_ioctls::IOAS_ALLOC, 0x3b81),
        (
            "IOMMU_IOAS_ALLOW_IOVAS",
            iommufd_ioctls::IOAS_ALLOW_IOVAS,
            0x3b82,
        ),
        ("IOMMU_IOAS_COPY", iommufd_ioctls::IOAS_COPY, 0x3b83),
        (
            "IOMMU_IOAS_IOVA_RANGES",
            iommufd_ioctls::IOAS_IOVA_RANGES,
            0x3b84,
        ),
        ("IOMMU_IOAS_MAP", iommufd_ioctls::IOAS_MAP, 0x3b85),
        ("IOMMU_IOAS_UNMAP", iommufd_ioctls::IOAS_UNMAP, 0x3b86),
        ("IOMMU_OPTION", iommufd_ioctls::OPTION, 0x3b87),
        ("IOMMU_IOAS_MAP_FILE", iommufd_ioctls::IOAS_MAP_FILE, 0x3b8f),
        (
            "VFIO_DEVICE_BIND_IOMMUFD",
            device_ioctls::BIND_IOMMUFD,
            0x3b76,
        ),
        (
            "VFIO_DEVICE_ATTACH_IOMMUFD_PT",
            device_ioctls::ATTACH_IOMMUFD_PT,
            0x3b77,
        ),
        (
            "VFIO_DEVICE_DETACH_IOMMUFD_PT",
            device_ioctls::DETACH_IOMMUFD_PT,
            0x3b78,
        ),
        (
            "IOMMU_IOAS_MAP_FIXED_IOVA",
            iommufd_ioas_map_flags_IOMMU_IOAS_MAP_FIXED_IOVA.into(),
            1,
        ),
        (
            "IOMMU_IOAS_MAP_WRITEABLE",
            iommufd_ioas_map_flags_IOMMU_IOAS_MAP_WRITEABLE.into(),
            2,
        ),
        (
            "IOMMU_IOAS_MAP_READABLE",
            iommufd_ioas_map_flags_IOMMU_IOAS_MAP_READABLE.into(),
            4,
        ),
        (
            "IOMMU_OPTION_RLIMIT_MODE",
            iommufd_option_IOMMU_OPTION_RLIMIT_MODE.into(),
            0,
        ),
        (
            "IOMMU_OPTION_HUGE_PAGES",
            iommufd_option_IOMMU_OPTION_HUGE_PAGES.into(),
            1,
        ),
        (
            "IOMMU_OPTION_OP_SET",
            iommufd_option_ops_IOMMU_OPTION_OP_SET.into(),
            0,
        ),
        (
            "IOMMU_OPTION_OP_GET",
            iommufd_option_ops_IOMMU_OPTION_OP_GET.into(),
            1,
        ),
        (
            "VFIO_DEVICE_FEATURE_DMA_BUF",
            VFIO_DEVICE_FEATURE_DMA_BUF.into(),
            11,
        ),
        (
            "VFIO_PCI_HOT_RESET_FLAG_DEV_ID",
            VFIO_PCI_HOT_RESET_FLAG_DEV_ID.into(),
            1,
        ),
        (
            "VFIO_PCI_HOT_RESET_FLAG_DEV_ID_OWNED",
            VFIO_PCI_HOT_RESET_FLAG_DEV_ID_OWNED.into(),
            2,
        ),
        ("VFIO_PCI_DEVID_OWNED", VFIO_PCI_DEVID_OWNED.into(), 0),
    ] {
        lines.push((name.to_owned(), rust, value));
    }
    lines
}

/// Rust links with `cc`, and what `cc` needs for that brings the kernel's headers along.
fn compile(headers: &[&str], assertions: &[String]) -> std::process::Output {
    static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
    let mut program = "#include <stddef.h>\n".to_owned();
    for header in headers {
        program.push_str(&format!("#include <{header}>\n"));
    }
    for assertion in assertions {
        program.push_str(&format!("_Static_assert({assertion}, \"layout\");\n"));
    }
    let path = std::env::temp_dir().join(format!(
        "throughway-layout-{}-{}.c",
        std::process::id(),
        NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed)
    ));
    std::fs::write(&path, program).unwrap();
    let mut compiler = Command::new("cc");
    compiler.args(["-std=c11", "-fsyntax-only"]);
    if let Some(headers) = std::env::var_os("THROUGHWAY_UAPI") {
        // What `make headers_install` takes out of them.
        compiler.arg("-D__user=").arg("-I").arg(headers);
    }
    let output = compiler.arg(&path).output();
    std::fs::remove_file(&path).unwrap();
    output.expect("the C compiler `cc`, which rustc links with")
}

const VFIO: &[&str] = &["linux/vfio.h"];

#[test]
fn rust_and_c_agree() {
    let assertions = assertions();
    assert!(assertions.len() > 100);
    let output = compile(VFIO, &assertions);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
}

/// The control: the check above can fail.
#[test]
fn a_wrong_offset_is_noticed() {
    let wrong = "offsetof(struct vfio_region_info, size) == 8".to_owned();
    assert!(!compile(VFIO, &[wrong]).status.success());
}

#[test]
fn the_requests_as_numbers() {
    assert_eq!(ioctls::GET_API_VERSION, 0x3b64);
    assert_eq!(ioctls::IOMMU_UNMAP_DMA, 0x3b72);
}

#[test]
fn what_is_newer_is_what_it_is() {
    let newer = newer();
    assert!(newer.len() > 80);
    for (name, rust, value) in newer {
        assert_eq!(rust, value, "{name}");
    }
    assert_eq!(size_of::<device_ioctls::DmaBufFeature>(), 40);
    assert_eq!(offset_of!(device_ioctls::DmaBufFeature, dma_buf), 8);
    assert_eq!(offset_of!(device_ioctls::DmaBufFeature, range), 24);
}

/// Where the headers know of it. Those that do not are too old to say anything.
#[test]
fn rust_and_newer_c_agree() {
    let headers = ["linux/iommufd.h", "linux/vfio.h"];
    let newest = "VFIO_DEVICE_FEATURE_DMA_BUF > 0 && IOMMU_IOAS_MAP_FILE > 0".to_owned();
    if !compile(&headers, &[newest]).status.success() {
        let given = std::env::var_os("THROUGHWAY_UAPI");
        assert_eq!(given, None, "no headers of Linux 6.19 or newer");
        println!("skipped: the C headers here are older than Linux 6.19");
        return;
    }
    let assertions: Vec<String> = newer()
        .into_iter()
        .map(|(name, rust, _)| format!("{name} == {rust}"))
        .collect();
    let output = compile(&headers, &assertions);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
}
