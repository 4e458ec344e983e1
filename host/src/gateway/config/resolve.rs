//! From the file's fields to a [`Plan`]: names looked up, files read, each refusal at its place.

use std::path::{Path, PathBuf};
use std::time::Duration;

use http::{HeaderName, HeaderValue, Method, Uri};
use serde_saphyr::{Location, Spanned};

use super::scalar::Span;
use super::{Config, Filter, Listener, Match, Route, Upstream};
use crate::gateway::access_log::AccessLogTarget;
use crate::gateway::error::GatewayError;
use crate::gateway::options::{FailurePolicy, RELOAD_BACKOFF, default_workers, upstream_plan};
use crate::gateway::plan::{
    FilterCode, FilterPlan, HostPattern, Limits, ListenerPlan, Matches, Plan, RoutePlan, UpstreamPlan, VmPlan,
};
use crate::gateway::tls;
use crate::replay::find_filter;
use crate::train::with_baseline;

/// hyper's smallest buffer for a message's head.
const LEAST_HEADER_BYTES: u64 = 8 << 10;

/// A configuration as a module gets it.
fn as_given(value: &serde_json::Value) -> Vec<u8> {
    match value {
        serde_json::Value::String(text) => text.clone().into_bytes(),
        other => other.to_string().into_bytes(),
    }
}

/// One load: where relative paths start, what was read so far.
struct Loader<'c> {
    file: &'c Path,
    folder: PathBuf,
    watched: Vec<PathBuf>,
}

impl Config {
    pub(super) fn resolve(self, file: &Path) -> Result<Plan, GatewayError> {
        let folder = file.parent().map(Path::to_owned).unwrap_or_default();
        let mut loader = Loader { file, folder, watched: vec![file.to_owned()] };
        let start = || Location::UNKNOWN;
        let workers = self.workers.map_or_else(default_workers, usize::from);
        if self.listeners.is_empty() {
            return Err(loader.refuse(start(), "listeners", "give at least one listener"));
        }
        if self.routes.is_empty() {
            return Err(loader.refuse(start(), "routes", "give at least one route"));
        }
        let limits = loader.limits(&self.limits)?;
        let client_timeout = loader.positive(self.timeouts.client.as_ref(), "timeouts.client", 60)?;
        let tunnel_idle_timeout =
            loader.positive(self.timeouts.tunnel_idle.as_ref(), "timeouts.tunnel_idle", 3600)?;
        let listeners = indexed(&self.listeners)
            .map(|(index, listener)| loader.listener(index, listener))
            .collect::<Result<Vec<_>, _>>()?;
        let filters = indexed(&self.filters)
            .map(|(index, filter)| loader.filter(index, filter, &self.filters, workers))
            .collect::<Result<Vec<_>, _>>()?;
        let upstreams = self
            .upstreams
            .iter()
            .map(|(name, upstream)| loader.upstream(name, upstream))
            .collect::<Result<Vec<_>, _>>()?;
        let routes = indexed(&self.routes)
            .map(|(index, route)| loader.route(index, route, &filters, &upstreams, &limits))
            .collect::<Result<Vec<_>, _>>()?;
        Ok(Plan {
            listeners,
            admin: self.admin,
            access_log: match self.access_log.as_str() {
                "none" => AccessLogTarget::None,
                "stdout" => AccessLogTarget::Stdout,
                path => AccessLogTarget::File(loader.folder.join(path)),
            },
            workers,
            client_timeout,
            drain_timeout: self.timeouts.drain.map_or(Duration::from_secs(30), |span| span.0),
            tunnel_idle_timeout,
            limits,
            module_cache: self.module_cache.map(|path| loader.folder.join(path)),
            filters,
            upstreams,
            routes,
            watched: loader.watched,
        })
    }
}

fn indexed<T>(items: &[T]) -> impl Iterator<Item = (usize, &T)> {
    items.iter().enumerate()
}

impl Loader<'_> {
    fn refuse(&self, place: Location, field: impl Into<String>, problem: impl Into<String>) -> GatewayError {
        GatewayError::ConfigFile {
            path: self.file.to_owned(),
            line: place.line(),
            column: place.column(),
            field: field.into(),
            problem: problem.into(),
        }
    }

    /// A path of the file, from now on watched.
    fn path(&mut self, path: &Spanned<PathBuf>) -> PathBuf {
        let path = self.folder.join(&path.value);
        if !self.watched.contains(&path) {
            self.watched.push(path.clone());
        }
        path
    }

    fn read(&mut self, path: &Spanned<PathBuf>, field: &str) -> Result<Vec<u8>, GatewayError> {
        let full = self.path(path);
        std::fs::read(&full).map_err(|error| {
            self.refuse(path.referenced, field, format!("cannot read {}: {error}", full.display()))
        })
    }

    fn positive(
        &self,
        span: Option<&Spanned<Span>>,
        field: &str,
        default_s: u64,
    ) -> Result<Duration, GatewayError> {
        match span {
            None => Ok(Duration::from_secs(default_s)),
            Some(span) if span.value.0 < Duration::from_millis(1) => {
                Err(self.refuse(span.referenced, field, "it has to be at least 1ms"))
            }
            Some(span) => Ok(span.value.0),
        }
    }

    fn limits(&self, limits: &super::Limits) -> Result<Limits, GatewayError> {
        let defaults = Limits::default();
        let header_bytes = match &limits.header_bytes {
            None => defaults.header_bytes,
            Some(size) if (LEAST_HEADER_BYTES..=1 << 30).contains(&size.value.0) => {
                usize::try_from(size.value.0).unwrap_or(usize::MAX)
            }
            Some(size) => {
                let problem = "it has to be between 8KiB and 1GiB";
                return Err(self.refuse(size.referenced, "limits.header_bytes", problem));
            }
        };
        Ok(Limits {
            header_bytes,
            headers: limits.headers.map_or(defaults.headers, usize::from),
            request_body_bytes: limits.request_body.map_or(defaults.request_body_bytes, |size| size.0),
            response_body_bytes: limits.response_body.map_or(defaults.response_body_bytes, |size| size.0),
            connections: limits.connections.map_or(defaults.connections, usize::from),
            streams: limits
                .streams
                .map_or(defaults.streams, |count| u32::try_from(count.get()).unwrap_or(u32::MAX)),
        })
    }

    fn listener(&mut self, index: usize, listener: &Listener) -> Result<ListenerPlan, GatewayError> {
        let tls = match &listener.tls {
            None => None,
            Some(files) => {
                let (certificate, key) = (self.path(&files.certificate), self.path(&files.key));
                let client_ca = files.client_ca.as_ref().map(|path| self.path(path));
                let tls = tls::server(&certificate, &key, client_ca.as_deref()).map_err(|problem| {
                    let place = files.certificate.referenced;
                    self.refuse(place, format!("listeners[{index}].tls"), problem)
                })?;
                Some(tls)
            }
        };
        Ok(ListenerPlan { address: listener.address.value, tls })
    }

    fn filter(
        &mut self,
        index: usize,
        filter: &Filter,
        all: &[Filter],
        workers: usize,
    ) -> Result<FilterPlan, GatewayError> {
        let field = |name: &str| format!("filters[{index}].{name}");
        let name = &filter.name;
        if name.value.is_empty() {
            return Err(self.refuse(name.referenced, field("name"), "it has to have a name"));
        }
        if all.iter().take(index).any(|earlier| earlier.name.value == name.value) {
            let problem = format!("another filter is called {:?} already", name.value);
            return Err(self.refuse(name.referenced, field("name"), problem));
        }
        let code = match &filter.module {
            Some(path) => self.read(path, &field("module"))?,
            None => {
                let path = find_filter(None);
                self.watched.push(path.clone());
                std::fs::read(&path).map_err(|error| {
                    let problem = format!(
                        "no module is named, and Driftlock's own at {} cannot be read: {error}",
                        path.display()
                    );
                    self.refuse(name.referenced, field("module"), problem)
                })?
            }
        };
        let max_buffer_bytes = match &filter.max_buffer {
            None => 4 << 20,
            Some(size) if size.value.0 == 0 => {
                return Err(self.refuse(size.referenced, field("max_buffer"), "it has to be at least 1"));
            }
            Some(size) => usize::try_from(size.value.0).unwrap_or(usize::MAX),
        };
        let reload_backoff = match &filter.reload_backoff {
            Some(given) if filter.failure_policy != FailurePolicy::FailReload => {
                let problem = "it is of use only with failure_policy: fail_reload";
                return Err(self.refuse(given.referenced, field("reload_backoff"), problem));
            }
            Some(given) => given.value.0,
            None => RELOAD_BACKOFF,
        };
        Ok(FilterPlan {
            name: name.value.as_str().into(),
            code: FilterCode::Wasm(code.into()),
            plugin_configuration: self.plugin_configuration(index, filter)?,
            root_id: filter.root_id.clone().unwrap_or_else(|| name.value.clone()),
            vm: VmPlan {
                id: filter.vm_id.clone(),
                configuration: filter.vm_configuration.as_ref().map(as_given).unwrap_or_default(),
                environment: filter.environment.clone().into_iter().collect(),
            },
            vms: filter.vms.map_or(workers, usize::from),
            failure_policy: filter.failure_policy,
            reload_backoff,
            max_buffer_bytes,
            allow_on_headers_stop_iteration: filter.allow_on_headers_stop_iteration,
        })
    }

    fn plugin_configuration(&mut self, index: usize, filter: &Filter) -> Result<Vec<u8>, GatewayError> {
        let field = |name: &str| format!("filters[{index}].{name}");
        let bytes = match (&filter.configuration, &filter.configuration_file) {
            (Some(_), Some(file)) => {
                let problem = "give either configuration or configuration_file";
                return Err(self.refuse(file.referenced, field("configuration_file"), problem));
            }
            (Some(inline), None) => Some(as_given(inline)),
            (None, Some(file)) => Some(self.read(file, &field("configuration_file"))?),
            (None, None) => None,
        };
        let Some(baseline) = &filter.baseline else { return Ok(bytes.unwrap_or_default()) };
        let snapshot = self.read(baseline, &field("baseline"))?;
        let configuration: serde_json::Value = serde_json::from_slice(bytes.as_deref().unwrap_or(b"{}"))
            .ok()
            .filter(serde_json::Value::is_object)
            .ok_or_else(|| {
                let problem = "the plugin configuration is no JSON object, so it cannot take a baseline";
                self.refuse(baseline.referenced, field("baseline"), problem)
            })?;
        Ok(with_baseline(&configuration, Some(&snapshot)))
    }

    fn upstream(&mut self, name: &str, upstream: &Upstream) -> Result<UpstreamPlan, GatewayError> {
        let field = |part: &str| format!("upstreams.{name}.{part}");
        let place = upstream.uri.referenced;
        let uri: Uri = upstream
            .uri
            .value
            .parse()
            .map_err(|error| self.refuse(place, field("uri"), format!("it is no URI: {error}")))?;
        let ca_pem = match &upstream.ca {
            Some(path) => self.read(path, &field("ca"))?,
            None => Vec::new(),
        };
        let ca = upstream.ca.as_ref().map(|path| self.path(path));
        let plan = upstream_plan(name, &uri, upstream.http, ca.as_deref())
            .map_err(|problem| self.refuse(place, field("uri"), problem))?;
        Ok(UpstreamPlan {
            ca_pem,
            connect_timeout: self.positive(
                upstream.connect_timeout.as_ref(),
                &field("connect_timeout"),
                10,
            )?,
            timeout: self.positive(upstream.timeout.as_ref(), &field("timeout"), 300)?,
            idle_timeout: upstream.idle_timeout.map_or(plan.idle_timeout, |span| span.0),
            max_connections: upstream.max_connections.map_or(plan.max_connections, usize::from),
            ..plan
        })
    }

    fn route(
        &self,
        index: usize,
        route: &Route,
        filters: &[FilterPlan],
        upstreams: &[UpstreamPlan],
        limits: &Limits,
    ) -> Result<RoutePlan, GatewayError> {
        let field = |name: &str| format!("routes[{index}].{name}");
        let upstream = position(&route.upstream, upstreams.iter().map(|upstream| &*upstream.name)).map_err(
            |problem| {
                self.refuse(route.upstream.referenced, field("upstream"), format!("no upstream {problem}"))
            },
        )?;
        let chosen = match &route.filters {
            None => (0..filters.len()).collect(),
            Some(names) => names
                .iter()
                .enumerate()
                .map(|(at, name)| {
                    position(name, filters.iter().map(|filter| &*filter.name)).map_err(|problem| {
                        let field = format!("routes[{index}].filters[{at}]");
                        self.refuse(name.referenced, field, format!("no filter {problem}"))
                    })
                })
                .collect::<Result<_, _>>()?,
        };
        let rewrite_prefix = match &route.rewrite_prefix {
            Some(rewrite) if route.matches.path_prefix.is_none() => {
                let problem = "there is no match.path_prefix to replace";
                return Err(self.refuse(rewrite.referenced, field("rewrite_prefix"), problem));
            }
            Some(rewrite) => Some(self.path_start(rewrite, &field("rewrite_prefix"))?),
            None => None,
        };
        let default_timeout = upstreams.get(upstream).map_or(Duration::from_secs(300), |it| it.timeout);
        Ok(RoutePlan {
            name: route.name.clone().unwrap_or_else(|| (index + 1).to_string()).into(),
            matches: self.matches(index, &route.matches)?,
            upstream,
            filters: chosen,
            rewrite_prefix,
            host: route.host,
            timeout: match &route.timeout {
                None => default_timeout,
                timeout => self.positive(timeout.as_ref(), &field("timeout"), 300)?,
            },
            request_body_bytes: route.request_body.map_or(limits.request_body_bytes, |size| size.0),
            websocket: route.websocket,
            connect: route.connect,
        })
    }

    fn matches(&self, index: usize, matches: &Match) -> Result<Matches, GatewayError> {
        let field = |name: &str| format!("routes[{index}].match.{name}");
        let hosts = indexed(&matches.hosts)
            .map(|(at, host)| {
                HostPattern::parse(&host.value).ok_or_else(|| {
                    let problem = "write a host name without a port, or *.example.com";
                    self.refuse(host.referenced, field(&format!("hosts[{at}]")), problem)
                })
            })
            .collect::<Result<_, _>>()?;
        let methods = indexed(&matches.methods)
            .map(|(at, method)| {
                Method::from_bytes(method.value.as_bytes()).map_err(|_| {
                    let field = field(&format!("methods[{at}]"));
                    self.refuse(method.referenced, field, "it is no HTTP method")
                })
            })
            .collect::<Result<_, _>>()?;
        let headers = matches
            .headers
            .iter()
            .map(|(name, value)| {
                let refuse =
                    |problem| self.refuse(value.referenced, field(&format!("headers.{name}")), problem);
                let key = HeaderName::from_bytes(name.as_bytes())
                    .map_err(|_| refuse("it is no name of a header field"))?;
                let value = HeaderValue::from_str(&value.value)
                    .map_err(|_| refuse("it is no value of a header field"))?;
                Ok((key, value))
            })
            .collect::<Result<_, GatewayError>>()?;
        let path_prefix = match &matches.path_prefix {
            Some(prefix) => Some(self.path_start(prefix, &field("path_prefix"))?),
            None => None,
        };
        Ok(Matches { hosts, path_prefix, methods, headers })
    }

    fn path_start(&self, path: &Spanned<String>, field: &str) -> Result<String, GatewayError> {
        if path.value.starts_with('/') && !path.value.contains(['?', '#', ' ']) {
            return Ok(path.value.clone());
        }
        Err(self.refuse(path.referenced, field, "it has to be a path that starts with /"))
    }
}

/// Where `name` is among `names`; else what to say about it.
fn position<'n>(
    name: &Spanned<String>,
    names: impl Iterator<Item = &'n str> + Clone,
) -> Result<usize, String> {
    names.clone().position(|known| known == name.value).ok_or_else(|| {
        let known: Vec<&str> = names.collect();
        let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
        format!("is called {:?}; there are: {known}", name.value)
    })
}
