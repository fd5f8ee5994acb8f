#!/usr/bin/env bash
# Makes sure that the programs are there which demo, tests and checks run.
#
# As root on Debian or Ubuntu it installs what is missing with apt-get; elsewhere
# it says what is missing and ends with 1. With everything there it changes
# nothing and asks no network.
set -euo pipefail

# Programs that are not on every user's PATH.
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

# What is needed: a command (or a test below) and the package that has it.
readonly needs=(
    "cc gcc"                      # links Rust programs and builds ring's C parts
    "curl curl"
    "dbus-daemon dbus"            # the nodes' system bus
    "git git"
    "ip iproute2"                 # the nodes' networks
    "nginx nginx"                 # the nodes' proxy
    "node nodejs"                 # the examples' languages, Go apart
    "nsenter util-linux"
    "python3 python3"
    "shellcheck shellcheck"
    "systemctl systemd"           # the nodes' PID 1
    "yamllint yamllint"
    "+libc-headers libc6-dev"
    "+certificates ca-certificates"
    "+libnss-systemd libnss-systemd"   # users from /etc/userdb
)

main() {
    local missing=() need name
    for need in "${needs[@]}"; do
        name=${need%% *}
        is_there "$name" || missing+=("${need##* }")
    done
    missing_toolchains || exit 1
    if ((${#missing[@]} == 0)); then
        return
    fi
    if [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
        install "${missing[@]}"
    else
        echo "missing: ${missing[*]} (names of Debian packages)" >&2
        echo "Install them and run this again; as root on Debian or Ubuntu this installs them itself." >&2
        exit 1
    fi
}

is_there() {
    case $1 in
        +libc-headers) echo '#include <stdlib.h>' | cc -E - >/dev/null 2>&1 ;;
        +certificates) [[ -e /etc/ssl/certs/ca-certificates.crt ]] ;;
        # Looked for by name: a library has no command. Listed rather than
        # matched by `grep -q`, which would end ldconfig in mid-write.
        +libnss-systemd) [[ $(ldconfig -p) == *libnss_systemd.so.2* ]] ;;
        *) command -v "$1" >/dev/null ;;
    esac
}

# Rust and Go are the user's own choice of version and place: said, not installed.
missing_toolchains() {
    local result=0
    if ! command -v cargo >/dev/null; then
        echo "missing: cargo. Install Rust with rustup, or put it on PATH." >&2
        result=1
    fi
    if ! command -v go >/dev/null; then
        echo "missing: go. Install Go, or put it on PATH." >&2
        result=1
    fi
    return $result
}

install() {
    echo "installing: $*" >&2
    export DEBIAN_FRONTEND=noninteractive
    local nginx_was_there=1
    command -v nginx >/dev/null || nginx_was_there=0
    refuse_service_starts
    quietly apt-get update
    quietly apt-get install -y --no-install-recommends "$@"
    if ((nginx_was_there == 0)); then
        # Only its program is wanted. Left enabled, it would hold port 80 of
        # this machine from the next boot on.
        systemctl disable --quiet nginx.service >/dev/null 2>&1 || true
    fi
}

# Runs a command without its output, unless it fails.
quietly() {
    local output
    output=$("$@" 2>&1 </dev/null) || {
        printf '%s\n%s failed\n' "$output" "$*" >&2
        exit 1
    }
}

# Debian starts a service when its package is installed, unless this file says no.
refuse_service_starts() {
    local policy=/usr/sbin/policy-rc.d
    if [[ -e $policy ]]; then
        return
    fi
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
    trap 'rm -f /usr/sbin/policy-rc.d' EXIT
}

main
