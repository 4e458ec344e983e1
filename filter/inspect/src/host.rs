//! What the inspection needs of the proxy: a small trait, so that the logic runs without one.
//!
//! What: [`Host`] is implemented by the filter over proxy-wasm host calls and by the replay in memory.
//! Every call that can fail returns a [`HostError`]; the session counts it and goes on.
//!
//! Left out on purpose: body bytes, which the caller hands over.

use alloc::vec::Vec;

use driftlock_engine::evidence::Verdict;

pub use crate::metrics::{GAUGE_NAMES, Gauge, HISTOGRAM_NAMES, Histogram, METRIC_NAMES, Metric};
pub use crate::refusal::Reply;

/// Which message of an exchange.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the client.
    Request,
    /// From the upstream.
    Response,
}

impl Direction {
    /// The name in stream keys, logs and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Request => "request",
            Self::Response => "response",
        }
    }
}

/// A host call was refused, with proxy-wasm's status where there is one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the proxy refused the call with status {0}")]
pub struct HostError(pub u32);

/// Whether the byte may stand in a token, such as a header's name (RFC 9110 section 5.6.2).
pub(crate) fn is_tchar(byte: u8) -> bool {
    matches!(byte, b'!' | b'#'..=b'\'' | b'*' | b'+' | b'-' | b'.' | b'0'..=b'9' | b'A'..=b'Z' | b'^'..=b'z' | b'|' | b'~')
}

/// The headers of a message as proxy-wasm serialises them: u32 count, then for each u32 size of name and value, then
/// each name and value with a NUL behind it, all numbers little-endian (ABI 0.2.1, `proxy_get_header_map_pairs`).
#[derive(Clone, Debug)]
pub struct HeaderMap(Vec<u8>);

impl HeaderMap {
    /// Of what a host handed over. It is read when it is asked for something.
    pub fn new(serialised: Vec<u8>) -> Self {
        Self(serialised)
    }

    /// The first value of that name, whatever its case, or that there is none; nothing if this is no map as far as
    /// it was read.
    pub fn first(&self, name: &str) -> Option<Option<&[u8]>> {
        let number = |at: usize| -> Option<usize> {
            let bytes = self.0.get(at..at.checked_add(4)?)?.try_into().ok()?;
            usize::try_from(u32::from_le_bytes(bytes)).ok()
        };
        let count = number(0)?;
        let mut at = count.checked_mul(8)?.checked_add(4)?;
        for pair in 0..count {
            let (name_size, value_size) = (number(4 + pair * 8)?, number(8 + pair * 8)?);
            let name_end = at.checked_add(name_size)?;
            let value_at = name_end.checked_add(1)?;
            let value_end = value_at.checked_add(value_size)?;
            let found = self.0.get(at..name_end)?.eq_ignore_ascii_case(name.as_bytes());
            let value = self.0.get(value_at..value_end)?;
            if found {
                return Some(Some(value));
            }
            at = value_end.checked_add(1)?;
        }
        Some(None)
    }
}

/// Severity of a log line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// For the record.
    Info,
    /// A person should look.
    Warn,
    /// The filter cannot do its work.
    Error,
}

/// The proxy, as one exchange sees it.
pub trait Host {
    /// First value of a header of the message, `None` if it has none. Pseudo-headers count as headers.
    ///
    /// # Errors
    /// [`HostError`] if the proxy cannot tell.
    fn header(&self, direction: Direction, name: &str) -> Result<Option<Vec<u8>>, HostError>;

    /// Sets a header of the message, while its headers are open.
    ///
    /// # Errors
    /// [`HostError`] if they are not.
    fn set_header(&mut self, direction: Direction, name: &str, value: &str) -> Result<(), HostError>;

    /// Removes a header of the message, while its headers are open; one that is not there is no error.
    ///
    /// # Errors
    /// [`HostError`] if they are not.
    fn remove_header(&mut self, direction: Direction, name: &str) -> Result<(), HostError>;

    /// Sets a trailer of the response, in its last callback, where the client's protocol has trailers.
    /// One that has none is no error.
    ///
    /// # Errors
    /// [`HostError`] if the proxy refuses.
    fn set_response_trailer(&mut self, name: &str, value: &str) -> Result<(), HostError>;

    /// Puts `bytes` in the place of all that the proxy has of the message's body in this callback: the
    /// bytes just handed over and those that it holds.
    ///
    /// # Errors
    /// [`HostError`] if the proxy refuses; it then has what it had.
    fn set_body(&mut self, direction: Direction, bytes: &[u8]) -> Result<(), HostError>;

    /// Sets filter state `wasm.<key>` for the access log.
    ///
    /// # Errors
    /// [`HostError`] if the proxy has none.
    fn set_filter_state(&mut self, key: &str, value: &str) -> Result<(), HostError>;

    /// Answers in the upstream's place. Once response headers have gone, it breaks the response off.
    ///
    /// # Errors
    /// [`HostError`] if it is too late.
    fn respond(&mut self, reply: &Reply) -> Result<(), HostError>;

    /// The proxy's clock, for metrics and for nothing else: no verdict and no action may depend on it.
    /// None where there is no time, as in a replay.
    fn now_ns(&self) -> Option<u64>;

    /// Adds to a counter.
    fn count(&mut self, metric: Metric, by: u64);

    /// Adds a value to a histogram.
    fn record(&mut self, histogram: Histogram, value: u64);

    /// Sets a gauge.
    fn gauge(&mut self, gauge: Gauge, value: u64);

    /// Writes a log line.
    fn log(&mut self, level: Level, line: &str);

    /// A message was judged. For hosts that want more of the verdict than its JSON, such as its sentences.
    fn judged(&mut self, direction: Direction, verdict: &Verdict) {
        let _ = (direction, verdict);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::String;
    use proptest::prelude::*;

    #[test]
    fn a_token_is_made_of_what_the_rfc_lists() {
        for byte in 0..=u8::MAX {
            let listed = byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
            assert_eq!(is_tchar(byte), listed, "{byte}");
        }
    }

    /// As the ABI says.
    fn serialised(pairs: &[(String, Vec<u8>)]) -> Vec<u8> {
        let mut out = (pairs.len() as u32).to_le_bytes().to_vec();
        for (name, value) in pairs {
            out.extend((name.len() as u32).to_le_bytes());
            out.extend((value.len() as u32).to_le_bytes());
        }
        for (name, value) in pairs {
            out.extend(name.bytes().chain([0]));
            out.extend(value.iter().copied().chain([0]));
        }
        out
    }

    proptest! {
        #[test]
        fn the_first_value_of_a_name_is_found(
            pairs in prop::collection::vec(("[a-cA-C:-]{0,3}", prop::collection::vec(any::<u8>(), 0..5)), 0..8),
            name in "[a-c:-]{0,3}",
        ) {
            let map = HeaderMap::new(serialised(&pairs));
            let first = pairs.iter().find(|(of, _)| of.eq_ignore_ascii_case(&name));
            prop_assert_eq!(map.first(&name), Some(first.map(|(_, value)| value.as_slice())));
        }

        #[test]
        fn what_is_no_map_is_said_to_be_none(
            pairs in prop::collection::vec(("[a-c]{1,3}", prop::collection::vec(any::<u8>(), 0..5)), 1..8),
            cut in any::<prop::sample::Index>(), noise in prop::collection::vec(any::<u8>(), 0..64),
        ) {
            let mut bytes = serialised(&pairs);
            // But for the last NUL, which nothing needs.
            bytes.truncate(cut.index(bytes.len() - 1));
            prop_assert!(HeaderMap::new(bytes).first("x-other").is_none());
            let _ = HeaderMap::new(noise).first("x-other");
        }

        #[test]
        fn sizes_that_lie_are_no_map(count in any::<u32>(), sizes in any::<[u32; 2]>()) {
            prop_assume!(count > 0);
            let bytes = [count, sizes[0], sizes[1]].map(u32::to_le_bytes).concat();
            prop_assert!(HeaderMap::new(bytes).first("a").is_none());
        }
    }
}
