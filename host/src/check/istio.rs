//! Istio's resources that carry Driftlock, by the rules of their definitions.
//!
//! What a cluster's validation (CEL) would refuse, and what it would drop without a word: fields that it
//! does not know. The lists of fields are those of the API of Istio 1.30 (`extensions/v1alpha1`,
//! `networking/v1alpha3`, `telemetry/v1`); each rule's text is this project's own. Then the plugin
//! configuration, which a cluster does not look into at all.
//!
//! Left out on purpose: types and lengths of every field (the published schemas have them), and whether what a
//! reference names is there.

use super::node::{Node, Value};
use super::{Report, envoy, is_driftlock, join, plugin};

const TARGETS: [&str; 2] = ["selector", "targetRefs"];
/// Of a WasmPlugin's spec, and of `spec.wasm` in a TrafficExtension.
const WASM: [&str; 10] = [
    "url",
    "sha256",
    "imagePullPolicy",
    "imagePullSecret",
    "verificationKey",
    "pluginConfig",
    "pluginName",
    "failStrategy",
    "vmConfig",
    "type",
];

/// Checks a resource. `text` is the whole file.
pub(super) fn check(document: &Node, text: &str, report: &mut Report) {
    let group = document.text(&["apiVersion"]).unwrap_or_default();
    let kind = document.text(&["kind"]).unwrap_or_default();
    let empty = Node::default();
    let spec = document.get("spec").unwrap_or(&empty);
    let istio = group.split('/').next().is_some_and(|group| group.ends_with(".istio.io"));
    if !istio {
        return;
    }
    if document.text(&["metadata", "name"]).is_none() {
        report.error(document.place, "metadata.name", "not given; every resource has a name");
    }
    match kind {
        "WasmPlugin" => {
            known(
                spec,
                "spec",
                &[&TARGETS[..], &WASM[..], &["targetRef", "match", "phase", "priority"]].concat(),
                report,
            );
            targets(spec, &TARGETS, report);
            wasm(spec, spec, "spec", report);
        }
        "TrafficExtension" => {
            known(
                spec,
                "spec",
                &["selector", "targetRefs", "phase", "priority", "match", "wasm", "lua"],
                report,
            );
            targets(spec, &TARGETS, report);
            match (spec.get("wasm"), spec.get("lua")) {
                (Some(config), None) => {
                    known(config, "spec.wasm", &WASM, report);
                    wasm(spec, config, "spec.wasm", report);
                }
                (None, Some(_)) => {}
                _ => report.error(spec.place, "spec", "exactly one of wasm and lua has to be given"),
            }
        }
        "EnvoyFilter" => {
            known(spec, "spec", &["workloadSelector", "targetRefs", "configPatches", "priority"], report);
            targets(spec, &["workloadSelector", "targetRefs"], report);
            patches(spec, report);
            envoy::check(spec, "spec", text, envoy::Fetcher::Agent, report);
        }
        "Telemetry" => {
            known(
                spec,
                "spec",
                &["selector", "targetRef", "targetRefs", "tracing", "metrics", "accessLogging"],
                report,
            );
            targets(spec, &TARGETS, report);
        }
        _ => {}
    }
}

/// Fields that the resource does not have are dropped by the cluster, so what they say does not hold.
fn known(node: &Node, path: &str, names: &[&str], report: &mut Report) {
    for (name, place, _) in node.fields() {
        if !names.contains(&name.as_str()) {
            let problem =
                format!("there is no such field, it would be dropped; there are {}", names.join(", "));
            report.error(*place, join(path, name), problem);
        }
    }
}

fn targets(spec: &Node, names: &[&str; 2], report: &mut Report) {
    if let [Some(_), Some(_)] = names.map(|name| spec.get(name)) {
        let problem = format!("only one of {} and {} can be given", names[0], names[1]);
        report.error(spec.place_of(names[1]), join("spec", names[1]), problem);
    }
    let references = spec.get("targetRefs").map(Node::items).unwrap_or_default();
    if references.len() > 16 {
        report.error(spec.place_of("targetRefs"), "spec.targetRefs", "at most 16 are allowed");
    }
    for (index, reference) in references.iter().enumerate() {
        let path = format!("spec.targetRefs[{index}]");
        known(reference, &path, &["group", "kind", "name", "namespace"], report);
        if reference.text(&["namespace"]).is_some_and(|namespace| !namespace.is_empty()) {
            let problem = "a reference into another namespace is not supported; leave it out";
            report.error(reference.place_of("namespace"), join(&path, "namespace"), problem);
        }
        let target = ["group", "kind"].map(|name| reference.text(&[name]).unwrap_or_default());
        let allowed = [
            ["gateway.networking.k8s.io", "Gateway"],
            ["gateway.networking.k8s.io", "GatewayClass"],
            ["", "Service"],
            ["core", "Service"],
            ["networking.istio.io", "ServiceEntry"],
        ];
        if !allowed.contains(&target) {
            let problem = "only a Gateway or GatewayClass (group gateway.networking.k8s.io), a Service, or a ServiceEntry (group networking.istio.io) can be a target";
            report.error(reference.place, path, problem);
        }
    }
}

/// The module and its configuration. `spec` has the matches, `config` the rest.
fn wasm(spec: &Node, config: &Node, path: &str, report: &mut Report) {
    one_of(spec, "phase", "spec", &["UNSPECIFIED_PHASE", "AUTHN", "AUTHZ", "STATS"], report);
    one_of(config, "failStrategy", path, &["FAIL_CLOSE", "FAIL_OPEN", "FAIL_RELOAD"], report);
    one_of(config, "imagePullPolicy", path, &["UNSPECIFIED_POLICY", "IfNotPresent", "Always"], report);
    for (index, selector) in spec.get("match").map(Node::items).unwrap_or_default().iter().enumerate() {
        let path = format!("spec.match[{index}]");
        known(selector, &path, &["mode", "ports"], report);
        one_of(selector, "mode", &path, &["UNDEFINED", "CLIENT", "SERVER", "CLIENT_AND_SERVER"], report);
    }
    url(config, path, report);
    environment(config, path, report);

    let names = ["url", "pluginName"].map(|name| config.text(&[name]).unwrap_or_default());
    if !is_driftlock(&names) {
        return;
    }
    if config.text(&["type"]) == Some("NETWORK") {
        report.error(config.place_of("type"), join(path, "type"), "the filter reads HTTP; leave type out");
    }
    if config.get("failStrategy").is_none() {
        let problem = "not given, so Istio's default FAIL_CLOSE: all requests get 503 while the filter is broken. Say FAIL_OPEN or FAIL_CLOSE";
        report.warn(config.place, join(path, "failStrategy"), problem);
    }
    let path = join(path, "pluginConfig");
    let Some(configuration) = config.get("pluginConfig") else {
        plugin::check_bytes(config, b"", &path, report);
        return;
    };
    if !plugin::is_object(configuration) {
        report.error(configuration.place, path, "has to be an object, not a string with JSON in it");
        return;
    }
    let json = plugin::check_node(configuration, &path, report);
    if json.is_some_and(|json| json["hold"]["headers"] == true) {
        let problem = "Istio sets allow_on_headers_stop_iteration in no WasmPlugin and no TrafficExtension, so held headers would get no body; use an EnvoyFilter for it";
        report.error(configuration.place_of("hold.headers"), join(&path, "hold.headers"), problem);
    }
}

fn one_of(node: &Node, name: &str, path: &str, allowed: &[&str], report: &mut Report) {
    let Some(value) = node.get(name) else { return };
    let text = node.text(&[name]).unwrap_or_default();
    if !allowed.contains(&text) {
        report.error(value.place, join(path, name), format!("has to be one of {}", allowed.join(", ")));
    }
}

fn url(config: &Node, path: &str, report: &mut Report) {
    let Some(url) = config.text(&["url"]).filter(|url| !url.is_empty()) else {
        report.error(config.place, join(path, "url"), "not given; say where the module is");
        return;
    };
    let scheme = url.split_once("://").map(|(scheme, _)| scheme);
    let known_scheme = scheme.is_none_or(|scheme| ["http", "https", "file", "oci"].contains(&scheme));
    if !known_scheme || url.contains(char::is_whitespace) {
        let problem = "has to begin with oci://, https://, http:// or file://, or be an image's name";
        report.error(config.place_of("url"), join(path, "url"), problem);
    }
    let Some(digest) = config.text(&["sha256"]) else { return };
    let place = config.place_of("sha256");
    if !digest.is_empty()
        && (digest.len() != 64 || !digest.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')))
    {
        report.error(place, join(path, "sha256"), "has to be 64 hexadecimal digits in lower case");
    } else if let Some((_, pinned)) = url.split_once("@sha256:")
        && !digest.is_empty()
        && pinned != digest
    {
        report.error(place, join(path, "sha256"), "is not the digest that url names");
    }
}

fn environment(config: &Node, path: &str, report: &mut Report) {
    let variables = config.at(&["vmConfig", "env"]).map(Node::items).unwrap_or_default();
    let path = join(path, "vmConfig.env");
    let mut seen = Vec::new();
    for (index, variable) in variables.iter().enumerate() {
        let path = format!("{path}[{index}]");
        known(variable, &path, &["name", "value", "valueFrom"], report);
        one_of(variable, "valueFrom", &path, &["INLINE", "HOST"], report);
        let name = variable.text(&["name"]).unwrap_or_default();
        if name.is_empty() {
            report.error(variable.place, join(&path, "name"), "not given");
        } else if seen.contains(&name) {
            report.error(variable.place, join(&path, "name"), format!("{name} is given twice"));
        }
        seen.push(name);
        if variable.text(&["valueFrom"]) == Some("HOST") && variable.get("value").is_some() {
            let problem = "valueFrom: HOST takes the proxy's own value; leave value out";
            report.error(variable.place_of("value"), join(&path, "value"), problem);
        }
    }
}

/// The frame around an EnvoyFilter's patches; their values are Envoy's.
fn patches(spec: &Node, report: &mut Report) {
    const APPLY_TO: [&str; 11] = [
        "LISTENER",
        "FILTER_CHAIN",
        "NETWORK_FILTER",
        "HTTP_FILTER",
        "ROUTE_CONFIGURATION",
        "VIRTUAL_HOST",
        "HTTP_ROUTE",
        "CLUSTER",
        "EXTENSION_CONFIG",
        "BOOTSTRAP",
        "LISTENER_FILTER",
    ];
    for (index, patch) in spec.get("configPatches").map(Node::items).unwrap_or_default().iter().enumerate() {
        let path = format!("spec.configPatches[{index}]");
        known(patch, &path, &["applyTo", "match", "patch"], report);
        one_of(patch, "applyTo", &path, &APPLY_TO, report);
        let empty = Node::default();
        let [matches, change] = ["match", "patch"].map(|name| patch.get(name).unwrap_or(&empty));
        let match_path = join(&path, "match");
        known(
            matches,
            &match_path,
            &["context", "proxy", "listener", "routeConfiguration", "cluster", "waypoint"],
            report,
        );
        let contexts = ["ANY", "SIDECAR_INBOUND", "SIDECAR_OUTBOUND", "GATEWAY", "WAYPOINT"];
        one_of(matches, "context", &match_path, &contexts, report);
        let waypoint = matches.text(&["context"]) == Some("WAYPOINT");
        if waypoint != matches.get("waypoint").is_some() {
            let problem = "context: WAYPOINT needs waypoint beside it, and no other context may have it";
            report.error(matches.place, match_path, problem);
        }
        let patch_path = join(&path, "patch");
        known(change, &patch_path, &["operation", "value", "filterClass"], report);
        let operations =
            ["MERGE", "ADD", "REMOVE", "INSERT_BEFORE", "INSERT_AFTER", "INSERT_FIRST", "REPLACE"];
        one_of(change, "operation", &patch_path, &operations, report);
        let needs_value = change.text(&["operation"]).is_some_and(|operation| operation != "REMOVE");
        if needs_value && !matches!(change.get("value").map(|value| &value.value), Some(Value::Map(_))) {
            report.error(change.place, join(&patch_path, "value"), "not given; say what is put there");
        }
    }
}
