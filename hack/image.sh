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
    local archive name version options
    archive=$(realpath "$1")
    version=$(sed -n '/^\[workspace.package\]/,/^\[/s/^version = "\(.*\)"/\1/p' Cargo.toml)
    name=${2:-localhost/kari:$version}
    hack/image-root.sh "$folder/root" "${@:3:1}"
    mapfile -t options < <(configuration)
    hack/image-archive.py --name "$name" "${options[@]}" "$folder/root" "$archive"
}

# What the Dockerfile says of the image beside its files, as options of image-archive.py.
configuration() {
    sed -n \
        -e 's/^ENV /--environment=/p' \
        -e 's/^LABEL /--label=/p' \
        -e 's/^ENTRYPOINT \["\(.*\)"\]$/--entrypoint=\1/p' Dockerfile
}

main "$@"
