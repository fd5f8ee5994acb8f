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

# What a testbed makes and must take away. Processes are known by what they
# work on: the testbed's folder is in their arguments.
leftovers() {
    # The folder's name comes from a file, or grep would find itself.
    grep -sl -F -f "$dir/name" /proc/[0-9]*/cmdline || true
    grep --fixed-strings "$dir/testbed" /proc/mounts || true
    find /sys/fs/cgroup -type d | sort | comm -13 "$dir/cgroups" - || true
    ip netns list 2>/dev/null | sort | comm -13 "$dir/networks" - || true
    ip -brief link | cut -d' ' -f1 | sort | comm -13 "$dir/links" - || true
    [[ ! -e $dir/testbed ]] || echo "$dir/testbed"
}

echo "$dir/testbed" >"$dir/name"
find /sys/fs/cgroup -type d | sort >"$dir/cgroups"
ip netns list 2>/dev/null | sort >"$dir/networks"
ip -brief link | cut -d' ' -f1 | sort >"$dir/links"

failed=0
for ((round = 1; round <= rounds; round++)); do
    begin=$(milliseconds)
    testbed up --nodes 3 --dir "$dir/testbed" >/dev/null
    up=$(($(milliseconds) - begin))
    begin=$(milliseconds)
    testbed down --dir "$dir/testbed"
    down=$(($(milliseconds) - begin))
    left=$(leftovers)
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
