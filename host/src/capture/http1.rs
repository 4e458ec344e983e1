//! Raw HTTP/1.1 messages (RFC 9112) as text, without copying them.
//!
//! Recordings hold bodies with the transfer coding already removed, so `content-length` and
//! `transfer-encoding` say nothing here: the body is what follows the empty line. One pass over the head
//! and one allocation, the list of fields.

/// Header fields that point into the message, names as captured.
pub type Fields<'a> = Vec<(&'a str, &'a str)>;

/// A request that points into its recording.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RequestRef<'a> {
    /// Method token.
    pub method: &'a str,
    /// Request target as sent.
    pub target: &'a str,
    /// Header fields in order.
    pub headers: Fields<'a>,
    /// The body.
    pub body: &'a [u8],
}

/// A response that points into its recording.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResponseRef<'a> {
    /// Status code.
    pub status: u16,
    /// Header fields in order.
    pub headers: Fields<'a>,
    /// The body.
    pub body: &'a [u8],
}

/// Reads a request; the error says what is missing or wrong.
pub(super) fn request(raw: &str) -> Result<RequestRef<'_>, &'static str> {
    let (start, headers, body) = split(raw)?;
    let (method, rest) = start.split_once(' ').ok_or("the request line has no target")?;
    // A target with raw spaces (an attack, often) ends at the last space before the version.
    let (target, version) = rest.rsplit_once(' ').ok_or("the request line has no version")?;
    if !version.starts_with("HTTP/") {
        return Err("the request line does not end in a version");
    }
    if method.is_empty() || !method.bytes().all(|b| b.is_ascii_alphabetic() || b == b'-' || b == b'_') {
        return Err("the method is not a token");
    }
    Ok(RequestRef { method, target, headers, body: body.as_bytes() })
}

/// Reads a response; the error says what is missing or wrong.
pub(super) fn response(raw: &str) -> Result<ResponseRef<'_>, &'static str> {
    let (start, headers, body) = split(raw)?;
    let mut parts = start.splitn(3, ' ');
    if !parts.next().unwrap_or_default().starts_with("HTTP/") {
        return Err("the status line does not start with a version");
    }
    let status: u16 =
        parts.next().and_then(|s| s.parse().ok()).ok_or("the status line has no three-digit status")?;
    if !(100..=599).contains(&status) {
        return Err("the status is not between 100 and 599");
    }
    Ok(ResponseRef { status, headers, body: body.as_bytes() })
}

/// Start line, header fields and body.
fn split(raw: &str) -> Result<(&str, Fields<'_>, &str), &'static str> {
    let (head, body) = match memchr::memmem::find(raw.as_bytes(), b"\r\n\r\n") {
        Some(end) => (&raw[..end], &raw[end + 4..]),
        None => (raw.strip_suffix("\r\n").unwrap_or(raw), ""),
    };
    let mut lines = lines(head);
    let start = lines.next().unwrap_or_default();
    let mut headers = Vec::with_capacity(16);
    for line in lines {
        let colon = line.bytes().position(|byte| byte == b':').ok_or("a header line has no colon")?;
        let (name, value) = (&line[..colon], &line[colon + 1..]);
        let value = value.strip_prefix(' ').unwrap_or(value);
        let name = if is_bare(name) { name } else { name.trim() };
        headers.push((name, if is_bare(value) { value } else { value.trim() }));
    }
    Ok((start, headers, body))
}

/// Whether there is nothing to trim: nearly always, and trimming looks at characters, not at bytes.
pub(crate) fn is_bare(text: &str) -> bool {
    matches!(text.as_bytes(), [first, .., last] if first.is_ascii_graphic() && last.is_ascii_graphic())
}

/// Lines that end in CRLF; what `split("\\r\\n")` gives, several times faster.
fn lines(head: &str) -> impl Iterator<Item = &str> {
    let bytes = head.as_bytes();
    let mut start = 0;
    let mut ends = memchr::memchr_iter(b'\n', bytes);
    let mut done = false;
    std::iter::from_fn(move || {
        if done {
            return None;
        }
        for at in ends.by_ref() {
            if at > start && bytes[at - 1] == b'\r' {
                let line = &head[start..at - 1];
                start = at + 1;
                return Some(line);
            }
        }
        done = true;
        Some(&head[start..])
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn lines_are_those_of_the_plain_way(head in "[a\r\n:é]{0,20}") {
            let plain: Vec<&str> = head.split("\r\n").collect();
            prop_assert_eq!(lines(&head).collect::<Vec<_>>(), plain);
        }
    }
}
