#!/usr/bin/env bash
# Brings a testbed with three nodes up and down, twenty times in a row, and says
# how long each took. Ends with 1 when one takes longer than it may or leaves a
# process, a cgroup, a mount or a folder behind.
set -euo pipefail

readonly rounds=${ROUNDS:-20}
readonly longest_up_milliseconds=15000

repository=$(cd "$(dirname "$0")/.." && pwd)
PATH=${CARGO_TARGET_DIR:-$repository/target}/debug:$PATH

dir=$(mktemp -d "${TMPDIR:-/tmp}/kari.XXXXXX")
trap '[[ ! -d $dir/testbed ]] || testbed down --dir "$dir/testbed"; rm -rf "$dir"' EXIT

milliseconds() { date +%s%3N; }

# What a testbed makes and must take away, known by its id or its folder, so that
# other testbeds on this machine do not count.
leftovers() {
    local id=$1
    # The patterns come from a file, or grep would find itself.
    printf '%s\n' "$id" "$dir/testbed" >"$dir/names"
    grep -sl -F -f "$dir/names" /proc/[0-9]*/cmdline /proc/[0-9]*/environ || true
    grep -F -f "$dir/names" /proc/mounts || true
    find /sys/fs/cgroup -type d -name "*$id*"
    ip netns list | grep -F "$id" || true
    ip -brief link | grep -F "$id" || true
    [[ ! -e $dir/testbed ]] || echo "$dir/testbed"
}

failed=0
for ((round = 1; round <= rounds; round++)); do
    begin=$(milliseconds)
    testbed up --nodes 3 --dir "$dir/testbed" >/dev/null
    up=$(($(milliseconds) - begin))
    id=$(sed -n 's/^  "id": "\(.*\)",$/\1/p' "$dir/testbed/testbed.json")
    begin=$(milliseconds)
    testbed down --dir "$dir/testbed"
    down=$(($(milliseconds) - begin))
    left=$(leftovers "$id")
    printf '%2d of %d: up in %d ms, down in %d ms\n' "$round" "$rounds" "$up" "$down"
    if ((up > longest_up_milliseconds)); then
        echo "   took longer than $longest_up_milliseconds ms" >&2
        failed=$((failed + 1))
    fi
    if [[ -n $left ]]; then
        printf '   left behind:\n%s\n' "$left" >&2
        failed=$((failed + 1))
    fi
done
echo "$rounds testbeds, $failed faults"
((failed == 0))
