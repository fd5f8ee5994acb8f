#!/usr/bin/env bash
# Builds Kari's image twice, from two copies of the sources in two folders with
# nothing built yet, and compares the digests: the same sources give the same image.
set -euo pipefail
cd "$(dirname "$0")/.."

folder=$(mktemp -d /var/tmp/kari-image.XXXXXX)
trap 'rm -rf "$folder"' EXIT

commit=$(git rev-parse HEAD) # a commit may be added meanwhile
for copy in first second; do
    mkdir "$folder/$copy"
    git archive "$commit" | tar -x -C "$folder/$copy"
    (unset CARGO_TARGET_DIR && "$folder/$copy/hack/image.sh" "$folder/$copy.tar")
done
sha256sum "$folder"/*.tar
cmp "$folder/first.tar" "$folder/second.tar"
