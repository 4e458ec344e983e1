"""Validates CycloneDX 1.5 documents by CycloneDX's own JSON Schema. Usage: sbom.py FILE..."""

import importlib.util
import json
import pathlib
import sys

import jsonschema
import referencing

# The package is not imported, so that what it imports need not be installed.
RESOURCES = pathlib.Path(importlib.util.find_spec("cyclonedx").origin).parent / "schema/_res"


def schema(name):
    return json.loads((RESOURCES / f"{name}.SNAPSHOT.schema.json").read_text(encoding="utf-8"))


def main():
    bom = schema("bom-1.5")
    parts = [schema(name) for name in ("spdx", "jsf-0.82")]
    registry = referencing.Registry().with_resources(
        (part["$id"], referencing.Resource.from_contents(part)) for part in parts
    )
    validator = jsonschema.Draft7Validator(bom, registry=registry)
    problems = []
    for name in sys.argv[1:]:
        document = json.loads(pathlib.Path(name).read_text(encoding="utf-8"))
        problems += [f"{name}: {error.json_path}: {error.message[:200]}" for error in validator.iter_errors(document)]
    print("\n".join(problems))
    sys.exit(bool(problems))


main()
