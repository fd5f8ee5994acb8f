#!/usr/bin/env bash
# Runs parts of two versions together, as an upgrade, or a return, does for a while:
# the controller of an earlier version with the agents of this one, and the reverse;
# then an upgrade and a return on one testbed, during which nothing may be restarted
# and each version must take on what the other has begun. The definitions are this
# version's: they come first in an upgrade, and stay when one is taken back.
#
#   skew.sh [REF]      the earlier version; without one, the last release before HEAD
#                      (a tag v*), or, before the first one, the commit before the
#                      last that changed the API (src/api, crds)
#
# The earlier programs get the arguments that a testbed gives this version's, where a
# chart has its own: one that lacks such an argument is too old to be tried so.
set -euo pipefail

# shellcheck source=hack/testbed-session.sh
source "$(dirname "$0")/testbed-session.sh"
cd "$repository"

# What each pair of versions must do, a test program and its tests a line. All of it
# is older than any version that is skewed with this one.
readonly tests=(
    "deploy an_applied_manifest_is_built_served_and_described
        a_second_commit_replaces_the_first
        a_placement_that_matches_no_node_says_so_and_leaving_it_takes_the_app_away"
    "failure a_failed_build_keeps_the_running_release_and_shows_the_end_of_its_log
        a_process_that_does_not_become_healthy_never_gets_traffic_and_a_retry_tries_again"
    "references a_changed_config_map_restarts_and_builds_again_only_if_the_build_sees_it"
    "removal a_deleted_deployment_leaves_the_host_as_it_was"
    "secrets another_value_rolls_out_without_a_build_and_restarts_only_who_has_it"
)
readonly nodes=(n1 n2)
# Longest time for what needs no build.
readonly timeout=60s

main() {
    trap end_session EXIT
    local ref commit
    ref=${1:-$(earlier_version)}
    commit=$(git rev-parse --verify --quiet "$ref^{commit}") ||
        { echo "skew.sh: there is no commit $ref here; fetch it, or name another" >&2; exit 1; }
    heading "The program of $ref, commit ${commit:0:7}"
    build_program "$commit"

    heading "Its controller, agents of this version"
    KARI_CONTROLLER_BIN=$earlier run_tests
    heading "The controller of this version, its agents"
    KARI_AGENT_BIN=$earlier run_tests

    upgrade_and_return
}

earlier_version() {
    git describe --tags --abbrev=0 --match 'v*' HEAD^ 2>/dev/null && return
    echo "skew.sh: no version was released yet; taking the commit before the last change of the API" >&2
    echo "$(git log -1 --first-parent --format=%H -- src/api crds)^"
}

# Builds the program of a commit. Its dependencies stay for the next time.
build_program() {
    local source=$session_dir/source target=${CARGO_TARGET_DIR:-$repository/target}/skew
    mkdir "$source"
    git archive "$1" | tar -x -C "$source"
    (cd "$source" && CARGO_TARGET_DIR=$target cargo build --locked --bin kari)
    earlier=$session_dir/kari
    cp "$target/debug/kari" "$earlier"
}

run_tests() {
    local line names
    for line in "${tests[@]}"; do
        read -r -d '' -a names <<<"$line" || true
        run cargo test --quiet --locked --test "${names[0]}" -- --exact "${names[@]:1}"
    done
}

# All of the earlier version, then the controller and the agents of this one, these in
# the middle of a rollout, then all back again.
upgrade_and_return() {
    local this app=$session_dir/hello-python url commit before first
    this=$(type -P kari)
    # The nodes show this file: another version of it is another version of the agents.
    agent=$session_dir/agent
    cp "$earlier" "$agent"
    export KARI_AGENT_BIN=$agent KARI_CONTROLLER_BIN=$earlier

    heading "All of the earlier version"
    begin_testbed --nodes "${#nodes[@]}"
    cp -r examples/python "$app"
    push "$app" "Say hello"
    sed "s#https://git.example.com/hello-python.git#$url#" "$app/deployment.yaml" | kubectl apply -f -
    follow_rollout hello-python "$commit"
    before=$(running)

    heading "The controller of this version"
    exchange_controller "$this"
    stays_as_it_was "$before" 3

    heading "A commit, and the agents of this version in the middle of its rollout"
    push "$app" "Say it again"
    ask_to_look
    first=$(kubectl get krel --field-selector "spec.nodeName=${nodes[0]}" -o name)
    run kubectl wait "$first" --for="jsonpath={.spec.commit}=$commit" --timeout "$timeout"
    exchange_agents "$this"
    follow_rollout hello-python "$commit"
    before=$(running)

    heading "Back to the earlier version"
    exchange_controller "$earlier"
    exchange_agents "$earlier"
    stays_as_it_was "$before" 4
    push "$app" "Say it once more"
    ask_to_look
    follow_rollout hello-python "$commit"
}

push() {
    date +%N >"$1/change"
    { read -r url; read -r commit; } < <(testbed git hello-python "$1" --message "$2")
}

ask_to_look() {
    run kubectl annotate kd/hello-python --overwrite "kari.dev/requestedAt=$(date --utc +%FT%T.%NZ)"
}

exchange_controller() {
    testbed kill controller
    KARI_CONTROLLER_BIN=$1 testbed start controller
}

exchange_agents() {
    local node
    for node in "${nodes[@]}"; do testbed kill "agent/$node"; done
    # A thread of a program that has ended may hold the file for a moment.
    local begin=$SECONDS
    until { cat "$1" >"$agent"; } 2>/dev/null; do
        ((SECONDS - begin < 10)) || { echo "skew.sh: an agent still runs" >&2; return 1; }
        sleep 0.1
    done
    for node in "${nodes[@]}"; do testbed start "agent/$node"; done
}

# What is decided for each node, and the processes there.
running() {
    local node
    kubectl get krel -o jsonpath='{range .items[*]}{.metadata.name} {.spec.releaseId} {.spec.revision}{"\n"}{end}'
    for node in "${nodes[@]}"; do
        command testbed exec "$node" --dir "$testbed_dir" -- \
            systemctl show --property=Id,MainPID,InvocationID 'kari.default.*.service'
    done
}

# Compares what runs with what ran before, when controller and agents have acted on
# a change that is none of what runs: how many old builds are kept.
stays_as_it_was() {
    local release generation
    run kubectl patch kd/hello-python --type=merge --patch "{\"spec\": {\"keepReleases\": $2}}"
    for release in $(kubectl get krel -o name); do
        kubectl wait "$release" --for="jsonpath={.spec.template.keepReleases}=$2" --timeout "$timeout"
        generation=$(kubectl get "$release" -o jsonpath='{.metadata.generation}')
        kubectl wait "$release" --for="jsonpath={.status.observedGeneration}=$generation" --timeout "$timeout"
    done
    kubectl wait kd/hello-python --for=condition=Ready --timeout "$timeout"
    diff <(echo "$1") <(running) >&2 || { echo "skew.sh: the other version has changed what runs" >&2; return 1; }
    say "nothing was restarted"
}

main "$@"
