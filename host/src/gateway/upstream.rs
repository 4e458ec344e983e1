//! The connection pool towards the upstream, and what its failures mean to a client.
//!
//! One pool for one upstream; requests stream, idle connections are kept for 30 s. Left out on
//! purpose: retries of requests that were sent (an LLM call is not idempotent), TLS, HTTP/2.

use std::error::Error as _;
use std::io;
use std::time::Duration;

use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::client::legacy::{Client, Error};
use hyper_util::rt::{TokioExecutor, TokioTimer};

use super::lane::Lane;

/// Shorter than common servers' keep-alive times, so that they seldom close a connection just as a
/// request is sent on it.
const IDLE_CONNECTION: Duration = Duration::from_secs(30);

pub(super) type UpstreamClient = Client<HttpConnector, Lane>;

pub(super) fn client(connect_timeout: Duration) -> UpstreamClient {
    let mut connector = HttpConnector::new();
    connector.set_nodelay(true);
    connector.set_connect_timeout(Some(connect_timeout));
    Client::builder(TokioExecutor::new())
        .pool_timer(TokioTimer::new())
        .pool_idle_timeout(IDLE_CONNECTION)
        .build(connector)
}

/// A failure as a status, a short code for programs and a sentence for people.
pub(super) fn explain(error: &Error) -> (u16, &'static str, String) {
    let mut cause = error.source();
    let mut text = error.to_string();
    let mut timed_out = false;
    while let Some(source) = cause {
        text = format!("{text}: {source}");
        timed_out |=
            source.downcast_ref::<io::Error>().is_some_and(|io| io.kind() == io::ErrorKind::TimedOut);
        cause = source.source();
    }
    if !error.is_connect() {
        return (
            502,
            "upstream_failed",
            format!("the upstream closed the connection or broke HTTP before it answered ({text})"),
        );
    }
    if timed_out {
        (
            504,
            "upstream_connect_timeout",
            format!("the upstream did not accept a connection in time ({text})"),
        )
    } else {
        (
            502,
            "upstream_unreachable",
            format!("the upstream does not accept connections; check that it is running ({text})"),
        )
    }
}
