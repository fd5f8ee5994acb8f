#!/usr/bin/env bash
# Fills a new folder with what is in Kari's image: the program, and from the
# Debian packages of this machine what it calls, with the libraries of each.
# Used on a machine (image.sh) and in the Dockerfile, so that both make the same.
#
#   image-root.sh FOLDER [KARI_PROGRAM]      without a program, it builds one for release
set -euo pipefail

# What calls it, and for what:
readonly programs=(
    /usr/bin/git                       # the controller asks which commit a reference names
    /usr/lib/git-core/git-remote-https # the same, by http and https
    /usr/bin/ssh                       # the same, by ssh
    /bin/sh                            # git starts ssh by it
    /usr/bin/getent                    # the agent looks whether a user id is free
    /usr/bin/journalctl                # the agent reads what a service said last
)
# What is loaded by name while it runs, and read.
readonly libraries=(libnss_systemd.so.2)
readonly files=(/etc/ssl/certs/ca-certificates.crt /etc/services /etc/protocols)

# The user for whoever needs none of root's rights, as distroless images number it.
readonly user=65532

main() {
    root=$1
    local kari path
    kari=${2:-$(build)}
    mkdir "$root"
    sources=$(mktemp)
    trap 'rm -f "$sources"' EXIT
    make_tree
    install -m 755 "$kari" "$root/usr/bin/kari"
    # Debugging information is most of a program that was built for development.
    strip --strip-debug "$root/usr/bin/kari"
    copy_libraries "$root/usr/bin/kari"
    for path in "${programs[@]}"; do
        copy "$path"
        copy_libraries "$path"
    done
    ln -s git-remote-https "$root/usr/lib/git-core/git-remote-http"
    for path in "${libraries[@]}"; do
        path=$(ldconfig -p | sed -n "s/^\\s*${path//./\\.} .*=> //p" | head -1)
        copy "$path"
        copy_libraries "$path"
    done
    for path in "${files[@]}"; do copy "$path"; done
    "$(dirname "$0")/image-sbom.py" "$root" <"$sources"
}

# Builds the program and prints where it is. Without the paths of this machine in
# it, that of another folder is the same.
build() {
    local source cargo_home=${CARGO_HOME:-$HOME/.cargo} target
    source=$(cd "$(dirname "$0")/.." && pwd)
    target=$(realpath --canonicalize-missing "${CARGO_TARGET_DIR:-$source/target}")
    export RUSTFLAGS="--remap-path-prefix=$source=/src --remap-path-prefix=$target=/src/target --remap-path-prefix=$cargo_home=/cargo"
    cargo build --release --locked --bin kari --manifest-path "$source/Cargo.toml" >&2
    echo "$target/release/kari"
}

# The folders that every system has, and whom there is.
make_tree() {
    local link
    mkdir -p "$root"/usr/{bin,sbin,lib,lib64,share/kari} "$root"/{dev,etc,proc,run,sys,tmp,var/lib}
    chmod 1777 "$root/tmp"
    ln -s /run "$root/var/run" # where programs look for the system bus
    for link in bin sbin lib lib64; do ln -s "usr/$link" "$root/$link"; done
    cat >"$root/etc/passwd" <<PASSWD
root:x:0:0:root:/root:/usr/sbin/nologin
kari:x:$user:$user:kari:/tmp:/usr/sbin/nologin
PASSWD
    printf 'root:x:0:\nkari:x:%s:\n' "$user" >"$root/etc/group"
    printf 'passwd: files systemd\ngroup: files systemd\nhosts: files dns\n' >"$root/etc/nsswitch.conf"
}

# Copies a file to where it is here, links resolved and /bin and the like being in /usr.
copy() {
    local target=$1
    case $target in /bin/* | /sbin/* | /lib/* | /lib64/*) target=/usr$target ;; esac
    echo "$1" >>"$sources"
    [[ -e $root$target ]] || install -D -m "$(stat -L -c %a "$1")" "$1" "$root$target"
}

# Copies the shared libraries that a program is linked with.
copy_libraries() {
    local library
    while read -r library; do
        copy "$library"
    done < <(ldd "$1" | grep -oE '/[^ ]+\.so[^ ]*' | sort -u)
}

main "$@"
