#!/usr/bin/env python3
"""Requests a second by wrk: Envoy without a filter, with one that only reads, with Driftlock's, by turns.

What `driftlock bench` measures with clients and an upstream of its own, which take so little that the proxies are what is
slow, this measures as one would by hand: `wrk -t2 -c8`, a second Envoy as upstream, nothing pinned. The ratios here are
higher, since the load slows the faster proxies down (DECISIONS.md, 2026-12-01).

Usage: python3 benches/wrk.py [ROUNDS]     after `cargo xtask build` and `cargo xtask envoy`; wrk is a Debian package

Two loads: a hundred chats in turn, and one over and over. Every answer must have status 200, and the filter must have
judged both messages of every exchange. It takes some three minutes, stays on loopback and stops what it started.
"""

import base64
import json
import pathlib
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parent.parent
ENVOY = ROOT / "target/envoy/bin/envoy"
DRIFTLOCK = ROOT / "dist/driftlock"
FILTER = ROOT / "dist/driftlock_filter.wasm"
TYPES = "type.googleapis.com/envoy.extensions."
SECONDS = 2


def address(port):
    return {"address": {"socket_address": {"address": "127.0.0.1", "port_value": port}}}


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def noop_module(folder):
    """benches and this share the filter's text; the assembler comes from PyPI."""
    environment = ROOT / "target/wrk"
    python = environment / "bin/python"
    if not python.exists():
        print("   installing an assembler for wasm into target/wrk", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", environment], check=True)
        pinned = ["--no-deps", "--only-binary=:all:", "--require-hashes", "-r", ROOT / "benches/wrk-requirements.txt"]
        subprocess.run([python, "-m", "pip", "install", "--quiet", *pinned], check=True)
    module = folder / "noop.wasm"
    program = "import sys, wasmtime; open(sys.argv[2], 'wb').write(wasmtime.wat2wasm(open(sys.argv[1], 'rb').read()))"
    subprocess.run([python, "-c", program, ROOT / "host/src/bench/noop.wat", module], check=True)
    return module


def chats(folder):
    """The hundred nearest to 2 KiB, and a baseline of all: as `driftlock bench` has them."""
    traffic, snapshot = folder / "traffic.jsonl", folder / "snapshot"
    subprocess.run([DRIFTLOCK, "synth", "--count", "2500", "--out", traffic], check=True, stderr=subprocess.DEVNULL)
    subprocess.run([DRIFTLOCK, "train", traffic, "--out", snapshot], check=True, capture_output=True)
    rows = [json.loads(line) for line in traffic.read_text().splitlines()]
    rows = [row for row in rows if row["text"].startswith("POST /v1/chat/completions")]
    body = lambda message: message.split("\r\n\r\n", 1)[1]
    nearest = lambda bodies: sorted(bodies, key=lambda it: abs(len(it.encode()) - 2048))[:100]
    answers = [body(row["extra"]["response"]) for row in rows if row["extra"].get("response")]
    requests = nearest(body(row["text"]) for row in rows)
    return requests, nearest(it for it in answers if it.startswith("{")), snapshot.read_bytes()


def script(requests):
    """What wrk sends."""
    text = ",\n".join("[==========[\n" + request + "]==========]" for request in requests)
    return (
        "local bodies = {" + text + "}\nlocal requests, at = {}, 0\n"
        "function init() for i, body in ipairs(bodies) do\n"
        ' requests[i] = wrk.format("POST", "/v1/chat/completions",'
        ' {["content-type"] = "application/json", ["x-exchange"] = tostring(i - 1)}, body) end end\n'
        "function request() at = at % #requests + 1; return requests[at] end\n"
    )


def listener(port, routes, filters, access_log=None):
    router = {"@type": TYPES + "filters.http.router.v3.Router", "suppress_envoy_headers": True}
    manager = {
        "@type": TYPES + "filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "bench",
        "generate_request_id": False,
        "route_config": {
            "max_direct_response_body_size_bytes": 1 << 20,
            "virtual_hosts": [{"name": "all", "domains": ["*"], "routes": routes}],
        },
        "http_filters": filters + [{"name": "router", "typed_config": router}],
    }
    if access_log:
        state = {key: f"%FILTER_STATE(wasm.driftlock.{key}:PLAIN)%" for key in ("request", "response", "outcome")}
        fields = {"method": "%REQ(:METHOD)%", "path": "%REQ(:PATH)%", "status": "%RESPONSE_CODE%", "driftlock": state}
        log = {
            "@type": TYPES + "access_loggers.file.v3.FileAccessLog",
            "path": str(access_log),
            "log_format": {"json_format": fields},
        }
        manager["access_log"] = [{"name": "file", "typed_config": log}]
    chain = {"filters": [{"name": "http", "typed_config": manager}]}
    return {"name": "bench", **address(port), "filter_chains": [chain]}


def upstream(port, answers):
    as_json = {"header": {"key": "content-type", "value": "application/json"}, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}
    route = lambda i, answer: {
        "match": {"prefix": "/", "headers": [{"name": "x-exchange", "string_match": {"exact": str(i)}}]},
        "direct_response": {"status": 200, "body": {"inline_string": answer}},
        "response_headers_to_add": [as_json],
    }
    # Requests are read to their end, or Envoy would close each connection.
    whole = {"@type": TYPES + "filters.http.buffer.v3.Buffer", "max_request_bytes": 1 << 20}
    routes = [route(i, answer) for i, answer in enumerate(answers)]
    return {"static_resources": {"listeners": [listener(port, routes, [{"name": "buffer", "typed_config": whole}])]}}


def proxy(port, upstream_port, log, module, configuration):
    filters = []
    if module:
        code = {"local": {"filename": str(module)}}
        value = {"@type": "type.googleapis.com/google.protobuf.StringValue", "value": json.dumps(configuration)}
        vm = {"vm_id": "bench", "runtime": "envoy.wasm.runtime.v8", "code": code}
        config = {"name": "bench", "root_id": "bench", "vm_config": vm}
        if configuration:
            config["configuration"] = value
        wasm = {"@type": TYPES + "filters.http.wasm.v3.Wasm", "config": config}
        filters = [{"name": "wasm", "typed_config": wasm}]
    endpoint = {"endpoint": address(upstream_port)}
    cluster = {
        "name": "upstream",
        "type": "STATIC",
        "load_assignment": {"cluster_name": "upstream", "endpoints": [{"lb_endpoints": [endpoint]}]},
    }
    routes = [{"match": {"prefix": "/"}, "route": {"cluster": "upstream", "timeout": "0s"}}]
    return {"static_resources": {"clusters": [cluster], "listeners": [listener(port, routes, filters, log)]}}


def judged(admin):
    with urllib.request.urlopen(f"http://127.0.0.1:{admin}/stats?filter=driftlock.messages") as stats:
        counts = re.findall(r"(?:normal|anomalous): (\d+)", stats.read().decode())
    return sum(map(int, counts))


def load(port, path):
    url = f"http://127.0.0.1:{port}/"
    said = subprocess.run(["wrk", "-t2", "-c8", f"-d{SECONDS}s", "-s", path, url], check=True, capture_output=True, text=True)
    if re.search("Non-2xx|Socket errors", said.stdout):
        sys.exit(f"a proxy answered wrongly:\n{said.stdout}")
    return float(re.search(r"Requests/sec:\s+([\d.]+)", said.stdout)[1]), int(re.search(r"(\d+) requests in", said.stdout)[1])


def main():
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 9
    missing = [str(path) for path in (ENVOY, DRIFTLOCK, FILTER) if not path.exists()]
    if missing or not shutil.which("wrk"):
        sys.exit(f"missing: {', '.join(missing) or 'wrk'}; `cargo xtask build`, `cargo xtask envoy`, `apt-get install wrk`")
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        requests, answers, snapshot = chats(folder)
        scripts = {"a hundred chats": folder / "hundred.lua", "one chat": folder / "one.lua"}
        scripts["a hundred chats"].write_text(script(requests))
        scripts["one chat"].write_text(script(requests[:1]))
        ports = {name: free_port() for name in ("upstream", "none", "noop", "driftlock")}
        configuration = {"report": {"log": "never"}, "baseline": base64.b64encode(snapshot).decode()}
        modules = {"none": (None, None), "noop": (noop_module(folder), None), "driftlock": (FILTER, configuration)}
        configs = {name: proxy(ports[name], ports["upstream"], folder / f"{name}.log", *it) for name, it in modules.items()}
        configs["upstream"] = upstream(ports["upstream"], answers)
        started, admins = [], {}
        try:
            for name, config in configs.items():
                admins[name] = free_port()
                config["admin"] = address(admins[name])
                file = folder / f"{name}.json"
                file.write_text(json.dumps(config))
                command = [ENVOY, "-c", file, "--concurrency", "1", "--disable-hot-restart", "--log-level", "error"]
                started.append(subprocess.Popen(command))
            time.sleep(5)
            asked = 0
            for load_name, path in scripts.items():
                rates = {name: [] for name in modules}
                for name in modules:
                    asked += load(ports[name], path)[1] * (name == "driftlock")
                for _ in range(rounds):
                    for name in modules:
                        rate, count = load(ports[name], path)
                        rates[name].append(rate)
                        asked += count * (name == "driftlock")
                of = lambda other: statistics.median(a / b for a, b in zip(rates["driftlock"], rates[other]))
                medians = ", ".join(f"{name} {statistics.median(it):.0f}/s" for name, it in rates.items())
                print(f"{load_name}: {of('noop'):.3f} of a filter that only reads (bar .5), {of('none'):.3f} of none (bar .4); {medians}")
            if judged(admins["driftlock"]) < 2 * asked:
                sys.exit(f"of {asked} exchanges' messages the filter judged {judged(admins['driftlock'])}")
        finally:
            for process in started:
                process.terminate()
            for process in started:
                process.wait()


main()
