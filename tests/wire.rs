//! An HTTP/1.1 client by hand: what is on the wire is what a test asserts; and an HTTP/2 client.
//!
//! A client library hides the difference between an answer that ended and one that broke off, and would
//! not leave in the middle of one. [`ask`] sends one request on a connection of its own and reports what
//! came back, complete or not; [`ask_http2`] does so over HTTP/2. Left out on purpose: pipelining.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use driftlock_host::capture::HttpRequest;
use http_body_util::{BodyExt as _, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;

const PATIENCE: Duration = Duration::from_secs(20);

/// What a client received.
#[derive(Clone, Debug, Default)]
pub struct Answer {
    /// None if not even the head arrived.
    pub status: Option<u16>,
    /// Fields in order, names in lower case.
    pub headers: Vec<(String, String)>,
    /// The body, transfer coding removed, as far as it arrived.
    pub body: Vec<u8>,
    /// Trailers, names in lower case.
    pub trailers: Vec<(String, String)>,
    /// The message ended as HTTP says it must; false when it broke off.
    pub complete: bool,
}

impl Answer {
    /// Values of a field.
    pub fn all(&self, name: &str) -> Vec<&str> {
        self.headers.iter().filter(|(known, _)| known == name).map(|(_, value)| value.as_str()).collect()
    }

    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

/// Sends `request` and reads the answer. With `leave_after_bytes` the connection is dropped once that many
/// bytes of the answer's body have come.
///
/// # Panics
/// If nothing happens for 20 s, or the answer is no HTTP.
pub async fn ask(address: SocketAddr, request: Vec<u8>, leave_after_bytes: Option<usize>) -> Answer {
    let stream = TcpStream::connect(address).await.expect("the proxy accepts connections");
    let (mut reading, mut writing) = stream.into_split();
    // A proxy may answer and close before it has read everything.
    let sending = tokio::spawn(async move {
        let _ = writing.write_all(&request).await;
        writing
    });
    let mut received = Vec::new();
    let mut answer = Answer::default();
    let mut buffer = vec![0; 64 << 10];
    loop {
        let read = timeout(PATIENCE, reading.read(&mut buffer)).await;
        let closed = match read.unwrap_or_else(|_| panic!("no byte and no end for {PATIENCE:?}: {answer:?}"))
        {
            Ok(0) | Err(_) => true,
            Ok(count) => {
                received.extend_from_slice(&buffer[..count]);
                false
            }
        };
        if let Some(parsed) = parse(&received, closed) {
            answer = parsed;
        }
        let left = leave_after_bytes.is_some_and(|bytes| answer.body.len() >= bytes);
        if closed || answer.complete || left {
            sending.abort();
            return answer;
        }
    }
}

/// Sends `request` over HTTP/2 (prior knowledge) on a connection of its own, with further fields. With
/// `leave_after_bytes` the stream is reset once that many bytes of the answer's body have come.
///
/// # Panics
/// If nothing happens for 20 s, or the request cannot be sent.
pub async fn ask_http2(
    address: SocketAddr,
    request: &HttpRequest,
    fields: &[(&str, &str)],
    leave_after_bytes: Option<usize>,
) -> Answer {
    let stream = TcpStream::connect(address).await.expect("the proxy accepts connections");
    let client = hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream));
    let (mut sender, connection) = client.await.expect("HTTP/2");
    let connection = tokio::spawn(connection);
    let mut sent = http::Request::builder()
        .method(request.method.as_str())
        .uri(format!("http://h{}", request.target))
        .header("te", "trailers");
    let recorded = request.headers.iter().map(|(name, value)| (name.as_str(), value.as_str()));
    for (name, value) in recorded.chain(fields.iter().copied()) {
        sent = sent.header(name, value);
    }
    let sent = sent.body(Full::new(Bytes::copy_from_slice(&request.body))).expect("a request");
    let mut answer = Answer::default();
    let got = timeout(PATIENCE, sender.send_request(sent)).await.expect("no answer");
    if let Ok(got) = got {
        let (head, mut body) = got.into_parts();
        answer.status = Some(head.status.as_u16());
        answer.headers = fields_of(&head.headers);
        answer.complete = loop {
            let frame = timeout(PATIENCE, body.frame()).await;
            match frame.unwrap_or_else(|_| panic!("no byte and no end for {PATIENCE:?}: {answer:?}")) {
                None => break true,
                Some(Err(_)) => break false,
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => answer.body.extend_from_slice(&data),
                    Err(frame) => {
                        answer.trailers = frame.trailers_ref().map(fields_of).unwrap_or_default();
                    }
                },
            }
            if leave_after_bytes.is_some_and(|bytes| answer.body.len() >= bytes) {
                break false;
            }
        };
    }
    drop(sender);
    connection.abort();
    answer
}

fn fields_of(map: &http::HeaderMap) -> Vec<(String, String)> {
    let text = |value: &http::HeaderValue| String::from_utf8_lossy(value.as_bytes()).into_owned();
    map.iter().map(|(name, value)| (name.as_str().to_owned(), text(value))).collect()
}

/// Sends `bytes`, waits until a proxy has had the time to read them, and leaves.
///
/// # Panics
/// If the proxy does not take them.
pub async fn abandon(address: SocketAddr, bytes: &[u8]) {
    let mut stream = TcpStream::connect(address).await.expect("the proxy accepts connections");
    stream.write_all(bytes).await.expect("the proxy reads");
    tokio::time::sleep(Duration::from_millis(100)).await;
}

/// What the bytes so far say; `None` before the head is complete.
fn parse(bytes: &[u8], closed: bool) -> Option<Answer> {
    let head_end = bytes.windows(4).position(|window| window == b"\r\n\r\n")?;
    let head = String::from_utf8_lossy(&bytes[..head_end]).into_owned();
    let mut lines = head.split("\r\n");
    let status = lines.next().and_then(|line| line.split(' ').nth(1)?.parse().ok());
    let headers: Vec<_> = lines.filter_map(field_line).collect();
    let field = |name: &str| headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.clone());
    let rest = &bytes[head_end + 4..];
    if status == Some(100) {
        return parse(rest, closed);
    }
    let mut trailers = Vec::new();
    let (body, complete) = if field("transfer-encoding").is_some_and(|coding| coding.contains("chunked")) {
        unchunk(rest, &mut trailers)
    } else if let Some(length) = field("content-length").and_then(|length| length.parse::<usize>().ok()) {
        (rest[..rest.len().min(length)].to_vec(), rest.len() >= length)
    } else {
        (rest.to_vec(), closed || matches!(status, Some(204 | 304)))
    };
    Some(Answer { status, headers, body, trailers, complete })
}

fn field_line(line: &str) -> Option<(String, String)> {
    line.split_once(':').map(|(name, value)| (name.trim().to_ascii_lowercase(), value.trim().to_owned()))
}

/// Takes the chunked coding off as far as it arrived (RFC 9112 section 7.1); says whether it ended.
fn unchunk(mut rest: &[u8], trailers: &mut Vec<(String, String)>) -> (Vec<u8>, bool) {
    let mut body = Vec::new();
    loop {
        let Some(line_end) = rest.windows(2).position(|window| window == b"\r\n") else {
            return (body, false);
        };
        let line = String::from_utf8_lossy(&rest[..line_end]).into_owned();
        let size = usize::from_str_radix(line.split(';').next().unwrap_or_default().trim(), 16)
            .unwrap_or_else(|_| panic!("no chunk size: {line:?}"));
        rest = &rest[line_end + 2..];
        if size == 0 {
            let text = String::from_utf8_lossy(rest);
            let ended = rest == b"\r\n" || rest.ends_with(b"\r\n\r\n");
            trailers.extend(text.split("\r\n").filter_map(field_line));
            return (body, ended);
        }
        body.extend_from_slice(&rest[..rest.len().min(size)]);
        match rest.get(size + 2..) {
            Some(next) => rest = next,
            None => return (body, false),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_broken_answer_is_told_from_one_that_ended() {
        let of = |bytes: &str, closed| parse(bytes.as_bytes(), closed).map(|a| (a.body.len(), a.complete));
        assert_eq!(of("HTTP/1.1 200 OK\r\ncontent-le", true), None);
        assert_eq!(of("HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nab", true), Some((2, false)));
        assert_eq!(of("HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc", false), Some((3, true)));
        let chunked = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n";
        assert_eq!(of(chunked, true), Some((3, false)));
        assert_eq!(of(&format!("{chunked}0\r\n\r\n"), false), Some((3, true)));
        assert_eq!(of("HTTP/1.1 200 OK\r\n\r\nab", false), Some((2, false)));
        assert_eq!(of("HTTP/1.1 200 OK\r\n\r\nab", true), Some((2, true)));
    }
}
