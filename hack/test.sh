#!/usr/bin/env bash
# Runs every test of the workspace but those that `make e2e` and `make examples` run:
# those that compare times by themselves, then as many test programs at a time as the
# processors have room for, as each spends much of its time waiting for nodes.
# `cargo test` runs one after the other, with the same result. Ends with 1 when one
# fails, after all have run.
set -euo pipefail
cd "$(dirname "$0")/.."

# Each program brings up a testbed of its own, whose API server alone takes up to 1 GiB of memory.
readonly most_at_once=${TEST_PROGRAMS_AT_ONCE:-6}
# Beside this many, a further one begins only where the processors were idle for so many
# of a hundred parts of so many seconds: programs that wait run beside many others, and
# those that compute do not slow each other until their deadlines pass.
readonly always_at_once=3 idle_enough=25 idle_seconds=2
# Within a program, too, tests mostly wait; by default it runs one a processor at a time.
export RUST_TEST_THREADS=${RUST_TEST_THREADS:-4}
# No program takes a quarter of it on an idle machine; beyond this one hangs.
readonly longest_seconds=900

# A node shows the machine's /var/tmp, and a test that compares what is on a node
# knows by this name what is not of it.
logs=$(mktemp -d /var/tmp/kari-testbed-logs.XXXXXX)
trap 'rm -rf "$logs"' EXIT

main() {
    local list=$logs/list line begin=$SECONDS
    programs >"$list"
    # Before there is any node: nodes are overlays of what this machine has installed.
    "${CARGO_TARGET_DIR:-target}/debug/testbed" prerequisites --kubelet
    while read -r line <&3; do
        if [[ $line == alone$'\t'* ]]; then
            run_program "$line" 3<&-
            continue
        fi
        wait_for_room
        run_program "$line" 3<&- &
    done 3<"$list"
    wait
    cargo test --workspace --locked --doc --quiet || echo "doc tests" >>"$logs/failed"
    printf '==> %d runs of test programs in %d s\n' "$(wc -l <"$list")" $((SECONDS - begin))
    if [[ -e $logs/failed ]]; then
        printf '==> failed: %s\n' "$(paste -sd , "$logs/failed")"
        return 1
    fi
}

# The tests that compare times, which are run before all others, each by itself.
readonly alone="
many what_hangs_for_ever_holds_its_own_slot_and_nothing_else
switch blue_green_fails_no_request_and_recreate_only_while_the_app_stops_and_starts
"
# The programs that take longest: begun last, one of them would be alone at the end.
readonly first="crash failure git_servers nodes routes skew rollout secrets proxy probes switch many mirror removal lifecycle"

# A line for each run: whether it is to be alone, its package's folder, a name for it,
# the program, its arguments. Those with a testbed take longer than the others, and
# come before them.
programs() {
    cargo test --workspace --locked --no-run --message-format=json-render-diagnostics | python3 -c '
import json, os, sys
alone = dict(line.split() for line in sys.argv[1].split("\n") if line)
first = sys.argv[2].split()
found = []
for line in sys.stdin:
    message = json.loads(line)
    if message.get("executable") and message.get("profile", {}).get("test"):
        folder = os.path.dirname(message["manifest_path"])
        name, kind = message["target"]["name"], message["target"]["kind"][0]
        if name in ("e2e", "kubelet", "examples"):
            continue
        rank = first.index(name) if name in first else len(first)
        run = (folder, f"{name} ({kind})", message["executable"])
        if name in alone:
            found.append((0, rank, ("alone", *run, alone[name])))
        arguments = f"--skip {alone[name]}" if name in alone else ""
        found.append((1 if kind == "test" else 2, rank, ("beside", *run, arguments)))
for _, _, run in sorted(found):
    print(*run, sep="\t")
' "$alone" "$first"
}

# What is waited for is not only the end of a program, so it is looked at.
wait_for_room() {
    local running
    while running=$(jobs -rp | wc -l) && ((running >= always_at_once)); do
        if ((running >= most_at_once)); then
            wait -n || true # its result is written down
        elif (($(idle_percent) >= idle_enough)); then
            return
        fi
    done
}

# How much of the next seconds the processors are idle: proc_stat(5), of which the last
# columns, of guests, are in the first ones already.
idle_percent() {
    local user nice system idle iowait irq softirq steal _ all_before idle_before all
    read -r _ user nice system idle iowait irq softirq steal _ </proc/stat
    all_before=$((user + nice + system + idle + iowait + irq + softirq + steal))
    idle_before=$idle
    sleep "$idle_seconds"
    read -r _ user nice system idle iowait irq softirq steal _ </proc/stat
    all=$((user + nice + system + idle + iowait + irq + softirq + steal - all_before))
    echo $((100 * (idle - idle_before) / all))
}

run_program() {
    local company folder name program arguments begin=$SECONDS status=0
    IFS=$'\t' read -r company folder name program arguments <<<"$1"
    # shellcheck disable=SC2086 # several words
    (cd "$folder" && timeout "$longest_seconds" "$program" $arguments) >"$logs/$name $company" 2>&1 </dev/null || status=$?
    # One write, so that two programs that end together do not mix.
    ((status == 0)) || echo "$name" >>"$logs/failed"
    printf '%s\n' "==> $name $arguments ended with $status after $((SECONDS - begin)) s
$(cat "$logs/$name $company")"
}

main
