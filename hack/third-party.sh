#!/usr/bin/env bash
# Deploys two public servers of others, unmodified, by a manifest alone:
# Prometheus Pushgateway as its Go module has it, whose build fetches its own
# dependencies, and lighttpd as Debian's source package has it, in C.
#
# Their sources are fetched when this runs, and are not part of the project. Needs
# root, a Go module proxy and, on Debian or Ubuntu, the package sources.
set -euo pipefail

# shellcheck source=hack/testbed-session.sh
source "$(dirname "$0")/testbed-session.sh"

readonly pushgateway=github.com/prometheus/pushgateway@v1.11.1

main() {
    command -v dpkg-source >/dev/null || { say "missing: dpkg-source, from the package dpkg-dev" >&2; exit 1; }

    heading "Fetching the released sources"
    fetch_go_module "$pushgateway" "$session_dir/pushgateway"
    fetch_debian_source lighttpd "$session_dir/lighttpd"

    heading "One node in this machine's own network, so that builds reach the registries"
    begin_testbed --nodes 1 --network host
    proxy=$(proxy_of n1)

    deploy pushgateway
    printf 'jobs_done 3\n' | request pushgateway /metrics/job/third-party --data-binary @-
    ask pushgateway /metrics 'jobs_done{.*job="third-party".*} 3'

    deploy lighttpd
    ask lighttpd / 'Index of /'
    ask lighttpd /lighttpd.8 'a fast, secure and flexible web server'

    heading "Both at once"
    run kubectl get kd,krel
}

# The sources of a Go module, as the module proxy has them.
fetch_go_module() {
    local folder
    folder=$(go mod download -json "$1" | sed -n 's/^\t"Dir": "\(.*\)",$/\1/p')
    cp -r --no-preserve=mode,ownership "$folder" "$2"
    say "   $1: $(find "$2" -type f | wc -l) files"
}

# The sources of a Debian package, as the machine's own package sources have
# them, without a change to the machine's configuration.
fetch_debian_source() {
    local apt=$session_dir/apt
    mkdir -p "$apt/sources" "$apt/lists/partial" "$apt/cache/archives/partial"
    local file
    for file in /etc/apt/sources.list /etc/apt/sources.list.d/*.list; do
        [[ -e $file ]] && sed -n 's/^deb /deb-src /p' "$file" >>"$apt/sources/list.list"
    done
    for file in /etc/apt/sources.list.d/*.sources; do
        [[ -e $file ]] && sed 's/^Types:.*/Types: deb-src/' "$file" >"$apt/sources/${file##*/}"
    done
    local options=(
        -o Dir::Etc::sourcelist=/dev/null -o "Dir::Etc::sourceparts=$apt/sources"
        -o "Dir::State::lists=$apt/lists" -o "Dir::Cache=$apt/cache" -o APT::Sandbox::User=root
    )
    apt-get -qq "${options[@]}" update
    (cd "$apt" && apt-get -qq "${options[@]}" source "$1" >"$apt/log" 2>&1) || { cat "$apt/log" >&2; exit 1; }
    mv "$apt/$1"-*/ "$2"
    say "   $1: $(find "$2" -type f | wc -l) files, $(cd "$apt" && echo "$1"_*.dsc)"
}

# Puts the sources into a bare repository as they are, and applies the manifest.
deploy() {
    local name=$1 sources=$session_dir/$1 bare=$session_dir/$1.git url commit
    heading "$name"
    git -C "$sources" init --quiet --initial-branch=main
    git -C "$sources" add --all --force
    git -C "$sources" -c user.name=third-party -c user.email=third-party@example.com \
        commit --quiet --message="$name as it was released"
    git clone --quiet --bare "$sources" "$bare"
    { read -r url; read -r commit; } < <(testbed git "$name" --mirror "$bare")
    sed "s#https://git.example.com/$name.git#$url#" "$repository/hack/third-party/$name.yaml" | run kubectl apply -f -
    follow_rollout "$name" "$commit"
}

# One request through the node's proxy.
request() {
    curl --silent --show-error --fail --max-time 5 --header "Host: $1.example.com" "http://$proxy$2" "${@:3}"
}

# One request whose answer must match.
ask() {
    local name=$1 path=$2 expected=$3 answer
    answer=$(request "$name" "$path")
    if ! grep -q "$expected" <<<"$answer"; then
        say "http://$name.example.com$path did not answer with \"$expected\" but with:" >&2
        head -20 <<<"$answer" >&2
        exit 1
    fi
    say "   http://$name.example.com$path answers: $(grep -m1 -o "$expected" <<<"$answer")"
}

main
