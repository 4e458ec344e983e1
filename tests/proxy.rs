//! A real proxy with the filter in it, between a raw client and a planned upstream.
//!
//! [`Proxy`] is an Envoy or the gateway of this project; a test asks both the same. Verdicts are read from
//! the access log, where an operator finds them. Cost: an Envoy about half a second to start, the gateway
//! the module's compilation.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use driftlock_host::capture::{HttpRequest, HttpResponse};
use driftlock_host::envoy::{Envoy, EnvoyError, EnvoyOptions};
use driftlock_host::gateway::{AccessLogTarget, AccessRecord, FilterSource, Gateway, GatewayOptions};
use driftlock_host::replay::telling_all;
use driftlock_host::replay::upstream::{Delivery, Upstream};
use driftlock_host::replay::wire::REPLAY_ID_HEADER;
use driftlock_inspect::host::METRIC_NAMES;
use serde_json::Value;

use crate::wire::{Answer, abandon, ask, ask_http2};

const LOG_PATIENCE: Duration = Duration::from_secs(15);

/// A proxy under test.
pub struct Proxy {
    /// What is behind it.
    pub upstream: Upstream,
    /// Which proxy.
    pub kind: Kind,
    /// The client speaks HTTP/2.
    pub http2: bool,
}

/// Which proxy.
pub enum Kind {
    /// A real Envoy.
    Envoy(Envoy),
    /// The gateway in this process, with its access log.
    Gateway(Gateway, Mutex<Receiver<AccessRecord>>),
}

/// What became of one exchange.
#[derive(Clone, Debug)]
pub struct Observed {
    /// What the client got.
    pub answer: Answer,
    /// What the upstream got, if it got a whole request.
    pub received: Option<HttpRequest>,
    /// Filter state `driftlock.request`, from the access log.
    pub request: Option<String>,
    /// Filter state `driftlock.response`.
    pub response: Option<String>,
    /// Filter state `driftlock.outcome`.
    pub outcome: Option<String>,
}

/// Starts an Envoy with the filter, off the async threads.
///
/// # Errors
/// Those of [`Envoy::start`].
pub async fn start_envoy(configuration: &[u8], upstream: SocketAddr) -> Result<Envoy, EnvoyError> {
    let mut options = EnvoyOptions::new(crate::envoy_binary(), crate::filter(), upstream);
    options.plugin_configuration = telling_all(configuration.to_vec());
    tokio::task::spawn_blocking(move || Envoy::start(&options)).await.expect("no panic")
}

/// Starts a gateway with the filter and one VM, so that learning sees all traffic.
///
/// # Panics
/// If it does not start.
pub async fn start_gateway(configuration: &[u8], upstream: SocketAddr) -> (Gateway, Receiver<AccessRecord>) {
    let (records, log) = channel();
    let uri = format!("http://{upstream}").parse().expect("a URI");
    let mut options = GatewayOptions::new(uri, FilterSource::WasmFile(crate::filter()));
    options.plugin_configuration = telling_all(configuration.to_vec());
    options.workers = 1;
    options.admin = Some(SocketAddr::from(([127, 0, 0, 1], 0)));
    options.access_log = AccessLogTarget::Channel(records);
    (Gateway::start(options).await.unwrap_or_else(|error| panic!("{error}")), log)
}

impl Proxy {
    /// An Envoy.
    ///
    /// # Panics
    /// If it does not start.
    pub async fn envoy(configuration: &[u8]) -> Self {
        Self::envoy_with(configuration, |_| {}).await
    }

    /// An Envoy that speaks HTTP/2 to the client and to the upstream.
    ///
    /// # Panics
    /// If it does not start.
    pub async fn envoy_http2(configuration: &[u8], set: impl FnOnce(&mut EnvoyOptions)) -> Self {
        let proxy = Self::envoy_with(configuration, |options| {
            options.upstream_http2 = true;
            set(options);
        })
        .await;
        Self { http2: true, ..proxy }
    }

    /// An Envoy with further options.
    ///
    /// # Panics
    /// If it does not start.
    pub async fn envoy_with(configuration: &[u8], set: impl FnOnce(&mut EnvoyOptions)) -> Self {
        let upstream = Upstream::start().await.expect("an upstream");
        let mut options = EnvoyOptions::new(crate::envoy_binary(), crate::filter(), upstream.address());
        options.plugin_configuration = telling_all(configuration.to_vec());
        set(&mut options);
        let envoy = tokio::task::spawn_blocking(move || Envoy::start(&options)).await.expect("no panic");
        let envoy = envoy.unwrap_or_else(|error| panic!("{error}"));
        Self { upstream, kind: Kind::Envoy(envoy), http2: false }
    }

    /// A gateway.
    ///
    /// # Panics
    /// If it does not start.
    pub async fn gateway(configuration: &[u8]) -> Self {
        let upstream = Upstream::start().await.expect("an upstream");
        let (gateway, log) = start_gateway(configuration, upstream.address()).await;
        Self { upstream, kind: Kind::Gateway(gateway, Mutex::new(log)), http2: false }
    }

    /// `envoy` or `gateway`, for messages.
    pub fn name(&self) -> &'static str {
        match self.kind {
            Kind::Envoy(_) => "envoy",
            Kind::Gateway(..) => "gateway",
        }
    }

    /// Where it listens.
    pub fn listen(&self) -> SocketAddr {
        match &self.kind {
            Kind::Envoy(envoy) => envoy.listen(),
            Kind::Gateway(gateway, _) => gateway.addr,
        }
    }

    /// Passes one exchange, framing as given by `delivery`; the client leaves after so many bytes of the
    /// answer's body, if told to.
    ///
    /// # Panics
    /// If the access log has no line for it after 15 s.
    pub async fn pass(
        &self,
        request: &HttpRequest,
        response: &HttpResponse,
        delivery: Delivery,
        leave_after_bytes: Option<usize>,
    ) -> Observed {
        let number = self.upstream.plan(response, delivery).expect("an answer that can be sent");
        let answer = if self.http2 {
            let number = number.to_string();
            ask_http2(self.listen(), request, &[(REPLAY_ID_HEADER, &number)], leave_after_bytes).await
        } else {
            ask(self.listen(), encoded(request, number), leave_after_bytes).await
        };
        self.observed(number, answer).await
    }

    /// A client that sends the request's head and so many bytes of its body, and leaves.
    ///
    /// # Panics
    /// As [`Proxy::pass`].
    pub async fn abandon(
        &self,
        request: &HttpRequest,
        response: &HttpResponse,
        body_bytes: usize,
    ) -> Observed {
        let number = self.upstream.plan(response, Delivery::default()).expect("an answer that can be sent");
        let mut bytes = encoded(request, number);
        bytes.truncate(bytes.len() - request.body.len() + body_bytes);
        abandon(self.listen(), &bytes).await;
        self.observed(number, Answer::default()).await
    }

    async fn observed(&self, number: u64, answer: Answer) -> Observed {
        let state = self.logged(number).await;
        let received = self.upstream.take(number);
        let of = |name: &str| state.get(name).cloned();
        Observed {
            answer,
            received,
            request: of("request"),
            response: of("response"),
            outcome: of("outcome"),
        }
    }

    /// The filter state that the access log has for an exchange.
    async fn logged(&self, number: u64) -> BTreeMap<String, String> {
        let started = Instant::now();
        loop {
            let found = match &self.kind {
                Kind::Envoy(envoy) => envoy_line(envoy, number),
                Kind::Gateway(_, log) => log.lock().expect("no panic").try_recv().ok().map(|record| {
                    let text = |value: &[u8]| String::from_utf8(value.to_vec()).expect("UTF-8");
                    let state = record.filter_state.iter();
                    state
                        .filter_map(|(key, value)| {
                            Some((key.strip_prefix("wasm.driftlock.")?.to_owned(), text(value)))
                        })
                        .collect()
                }),
            };
            if let Some(found) = found {
                return found;
            }
            assert!(started.elapsed() < LOG_PATIENCE, "{}: exchange {number} is not logged", self.name());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// The filter's counters by the names it gave them, those at zero included where the proxy tells.
    ///
    /// # Panics
    /// If the proxy does not answer.
    pub async fn counters(&self) -> BTreeMap<String, u64> {
        match &self.kind {
            Kind::Envoy(envoy) => {
                let stats = tokio::task::block_in_place(|| envoy.stats()).expect("stats");
                let counter = |(name, value): (String, u64)| {
                    let name = name.strip_prefix("wasmcustom.")?;
                    // Not the gauges.
                    METRIC_NAMES.contains(&name).then(|| (name.to_owned(), value))
                };
                stats.into_iter().filter_map(counter).collect()
            }
            Kind::Gateway(gateway, _) => {
                let admin = gateway.admin_addr.expect("an admin address");
                let request = b"GET /metrics HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n".to_vec();
                let page = ask(admin, request, None).await.text();
                METRIC_NAMES
                    .iter()
                    .filter_map(|name| {
                        let exported = format!("{} ", name.replace('.', "_"));
                        let value = page.lines().find_map(|line| line.strip_prefix(&exported))?;
                        Some(((*name).to_owned(), value.parse().expect("a number")))
                    })
                    .collect()
            }
        }
    }
}

fn envoy_line(envoy: &Envoy, number: u64) -> Option<BTreeMap<String, String>> {
    let log = std::fs::read_to_string(envoy.access_log()).unwrap_or_default();
    let wanted = number.to_string();
    let line = log
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .find(|line| line["replay_id"].as_str() == Some(&wanted))?;
    let state = line["driftlock"].as_object()?.iter();
    Some(state.filter_map(|(name, value)| Some((name.clone(), value.as_str()?.to_owned()))).collect())
}

/// The request as bytes, with its length and the number that asks for the planned answer.
pub fn encoded(request: &HttpRequest, number: u64) -> Vec<u8> {
    let mut bytes = format!(
        "{} {} HTTP/1.1\r\nhost: h\r\n{REPLAY_ID_HEADER}: {number}\r\n",
        request.method, request.target
    );
    for (name, value) in request.headers.iter().filter(|(name, _)| !name.eq_ignore_ascii_case("host")) {
        bytes.push_str(&format!("{name}: {value}\r\n"));
    }
    if !request.body.is_empty() || request.method == "POST" {
        bytes.push_str(&format!("content-length: {}\r\n", request.body.len()));
    }
    bytes.push_str("\r\n");
    let mut bytes = bytes.into_bytes();
    bytes.extend_from_slice(&request.body);
    bytes
}
