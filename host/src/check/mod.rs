//! `driftlock config check`: says before a proxy does what is wrong with a file, and on which line.
//!
//! What: [`check`] looks at a text that is one of four things, told apart by their fields:
//!
//! | the text | has at its top | what is checked |
//! |---|---|---|
//! | plugin configuration | none of the following | all that the filter itself would refuse |
//! | gateway | `listeners` and `upstreams` or `routes` | the same for each filter named driftlock; then the whole file as `driftlock gateway --check` does |
//! | Envoy | `static_resources`, `dynamic_resources`, `resources`, `@type`, … | every Wasm filter that is Driftlock's, wherever it stands: its configuration, and what around it would make it fail (`envoy.rs`) |
//! | Kubernetes | `apiVersion` and `kind` | WasmPlugin, TrafficExtension, EnvoyFilter and Telemetry by the rules that a cluster would apply (`istio.rs`), and the plugin configuration in them |
//!
//! Why: Envoy says what it refuses in one long line without a place, Istio in a condition of the resource
//! or only in the proxy's log, and a field that nobody knows is dropped by Kubernetes without a word.
//!
//! Cost: milliseconds, but for a gateway's file, whose modules are compiled.
//!
//! Left out on purpose: all of Envoy's schema (`envoy --mode validate`), and names of clusters that come by xDS.

mod envoy;
mod istio;
mod node;
mod plugin;

use std::fmt;
use std::path::{Path, PathBuf};

use crate::gateway::{self, GatewayError};
use node::{Node, Place};

/// Arguments of `driftlock config check`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The files: JSON or YAML, several documents in one allowed.
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
}

/// Why a check failed.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// A file that cannot be read.
    #[error("cannot read {path}: {source}; check the path and its permissions")]
    Read {
        /// Which one.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// There are problems; they have been printed.
    #[error("{problems} to be put right before a proxy takes it")]
    Problems {
        /// How many, in words.
        problems: String,
    },
}

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Severity {
    /// The proxy, the cluster or the filter refuses it, or it cannot work.
    Error,
    /// It works, but perhaps not as meant.
    Warning,
}

/// Something wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// Line, from 1; 0 where the file as a whole is meant.
    pub line: u64,
    /// Column, from 1.
    pub column: u64,
    /// Path of the value, such as `spec.wasm.pluginConfig: learn.messages`.
    pub path: String,
    /// What is wrong and what would be right.
    pub problem: String,
    /// How bad it is.
    pub severity: Severity,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { line, column, path, problem, severity } = self;
        if *line > 0 {
            write!(f, "{line}:{column}: ")?;
        }
        if *severity == Severity::Warning {
            f.write_str("warning: ")?;
        }
        if !path.is_empty() {
            write!(f, "{path}: ")?;
        }
        f.write_str(problem)
    }
}

/// What a check found.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// In the file's order.
    pub findings: Vec<Finding>,
    /// What was looked at, a line each, such as `plugin configuration "llm"`.
    pub checked: Vec<String>,
}

impl Report {
    /// Whether a proxy can take it.
    pub fn is_usable(&self) -> bool {
        self.findings.iter().all(|finding| finding.severity != Severity::Error)
    }

    fn add(&mut self, place: Place, severity: Severity, path: impl Into<String>, problem: impl Into<String>) {
        let Place { line, column } = place;
        self.findings.push(Finding { line, column, path: path.into(), problem: problem.into(), severity });
    }

    fn error(&mut self, place: Place, path: impl Into<String>, problem: impl Into<String>) {
        self.add(place, Severity::Error, path, problem);
    }

    fn warn(&mut self, place: Place, path: impl Into<String>, problem: impl Into<String>) {
        self.add(place, Severity::Warning, path, problem);
    }
}

/// Fields of which an Envoy bootstrap, a piece of one or a discovery response has at least one.
const ENVOY_FIELDS: [&str; 8] = [
    "static_resources",
    "dynamic_resources",
    "resources",
    "@type",
    "filter_chains",
    "http_filters",
    "typed_config",
    "load_assignment",
];

/// Checks one file. `path` is where it is: a gateway's file names others beside it.
pub fn check(text: &str, path: &Path) -> Report {
    let mut report = Report::default();
    let documents = match Node::documents(text) {
        Ok(documents) => documents,
        Err((place, reason)) => {
            report.error(place, "", format!("neither YAML nor JSON: {reason}"));
            return report;
        }
    };
    if documents.is_empty() {
        report.error(Place::default(), "", "the file is empty; a plugin configuration is at least {}");
    }
    for document in &documents {
        let has = |name: &str| document.get(name).is_some();
        if has("apiVersion") && has("kind") {
            istio::check(document, text, &mut report);
        } else if ENVOY_FIELDS.iter().any(|name| has(name)) {
            envoy::check(document, "", text, envoy::Fetcher::Envoy, &mut report);
        } else if has("listeners") && (has("upstreams") || has("routes")) {
            check_gateway(document, path, &mut report);
        } else {
            plugin::check_node(document, "", &mut report);
        }
    }
    report
}

/// The filters' configurations first, since the filter itself names no line.
fn check_gateway(document: &Node, path: &Path, report: &mut Report) {
    let filters = document.get("filters").map(Node::items).unwrap_or_default();
    for (index, filter) in filters.iter().enumerate() {
        let names = ["name", "module", "root_id"].map(|name| filter.text(&[name]).unwrap_or_default());
        // A baseline beside it completes the configuration; the gateway puts the two together.
        let complete = filter.get("baseline").is_none();
        if let Some(configuration) = filter.get("configuration")
            && complete
            && is_driftlock(&names)
        {
            plugin::check_node(configuration, &format!("filters[{index}].configuration"), report);
        }
    }
    if !report.is_usable() {
        return;
    }
    match gateway::check(path) {
        Ok(()) => report.checked.push("a gateway's file, its filters started".to_owned()),
        Err(GatewayError::ConfigFile { line, column, field, problem, .. }) => {
            report.error(Place { line, column }, field, problem);
        }
        Err(error) => report.error(Place::default(), "", error.to_string()),
    }
}

/// Whether a plugin with these names is Driftlock's.
fn is_driftlock(names: &[&str]) -> bool {
    names.iter().any(|name| name.to_ascii_lowercase().contains("driftlock"))
}

/// `base.name`, or the name alone.
fn join(base: &str, name: &str) -> String {
    match (base, name) {
        ("", name) => name.to_owned(),
        (base, name) if name.starts_with('[') => format!("{base}{name}"),
        (base, name) => format!("{base}.{name}"),
    }
}

/// Runs `driftlock config check`.
///
/// # Errors
/// [`CheckError`]: a file that cannot be read, or the number of problems, which are printed.
pub fn run(args: &Args) -> Result<(), CheckError> {
    let mut problems = 0_usize;
    for path in &args.files {
        let text = std::fs::read_to_string(path)
            .map_err(|source| CheckError::Read { path: path.to_owned(), source })?;
        let report = check(&text, path);
        for finding in &report.findings {
            anstream::println!("{}:{finding}", path.display());
        }
        let errors = report.findings.iter().filter(|finding| finding.severity == Severity::Error).count();
        problems += errors;
        for checked in report.checked.iter().filter(|_| errors == 0) {
            anstream::println!("{}: usable: {checked}", path.display());
        }
        if report.checked.is_empty() && errors == 0 {
            anstream::println!("{}: there is nothing of Driftlock's in it", path.display());
        }
    }
    match problems {
        0 => Ok(()),
        1 => Err(CheckError::Problems { problems: "one problem".to_owned() }),
        many => Err(CheckError::Problems { problems: format!("{many} problems") }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All errors of a text, as they are printed.
    fn errors(text: &str) -> Vec<String> {
        let report = check(text, Path::new("file.yaml"));
        let errors = report.findings.iter().filter(|finding| finding.severity == Severity::Error);
        errors.map(ToString::to_string).collect()
    }

    fn warnings(text: &str) -> Vec<String> {
        let report = check(text, Path::new("file.yaml"));
        let warnings = report.findings.iter().filter(|finding| finding.severity == Severity::Warning);
        warnings.map(ToString::to_string).collect()
    }

    /// The only error, which begins with its place and path and says this.
    fn refused(text: &str, begins: &str, says: &str) {
        let errors = errors(text);
        let [error] = errors.as_slice() else { panic!("{text}\n{errors:#?}") };
        assert!(error.starts_with(begins) && error.contains(says), "{text}\n{error}");
    }

    #[test]
    fn a_plugin_configuration_is_what_nothing_else_is() {
        assert_eq!(errors("{\"name\": \"llm\"}"), [""; 0]);
        assert_eq!(errors("name: llm\nlearn: {messages: 1000}\n"), [""; 0]);
        refused("name: llm\nlearn:\n  mesages: 1000\n", "3:3: learn.mesages: ", "unknown field");
        refused("{\n \"alpha\": 2\n}", "2:2: alpha: ", "not between");
        refused("exclude:\n- path: /a\n- {}\n", "3:3: exclude[1]: ", "names nothing");
        refused("learn: null\n", "1:1: ", "nothing could ever be judged");
        refused("a: [", "1:", "neither YAML nor JSON");
        refused("", "the file is empty", "{}");
        refused("- 1\n", "1:1: ", "object");
    }

    /// A bootstrap whose filter has these fields in its `config`, indented by eight.
    fn bootstrap(fields: &str) -> String {
        format!(
            "static_resources:
  listeners:
  - filter_chains:
    - filters:
      - typed_config:
          http_filters:
          - name: d
            typed_config:
              \"@type\": type.googleapis.com/envoy.extensions.filters.http.wasm.v3.Wasm
              config:
                name: driftlock
                failure_policy: FAIL_OPEN
{fields}
  clusters:
  - {{name: llm}}
"
        )
    }

    const CONFIGURATION: &str =
        "                configuration: {\"@type\": type.googleapis.com/google.protobuf.StringValue, value: ";
    const PATH: &str = "static_resources.listeners[0].filter_chains[0].filters[0].typed_config.http_filters[0].typed_config.config";

    #[test]
    fn the_configuration_in_an_envoy_file_is_checked_where_it_stands() {
        assert_eq!(errors(&bootstrap(&format!("{CONFIGURATION}'{{}}'}}"))), [""; 0]);
        let wrong = bootstrap(&format!("{CONFIGURATION}'{{\"aplha\": 1}}'}}"));
        refused(&wrong, &format!("13:98: {PATH}.configuration.value.aplha: "), "unknown field");
        let block = "                configuration:
                  \"@type\": type.googleapis.com/google.protobuf.StringValue
                  value: |
                    {
                      \"learn\": {\"messages\": 3}
                    }";
        refused(&bootstrap(block), &format!("17:33: {PATH}.configuration.value.learn.messages: "), "3");
        let structure = "                configuration: {\"@type\": type.googleapis.com/google.protobuf.Struct, value: {alpha: 1}}";
        refused(&bootstrap(structure), "13:32: ", "StringValue");
        let other = bootstrap(structure).replace("name: driftlock", "name: other");
        assert_eq!(errors(&other), [""; 0], "another filter's configuration is none of our business");
    }

    #[test]
    fn what_envoy_would_let_down_without_a_word_is_said() {
        let hold = format!("{CONFIGURATION}'{{\"hold\": {{\"headers\": true}}}}'}}");
        refused(&bootstrap(&hold), "11:17: ", "allow_on_headers_stop_iteration: true");
        let consent = format!("                allow_on_headers_stop_iteration: true\n{hold}");
        assert_eq!(errors(&bootstrap(&consent)), [""; 0]);
        let pull = bootstrap(&format!("{CONFIGURATION}'{{\"pull\": {{\"cluster\": \"driftlock\"}}}}'}}"));
        refused(&pull, "13:17: ", "no cluster \"driftlock\"");
        assert_eq!(errors(&pull.replace("- {name: llm}", "- {name: driftlock}")), [""; 0]);
        let by_xds = format!("dynamic_resources: {{cds_config: {{}}}}\n{pull}");
        assert_eq!(errors(&by_xds), [""; 0], "clusters that come later are not known");
        let silent = bootstrap(&format!("{CONFIGURATION}'{{}}'}}")).replace("failure_policy", "#");
        assert!(warnings(&silent)[0].contains("FAIL_OPEN"), "{:?}", warnings(&silent));
        let remote = "                vm_config: {code: {remote: {http_uri: {uri: \"https://h/f.wasm\"}}}}";
        refused(&bootstrap(remote), "13:36: ", "sha256sum");
    }

    /// A WasmPlugin with these lines in its spec.
    fn wasm_plugin(lines: &str) -> String {
        format!(
            "apiVersion: extensions.istio.io/v1alpha1
kind: WasmPlugin
metadata: {{name: d}}
spec:
  url: oci://registry.example/driftlock:1
  failStrategy: FAIL_OPEN
{lines}
"
        )
    }

    #[test]
    fn a_wasm_plugin_keeps_the_rules_of_its_definition() {
        let good = "  selector: {matchLabels: {istio: ingressgateway}}\n  phase: STATS\n  pluginConfig: {name: llm}\n  vmConfig: {env: [{name: A, value: b}, {name: B, valueFrom: HOST}]}";
        assert_eq!(errors(&wasm_plugin(good)), [""; 0]);
        for (lines, begins, says) in [
            ("  pluginConfg: {}", "7:3: spec.pluginConfg: ", "no such field"),
            (
                "  selector: {}\n  targetRefs: []",
                "8:3: spec.targetRefs: ",
                "only one of selector and targetRefs",
            ),
            ("  targetRefs: [{kind: Pod, name: p}]", "7:16: spec.targetRefs[0]: ", "Gateway"),
            ("  phase: LAST", "7:10: spec.phase: ", "AUTHN"),
            ("  match: [{mode: INBOUND}]", "7:18: spec.match[0].mode: ", "SERVER"),
            ("  sha256: ABC", "7:3: spec.sha256: ", "64 hexadecimal digits"),
            (
                "  vmConfig: {env: [{name: A, valueFrom: HOST, value: b}]}",
                "7:47: spec.vmConfig.env[0].value: ",
                "HOST",
            ),
            (
                "  vmConfig: {env: [{name: A, value: b}, {name: A, value: c}]}",
                "7:41: spec.vmConfig.env[1].name: ",
                "twice",
            ),
            ("  pluginConfig: '{}'", "7:17: spec.pluginConfig: ", "object"),
            (
                "  pluginConfig:\n    limits: {max_streams: 0}",
                "8:14: spec.pluginConfig.limits.max_streams: ",
                "less than 1",
            ),
            (
                "  pluginConfig: {hold: {headers: true}}",
                "7:25: spec.pluginConfig.hold.headers: ",
                "EnvoyFilter",
            ),
            ("  type: NETWORK", "7:3: spec.type: ", "HTTP"),
        ] {
            refused(&wasm_plugin(lines), begins, says);
        }
        refused(&wasm_plugin("").replace("oci://", "ftp://"), "5:3: spec.url: ", "oci://");
        let unnamed = wasm_plugin("").replace("metadata: {name: d}\n", "");
        refused(&unnamed, "1:1: metadata.name: ", "not given");
        let silent = wasm_plugin("").replace("  failStrategy: FAIL_OPEN\n", "");
        assert!(warnings(&silent)[0].contains("FAIL_CLOSE"), "{:?}", warnings(&silent));
    }

    #[test]
    fn traffic_extensions_and_envoy_filters_keep_theirs() {
        let extension = |spec: &str| {
            format!(
                "apiVersion: extensions.istio.io/v1alpha1\nkind: TrafficExtension\nmetadata: {{name: d}}\nspec:\n{spec}\n"
            )
        };
        let good = "  phase: STATS\n  wasm: {url: \"oci://r/driftlock\", failStrategy: FAIL_OPEN, pluginConfig: {alpha: 0.01}}";
        assert_eq!(errors(&extension(good)), [""; 0]);
        refused(&extension("  phase: STATS"), "5:3: spec: ", "exactly one of wasm and lua");
        let wrong = good.replace("alpha: 0.01", "alpha: 1");
        refused(&extension(&wrong), "6:76: spec.wasm.pluginConfig.alpha: ", "not between");
        refused(&extension(&format!("{good}\n  url: x")), "7:3: spec.url: ", "no such field");

        let filter = |lines: &str, value: &str| {
            format!(
                "apiVersion: networking.istio.io/v1alpha3\nkind: EnvoyFilter\nmetadata: {{name: d}}\nspec:\n{lines}\n  configPatches:\n  - applyTo: HTTP_FILTER\n    match: {{context: GATEWAY}}\n    patch:\n      operation: INSERT_BEFORE\n      value: {value}\n"
            )
        };
        let typed = "{typed_config: {\"@type\": type.googleapis.com/udpa.type.v1.TypedStruct, type_url: type.googleapis.com/envoy.extensions.filters.http.wasm.v3.Wasm, value: {config: {name: driftlock, failure_policy: FAIL_OPEN, configuration: {\"@type\": type.googleapis.com/google.protobuf.StringValue, value: '{\"alpha\": 3}'}}}}}";
        let path = "spec.configPatches[0].patch.value.typed_config.value.config.configuration.value.alpha";
        let errors = errors(&filter("  priority: 1", typed));
        assert!(errors.len() == 1 && errors[0].contains(path), "{errors:?}");
        refused(
            &filter("  workloadSelector: {}\n  targetRefs: []", "{name: x}"),
            "6:3: spec.targetRefs: ",
            "only one",
        );
        refused(&filter("  priority: 1", "null"), "10:7: spec.configPatches[0].patch.value: ", "not given");
        let sideways = filter("  priority: 1", "{name: x}").replace("GATEWAY", "SIDEWAYS");
        refused(&sideways, "8:22: spec.configPatches[0].match.context: ", "SIDECAR_INBOUND");
        let waypoint = filter("  priority: 1", "{name: x}").replace("GATEWAY", "WAYPOINT");
        refused(&waypoint, "8:12: spec.configPatches[0].match: ", "needs waypoint");
    }

    #[test]
    fn other_resources_are_left_alone() {
        let report = check("apiVersion: v1\nkind: ConfigMap\ndata: {a: b}\n", Path::new("f"));
        assert!(report.is_usable() && report.checked.is_empty());
    }
}
