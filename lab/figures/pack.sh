#!/bin/sh
# Packs other programs that run virtual machines, with the libraries that they need, for
# virtual-machines.sh: the QEMU that the lab has in its cache, and alioth if its path is given.
#
#     pack.sh TAR [ALIOTH]
set -eu
tar=$1 alioth=${2:-}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
libraries() { awk '$2 == "=>" { print $3 }'; }

set -- "${THROUGHWAY_CACHE:-$HOME/.cache/throughway}"/entries/qemu-system-x86_*
qemu=$1
loader=$qemu/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2
path=$qemu/lib/x86_64-linux-gnu:$qemu/usr/lib/x86_64-linux-gnu
mkdir "$folder/qemu"
"$loader" --library-path "$path" --list "$qemu/usr/bin/qemu-system-x86_64" | libraries |
    grep / | while read -r library; do cp -L "$library" "$folder/qemu"; done
cp -L "$loader" "$folder/qemu/ld.so"
cp "$qemu/usr/bin/qemu-system-x86_64" "$qemu"/usr/share/seabios/bios-256k.bin \
    "$qemu"/usr/share/qemu/linuxboot_dma.bin "$qemu"/usr/share/qemu/kvmvapic.bin "$folder/qemu"

if [ -n "$alioth" ]; then
    mkdir "$folder/alioth"
    ldd "$alioth" | libraries |
        while read -r library; do cp -L "$library" "$folder/alioth"; done
    cp -L /lib64/ld-linux-x86-64.so.2 "$folder/alioth/ld.so"
    strip -o "$folder/alioth/alioth" "$alioth"
fi
tar -C "$folder" -cf "$tar" .
