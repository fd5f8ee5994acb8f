#!/usr/bin/env bash
# Which lines of the planners the unit tests reach: a table by file, and below it the lines that none does.
# From rustc's own instrumentation; arguments select tests, as those of `cargo test` do.
set -euo pipefail
cd "$(dirname "$0")/.."

host=$(rustc --version --verbose | sed -n 's/^host: //p')
tools=$(rustc --print sysroot)/lib/rustlib/$host/bin
if [[ ! -x $tools/llvm-cov ]]; then
  echo "this toolchain has no llvm-cov: run \`rustup component add llvm-tools\`" >&2
  exit 1
fi

export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-target}/coverage
profiles=$CARGO_TARGET_DIR/profiles
rm -rf "$profiles"
mkdir -p "$profiles"

# What the build scripts and macros of dependencies write is of no interest.
program=$(RUSTFLAGS=-Cinstrument-coverage LLVM_PROFILE_FILE=/dev/null \
  cargo test --locked --lib --package kari --no-run --message-format=json |
  sed -n 's/.*"executable":"\([^"]*\)".*/\1/p')
LLVM_PROFILE_FILE=$profiles/%p.profraw "$program" --quiet "$@"
"$tools/llvm-profdata" merge --sparse "$profiles"/*.profraw --output "$profiles/all.profdata"

planners=(src/*/plan.rs src/*/plan src/controller/rollout.rs)
show() {
  "$tools/llvm-cov" "$@" "$program" --instr-profile="$profiles/all.profdata" \
    --ignore-filename-regex='/plan/(rules|simulation|tests)\.rs$' --sources "${planners[@]}"
}
show report --show-region-summary=false --show-branch-summary=false | tee "$profiles/report"
echo
show show --show-line-counts=true | grep --extended-regexp '^/.*:$|^ +[0-9]+\| +0\|' || true
