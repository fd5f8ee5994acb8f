#!/usr/bin/env bash
# Makes Kari's image without a registry or a daemon, from a program that is built
# already and the Debian packages of this machine. The same files give the same digest.
#
#   image.sh KARI_PROGRAM ARCHIVE [NAME:TAG]
set -euo pipefail
cd "$(dirname "$0")"

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
version=$(sed -n '/^\[workspace.package\]/,/^\[/s/^version = "\(.*\)"/\1/p' ../Cargo.toml)

./image-root.sh "$folder/root" "$1"
./image-archive.py --name "${3:-ghcr.io/kari-dev/kari:$version}" --entrypoint /usr/bin/kari \
    --label org.opencontainers.image.title=kari \
    --label "org.opencontainers.image.version=$version" \
    --label org.opencontainers.image.licenses=Apache-2.0 \
    "$folder/root" "$2"
