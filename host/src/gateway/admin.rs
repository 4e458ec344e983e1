//! The admin listener: `/metrics` (Prometheus text), `/healthz` (the process answers), `/readyz`
//! (an exchange that arrives now is served as configured; 503 while draining or without a filter).
//!
//! Bind it to an address that only operators reach: it asks for no credentials.

use std::sync::atomic::Ordering;

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::Incoming;

use super::Shared;

pub(super) fn answer(shared: &Shared, request: &Request<Incoming>) -> Response<Full<Bytes>> {
    if *request.method() != Method::GET && *request.method() != Method::HEAD {
        return text(StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD\n");
    }
    match request.uri().path() {
        "/healthz" => text(StatusCode::OK, "ok\n"),
        "/readyz" => {
            if shared.draining.load(Ordering::Acquire) {
                text(StatusCode::SERVICE_UNAVAILABLE, "draining\n")
            } else if shared.filters.as_ref().is_some_and(|filters| !filters.ready()) {
                text(StatusCode::SERVICE_UNAVAILABLE, "no filter VM is ready\n")
            } else {
                text(StatusCode::OK, "ready\n")
            }
        }
        "/metrics" => {
            let mut out = String::new();
            shared.counters.write(shared.access_log.dropped.value(), &mut out);
            if let Some(filters) = &shared.filters {
                filters.write_metrics(&mut out);
            }
            let mut response = Response::new(Full::from(out));
            let format = header::HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
            response.headers_mut().insert(header::CONTENT_TYPE, format);
            response
        }
        _ => text(StatusCode::NOT_FOUND, "try /metrics, /healthz or /readyz\n"),
    }
}

fn text(status: StatusCode, body: &'static str) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from(body));
    *response.status_mut() = status;
    let format = header::HeaderValue::from_static("text/plain; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, format);
    response
}
