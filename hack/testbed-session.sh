# shellcheck shell=bash
# Sourced by the scripts beside it: a testbed that is taken down when the script
# ends, however it ends, and what to ask it.
#
#   begin_testbed --nodes 3         # then KUBECONFIG is set, and kubectl and testbed are on PATH
#   proxy_of n1                     # prints where its proxy answers on this machine
#   follow_rollout NAME COMMIT      # prints each step until COMMIT is served everywhere

# Longest time for one rollout: three builds one after the other on a busy
# machine take a few minutes; beyond this something hangs.
readonly rollout_timeout_seconds=900

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PATH=${CARGO_TARGET_DIR:-$repository/target}/debug:$PATH

session_dir=$(mktemp -d "${TMPDIR:-/tmp}/kari.XXXXXX")
testbed_dir=$session_dir/testbed

if [[ -t 1 ]]; then
    bold=$'\e[1m' dim=$'\e[2m' plain=$'\e[0m'
else
    bold='' dim='' plain=''
fi

heading() { printf '\n%s%s%s\n' "$bold" "$*" "$plain"; }
say() { printf '%s\n' "$*"; }

# Shows a command as a person would type it, then runs it.
run() {
    printf '%s$ %s%s\n' "$dim" "$*" "$plain"
    "$@"
}

testbed() { command testbed "$@" --dir "$testbed_dir"; }

# Where the proxy of a node answers on this machine, as address:port.
proxy_of() {
    testbed status --json | python3 -c '
import json, sys
print(next(p["forwarded"] for p in json.load(sys.stdin) if p["part"] == "node/" + sys.argv[1]))' "$1"
}

begin_testbed() {
    trap end_session EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
    local environment
    environment=$(testbed up "$@")
    eval "$environment"
    PATH=$testbed_dir/bin:$PATH
}

end_session() {
    local status=$?
    # Nothing may keep the testbed up: neither a second Ctrl-C, nor a reader
    # that went away, such as `| head`.
    trap '' INT TERM PIPE
    set +e
    if ((status != 0 && status != 130 && status != 143)); then
        say_what_happened >&2
    fi
    local child
    for child in $(jobs -p); do
        kill "$child" 2>/dev/null
    done
    if [[ -d $testbed_dir ]]; then
        say "taking everything down"
        testbed down || status=1
    fi
    rm -rf "$session_dir"
    exit "$status"
}

# What somebody needs to find out why it failed, before it is taken down.
say_what_happened() {
    [[ ${KUBECONFIG:-} == "$testbed_dir"/* ]] || return 0 # nothing came up
    heading "This failed. What there is to see:"
    kubectl get kd,krel --all-namespaces -o wide
    kubectl describe kd --all-namespaces | tail -40
    testbed status
    local part
    for part in controller agent/n1; do
        heading "the last lines of $part"
        testbed logs "$part" | tail -20
    done
}

# Prints each change of a Deployment and of its Releases, with the seconds since
# the beginning, until the commit is served on every node.
follow_rollout() {
    local name=$1 commit=$2 begin=$SECONDS before='' now
    while :; do
        print_changes
        if is_served "$name" "$commit"; then
            print_changes # what came between the two looks
            return
        fi
        if ((SECONDS - begin > rollout_timeout_seconds)); then
            say "not served everywhere after $rollout_timeout_seconds s" >&2
            return 1
        fi
        sleep 0.3
    done
}

# For follow_rollout alone, whose variables it uses.
print_changes() {
    now=$(rollout_state "$name")
    comm -13 <(sort <<<"$before") <(sort <<<"$now") | while read -r who what; do
        if [[ -n $what ]]; then
            printf '  %4d s  %-12s  %s\n' $((SECONDS - begin)) "$who" "$what"
        fi
    done
    before=$now
}

# A line for each: who, and where it is.
rollout_state() {
    kubectl get "kd/$1" -o jsonpath='{"Deployment "}{.status.conditions[?(@.type=="Ready")].reason}{", "}{.status.nodes.summary}{" nodes ready"}{"\n"}' |
        sed '/^Deployment ,/d' # no status yet
    kubectl get krel -o jsonpath='{range .items[?(@.spec.deployment=="'"$1"'")]}{.spec.nodeName}{" "}{.status.phase}{" "}{.status.attempt.failure.message}{"\n"}{end}'
}

# Whether every node serves the commit. Fails the script when only a person can
# mend what stands in the way.
is_served() {
    local observed generation commit ready stalled
    IFS='|' read -r observed generation commit ready stalled < <(
        kubectl get "kd/$1" -o jsonpath='{.status.observedGeneration}|{.metadata.generation}|{.status.source.commit}|{.status.conditions[?(@.type=="Ready")].status}|{.status.conditions[?(@.type=="Stalled")].status}{"\n"}')
    if [[ $observed == "$generation" && $stalled == True ]]; then
        say "the rollout is Stalled:" >&2
        kubectl get "kd/$1" -o jsonpath='{.status.conditions[?(@.type=="Stalled")].message}{"\n"}' >&2
        exit 1
    fi
    [[ $observed == "$generation" && $commit == "$2" && $ready == True ]]
}
