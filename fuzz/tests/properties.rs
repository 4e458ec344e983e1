//! The properties on proptest's bytes: dictionaries of fragments reach further than noise does.
#![allow(missing_docs)]

use driftlock_engine::baseline::Snapshot;
use driftlock_fuzz::{adapters, body, coder, config, decode, rewrite, score, session, snapshot, splits};
use proptest::prelude::*;

const JSON: &[&[u8]] = &[
    b"{",
    b"}",
    b"[",
    b"]",
    b"\"",
    b":",
    b",",
    b" ",
    b"\n",
    b"\\",
    b"\\n",
    b"\\\\",
    b"\\u00e9",
    b"\\ud83d",
    b"\\ude00",
    b"\\ud83d\\ude00",
    b"0",
    b"-1.5e+3",
    b"18446744073709551616",
    b"true",
    b"null",
    b"fals",
    b"x",
    b"\xc3\xa9",
    b"\xf0\x9f\x98\x80",
    b"\xff",
    b"\0",
    b"{\"messages\":[",
    b"{\"role\":\"user\",",
    b"\"role\":\"tool\"",
    b"\"content\":\"",
    b"\"content\":[",
    b"{\"type\":\"text\",\"text\":\"",
    b"\"}",
    b"\"}]}",
    b"{\"choices\":[",
    b"{\"index\":1,",
    b"\"delta\":{",
    b"\"message\":{",
    b"\"tool_calls\":[",
    b"{\"function\":{\"name\":\"f\"}}",
    b"\"arguments\":\"",
    b"\"url\":\"data:image/png;base64,",
    b"\"data\":\"",
    b"iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk",
    b"\"obfuscation\":\"",
    b"\"usage\":{\"prompt_tokens\":3}",
    b"\"contents\":[{\"parts\":[{",
    b"\"thought\":true",
    b"\"input\":{",
    b"\"input\":[{\"type\":\"reasoning\",",
    b"\"output\":[{",
    b"{\"type\":\"response.output_text.delta\",\"delta\":\"",
    b"{\"index\":1,\"delta\":{\"partial_json\":\"",
    b"{\"functionCall\":{\"name\":\"f\",\"args\":{",
    b"\"params\":{\"arguments\":{",
    b"\"result\":{\"content\":[{\"text\":\"",
    b"\"embedding\":[0.5,",
    b"\"embeddings\":{\"float\":[[1],",
    b"[1,\"x\",{\"k\":2},",
    b"{\"message\":{\"content\":\"",
    b"\"system\":\"",
    b"\r\n--x\r\n",
    b"content-type: image/png\r\n\r\n",
    b"--x--",
    b"%4",
    b"%26+",
    b"[[[[[[[[[[[[[[[[",
    b"]]]]]]]]]]]]]]]]",
    b"{\"model\":\"m\",\"messages\":[{\"role\":\"user\",\"content\":\"hi\"}]}",
    b"{\"choices\":[{\"delta\":{\"content\":\"hi\"},\"index\":0}]}",
];

const EVENTS: &[&[u8]] = &[
    b"data: ", b"data:", b"data", b"dat", b"\n", b"\n\n", b"\r\n", b"\r", b": ping", b"event: x", b"id", b"\xef\xbb\xbf",
    b"[DONE]", b"data: [DONE]\n\n", b"[DO", b"{}", b"data: {}\n\n", b" ",
    b"data: {\"choices\":[{\"delta\":{\"content\":\"hi\"},\"index\":0}]}\n\n",
    b"data: {\"choices\":[{\"index\":0,\"delta\":{\"tool_calls\":[{\"index\":0,\"function\":{\"arguments\":\"{\\\"a\\\":\"}}]}}]}\n\n",
];

const CONFIG: &[&[u8]] = &[
    b"{",
    b"}",
    b",",
    b":",
    b"\"name\":\"edge\"",
    b"\"name\":\"\"",
    b"\"\":0",
    b"\"alpha\":0.01",
    b"\"alpha\":0.000001",
    b"\"alpha\":1e-7",
    b"\"alpha\":0.5",
    b"\"alpha\":0.2",
    b"\"learn\":null",
    b"\"learn\":{\"messages\":400}",
    b"\"learn\":{\"messages\":4294967295}",
    b"\"learn\":{\"messages\":16}",
    b"\"limits\":{\"max_body_bytes\":1024}",
    b"\"limits\":{\"max_streams\":0}",
    b"\"limits\":{\"max_ngrams\":18446744073709551615}",
    b"\"uninspectable\":\"refuse\"",
    b"\"report\":{\"log\":\"never\"}",
    b"\"other\":1",
    b"null",
    b" ",
    b"[",
];

const TOKENS: &[&[u8]] = &[
    b"6f1c9f0e-5b1a-4c58-9f6e-2f1f0b8a7c11",
    b"2026-11-23T10:00:00Z",
    b"0123456789abcdef0123456789abcdef",
    b"1730000000",
    b"eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2lnbmF0dXJlLW9mLXRoZS10b2tlbg",
    b"4111 1111 1111 1111",
    b"192.168.0.1",
    b"DE89370400440532013000",
    b"someone@example.org",
    b"Bearer ",
    b"password=",
    b"sk-",
    b"abcdefghij0123456789ABCDEF",
    b"+49 30 1234567",
    b"-----BEGIN PRIVATE KEY-----",
    b"-----END PRIVATE KEY-----",
    b"Sun, 06 Nov 1994 08:49:37 GMT",
    b" ",
    b"-",
    b".",
    b":",
    b"\"",
    b"\\n",
    b"\\u0041",
    b"\\",
    b"\xc3\xa9",
    b"\xff",
    b"a",
    b"7",
    b"\x01",
    b"\n",
    b"[REDACTED:email]",
];

fn fragments(of: &'static [&'static [u8]], most: usize) -> impl Strategy<Value = Vec<u8>> {
    let fragment = prop_oneof![
        12 => prop::sample::select(of).prop_map(<[u8]>::to_vec),
        1 => prop::collection::vec(any::<u8>(), 0..9),
    ];
    prop::collection::vec(fragment, 0..most).prop_map(|all| all.concat())
}

fn cuts() -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(prop_oneof![0u8..4, any::<u8>()], 0..6).prop_map(|mut lengths| {
        lengths.insert(0, lengths.len() as u8);
        lengths
    })
}

/// A whole document with a few bytes changed, which noise and fragments seldom give.
fn nearly_json() -> impl Strategy<Value = Vec<u8>> {
    let bodies: &[&[u8]] = &[
        br#" {"model":"gpt\u002d4","messages":[{"content":"late \ud83d\ude00 \ud83d role","role":"user"},{"role":"assistant","tool_calls":[{"id":"1","function":{"name":"f","arguments":"{\"a\":1}"}}]},{"role":"tool","content":[{"type":"text","text":"x\\y"},{"image_url":{"url":"data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="}}]}],"temperature":-0.5e-3}"#,
        br#"{"choices":[{"message":{"content":"a","refusal":null,"reasoning":"because"},"index":0,"finish_reason":"stop"}],"usage":{"total_tokens":12}}"#,
    ];
    let change =
        (any::<prop::sample::Index>(), prop::sample::select(b"\"\\{}[],:0u \xff\n".to_vec()), 0u8..3);
    (prop::sample::select(bodies), prop::collection::vec(change, 0..3)).prop_map(|(body, changes)| {
        let mut body = body.to_vec();
        for (at, byte, kind) in changes {
            let at = at.index(body.len());
            match kind {
                0 => body[at] = byte,
                1 => body.insert(at, byte),
                _ => drop(body.remove(at)),
            }
        }
        body
    })
}

fn body_case() -> impl Strategy<Value = Vec<u8>> {
    // Chat or another path, either direction; JSON and streams more often than the rest.
    let kind = prop_oneof![3 => Just(0u8), 3 => Just(1), 1 => 2u8..10];
    let text = prop_oneof![
        2 => fragments(JSON, 20),
        2 => nearly_json(),
        2 => fragments(EVENTS, 16),
        1 => (fragments(EVENTS, 4), fragments(JSON, 8), fragments(EVENTS, 4)).prop_map(|(a, b, c)| [a, b, c].concat()),
        1 => (60usize..70, 60usize..70).prop_map(|(open, close)| [b"[".repeat(open), b"]".repeat(close)].concat()),
    ];
    (0u8..6, kind, cuts(), cuts(), text)
        .prop_map(|(choice, kind, one, other, text)| [vec![choice, kind], one, other, text].concat())
}

/// A usual exchange, with callbacks dropped, doubled, swapped and disturbed.
fn session_case() -> impl Strategy<Value = Vec<u8>> {
    const REQUEST_BODY: u8 = 1;
    const RESPONSE_BODY: u8 = 5;
    const END: u8 = 8;
    const PIECE: u8 = 8 << 4;
    let usual = [
        [0, 0],
        [REQUEST_BODY | PIECE, 0],
        [REQUEST_BODY | END, 0],
        [4, 0],
        [RESPONSE_BODY | PIECE, 0],
        [RESPONSE_BODY | END, 0],
    ];
    let change = (any::<prop::sample::Index>(), 0u8..4, any::<[u8; 2]>());
    let disturbed = prop::collection::vec(change, 0..4).prop_map(move |changes| {
        let mut script: Vec<[u8; 2]> = usual.to_vec();
        for (at, kind, callback) in changes {
            let at = at.index(script.len());
            match kind {
                0 => script.insert(at, callback),
                1 if script.len() > 1 => drop(script.remove(at)),
                2 => script.insert(at, script[at]),
                _ => script[at][1] = callback[1],
            }
        }
        script.concat()
    });
    let noise = prop::collection::vec(any::<u8>(), 0..80);
    let headers = prop_oneof![4 => Just([0u8; 4]), 1 => any::<[u8; 4]>()];
    (0u8..2, headers, prop_oneof![3 => disturbed, 1 => noise])
        .prop_map(|(refuse, headers, script)| [vec![refuse], headers.to_vec(), script].concat())
}

fn long(bytes: Vec<u8>) -> Vec<u8> {
    [(bytes.len() as u16).to_be_bytes().to_vec(), bytes].concat()
}

/// Cuts, repeats, then head, piece and tail with their lengths, as [`splits`] reads them.
fn split_case(
    direction: u8,
    head: &[u8],
    repeats: u16,
    piece: &[u8],
    tail: &[u8],
    one: &[u8],
    other: &[u8],
) -> Vec<u8> {
    let tail = [&[tail.len() as u8], tail].concat();
    // The length of the piece stands after the head.
    [
        vec![direction],
        one.to_vec(),
        other.to_vec(),
        repeats.to_be_bytes().to_vec(),
        long(head.to_vec()),
        long(piece.to_vec()),
        tail,
    ]
    .concat()
}

fn few(cases: u32) -> ProptestConfig {
    ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(cases) }
}

proptest! {
    #![proptest_config(few(4000))]

    #[test]
    fn snapshots(mode in 0u8..4, mutations in prop::collection::vec(any::<[u8; 4]>(), 0..8), noise in prop::collection::vec(any::<u8>(), 0..200)) {
        let data = if mode < 2 { [vec![mode], noise].concat() } else { [vec![mode], mutations.concat()].concat() };
        snapshot::holds(&data);
    }

    #[test]
    fn decoding(head in any::<[u8; 4]>(), cuts in cuts(), damage in any::<[u8; 11]>(), text in fragments(JSON, 30)) {
        decode::holds(&[&head[..], &cuts, &damage, &text].concat());
    }

    #[test]
    fn rewriting(classes in 0u8..3, cuts in cuts(), text in fragments(TOKENS, 12)) {
        rewrite::holds(&[vec![classes], cuts, text].concat());
    }

    #[test]
    fn code_lengths(order in any::<u8>(), units in prop::collection::vec(prop::collection::vec(prop::sample::select(b"\0abc{\xff".to_vec()), 0..80), 0..8), test in prop::collection::vec(prop::sample::select(b"\0abcd\xff".to_vec()), 0..200)) {
        let units: Vec<Vec<u8>> = units.into_iter().map(|unit| [vec![unit.len() as u8], unit].concat()).collect();
        coder::holds(&[vec![order, units.len() as u8], units.concat(), test].concat());
    }

    #[test]
    fn scores(expected in any::<[u8; 3]>(), classes in prop_oneof![Just([0u8; 2]), any::<[u8; 2]>()], cuts in cuts(), text in fragments(JSON, 40)) {
        let half = text.len() / 2;
        score::holds(&[&expected[..], &classes, &cuts, &[half.min(255) as u8], &text].concat());
    }
}

proptest! {
    #![proptest_config(few(20_000))]

    #[test]
    fn bodies(data in body_case()) {
        body::holds(&data);
    }

    #[test]
    fn configurations(pieces in prop_oneof![
        fragments(CONFIG, 8),
        prop::collection::vec(prop::sample::select(&CONFIG[4..22]), 0..5)
            .prop_map(|fields| [b"{", &fields.join(&b',')[..], b"}"].concat()),
    ]) {
        config::holds(&pieces);
    }
}

proptest! {
    #![proptest_config(few(5000))]

    #[test]
    fn sessions(data in session_case()) {
        session::holds(&data);
    }
}

proptest! {
    #![proptest_config(few(400))]

    #[test]
    fn splits_of_small_bodies(direction in 0u8..3, body in prop_oneof![nearly_json(), fragments(JSON, 12), fragments(EVENTS, 12)], one in cuts(), other in cuts()) {
        let (head, tail) = body.split_at(body.len().min(511));
        splits::holds(&split_case(direction, head, 0, b"", &tail[..tail.len().min(255)], &one, &other));
    }
}

proptest! {
    #![proptest_config(few(1000))]

    #[test]
    fn compressors(
        routes in prop::collection::vec(any::<[u8; 5]>(), 0..8),
        question in any::<[u8; 4]>(),
        adapter in any::<u8>(),
        baseline in fragments(JSON, 12),
        repeats in prop_oneof![3 => 0u16..4, 1 => 0u16..400],
        text in fragments(JSON, 60),
    ) {
        let baseline = &baseline[..baseline.len().min(255)];
        let choices = [vec![routes.len() as u8], routes.concat(), question.to_vec()].concat();
        let size = [&[adapter, baseline.len() as u8], &repeats.to_be_bytes()[..]].concat();
        adapters::holds(&[choices, size, baseline.to_vec(), text].concat());
    }
}

/// Larger than what is kept of a message while it is learned from, with the role after the content: which
/// unit gets the room must not depend on the chunks.
#[test]
fn splits_of_a_body_over_the_sample() {
    let head = br#"{"messages":["#;
    let message =
        [br#"{"content":""#.to_vec(), b"abcdefgh".repeat(40), br#"","role":"user"},"#.to_vec()].concat();
    for other in [&[1, 0][..], &[1, 63], &[2, 200, 9]] {
        splits::holds(&split_case(2, head, 300, &message, b"{}]}", &[0], other));
    }
    let event = [
        br#"data: {"choices":[{"delta":{"content":""#.to_vec(),
        b"abcdefgh".repeat(40),
        b"\"},\"index\":0}]}\n\n".to_vec(),
    ]
    .concat();
    for other in [&[1, 0][..], &[1, 63], &[2, 200, 9]] {
        splits::holds(&split_case(1, b"", 300, &event, b"", &[0], other));
    }
}

/// A baseline without a stream judges nothing.
#[test]
fn a_configuration_with_an_empty_baseline() {
    use base64::Engine as _;
    let empty = base64::engine::general_purpose::STANDARD.encode(Snapshot::default().encode());
    config::holds(format!(r#"{{"learn":null,"baseline":"{empty}"}}"#).as_bytes());
    config::holds(format!(r#"{{"baseline":"{empty}"}}"#).as_bytes());
}

/// Without disturbance the exchange is normal, so `sessions` has something to lose.
#[test]
fn an_undisturbed_session_is_normal() {
    for refuse in [false, true] {
        assert_eq!(session::undisturbed(refuse), [Some("normal".into()), Some("normal".into())]);
    }
}
