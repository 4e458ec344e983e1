//! The proxy behind the host calls, as `driftlock-inspect` wants it.

use std::cell::OnceCell;
use std::rc::Rc;

use driftlock_inspect::baselines::{Call, Services};
use driftlock_inspect::host::{
    Direction, GAUGE_NAMES, Gauge, HISTOGRAM_NAMES, HeaderMap, Histogram, Host, HostError, Level,
    METRIC_NAMES, Metric, Reply,
};

use crate::hostcall::{self, BufferType, MapType, MetricType};

/// Ids of the metrics, by their enums; one that the host refused to define is absent.
pub(crate) struct MetricIds {
    counters: [Option<u32>; METRIC_NAMES.len()],
    histograms: [Option<u32>; HISTOGRAM_NAMES.len()],
    gauges: [Option<u32>; GAUGE_NAMES.len()],
}

impl Default for MetricIds {
    /// Before they are defined.
    fn default() -> Self {
        Self {
            counters: [None; METRIC_NAMES.len()],
            histograms: [None; HISTOGRAM_NAMES.len()],
            gauges: [None; GAUGE_NAMES.len()],
        }
    }
}

impl MetricIds {
    /// Defines all of them, once a configuration.
    pub(crate) fn define() -> Self {
        let define = |kind: MetricType, name: &str| hostcall::define_metric(kind, name).ok();
        Self {
            counters: METRIC_NAMES.map(|name| define(MetricType::Counter, name)),
            histograms: HISTOGRAM_NAMES.map(|name| define(MetricType::Histogram, name)),
            gauges: GAUGE_NAMES.map(|name| define(MetricType::Gauge, name)),
        }
    }
}

/// The proxy of one stream.
pub(crate) struct Proxy {
    metrics: Rc<MetricIds>,
    /// While a callback has a message's headers: they are read at once, by the first who asks for one.
    open: Option<Direction>,
    headers: OnceCell<Result<HeaderMap, HostError>>,
}

impl Proxy {
    pub(crate) fn new(metrics: Rc<MetricIds>) -> Self {
        Self { metrics, open: None, headers: OnceCell::new() }
    }

    /// A callback that has these headers begins, or one ends that had some.
    pub(crate) fn opens(&mut self, direction: Option<Direction>) {
        self.open = direction;
        self.headers.take();
    }
}

fn headers_of(direction: Direction) -> MapType {
    match direction {
        Direction::Request => MapType::RequestHeaders,
        Direction::Response => MapType::ResponseHeaders,
    }
}

impl Host for Proxy {
    fn header(&self, direction: Direction, name: &str) -> Result<Option<Vec<u8>>, HostError> {
        if self.open != Some(direction) {
            return hostcall::header(headers_of(direction), name);
        }
        let headers = self.headers.get_or_init(|| hostcall::headers(headers_of(direction)));
        let value = headers.as_ref().map_err(|error| *error)?.first(name);
        value.map(|value| value.map(<[u8]>::to_vec)).ok_or(hostcall::BAD_ARGUMENT)
    }

    fn set_header(&mut self, direction: Direction, name: &str, value: &str) -> Result<(), HostError> {
        self.opens(None);
        hostcall::set_header(headers_of(direction), name, value)
    }

    fn remove_header(&mut self, direction: Direction, name: &str) -> Result<(), HostError> {
        self.opens(None);
        hostcall::remove_header(headers_of(direction), name)
    }

    fn set_response_trailer(&mut self, name: &str, value: &str) -> Result<(), HostError> {
        let protocol = hostcall::property("request\0protocol");
        let protocol = protocol.ok().flatten();
        if protocol.is_some_and(|protocol| matches!(protocol.as_slice(), b"HTTP/2" | b"HTTP/3")) {
            hostcall::set_header(MapType::ResponseTrailers, name, value)
        } else {
            Ok(())
        }
    }

    fn set_body(&mut self, direction: Direction, bytes: &[u8]) -> Result<(), HostError> {
        let kind = match direction {
            Direction::Request => BufferType::RequestBody,
            Direction::Response => BufferType::ResponseBody,
        };
        hostcall::set_buffer(kind, bytes)
    }

    fn set_filter_state(&mut self, key: &str, value: &str) -> Result<(), HostError> {
        hostcall::set_property(key, value)
    }

    fn respond(&mut self, reply: &Reply) -> Result<(), HostError> {
        hostcall::send_local_response(reply.status, reply.details, &reply.headers, &reply.body)
    }

    fn now_ns(&self) -> Option<u64> {
        Some(hostcall::now_ns()).filter(|now| *now > 0)
    }

    fn count(&mut self, metric: Metric, by: u64) {
        let by = i64::try_from(by).unwrap_or(i64::MAX);
        if let Some(id) = self.metrics.counters.get(metric as usize).copied().flatten() {
            // Nothing is left to report a refused increment to.
            let _ = hostcall::increment(id, by);
        }
    }

    fn record(&mut self, histogram: Histogram, value: u64) {
        if let Some(id) = self.metrics.histograms.get(histogram as usize).copied().flatten() {
            let _ = hostcall::record(id, value);
        }
    }

    fn gauge(&mut self, gauge: Gauge, value: u64) {
        if let Some(id) = self.metrics.gauges.get(gauge as usize).copied().flatten() {
            let _ = hostcall::record(id, value);
        }
    }

    fn log(&mut self, level: Level, line: &str) {
        let level = match level {
            Level::Info => 2,
            Level::Warn => 3,
            Level::Error => 4,
        };
        hostcall::log(level, line);
    }
}

impl Services for Proxy {
    fn shared(&self, key: &str) -> Result<Option<(Vec<u8>, u32)>, HostError> {
        hostcall::shared(key)
    }

    fn set_shared(&mut self, key: &str, value: &[u8], cas: u32) -> Result<(), HostError> {
        hostcall::set_shared(key, value, cas)
    }

    fn call(&mut self, call: Call<'_>) -> Result<u32, HostError> {
        hostcall::call(&call)
    }

    fn count(&mut self, metric: Metric, by: u64) {
        Host::count(self, metric, by);
    }

    fn log(&mut self, level: Level, line: &str) {
        Host::log(self, level, line);
    }
}
