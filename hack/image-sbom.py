#!/usr/bin/env python3
"""Writes what an image is made of, as CycloneDX, to usr/share/kari/sbom.cdx.json in it:
the crates that the program is built from, and the Debian packages of the files whose
paths are on standard input. Copies the packages' licences, too."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib

REPOSITORY = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")
TARGETS = {"x86_64": "x86_64-unknown-linux-gnu", "aarch64": "aarch64-unknown-linux-gnu"}


def main():
    (root,) = sys.argv[1:]
    program, crates = rust_components()
    packages = debian_packages(line.rstrip("\n") for line in sys.stdin)
    for name in packages:
        copyright_file = f"/usr/share/doc/{name.split(':')[0]}/copyright"
        if os.path.exists(copyright_file):
            target = root + copyright_file
            os.makedirs(os.path.dirname(target), exist_ok=True)
            shutil.copyfile(copyright_file, target)
    bom = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {"component": program},
        "components": crates + [debian_component(*entry) for entry in sorted(packages.items())],
    }
    with open(os.path.join(root, "usr/share/kari/sbom.cdx.json"), "w") as file:
        json.dump(bom, file, indent=1, sort_keys=True)
        file.write("\n")


def rust_components():
    """The program itself, and each crate that is linked into it."""
    metadata = json.loads(
        run(
            "cargo", "metadata", "--locked", "--format-version=1",
            "--filter-platform", TARGETS[os.uname().machine],
            "--manifest-path", os.path.join(REPOSITORY, "Cargo.toml"),
        )
    )
    with open(os.path.join(REPOSITORY, "Cargo.lock"), "rb") as file:
        locked = tomllib.load(file)["package"]
    checksums = {(p["name"], p["version"]): p.get("checksum") for p in locked}
    packages = {package["id"]: package for package in metadata["packages"]}
    nodes = {node["id"]: node for node in metadata["resolve"]["nodes"]}
    start = next(id for id, package in packages.items() if package["name"] == "kari")
    seen, left = {start}, [start]
    while left:
        for dependency in nodes[left.pop()]["deps"]:
            kinds = {kind["kind"] for kind in dependency["dep_kinds"]}
            if None in kinds and dependency["pkg"] not in seen:
                seen.add(dependency["pkg"])
                left.append(dependency["pkg"])
    components = []
    for package in sorted((packages[id] for id in seen), key=lambda p: (p["name"], p["version"])):
        name, version = package["name"], package["version"]
        component = {
            "type": "library",
            "name": name,
            "version": version,
            "purl": f"pkg:cargo/{name}@{version}",
            "bom-ref": f"pkg:cargo/{name}@{version}",
        }
        if package.get("license"):
            component["licenses"] = [{"expression": package["license"].replace("/", " OR ")}]
        if checksums.get((name, version)):
            component["hashes"] = [{"alg": "SHA-256", "content": checksums[(name, version)]}]
        if package["id"] == start:
            program = component | {"type": "application"}
        else:
            components.append(component)
    return program, components


def debian_packages(paths):
    """The version and architecture of the package of each file, by the package's name."""
    # A package may have put a file below /lib that is now below /usr/lib, and the reverse.
    candidates = {}
    for path in paths:
        real = os.path.realpath(path)
        candidates[path] = {path, real, real.removeprefix("/usr"), "/usr" + path}
    found = subprocess.run(
        ["dpkg-query", "--search", *sorted(set().union(*candidates.values()))],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    ).stdout
    owners = {path: owner for owner, path in re.findall(r"^([^\s,]+): (/.*)$", found, re.MULTILINE)}
    # It writes this file when it is installed.
    owners["/etc/ssl/certs/ca-certificates.crt"] = "ca-certificates"
    names = set()
    for path, ways in candidates.items():
        owner = next((owners[way] for way in sorted(ways) if way in owners), None)
        if owner is None:
            sys.exit(f"image-sbom.py: no Debian package has {path}")
        names.add(owner)
    answer = run("dpkg-query", "--show", "--showformat=${binary:Package}\t${Version}\t${Architecture}\n", *sorted(names))
    return {line.split("\t")[0]: line.split("\t")[1:] for line in answer.splitlines()}


def debian_component(name, facts):
    version, architecture = facts
    name = name.split(":")[0]
    purl = f"pkg:deb/debian/{name}@{version.replace(':', '%3A')}?arch={architecture}"
    return {"type": "library", "name": name, "version": version, "purl": purl, "bom-ref": purl}


def run(*words):
    return subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    main()
