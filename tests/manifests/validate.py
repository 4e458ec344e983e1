"""Validates Kubernetes and Istio manifests by their published schemas.

Usage: validate.py FILE...; `-` is standard input. Istio's resources go to validate.mjs beside this file, which runs
in the folder with node_modules that DRIFTLOCK_MANIFESTS names; everything else to kubernetes-validate. A
TrafficExtension, younger than the newest published package, is validated as the WasmPlugin that it is made of.
Prints one line for each refused document and ends with status 1 if there is one.
"""

import json
import os
import pathlib
import subprocess
import sys

import kubernetes_validate
import yaml

TOP = ("selector", "targetRefs", "phase", "priority", "match")


def as_wasm_plugin(document):
    spec = document.get("spec", {})
    merged = {name: value for name, value in spec.items() if name in TOP} | spec.get("wasm", {})
    return document | {"kind": "WasmPlugin", "spec": merged}


def main():
    istio, refused = [], []
    for name in sys.argv[1:]:
        text = sys.stdin.read() if name == "-" else pathlib.Path(name).read_text(encoding="utf-8")
        for document in filter(None, yaml.safe_load_all(text)):
            if document.get("kind") == "Kustomization":
                continue
            if document.get("apiVersion", "").split("/")[0].endswith(".istio.io"):
                if document.get("kind") == "TrafficExtension":
                    document = as_wasm_plugin(document)
                istio.append({"name": name, "document": document})
                continue
            try:
                kubernetes_validate.validate(document, "1.32", strict=True)
            except kubernetes_validate.ValidationError as error:
                refused.append(f"{name}: {error.message}")
    if istio:
        script = pathlib.Path(__file__).with_name("validate.mjs").read_bytes()
        folder = pathlib.Path(os.environ["DRIFTLOCK_MANIFESTS"])
        # A module's imports are looked for from where it stands.
        (folder / "validate.mjs").write_bytes(script)
        checked = subprocess.run(
            ["node", str(folder / "validate.mjs")], input=json.dumps(istio), text=True, capture_output=True, check=True
        )
        refused += checked.stdout.splitlines()
    print("\n".join(refused))
    sys.exit(bool(refused))


main()
