//! The structs, constants and request numbers that are used, held against the C header of the
//! machine: the C compiler checks a program of assertions made from what Rust has.

use std::mem::offset_of;
use std::process::Command;

use vfio_bindings::bindings::vfio::*;

use crate::ioctls;

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
    }
    // Not vfio_device_info: it grew from 20 to 24 bytes in Linux 6.6.
    sizes! {
        vfio_info_cap_header, vfio_group_status, vfio_region_info, vfio_irq_info,
        vfio_region_sparse_mmap_area, vfio_region_info_cap_sparse_mmap, vfio_region_info_cap_type,
        vfio_iommu_type1_info, vfio_iova_range, vfio_iommu_type1_info_cap_iova_range,
        vfio_iommu_type1_info_dma_avail, vfio_iommu_type1_dma_map, vfio_iommu_type1_dma_unmap,
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
    ] {
        lines.push(format!("{name} == {request}"));
    }
    lines
}

/// Rust links with `cc`, and what `cc` needs for that brings the kernel's headers along.
fn compile(assertions: &[String]) -> std::process::Output {
    static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
    let mut program = "#include <stddef.h>\n#include <linux/vfio.h>\n".to_owned();
    for assertion in assertions {
        program.push_str(&format!("_Static_assert({assertion}, \"layout\");\n"));
    }
    let path = std::env::temp_dir().join(format!(
        "throughway-layout-{}-{}.c",
        std::process::id(),
        NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed)
    ));
    std::fs::write(&path, program).unwrap();
    let output = Command::new("cc")
        .args(["-std=c11", "-fsyntax-only"])
        .arg(&path)
        .output();
    std::fs::remove_file(&path).unwrap();
    output.expect("the C compiler `cc`, which rustc links with")
}

#[test]
fn rust_and_c_agree() {
    let assertions = assertions();
    assert!(assertions.len() > 100);
    let output = compile(&assertions);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
}

/// The control: the check above can fail.
#[test]
fn a_wrong_offset_is_noticed() {
    let wrong = "offsetof(struct vfio_region_info, size) == 8".to_owned();
    assert!(!compile(&[wrong]).status.success());
}

#[test]
fn the_requests_as_numbers() {
    assert_eq!(ioctls::GET_API_VERSION, 0x3b64);
    assert_eq!(ioctls::IOMMU_UNMAP_DMA, 0x3b72);
}
