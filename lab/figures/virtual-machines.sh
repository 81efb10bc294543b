# Runs virtual machines in the nested machine, by several programs in turns, and prints what
# vm-figures says of each.
#
#     [LIMIT=SECONDS] [SHMEM=never|advise|within_size|...] virtual-machines.sh TURNS STEPS RUN...
#
# A run is PROGRAM:IOMMU or PROGRAM:IOMMU:edu, which leaves the ivshmem out. An edu is 05.0, an
# ivshmem 06.0. throughway:IOMMU-transparent has RAM of transparent huge pages, as far as SHMEM
# (shmem_enabled) lets it; qemu:IOMMU-memfd has a memfd as RAM, as throughway has.
# /lab/files/others.tar is what pack.sh makes; throughway needs none.
set -u
turns=$1 steps=$2
shift 2
line="console=ttyS0 quiet panic=-1 throughway.steps=$steps"
kernel=/lab/guest/kernel initrd=/lab/guest/initrd
edu=0000:00:05.0 ivshmem=0000:00:06.0
echo ${SHMEM:-never} > /sys/kernel/mm/transparent_hugepage/shmem_enabled
mkdir /others
if [ -e /lab/files/others.tar ]; then
    tar -C /others -xf /lab/files/others.tar && rm /lab/files/others.tar
fi

# Each takes how the IOMMU is programmed, and the functions.
run_throughway() {
    iommu=${1%-*} memory=size=512M
    case $1 in *-transparent) memory=$memory,hugepages=transparent ;; esac
    shift
    for function in "$@"; do set -- "$@" --device "$function"; shift; done
    vm-figures --limit ${LIMIT:-60} throughway run --kernel $kernel --initrd $initrd --cmdline "$line" \
        --memory $memory --cpus 1 --iommu "$iommu" "$@"
}

run_qemu() {
    object= of=
    case $1 in iommufd*) object="-object iommufd,id=iommufd0" of=,iommufd=iommufd0 ;; esac
    case $1 in *-memfd)
        object="$object -object memory-backend-memfd,id=ram,size=512M -machine memory-backend=ram" ;;
    esac
    shift
    for function in "$@"; do set -- "$@" -device vfio-pci,host="$function$of"; shift; done
    vm-figures --limit ${LIMIT:-60} /others/qemu/ld.so --library-path /others/qemu \
        /others/qemu/qemu-system-x86_64 -L /others/qemu -no-user-config -nodefaults \
        -display none -machine q35 -accel kvm -cpu host -smp 1 -m 512M -serial stdio \
        -kernel $kernel -initrd $initrd -append "$line" $object "$@"
}

run_alioth() {
    case $1 in
    iommufd)
        shift
        for function in "$@"; do
            cdev=$(ls "/sys/bus/pci/devices/$function/vfio-dev")
            set -- "$@" --vfio-cdev path=/dev/vfio/devices/"$cdev",ioas=all
            shift
        done
        set -- --vfio-ioas name=all "$@" ;;
    type1)
        shift
        for function in "$@"; do
            group=$(basename "$(readlink "/sys/bus/pci/devices/$function/iommu_group")")
            set -- "$@" --vfio-group path=/dev/vfio/"$group",devices="$function",container=all
            shift
        done
        set -- --vfio-container name=all "$@" ;;
    esac
    vm-figures --limit ${LIMIT:-60} /others/alioth/ld.so --library-path /others/alioth /others/alioth/alioth boot \
        --kernel $kernel --initramfs $initrd --cmdline "$line" --cpu count=1 \
        --memory size=512M "$@"
}

for turn in $(seq "$turns"); do
    for run in "$@"; do
        printf '%s ' "$run"
        way=${run#*:}
        case $run in
        *:edu) "run_${run%%:*}" "${way%:edu}" $edu ;;
        *) "run_${run%%:*}" "$way" $edu $ivshmem ;;
        esac 2>&1
    done
done
