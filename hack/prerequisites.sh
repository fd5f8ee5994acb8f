#!/usr/bin/env bash
# Makes sure that the programs are there which building, the checks and the
# examples run. What its nodes need the testbed installs itself, likewise.
#
# As root on Debian or Ubuntu it installs what is missing with apt-get; elsewhere
# it says what is missing and ends with 1. With everything there it changes
# nothing and asks no network.
set -euo pipefail

# What is needed: a command (or a test below) and the package that has it.
readonly needs=(
    "cc gcc"                      # links Rust programs and builds ring's C parts
    "curl curl"
    "git git"
    "getent libc-bin"             # in the image
    "journalctl systemd"
    "ssh openssh-client"
    "node nodejs"                 # the examples' languages, Go apart
    "python3 python3"
    "shellcheck shellcheck"
    "yamllint yamllint"
    "+libc-headers libc6-dev"
    "+certificates ca-certificates"
    "+nss-systemd libnss-systemd"
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
        +nss-systemd) ldconfig -p | grep -q libnss_systemd.so.2 ;;
        +certificates) [[ -e /etc/ssl/certs/ca-certificates.crt ]] ;;
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
    quietly apt-get update
    quietly apt-get install -y --no-install-recommends "$@"
}

# Runs a command without its output, unless it fails.
quietly() {
    local output
    output=$("$@" 2>&1 </dev/null) || {
        printf '%s\n%s failed\n' "$output" "$*" >&2
        exit 1
    }
}

main
