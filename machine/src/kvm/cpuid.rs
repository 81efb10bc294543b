//! What a guest's processor says of itself (`CPUID`; Intel's and AMD's manuals have the leaves).

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

const FEATURES: u32 = 0x1;
const CACHES: u32 = 0x4;
const TOPOLOGY: u32 = 0xb;
const TOPOLOGY_2: u32 = 0x1f;
const ADDRESS_SIZES: u32 = 0x8000_0008;
const AMD_TOPOLOGY: u32 = 0x8000_001e;

/// Of [`FEATURES`], in ECX: there is a hypervisor.
const HYPERVISOR: u32 = 1 << 31;
/// Of [`FEATURES`], in ECX: the local APIC's timer counts to a time stamp.
const TSC_DEADLINE: u32 = 1 << 24;
/// Of [`FEATURES`], in EDX: the package has more than one processor.
const SEVERAL: u32 = 1 << 28;
/// What a processor that does not say has.
const USUAL_ADDRESS_BITS: u8 = 36;

/// How wide a physical address is.
pub(super) fn address_bits(cpuid: &CpuId) -> u8 {
    let sizes = cpuid
        .as_slice()
        .iter()
        .find(|e| e.function == ADDRESS_SIZES);
    sizes.map_or(USUAL_ADDRESS_BITS, |entry| {
        let [bits, _, guest, _] = entry.eax.to_le_bytes();
        // AMD's processors may tell guests another width.
        let bits = if guest == 0 { bits } else { guest };
        bits.clamp(32, 52)
    })
}

/// What processor `number` of `count` says, by what KVM supports. All are cores of one package,
/// their APIC ids their numbers.
pub(super) fn of_processor(supported: &CpuId, number: u8, count: u8, tsc_deadline: bool) -> CpuId {
    let mut cpuid = supported.clone();
    let bits = u8::BITS.saturating_sub(count.saturating_sub(1).leading_zeros());
    for entry in cpuid.as_mut_slice() {
        tell(entry, number.into(), count.into(), bits, tsc_deadline);
    }
    cpuid
}

fn tell(entry: &mut kvm_cpuid_entry2, number: u32, count: u32, bits: u32, tsc_deadline: bool) {
    match entry.function {
        FEATURES => {
            let brand_and_flush = entry.ebx & 0xffff;
            entry.ebx = number << 24 | count.min(255) << 16 | brand_and_flush;
            entry.ecx |= HYPERVISOR;
            entry.ecx &= !TSC_DEADLINE;
            if tsc_deadline {
                entry.ecx |= TSC_DEADLINE;
            }
            if count > 1 {
                entry.edx |= SEVERAL;
            } else {
                entry.edx &= !SEVERAL;
            }
        }
        CACHES if entry.eax & 0x1f != 0 => {
            let (level, kept) = (entry.eax >> 5 & 7, entry.eax & 0x3fff);
            // The first two levels belong to one core, the others to all.
            let sharing = if level < 3 {
                0
            } else {
                count.saturating_sub(1)
            };
            let cores = count.saturating_sub(1).min(63);
            entry.eax = cores << 26 | sharing.min(0xfff) << 14 | kept;
        }
        TOPOLOGY | TOPOLOGY_2 => {
            // Level 0: the threads of a core. Level 1: the cores of the package.
            let (shift, at_level, kind) = match entry.index {
                0 => (0, 1, 1),
                1 => (bits, count, 2),
                _ => (0, 0, 0),
            };
            entry.eax = shift;
            entry.ebx = at_level;
            entry.ecx = kind << 8 | entry.index & 0xff;
            entry.edx = number;
        }
        ADDRESS_SIZES => {
            entry.ecx = bits << 12 | count.saturating_sub(1) & 0xff;
        }
        AMD_TOPOLOGY => {
            entry.eax = number;
            entry.ebx = number & 0xff;
            entry.ecx = 0;
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32, eax: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            index,
            eax,
            ebx: 0x0002_0800,
            ..Default::default()
        }
    }

    fn told(entry: kvm_cpuid_entry2, number: u8, count: u8) -> kvm_cpuid_entry2 {
        let supported = CpuId::from_entries(&[entry]).unwrap();
        of_processor(&supported, number, count, true).as_slice()[0]
    }

    #[test]
    fn processors_tell_their_numbers() {
        let features = told(entry(FEATURES, 0, 0), 2, 4);
        assert_eq!(features.ebx, 0x0204_0800);
        assert_eq!(features.ecx, HYPERVISOR | TSC_DEADLINE);
        assert_eq!(features.edx, SEVERAL);
        assert_eq!(told(entry(FEATURES, 0, 0), 0, 1).edx, 0);
        assert_eq!(told(entry(AMD_TOPOLOGY, 0, 9), 3, 4).eax, 3);
    }

    #[test]
    fn a_package_has_as_many_cores_as_there_are_processors() {
        let threads = told(entry(TOPOLOGY, 0, 7), 2, 3);
        assert_eq!((threads.eax, threads.ebx, threads.ecx), (0, 1, 0x100));
        let cores = told(entry(TOPOLOGY, 1, 7), 2, 3);
        assert_eq!((cores.eax, cores.ebx, cores.ecx), (2, 3, 0x201));
        assert_eq!((threads.edx, cores.edx), (2, 2));
        let end = told(entry(TOPOLOGY, 2, 7), 2, 3);
        assert_eq!((end.eax, end.ebx, end.ecx), (0, 0, 2));
    }

    #[test]
    fn addresses_are_as_wide_as_kvm_says_of_guests() {
        let bits =
            |eax| address_bits(&CpuId::from_entries(&[entry(ADDRESS_SIZES, 0, eax)]).unwrap());
        assert_eq!(bits(0x3028), 40);
        assert_eq!(bits(0x2d_3030), 45);
        assert_eq!(bits(0xff), 52);
        assert_eq!(address_bits(&CpuId::from_entries(&[]).unwrap()), 36);
    }
}
