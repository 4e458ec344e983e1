//! What a gateway does, resolved: no names left to look up, no files left to read.
//!
//! Both ways in, the configuration file and [`GatewayOptions`](super::GatewayOptions), end here, so that
//! a gateway starts and reloads in one way. A plan is only data; [`super::generation`] makes it run.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use http::{HeaderName, HeaderValue, Method};
use tokio_rustls::rustls::{ClientConfig, ServerConfig};

use super::access_log::AccessLogTarget;
use super::config::{Connect, HostHeader, HttpVersion};
use super::filter::FilterFactory;
use super::options::FailurePolicy;

/// Everything a gateway needs to run.
pub(super) struct Plan {
    pub(super) listeners: Vec<ListenerPlan>,
    pub(super) admin: Option<SocketAddr>,
    pub(super) access_log: AccessLogTarget,
    pub(super) workers: usize,
    pub(super) client_timeout: Duration,
    pub(super) drain_timeout: Duration,
    pub(super) tunnel_idle_timeout: Duration,
    pub(super) limits: Limits,
    /// Where compiled modules are kept.
    pub(super) module_cache: Option<PathBuf>,
    pub(super) filters: Vec<FilterPlan>,
    pub(super) upstreams: Vec<UpstreamPlan>,
    pub(super) routes: Vec<RoutePlan>,
    /// Files whose change is a reason to load the configuration again.
    pub(super) watched: Vec<PathBuf>,
}

/// One address, and TLS on it or not.
#[derive(Clone)]
pub(super) struct ListenerPlan {
    pub(super) address: SocketAddr,
    pub(super) tls: Option<Arc<ServerConfig>>,
}

/// What a client may send.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Limits {
    pub(super) header_bytes: usize,
    pub(super) headers: usize,
    pub(super) request_body_bytes: u64,
    pub(super) response_body_bytes: u64,
    pub(super) connections: usize,
    pub(super) streams: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            header_bytes: 64 << 10,
            headers: 128,
            request_body_bytes: u64::MAX,
            response_body_bytes: u64::MAX,
            connections: 10_000,
            streams: 100,
        }
    }
}

/// One filter.
#[derive(Clone)]
pub(super) struct FilterPlan {
    pub(super) name: Arc<str>,
    pub(super) code: FilterCode,
    pub(super) plugin_configuration: Vec<u8>,
    pub(super) root_id: String,
    pub(super) vm: VmPlan,
    pub(super) vms: usize,
    pub(super) failure_policy: FailurePolicy,
    pub(super) reload_backoff: Duration,
    pub(super) max_buffer_bytes: usize,
    pub(super) allow_on_headers_stop_iteration: bool,
}

/// What a filter's VMs are told of themselves (Envoy's `vm_config`).
#[derive(Clone, Default)]
pub(super) struct VmPlan {
    pub(super) id: String,
    pub(super) configuration: Vec<u8>,
    pub(super) environment: Vec<(String, String)>,
}

/// What a filter runs.
#[derive(Clone)]
pub(super) enum FilterCode {
    /// A proxy-wasm module.
    Wasm(Arc<[u8]>),
    /// Rust.
    Native(Arc<dyn FilterFactory>),
}

/// One upstream.
#[derive(Clone)]
pub(super) struct UpstreamPlan {
    pub(super) name: Arc<str>,
    /// Host and port as the Host header names them.
    pub(super) authority: HeaderValue,
    pub(super) authority_text: Arc<str>,
    pub(super) host: String,
    pub(super) port: u16,
    pub(super) http: HttpVersion,
    pub(super) tls: Option<Arc<ClientConfig>>,
    /// The authorities as read, to see whether they changed.
    pub(super) ca_pem: Vec<u8>,
    pub(super) connect_timeout: Duration,
    pub(super) timeout: Duration,
    pub(super) idle_timeout: Duration,
    pub(super) max_connections: usize,
}

impl UpstreamPlan {
    /// Whether connections made under `other` may be used under this.
    pub(super) fn same_connections(&self, other: &Self) -> bool {
        self.name == other.name
            && self.host == other.host
            && self.port == other.port
            && self.http == other.http
            && self.tls.is_some() == other.tls.is_some()
            && self.ca_pem == other.ca_pem
            && self.connect_timeout == other.connect_timeout
            && self.timeout == other.timeout
            && self.idle_timeout == other.idle_timeout
            && self.max_connections == other.max_connections
    }
}

/// One route.
pub(super) struct RoutePlan {
    pub(super) name: Arc<str>,
    pub(super) matches: Matches,
    /// Indices into the plan's lists.
    pub(super) upstream: usize,
    pub(super) filters: Vec<usize>,
    pub(super) rewrite_prefix: Option<String>,
    /// The upstream's name goes out as Host in place of the client's.
    pub(super) host: HostHeader,
    pub(super) timeout: Duration,
    pub(super) request_body_bytes: u64,
    pub(super) websocket: bool,
    pub(super) connect: Connect,
}

/// What a request has to look like; an empty part holds for every request.
#[derive(Default)]
pub(super) struct Matches {
    pub(super) hosts: Vec<HostPattern>,
    pub(super) path_prefix: Option<String>,
    pub(super) methods: Vec<Method>,
    pub(super) headers: Vec<(HeaderName, HeaderValue)>,
}

/// A host name, or the names below one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum HostPattern {
    /// This name.
    Exact(String),
    /// Any name that ends with this (`.example.com`).
    Below(String),
}

impl HostPattern {
    /// In lower case. `None`: a pattern that could match no host.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let text = text.to_ascii_lowercase();
        let plain = |name: &str| {
            !name.is_empty()
                && !name.contains(['*', '/', '@', ' '])
                && (!name.contains(':') || name.starts_with('['))
        };
        match text.strip_prefix('*') {
            Some(below) => (below.len() > 1 && below.starts_with('.') && plain(below))
                .then(|| Self::Below(below.to_owned())),
            None => plain(&text).then_some(Self::Exact(text)),
        }
    }

    fn holds(&self, host: &str) -> bool {
        match self {
            Self::Exact(name) => host.eq_ignore_ascii_case(name),
            Self::Below(below) => host
                .len()
                .checked_sub(below.len())
                .filter(|start| *start > 0)
                .and_then(|start| host.get(start..))
                .is_some_and(|end| end.eq_ignore_ascii_case(below)),
        }
    }
}

impl Matches {
    /// Whether a request is for this route. `authority` may carry a port.
    pub(super) fn hold(
        &self,
        method: &Method,
        authority: &str,
        path: &str,
        headers: &http::HeaderMap,
    ) -> bool {
        if !self.hosts.is_empty() {
            let host = without_port(authority);
            if !self.hosts.iter().any(|pattern| pattern.holds(host)) {
                return false;
            }
        }
        self.path_prefix.as_deref().is_none_or(|prefix| below(path, prefix).is_some())
            && (self.methods.is_empty() || self.methods.contains(method))
            && self
                .headers
                .iter()
                .all(|(name, value)| headers.get_all(name).iter().any(|present| present == value))
    }
}

/// `example.com:80` and `[::1]:80` without the port.
fn without_port(authority: &str) -> &str {
    match authority.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => host,
        _ => authority,
    }
}

/// The rest of `path` after `prefix`, when that ends at a segment's end.
fn below<'p>(path: &'p str, prefix: &str) -> Option<&'p str> {
    let rest = path.strip_prefix(prefix)?;
    (rest.is_empty() || prefix.ends_with('/') || rest.starts_with(['/', '?'])).then_some(rest)
}

/// `path` with `prefix` replaced. Unchanged when a filter has taken the prefix away.
pub(super) fn rewritten(path: &str, prefix: &str, replacement: &str) -> String {
    let Some(rest) = below(path, prefix) else { return path.to_owned() };
    let joined = match (replacement.ends_with('/'), rest.strip_prefix('/')) {
        (true, Some(rest)) => format!("{replacement}{rest}"),
        (false, None) if !rest.is_empty() && !rest.starts_with('?') => format!("{replacement}/{rest}"),
        _ => format!("{replacement}{rest}"),
    };
    if joined.starts_with('/') { joined } else { format!("/{joined}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_match_without_port_and_case() {
        let exact = HostPattern::parse("Api.Example.com").expect("a pattern");
        let below = HostPattern::parse("*.example.com").expect("a pattern");
        for (authority, by_exact, by_below) in [
            ("api.example.com", true, true),
            ("API.EXAMPLE.COM:8443", true, true),
            ("example.com", false, false),
            (".example.com", false, false),
            ("a.b.example.com", false, true),
            ("evil-example.com", false, false),
            ("api.example.com.evil.org", false, false),
        ] {
            let host = without_port(authority);
            assert_eq!((exact.holds(host), below.holds(host)), (by_exact, by_below), "{authority}");
        }
        assert_eq!(without_port("[::1]:80"), "[::1]");
        for bad in ["", "*", "*.", "a*b", "a/b", "a:80", "a b"] {
            assert_eq!(HostPattern::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_prefix_ends_at_a_segment() {
        for (path, prefix, rest) in [
            ("/v1", "/v1", Some("")),
            ("/v1/chat", "/v1", Some("/chat")),
            ("/v1?x=1", "/v1", Some("?x=1")),
            ("/v10", "/v1", None),
            ("/v1/chat", "/v1/", Some("chat")),
            ("/v1", "/v1/", None),
            ("/any", "/", Some("any")),
        ] {
            assert_eq!(below(path, prefix), rest, "{path} under {prefix}");
        }
    }

    #[test]
    fn a_rewritten_path_has_one_slash_where_it_was_cut() {
        for (path, prefix, replacement, expected) in [
            ("/openai/v1/chat?a=1", "/openai", "/", "/v1/chat?a=1"),
            ("/openai/v1", "/openai/", "/", "/v1"),
            ("/openai", "/openai", "/v1", "/v1"),
            ("/openai?a=1", "/openai", "/v1", "/v1?a=1"),
            ("/openai/x", "/openai/", "/v1", "/v1/x"),
            ("/openai/x", "/openai", "/v1/", "/v1/x"),
            ("/else", "/openai", "/v1", "/else"),
        ] {
            assert_eq!(rewritten(path, prefix, replacement), expected, "{path} {prefix} {replacement}");
        }
    }
}
