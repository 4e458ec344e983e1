//! The admin listener: `/metrics` (Prometheus text), `/healthz` (the process answers), `/readyz`
//! (an exchange that arrives now is served as configured; 503 while draining or without a filter).
//!
//! Bind it to an address that only operators reach: it asks for no credentials.

use std::convert::Infallible;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;
use tokio::task::JoinSet;

use super::Shared;
use super::metrics::{header as describe, label, sample};

const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
const CONNECTIONS: usize = 256;

/// Answers until it is dropped.
pub(super) async fn serve(listener: TcpListener, shared: Arc<Shared>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept(), if connections.len() < CONNECTIONS => match accepted {
                Ok((stream, _)) => {
                    let shared = Arc::clone(&shared);
                    connections.spawn(async move {
                        let service = service_fn(|request| {
                            let response = answer(&shared, &request);
                            async move { Ok::<_, Infallible>(response) }
                        });
                        let connection = http1::Builder::new()
                            .timer(TokioTimer::new())
                            .header_read_timeout(HEADER_TIMEOUT)
                            .serve_connection(TokioIo::new(stream), service);
                        if let Err(error) = pin!(connection).await {
                            tracing::debug!(target: "driftlock::gateway", %error, "admin connection ended early");
                        }
                    });
                }
                Err(error) => {
                    tracing::warn!(target: "driftlock::gateway", %error, "accept failed");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            },
            Some(_) = connections.join_next(), if !connections.is_empty() => {}
        }
    }
}

fn answer(shared: &Shared, request: &Request<Incoming>) -> Response<Full<Bytes>> {
    if *request.method() != Method::GET && *request.method() != Method::HEAD {
        return text(StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD\n".to_owned());
    }
    match request.uri().path() {
        "/healthz" => text(StatusCode::OK, "ok\n".to_owned()),
        "/readyz" => match not_ready(shared) {
            Some(reason) => text(StatusCode::SERVICE_UNAVAILABLE, format!("{reason}\n")),
            None => text(StatusCode::OK, "ready\n".to_owned()),
        },
        "/metrics" => {
            let mut response = Response::new(Full::from(metrics(shared)));
            let format = header::HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
            response.headers_mut().insert(header::CONTENT_TYPE, format);
            response
        }
        _ => text(StatusCode::NOT_FOUND, "try /metrics, /healthz or /readyz\n".to_owned()),
    }
}

fn not_ready(shared: &Shared) -> Option<String> {
    if shared.draining.load(Ordering::Acquire) {
        return Some("draining".to_owned());
    }
    let generation = shared.generation();
    let waiting = generation.filters.iter().find(|filter| !filter.factory.ready())?;
    Some(format!("no VM of the filter {} is ready", waiting.name))
}

fn metrics(shared: &Shared) -> String {
    let generation = shared.generation();
    let mut out = String::new();
    shared.counters.write(shared.access_log.dropped.value(), &mut out);
    let name = "driftlock_gateway_configuration_generation";
    describe(&mut out, name, "gauge", "Number of the configuration in use; 1 is the one of the start.");
    sample(&mut out, name, generation.number);
    for (suffix, kind, help) in [
        ("requests_total", "counter", "Requests to an upstream, those of filters included."),
        ("failures_total", "counter", "Requests that an upstream did not answer."),
        ("repeated_total", "counter", "Idempotent requests sent again after a used connection broke."),
        ("connections_total", "counter", "Connections made to an upstream."),
        ("connections", "gauge", "Connections to an upstream that are open."),
    ] {
        let name = format!("driftlock_gateway_upstream_{suffix}");
        describe(&mut out, &name, kind, help);
        for upstream in &generation.upstreams {
            let counters = &upstream.counters;
            let counter = match suffix {
                "requests_total" => &counters.requests,
                "failures_total" => &counters.failures,
                "repeated_total" => &counters.repeated,
                "connections_total" => &counters.connections,
                _ => &counters.open,
            };
            let series = format!("{name}{{upstream=\"{}\"}}", label(&upstream.plan.name));
            sample(&mut out, &series, counter.value());
        }
    }
    let name = "driftlock_gateway_filter_vms_ready";
    describe(&mut out, name, "gauge", "VMs of a filter that take exchanges.");
    for filter in &generation.filters {
        let series = format!("{name}{{filter=\"{}\"}}", label(&filter.name));
        sample(&mut out, &series, filter.factory.vms_ready());
    }
    shared.process.write_metrics(&mut out);
    out
}

fn text(status: StatusCode, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from(body));
    *response.status_mut() = status;
    let format = header::HeaderValue::from_static("text/plain; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, format);
    response
}
