#!/usr/bin/env python3
"""Writes a JSON schema for each kind, as kubeconform wants them: a file `kind-group-version.json`.

    chart-schemas.py FOLDER SWAGGER CRD…

SWAGGER is Kubernetes' own description of its API, CRD a file with CustomResourceDefinitions in YAML or JSON.
Fields that nothing describes are refused: a chart's typo is silently dropped by an API server.
"""

import json
import pathlib
import sys

import yaml


def strict(schema, refer):
    """The schema without what only the API server knows, and closed."""
    if isinstance(schema, list):
        return [strict(entry, refer) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    if isinstance(schema.get("$ref"), str):
        return {"$ref": refer(schema["$ref"])}
    if schema.get("x-kubernetes-int-or-string") or schema.get("format") == "int-or-string":
        return {"type": ["integer", "string"]}
    closed = {}
    for key, value in schema.items():
        if key == "properties":
            closed[key] = {name: strict(inner, refer) for name, inner in value.items()}
        elif key in ("items", "additionalProperties", "allOf", "anyOf", "oneOf"):
            closed[key] = strict(value, refer)
        elif key in ("type", "required", "enum", "minimum", "maximum"):
            closed[key] = value
    open_ended = schema.get("x-kubernetes-preserve-unknown-fields") or schema.get("x-kubernetes-embedded-resource")
    if "properties" in closed and "additionalProperties" not in closed and not open_ended:
        closed["additionalProperties"] = False
    return closed


def file_of(kind):
    group = kind["group"].split(".")[0]
    parts = [kind["kind"], group, kind["version"]] if group else [kind["kind"], kind["version"]]
    return "-".join(parts).lower() + ".json"


def builtin(folder, swagger):
    definitions = json.load(open(swagger, encoding="utf-8"))["definitions"]
    local = {name: strict(schema, lambda ref: ref) for name, schema in definitions.items()}
    # Texts and numbers under one name.
    quantity = {"type": ["string", "number"]}
    local["io.k8s.apimachinery.pkg.api.resource.Quantity"] = quantity
    local["io.k8s.apimachinery.pkg.util.intstr.IntOrString"] = {"type": ["integer", "string"]}
    for name, schema in definitions.items():
        for kind in schema.get("x-kubernetes-group-version-kind", []):
            # What a kind does not reach makes its file large, and reading slow.
            reached, queue = {}, [name]
            while queue:
                at = queue.pop()
                if at in reached:
                    continue
                reached[at] = local[at]
                queue += references(local[at])
            whole = {"$ref": f"#/definitions/{name}", "definitions": reached}
            (folder / file_of(kind)).write_text(json.dumps(whole), encoding="utf-8")


def references(schema):
    if isinstance(schema, list):
        return [name for entry in schema for name in references(entry)]
    if not isinstance(schema, dict):
        return []
    if isinstance(schema.get("$ref"), str):
        return [schema["$ref"].rsplit("/", 1)[-1]]
    return [name for value in schema.values() for name in references(value)]


def custom(folder, path):
    for definition in yaml.safe_load_all(open(path, encoding="utf-8")):
        if not definition or definition.get("kind") != "CustomResourceDefinition":
            continue
        spec = definition["spec"]
        for version in spec["versions"]:
            schema = strict(version["schema"]["openAPIV3Schema"], lambda ref: ref)
            schema.setdefault("properties", {})
            schema["properties"].update(
                apiVersion={"type": "string"}, kind={"type": "string"}, metadata={"type": "object"}
            )
            kind = {"kind": spec["names"]["kind"], "group": spec["group"], "version": version["name"]}
            (folder / file_of(kind)).write_text(json.dumps(schema), encoding="utf-8")


def main():
    folder = pathlib.Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    builtin(folder, sys.argv[2])
    for path in sys.argv[3:]:
        custom(folder, path)


main()
