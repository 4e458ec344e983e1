//! Driftlock in Envoy's configuration: bootstraps, discovery responses, pieces of either, and the patches of
//! an Istio EnvoyFilter.
//!
//! Only what concerns the filter is looked at; the rest of Envoy's schema is Envoy's to check. Of the four
//! rules here that are no part of the filter's own, each is a way to be let down without a word: a `Struct`
//! as configuration (it arrives as protobuf), held headers without Envoy's consent, a cluster that is not
//! there, and the default failure policy.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use super::node::{Node, Value};
use super::{Report, is_driftlock, join, plugin};

/// The end of the type of a Wasm filter, HTTP or not.
const WASM: &str = ".wasm.v3.Wasm";
/// A filter's configuration without Envoy's types, as Istio's patches often have it.
const TYPED_STRUCT: &str = ".TypedStruct";

/// Who fetches a remote module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fetcher {
    /// Envoy itself, which wants its digest.
    Envoy,
    /// Istio's agent, which also takes an image without one.
    Agent,
}

/// Checks a document, or the part of one that stands at `path`. `text` is the whole file.
pub(super) fn check(document: &Node, path: &str, text: &str, fetcher: Fetcher, report: &mut Report) {
    let mut filters = Vec::new();
    find(document, path.to_owned(), &mut filters);
    let clusters = static_clusters(document);
    for (path, config) in filters {
        check_plugin(config, &path, clusters.as_deref(), text, fetcher, report);
    }
}

/// All Wasm filters at or below a node, as path and `PluginConfig`.
fn find<'n>(node: &'n Node, path: String, found: &mut Vec<(String, &'n Node)>) {
    let of_type = |name: &str, end: &str| node.text(&[name]).is_some_and(|kind| kind.ends_with(end));
    let typed = of_type("@type", WASM).then(|| node.get("config")).flatten();
    let untyped = (of_type("@type", TYPED_STRUCT) && of_type("type_url", WASM))
        .then(|| node.at(&["value", "config"]))
        .flatten();
    match (typed, untyped) {
        (Some(config), _) => found.push((join(&path, "config"), config)),
        (_, Some(config)) => found.push((join(&path, "value.config"), config)),
        _ => {
            for (name, _, value) in node.fields() {
                find(value, join(&path, name), found);
            }
            for (index, item) in node.items().iter().enumerate() {
                find(item, join(&path, &format!("[{index}]")), found);
            }
        }
    }
}

/// The names of all clusters, where the document has all of them.
fn static_clusters(document: &Node) -> Option<Vec<&str>> {
    document.get("static_resources")?;
    let dynamic = document.at(&["dynamic_resources", "cds_config"]).is_some();
    let clusters = document.at(&["static_resources", "clusters"]).map(Node::items).unwrap_or_default();
    (!dynamic).then(|| clusters.iter().filter_map(|cluster| cluster.text(&["name"])).collect())
}

fn check_plugin(
    config: &Node,
    path: &str,
    clusters: Option<&[&str]>,
    text: &str,
    fetcher: Fetcher,
    report: &mut Report,
) {
    let code = ["vm_config", "code"];
    let code = |rest: [&'static str; 2]| config.text(&[code[0], code[1], rest[0], rest[1]]);
    let remote = config.text(&["vm_config", "code", "remote", "http_uri", "uri"]);
    let names = [
        config.text(&["name"]),
        config.text(&["root_id"]),
        config.text(&["vm_config", "vm_id"]),
        code(["local", "filename"]),
        remote,
    ];
    if !is_driftlock(&names.map(Option::unwrap_or_default)) {
        return;
    }
    if config.get("failure_policy").is_none() && config.get("fail_open").is_none() {
        let problem = "not given, so Envoy's default: all requests get 503 while the filter is broken. Say FAIL_OPEN or FAIL_CLOSED";
        report.warn(config.place, join(path, "failure_policy"), problem);
    }
    if fetcher == Fetcher::Envoy
        && remote.is_some()
        && config.text(&["vm_config", "code", "remote", "sha256"]).is_none_or(str::is_empty)
    {
        let problem = "not given; Envoy fetches no remote module without it. Say what `sha256sum` says of it";
        report.error(
            config.place_of("vm_config.code.remote"),
            join(path, "vm_config.code.remote.sha256"),
            problem,
        );
    }
    let Some(json) = check_configuration(config, path, text, report) else { return };
    let consent = matches!(
        config.get("allow_on_headers_stop_iteration").map(|node| &node.value),
        Some(Value::Bool(true))
    );
    if json["hold"]["headers"] == true && !consent {
        let problem = "the configuration holds headers (hold.headers); without allow_on_headers_stop_iteration: true Envoy gives the filter no body while they wait";
        report.error(config.place, join(path, "allow_on_headers_stop_iteration"), problem);
    }
    for caller in ["pull", "observations"] {
        if let Some(wanted) = json[caller]["cluster"].as_str()
            && let Some(clusters) = clusters
            && !clusters.contains(&wanted)
        {
            let problem = format!(
                "there is no cluster {wanted:?} among static_resources.clusters; add it with the address of `driftlock serve`"
            );
            report.error(
                config.place_of("configuration"),
                join(path, &format!("configuration: {caller}.cluster")),
                problem,
            );
        }
    }
}

/// The plugin's own configuration; `None` where it is not usable or cannot be read as JSON.
fn check_configuration(
    config: &Node,
    path: &str,
    text: &str,
    report: &mut Report,
) -> Option<serde_json::Value> {
    let Some(configuration) = config.get("configuration") else {
        plugin::check_bytes(config, b"", path, report);
        return None;
    };
    let path = join(path, "configuration");
    let kind = configuration.text(&["@type"]).unwrap_or_default();
    let value = configuration.get("value").unwrap_or(configuration);
    match (&value.value, kind.rsplit('.').next()) {
        (Value::Text(json), Some("StringValue")) => {
            plugin::check_string(value, json, &join(&path, "value"), text, report)
        }
        (Value::Text(base64), Some("BytesValue")) => {
            match STANDARD.decode(base64.trim()) {
                Ok(bytes) => plugin::check_bytes(value, &bytes, &join(&path, "value"), report),
                Err(error) => report.error(value.place, join(&path, "value"), format!("not base64: {error}")),
            }
            None
        }
        _ => {
            let problem = "only google.protobuf.StringValue, with JSON as its value, or BytesValue reaches the filter as it was written; a Struct arrives as protobuf";
            report.error(configuration.place, join(&path, "@type"), problem);
            None
        }
    }
}
