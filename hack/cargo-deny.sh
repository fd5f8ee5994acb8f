#!/usr/bin/env bash
# Runs cargo-deny in the version that the project is checked with; builds it
# first where it is missing (less than a minute), in the user's cache folder.
set -euo pipefail

readonly version=0.20.2
readonly root=${XDG_CACHE_HOME:-$HOME/.cache}/kari/cargo-deny-$version

if [[ ! -x $root/bin/cargo-deny ]]; then
    echo "building cargo-deny $version in $root" >&2
    # A debug build: it takes a tenth of the time, and checks in a second all the same.
    CARGO_PROFILE_DEV_DEBUG=0 cargo install --quiet --locked --debug --root "$root" "cargo-deny@$version"
fi
exec "$root/bin/cargo-deny" "$@"
