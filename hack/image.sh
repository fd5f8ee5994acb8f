#!/usr/bin/env bash
# Makes Kari's image without a registry or a daemon, as an archive in the OCI
# layout. What is in it beside the program is from the Debian packages of this
# machine. The same sources and packages give the same digest.
#
#   image.sh ARCHIVE [NAME:TAG [KARI_PROGRAM]]      without a program, it builds one for release
set -euo pipefail
cd "$(dirname "$0")/.."

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

main() {
    local archive version program
    archive=$(realpath "$1")
    version=$(sed -n '/^\[workspace.package\]/,/^\[/s/^version = "\(.*\)"/\1/p' Cargo.toml)
    program=${3:-$(build)}
    hack/image-root.sh "$folder/root" "$program"
    hack/image-archive.py --name "${2:-localhost/kari:$version}" --entrypoint /usr/bin/kari \
        --label org.opencontainers.image.title=kari \
        --label "org.opencontainers.image.version=$version" \
        --label org.opencontainers.image.licenses=Apache-2.0 \
        "$folder/root" "$archive"
}

# Builds the program and prints where it is. Without the paths of this machine in
# it, that of another folder is the same.
build() {
    local cargo_home=${CARGO_HOME:-$HOME/.cargo}
    RUSTFLAGS="--remap-path-prefix=$PWD=/src --remap-path-prefix=$cargo_home=/cargo" \
        cargo build --release --locked --bin kari >&2
    echo "${CARGO_TARGET_DIR:-$PWD/target}/release/kari"
}

main "$@"
