//! Header maps as proxy-wasm sees them: ordered, repeated names allowed, pseudo-headers included.
//!
//! Names are kept in lower case, as Envoy keeps them; values are bytes, untouched. Lookups are
//! linear: a message has tens of headers, and a scan of a small vector beats hashing each name.
//! As in Envoy, a value of some well-known names joins the one that is there with a comma, so that a
//! guest sees the whole list where it asks for the first value; other names keep an entry each.

use super::status::Status;

/// Largest serialised header map accepted from a guest, in bytes (the C++ host's limit).
pub const PAIRS_MAX_BYTES: usize = 1024 * 1024;
/// Most pairs accepted from a guest (the C++ host's limit).
pub const PAIRS_MAX_COUNT: usize = 1024;

/// Names of a request (or of trailers) whose values Envoy 1.40 joins, as it was seen to; sorted.
const JOINED_IN_REQUESTS: [&str; 28] = [
    "accept",
    "accept-encoding",
    "access-control-request-headers",
    "access-control-request-method",
    "authorization",
    "cache-control",
    "content-encoding",
    "content-type",
    "grpc-accept-encoding",
    "grpc-timeout",
    "if-match",
    "if-modified-since",
    "if-none-match",
    "if-range",
    "if-unmodified-since",
    "origin",
    "pragma",
    "referer",
    "te",
    "user-agent",
    "via",
    "x-client-trace-id",
    "x-forwarded-client-cert",
    "x-forwarded-for",
    "x-forwarded-host",
    "x-forwarded-port",
    "x-forwarded-proto",
    "x-request-id",
];

/// The same of a response.
const JOINED_IN_RESPONSES: [&str; 21] = [
    "access-control-allow-credentials",
    "access-control-allow-headers",
    "access-control-allow-methods",
    "access-control-allow-origin",
    "access-control-expose-headers",
    "access-control-max-age",
    "age",
    "cache-control",
    "content-encoding",
    "content-type",
    "etag",
    "expires",
    "grpc-message",
    "grpc-status",
    "last-modified",
    "location",
    "proxy-status",
    "server",
    "vary",
    "via",
    "x-request-id",
];

/// An ordered multimap of header names and values.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HeaderMap {
    pairs: Vec<(Vec<u8>, Vec<u8>)>,
}

impl HeaderMap {
    /// An empty map.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// An empty map with room for `count` entries.
    #[must_use]
    pub fn with_capacity(count: usize) -> Self {
        Self { pairs: Vec::with_capacity(count) }
    }

    /// How many entries there are (repeated names count each time).
    #[must_use]
    pub fn len(&self) -> usize {
        self.pairs.len()
    }

    /// Whether there is no entry.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.pairs.is_empty()
    }

    /// The entries in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&[u8], &[u8])> + Clone {
        self.pairs.iter().map(|(name, value)| (name.as_slice(), value.as_slice()))
    }

    /// The first value under `name`, whatever the case of `name`.
    #[must_use]
    pub fn first(&self, name: &[u8]) -> Option<&[u8]> {
        self.pairs.iter().find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_slice())
    }

    /// All values under `name`, joined with a comma when there are several (RFC 9110, 5.3).
    #[must_use]
    pub fn joined(&self, name: &[u8]) -> Option<Vec<u8>> {
        let mut out: Option<Vec<u8>> = None;
        for (n, value) in &self.pairs {
            if n.eq_ignore_ascii_case(name) {
                match &mut out {
                    None => out = Some(value.clone()),
                    Some(all) => {
                        all.push(b',');
                        all.extend_from_slice(value);
                    }
                }
            }
        }
        out
    }

    /// Appends an entry, or joins the one that is there if the name is one whose values are joined; the
    /// name is put in lower case.
    pub fn add(&mut self, name: &[u8], value: &[u8]) {
        let name = name.to_ascii_lowercase();
        if self.joins(&name)
            && let Some((_, joined)) = self.pairs.iter_mut().find(|(n, _)| *n == name)
        {
            joined.push(b',');
            joined.extend_from_slice(value);
            return;
        }
        self.pairs.push((name, value.to_vec()));
    }

    fn joins(&self, name: &[u8]) -> bool {
        let is_response = self.pairs.first().is_some_and(|(first, _)| first == b":status");
        let names: &[&str] = if is_response { &JOINED_IN_RESPONSES } else { &JOINED_IN_REQUESTS };
        names.binary_search_by(|known| known.as_bytes().cmp(name)).is_ok()
    }

    /// Sets `name` to exactly one value, at its first position if it had one.
    pub fn replace(&mut self, name: &[u8], value: &[u8]) {
        let Some(at) = self.pairs.iter().position(|(n, _)| n.eq_ignore_ascii_case(name)) else {
            return self.add(name, value);
        };
        let mut index = 0;
        self.pairs.retain(|(n, _)| {
            let keep = index <= at || !n.eq_ignore_ascii_case(name);
            index += 1;
            keep
        });
        if let Some((_, slot)) = self.pairs.get_mut(at) {
            slot.clear();
            slot.extend_from_slice(value);
        }
    }

    /// Removes every entry under `name`.
    pub fn remove(&mut self, name: &[u8]) {
        self.pairs.retain(|(n, _)| !n.eq_ignore_ascii_case(name));
    }

    /// Names plus values, in bytes; what `proxy_get_header_map_size` reports.
    #[must_use]
    pub fn byte_size(&self) -> usize {
        self.pairs.iter().map(|(n, v)| n.len() + v.len()).sum()
    }

    /// Appends the ABI form: count, then the lengths of each pair, then each name and value with a
    /// NUL after it; integers are little-endian u32. An empty map has no bytes at all.
    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        if self.pairs.is_empty() {
            return;
        }
        let u32_of = |n: usize| u32::try_from(n).unwrap_or(u32::MAX).to_le_bytes();
        out.reserve(4 + self.byte_size() + 10 * self.pairs.len());
        out.extend_from_slice(&u32_of(self.pairs.len()));
        for (name, value) in &self.pairs {
            out.extend_from_slice(&u32_of(name.len()));
            out.extend_from_slice(&u32_of(value.len()));
        }
        for (name, value) in &self.pairs {
            out.extend_from_slice(name);
            out.push(0);
            out.extend_from_slice(value);
            out.push(0);
        }
    }

    /// Reads the ABI form. Zero bytes are an empty map.
    ///
    /// # Errors
    /// `BadArgument` if the bytes are cut, too long, hold too many pairs, or do not end where the
    /// lengths say. (Envoy takes such bytes for an empty map, which would wipe the headers.)
    pub(super) fn decode(bytes: &[u8]) -> Result<Self, Status> {
        fn take<'a>(rest: &mut &'a [u8], n: usize) -> Result<&'a [u8], Status> {
            let (head, tail) = rest.split_at_checked(n).ok_or(Status::BadArgument)?;
            *rest = tail;
            Ok(head)
        }
        fn take_len(rest: &mut &[u8]) -> Result<usize, Status> {
            let four = take(rest, 4)?;
            let four: [u8; 4] = four.try_into().map_err(|_| Status::BadArgument)?;
            usize::try_from(u32::from_le_bytes(four)).map_err(|_| Status::BadArgument)
        }
        fn take_text(rest: &mut &[u8], n: usize) -> Result<Vec<u8>, Status> {
            let text = take(rest, n)?.to_vec();
            match take(rest, 1)? {
                [0] => Ok(text),
                _ => Err(Status::BadArgument),
            }
        }
        if bytes.is_empty() {
            return Ok(Self::new());
        }
        if bytes.len() > PAIRS_MAX_BYTES {
            return Err(Status::BadArgument);
        }
        let mut rest = bytes;
        let count = take_len(&mut rest)?;
        if count > PAIRS_MAX_COUNT {
            return Err(Status::BadArgument);
        }
        let mut lengths = Vec::with_capacity(count);
        for _ in 0..count {
            lengths.push((take_len(&mut rest)?, take_len(&mut rest)?));
        }
        let mut map = Self::with_capacity(count);
        for (name_len, value_len) in lengths {
            let name = take_text(&mut rest, name_len)?;
            map.add(&name, &take_text(&mut rest, value_len)?);
        }
        if rest.is_empty() { Ok(map) } else { Err(Status::BadArgument) }
    }
}

impl<N: AsRef<[u8]>, V: AsRef<[u8]>> FromIterator<(N, V)> for HeaderMap {
    fn from_iter<I: IntoIterator<Item = (N, V)>>(pairs: I) -> Self {
        let mut map = Self::new();
        for (name, value) in pairs {
            map.add(name.as_ref(), value.as_ref());
        }
        map
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(pairs: &[(&str, &str)]) -> HeaderMap {
        pairs.iter().copied().collect()
    }

    #[test]
    fn names_are_lower_case_and_looked_up_in_any_case() {
        let headers = map(&[("Content-Type", "a"), ("X-A", "1"), ("x-a", "2")]);
        assert_eq!(headers.first(b"CONTENT-type"), Some(&b"a"[..]));
        assert_eq!(headers.joined(b"X-a").as_deref(), Some(&b"1,2"[..]));
        assert_eq!(headers.iter().next().map(|(n, _)| n), Some(&b"content-type"[..]));
    }

    #[test]
    fn some_names_join_their_values_as_in_envoy() {
        let lists = [&JOINED_IN_REQUESTS[..], &JOINED_IN_RESPONSES];
        assert!(lists.iter().all(|list| list.is_sorted()));
        let request = map(&[(":path", "/"), ("Accept", "a"), ("x", "1"), ("accept", "b"), ("x", "2")]);
        assert_eq!(request.first(b"accept"), Some(&b"a,b"[..]));
        assert_eq!(request.len(), 4);
        let response = map(&[(":status", "200"), ("accept", "a"), ("accept", "b"), ("set-cookie", "a")]);
        assert_eq!(response.len(), 4);
        let mut bytes = Vec::new();
        request.encode(&mut bytes);
        assert_eq!(HeaderMap::decode(&bytes), Ok(request));
    }

    #[test]
    fn replace_keeps_the_place_and_drops_the_other_values() {
        let mut headers = map(&[("a", "1"), ("b", "2"), ("a", "3"), ("c", "4")]);
        headers.replace(b"A", b"9");
        assert_eq!(headers, map(&[("a", "9"), ("b", "2"), ("c", "4")]));
        headers.replace(b"d", b"5");
        assert_eq!(headers.first(b"d"), Some(&b"5"[..]));
        headers.remove(b"B");
        assert_eq!(headers, map(&[("a", "9"), ("c", "4"), ("d", "5")]));
    }

    #[test]
    fn the_abi_form_round_trips_and_every_cut_is_refused() {
        for headers in [map(&[]), map(&[("", "")]), map(&[(":path", "/x"), ("a", ""), ("a", "é\0")])] {
            let mut bytes = Vec::new();
            headers.encode(&mut bytes);
            assert_eq!(HeaderMap::decode(&bytes), Ok(headers));
            for cut in 1..bytes.len() {
                assert_eq!(HeaderMap::decode(&bytes[..cut]), Err(Status::BadArgument));
            }
            bytes.push(0);
            assert_eq!(HeaderMap::decode(&bytes), Err(Status::BadArgument));
        }
        assert_eq!(HeaderMap::decode(&[255; 12]), Err(Status::BadArgument));
    }

    #[test]
    fn a_value_without_its_nul_is_refused() {
        let mut bytes = Vec::new();
        map(&[("a", "b")]).encode(&mut bytes);
        let last = bytes.len() - 1;
        bytes[last] = b'x';
        assert_eq!(HeaderMap::decode(&bytes), Err(Status::BadArgument));
    }
}
