//! A plan made to run: routes with their upstreams' connections and their filters' VMs.
//!
//! A reload builds a new generation beside the old one and swaps the two; an exchange keeps the route
//! it began with, so none is dropped. What did not change is carried over: upstreams with their
//! connections, filters with their VMs and all they have learned, compiled code. A generation that
//! cannot be built leaves the old one in place.
//!
//! Cost of a lookup: a read lock and a scan of the routes.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use http::{HeaderMap, Method};
use sha2::{Digest, Sha256};

use super::error::GatewayError;
use super::filter::{FilterFactory, RouteInfo};
use super::options::FailurePolicy;
use super::plan::{FilterCode, FilterPlan, Limits, Plan, RoutePlan};
use super::upstream::Upstream;
use super::wasm::{Process, WasmFilters};
use crate::abi::Module;

/// The times and limits an exchange goes by.
#[derive(Debug, Clone, Copy)]
pub(super) struct Terms {
    pub(super) client_timeout: Duration,
    pub(super) upstream_timeout: Duration,
    pub(super) tunnel_idle_timeout: Duration,
    pub(super) request_body_bytes: u64,
    pub(super) response_body_bytes: u64,
}

/// One route, ready to take requests.
pub(super) struct Route {
    pub(super) plan: RoutePlan,
    /// What filters are told of it.
    pub(super) info: RouteInfo,
    pub(super) upstream: Arc<Upstream>,
    pub(super) filters: Vec<Arc<Filter>>,
    pub(super) terms: Terms,
}

/// One filter, running.
pub(super) struct Filter {
    pub(super) name: Arc<str>,
    pub(super) failure_policy: FailurePolicy,
    pub(super) factory: Arc<dyn FilterFactory>,
    identity: Identity,
}

/// What a running filter was made of.
enum Identity {
    Wasm { code: [u8; 32], settings: [u8; 32], module: Module },
    Native,
}

/// See the module's text.
pub(super) struct Generation {
    /// From 1; a reload adds one.
    pub(super) number: u64,
    routes: Vec<Arc<Route>>,
    pub(super) upstreams: Vec<Arc<Upstream>>,
    pub(super) filters: Vec<Arc<Filter>>,
    pub(super) limits: Limits,
    /// For requests that no route takes.
    pub(super) terms: Terms,
}

impl Generation {
    /// Starts what `plan` needs and `previous` does not have. Inside a tokio runtime.
    pub(super) async fn build(
        plan: Plan,
        previous: Option<&Self>,
        process: &Arc<Process>,
    ) -> Result<Self, GatewayError> {
        let mut filters: Vec<Arc<Filter>> = Vec::with_capacity(plan.filters.len());
        let names: Vec<Arc<str>> = plan.upstreams.iter().map(|upstream| Arc::clone(&upstream.name)).collect();
        let cache = plan.module_cache.as_deref();
        for filter in plan.filters {
            let running = previous.iter().flat_map(|previous| &previous.filters).chain(&filters);
            let filter = start_filter(filter, running, &names, cache, process).await?;
            filters.push(filter);
        }
        let upstreams: Vec<Arc<Upstream>> = plan
            .upstreams
            .into_iter()
            .map(|upstream| {
                let kept = previous.and_then(|previous| {
                    previous.upstreams.iter().find(|it| it.plan.same_connections(&upstream))
                });
                kept.map_or_else(|| Upstream::new(upstream), Arc::clone)
            })
            .collect();
        let terms = Terms {
            client_timeout: plan.client_timeout,
            upstream_timeout: plan.client_timeout,
            tunnel_idle_timeout: plan.tunnel_idle_timeout,
            request_body_bytes: plan.limits.request_body_bytes,
            response_body_bytes: plan.limits.response_body_bytes,
        };
        let routes = plan
            .routes
            .into_iter()
            .map(|route| {
                let upstream = Arc::clone(&upstreams[route.upstream]);
                Arc::new(Route {
                    info: RouteInfo {
                        name: Arc::clone(&route.name),
                        upstream: Arc::clone(&upstream.plan.name),
                    },
                    upstream,
                    filters: route.filters.iter().map(|at| Arc::clone(&filters[*at])).collect(),
                    terms: Terms {
                        upstream_timeout: route.timeout,
                        request_body_bytes: route.request_body_bytes,
                        ..terms
                    },
                    plan: route,
                })
            })
            .collect();
        let number = previous.map_or(1, |previous| previous.number + 1);
        Ok(Self { number, routes, upstreams, filters, limits: plan.limits, terms })
    }

    /// The first route that takes a request.
    pub(super) fn route(
        &self,
        method: &Method,
        authority: &str,
        path: &str,
        headers: &HeaderMap,
    ) -> Option<&Arc<Route>> {
        self.routes.iter().find(|route| route.plan.matches.hold(method, authority, path, headers))
    }
}

/// A filter as planned: one that runs already, or a new one.
async fn start_filter<'f>(
    plan: FilterPlan,
    running: impl Iterator<Item = &'f Arc<Filter>> + Clone,
    upstreams: &[Arc<str>],
    cache: Option<&Path>,
    process: &Arc<Process>,
) -> Result<Arc<Filter>, GatewayError> {
    let (name, failure_policy) = (Arc::clone(&plan.name), plan.failure_policy);
    let bytes = match &plan.code {
        FilterCode::Wasm(bytes) => Arc::clone(bytes),
        FilterCode::Native(factory) => {
            let factory = Arc::clone(factory);
            return Ok(Arc::new(Filter { name, failure_policy, factory, identity: Identity::Native }));
        }
    };
    let code: [u8; 32] = Sha256::digest(&bytes).into();
    let settings = settings_digest(&plan, upstreams);
    let mut compiled = None;
    for filter in running {
        let Identity::Wasm { code: its_code, settings: its_settings, module } = &filter.identity else {
            continue;
        };
        if *its_code == code {
            if *its_settings == settings {
                if filter.failure_policy == failure_policy {
                    return Ok(Arc::clone(filter));
                }
                let identity = Identity::Wasm { code, settings, module: module.clone() };
                let factory = Arc::clone(&filter.factory);
                return Ok(Arc::new(Filter { name, failure_policy, factory, identity }));
            }
            compiled = Some(module.clone());
        }
    }
    let module = match compiled {
        Some(module) => module,
        None => WasmFilters::compile(&name, bytes, cache).await?,
    };
    let factory = WasmFilters::start(&plan, module.clone(), upstreams, process).await?;
    let identity = Identity::Wasm { code, settings, module };
    Ok(Arc::new(Filter { name, failure_policy, factory: Arc::new(factory), identity }))
}

/// All that a running VM was told, besides its code.
fn settings_digest(plan: &FilterPlan, upstreams: &[Arc<str>]) -> [u8; 32] {
    let mut digest = Sha256::new();
    let mut add = |bytes: &[u8]| {
        digest.update((bytes.len() as u64).to_le_bytes());
        digest.update(bytes);
    };
    add(plan.name.as_bytes());
    add(&plan.plugin_configuration);
    add(plan.root_id.as_bytes());
    add(plan.vm.id.as_bytes());
    add(&plan.vm.configuration);
    for (name, value) in &plan.vm.environment {
        add(name.as_bytes());
        add(value.as_bytes());
    }
    // Where the variables end.
    add(&[]);
    add(&plan.vms.to_le_bytes());
    add(&plan.max_buffer_bytes.to_le_bytes());
    add(&[u8::from(plan.allow_on_headers_stop_iteration)]);
    // What becomes of exchanges is the chain's business; when a VM comes back is its own.
    let reload = (plan.failure_policy == FailurePolicy::FailReload).then_some(plan.reload_backoff);
    add(format!("{reload:?}").as_bytes());
    for upstream in upstreams {
        add(upstream.as_bytes());
    }
    digest.finalize().into()
}
