#!/usr/bin/env python3
"""Writes a folder's files as a container image: an archive in the OCI layout, which
`ctr images import`, `podman load`, `skopeo copy oci-archive:` and `crane push` take.

It needs no registry, no daemon and no root. The same files give the same bytes:
names are sorted, all times are 0, all belongs to root, nothing is compressed."""

import argparse
import functools
import hashlib
import io
import json
import os
import stat
import tarfile

LAYER = "application/vnd.oci.image.layer.v1.tar"
CONFIG = "application/vnd.oci.image.config.v1+json"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", required=True, help="the image's name with its tag")
    parser.add_argument("--entrypoint", required=True, help="the program that it runs")
    parser.add_argument("--environment", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--label", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("root", help="the folder that becomes the image's root")
    parser.add_argument("archive", help="the file to write")
    arguments = parser.parse_args()

    layer = layer_of(arguments.root)
    labels = dict(label.split("=", 1) for label in arguments.label)
    config = encode(
        {
            "architecture": ARCHITECTURES[os.uname().machine],
            "os": "linux",
            "config": {
                "Entrypoint": [arguments.entrypoint],
                "Env": arguments.environment,
                "Labels": labels,
            },
            "rootfs": {"type": "layers", "diff_ids": [digest(layer)]},
        }
    )
    manifest = encode(
        {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": descriptor(CONFIG, config),
            "layers": [descriptor(LAYER, layer)],
        }
    )
    named = descriptor(MANIFEST, manifest)
    named["annotations"] = {
        "io.containerd.image.name": arguments.name,
        "org.opencontainers.image.ref.name": arguments.name.rsplit(":", 1)[1],
    }
    index = encode({"schemaVersion": 2, "mediaType": INDEX, "manifests": [named]})
    staged = arguments.archive + ".new"
    with tarfile.open(staged, "w", format=tarfile.USTAR_FORMAT) as archive:
        add(archive, "oci-layout", encode({"imageLayoutVersion": "1.0.0"}))
        add(archive, "index.json", index)
        for blob in (config, layer, manifest):
            add(archive, "blobs/" + digest(blob).replace(":", "/"), blob)
    os.rename(staged, arguments.archive)
    print(f"{arguments.name} {digest(manifest)} {len(layer)} bytes")


def layer_of(root):
    """The files below a folder as a tar archive."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for path in sorted(paths_below(root)):
            source = os.path.join(root, path)
            entry = tar.gettarinfo(source, path)
            if not (entry.isreg() or entry.isdir() or entry.issym()):
                entry.type = tarfile.REGTYPE  # a second link to a file is a file of its own
                entry.size = os.stat(source).st_size
            entry.uid = entry.gid = entry.mtime = 0
            entry.uname = entry.gname = ""
            entry.mode = 0o777 if entry.issym() else mode_of(source)
            if entry.isreg():
                with open(source, "rb") as content:
                    tar.addfile(entry, content)
            else:
                tar.addfile(entry)
    return buffer.getvalue()


def mode_of(path):
    """Readable by all, whatever the umask was; /tmp and the like stay as they are."""
    mode = stat.S_IMODE(os.lstat(path).st_mode)
    if mode & stat.S_ISVTX:
        return mode
    return 0o755 if mode & stat.S_IXUSR else 0o644


def paths_below(root):
    for folder, folders, files in os.walk(root):
        for name in folders + files:
            yield os.path.relpath(os.path.join(folder, name), root)


def add(archive, name, content):
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))


def encode(value):
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


@functools.cache
def digest(content):
    return "sha256:" + hashlib.sha256(content).hexdigest()


def descriptor(media_type, content):
    return {"mediaType": media_type, "digest": digest(content), "size": len(content)}


if __name__ == "__main__":
    main()
