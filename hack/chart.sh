#!/usr/bin/env bash
# Checks the chart by three programs of others, in the versions that the project
# is checked with: helm lint, kubeconform (every field is one that Kubernetes
# 1.37 has) and kube-score (practices). They and the schemas are made once from Go
# modules, in the user's cache folder; after that it takes seconds.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly kubeconform=github.com/yannh/kubeconform/cmd/kubeconform@v0.8.0
readonly kube_score=github.com/zegl/kube-score/cmd/kube-score@v1.20.0
# Where the schemas of the built-in kinds and of the Prometheus operator's are.
readonly kubernetes=k8s.io/kubernetes@v1.37.2
readonly prometheus_operator=github.com/prometheus-operator/prometheus-operator@v0.85.0

# What kube-score asks for and the chart leaves out, each with its reason.
readonly left_out=(
    # A CPU limit would make a controller or agent slow when it matters; memory has one.
    --ignore-container-cpu-limit
    # Spread constraints do what it asks of an anti-affinity.
    --ignore-test deployment-has-host-podantiaffinity
    # They write to /tmp only, which has a limit of its own.
    --ignore-test container-ephemeral-storage-request-and-limit
    # The kubelet's default, and what a test with an image that is nowhere needs, is said by image.pullPolicy.
    --ignore-test container-image-pull-policy
    # One is for the controllers; agents are in their nodes' network, which policies do not reach.
    --ignore-test pod-networkpolicy
    # 65532 is above what it asks for; the agents are root, for a reason that the template gives.
    --ignore-test container-security-context-user-group-id
    # Readiness and liveness are two paths of one port.
    --ignore-test pod-probes-identical
)

main() {
    local cache=${XDG_CACHE_HOME:-$HOME/.cache}/kari helm scratch
    scratch=$(mktemp -d)
    # shellcheck disable=SC2064 # its name now
    trap "rm -rf '$scratch'" EXIT
    helm=$(cargo run --quiet --locked --package testbed -- program helm)
    tool "$kubeconform"
    tool "$kube_score"
    schemas

    "$helm" lint --strict --quiet charts/kari --set image.repository=example.com/kari
    render everything --values hack/chart-everything.yaml
    render default
    local name
    for name in default everything; do
        "$cache/${kubeconform##*/}" -strict -summary \
            -schema-location "$schema_folder/{{ .ResourceKind }}{{ .KindSuffix }}.json" "$scratch/$name.yaml"
        "$cache/${kube_score##*/}" score "${left_out[@]}" --output-format ci "$scratch/$name.yaml" >"$scratch/score" || true
        if grep -E '^\[(CRITICAL|WARNING)\]' "$scratch/score"; then
            echo "kube-score has the above to say against the chart ($name)" >&2
            return 1
        fi
    done
}

render() {
    "$helm" template kari charts/kari --namespace kari-system --set image.repository=example.com/kari "${@:2}" >"$scratch/$1.yaml"
}

# Installs a program of a Go module unless it is there.
tool() {
    [[ -x $cache/${1##*/} ]] && return
    local folder=$cache/${1##*/}.new
    echo "building ${1##*/} in $cache" >&2
    GOBIN=$folder CGO_ENABLED=0 go install -trimpath "$1"
    local name=${1##*/}
    mv "$folder/${name%@*}" "$cache/$name"
    rmdir "$folder"
}

# Makes the schemas unless they are there.
schemas() {
    schema_folder=$cache/schemas-${kubernetes##*@}-${prometheus_operator##*@}-$(sha256sum hack/chart-schemas.py | cut -c1-12)
    [[ -d $schema_folder ]] && return
    local operator
    operator=$(module "$prometheus_operator")/example/prometheus-operator-crd
    rm -rf "$schema_folder.new" # of a run that was cut short
    # Python's YAML comes with yamllint.
    hack/chart-schemas.py "$schema_folder.new" "$(module "$kubernetes")/api/openapi-spec/swagger.json" \
        "$operator/monitoring.coreos.com_podmonitors.yaml" "$operator/monitoring.coreos.com_prometheusrules.yaml"
    mv "$schema_folder.new" "$schema_folder"
}

# Where a Go module's files are.
module() { (cd / && go mod download -json "$1") | sed -n 's/^\t"Dir": "\(.*\)",$/\1/p'; }

main
