//! However a body is cut into pieces, the verdict is the same.
//!
//! The oracle is the native inspection with whole bodies; the module on wasmtime gets pieces of every size,
//! from single bytes on. Proxies cut where their buffers end, so anything else would make verdicts depend
//! on load.

use driftlock_host::capture::{Exchange, HttpRequest, HttpResponse};
use driftlock_tests::drive::{Native, Passage, Vm};
use driftlock_tests::{traffic, trained};
use proptest::prelude::*;
use serde_json::{Value, json};

const SIZES: [usize; 6] = [1, 2, 3, 7, 100, 4096];

fn json_of(verdict: &Option<String>) -> Value {
    serde_json::from_str(verdict.as_deref().expect("a verdict")).expect("JSON")
}

fn chat(request: String, content_type: &str, response: String) -> Passage {
    let header = |value: &str| vec![("content-type".to_owned(), value.to_owned())];
    Passage::new(
        HttpRequest {
            method: "POST".to_owned(),
            target: "/v1/chat/completions".to_owned(),
            headers: header("application/json"),
            body: request.into_bytes(),
        },
        HttpResponse { status: 200, headers: header(content_type), body: response.into_bytes() },
    )
}

/// Bodies that stretch the bounds: more open units than are scored apart, more text than is learned from,
/// units of equal rank, broken characters and broken ends.
fn hard() -> Vec<Passage> {
    let long: Vec<Value> = (0..400)
        .map(|i| json!({"content": format!("{i} ").repeat(70), "role": if i % 2 == 0 { "user" } else { "assistant" }, "name": "é\u{1f600}"}))
        .collect();
    let events: String = (0..600)
        .map(|i| {
            let choice = json!({"choices": [{"index": i * 7 % 23, "delta": {"content": format!("t{i} \"é\u{1f600}")}}]});
            let line_end = if i % 3 == 0 { "\r\n" } else { "\n" };
            format!("data: {choice}{line_end}{line_end}")
        })
        .collect();
    let same =
        json!({"messages": [{"role": "user", "content": "same"}, {"role": "user", "content": "same"}]});
    let whole =
        json!({"choices": [{"index": 0, "message": {"role": "assistant", "content": "\u{fffd}\u{7f} ok"}}]});
    let cut = |text: &str| text[..text.len() - 9].to_owned();
    let json = "application/json";
    let mut passages = vec![
        chat(json!({"messages": long}).to_string(), "text/event-stream", events.clone() + "data: [DONE]\n\n"),
        chat(same.to_string(), json, whole.to_string()),
        chat(cut(&same.to_string()), "text/event-stream", cut(&events)),
        chat(
            r#"{"messages": [{"role": "user", "content": "\ud83d\ude00 \u00e9 \ud83d"}]}"#.to_owned(),
            json,
            "{]".to_owned(),
        ),
    ];
    let mut broken = passages[1].clone();
    broken.request.body.extend_from_slice(b" \xf0\x9f\x98");
    broken.response.body[40] = 0xff;
    passages.push(broken);
    passages
}

fn generated(seed: u64) -> impl Iterator<Item = Passage> {
    let exchanges: Vec<Exchange> = traffic(seed, 25, 10);
    exchanges.into_iter().map(|exchange| Passage::of(&exchange))
}

#[test]
fn every_size_of_piece_gives_the_verdicts_of_the_whole() {
    for fields in [json!({}), json!({"uninspectable": "refuse"})] {
        let configuration = trained(fields);
        let mut native = Native::start(&configuration);
        let mut vm = Vm::start(&configuration);
        let passages: Vec<Passage> = generated(21).chain(hard()).collect();
        for (i, mut passage) in passages.into_iter().enumerate() {
            let whole = native.pass(&passage);
            assert_eq!(whole, vm.pass(&passage), "exchange {i} in one piece");
            for chunk_bytes in SIZES {
                passage.chunk_bytes = chunk_bytes;
                assert_eq!(whole, vm.pass(&passage), "exchange {i} in pieces of {chunk_bytes}");
            }
        }
    }
}

/// What is learned from pieces is what is learned from the whole: the digests of the baselines say so.
#[test]
fn every_size_of_piece_teaches_the_same() {
    // Not shared: the native session has no other VMs to share with, and counts that it does not.
    let configuration =
        json!({"alpha": 0.05, "learn": {"messages": 40}, "share": false}).to_string().into_bytes();
    let lessons: Vec<Passage> = (0..50)
        .map(|i| {
            // More than a message may teach, spread over units that interleave with the envelope.
            let messages: Vec<Value> = (0..150)
                .map(
                    |j| json!({"content": format!("order {} of day {j} ", i * j).repeat(30), "role": "user"}),
                )
                .collect();
            chat(
                json!({"messages": messages}).to_string(),
                "application/json",
                json!({"choices": [{"message": {"content": format!("done {i}")}}]}).to_string(),
            )
        })
        .collect();
    assert!(lessons[49].request.body.len() > 80 << 10);
    let mut native = Native::start(&configuration);
    let whole: Vec<_> = lessons.iter().map(|lesson| native.pass(lesson)).collect();
    assert!(json_of(&whole[49].request)["baseline"].is_string(), "learning has ended");
    for chunk_bytes in [usize::MAX, 7, 100, 4096] {
        let mut native = Native::start(&configuration);
        let mut vm = Vm::start(&configuration);
        for (i, lesson) in lessons.iter().enumerate() {
            let lesson = Passage { chunk_bytes, ..lesson.clone() };
            assert_eq!(whole[i], native.pass(&lesson), "lesson {i} natively in pieces of {chunk_bytes}");
            assert_eq!(whole[i], vm.pass(&lesson), "lesson {i} on wasmtime in pieces of {chunk_bytes}");
        }
    }
}

#[test]
fn where_a_message_breaks_off_is_all_that_counts() {
    let configuration = trained(json!({}));
    let (mut native, mut vm) = (Native::start(&configuration), Vm::start(&configuration));
    let mut passage = hard().remove(0);
    passage.response_cut_bytes = Some(passage.response.body.len() / 2);
    let whole = native.pass(&passage);
    assert_eq!(json_of(&whole.response)["reason"], "cut_short");
    assert!(!whole.response_passed);
    for chunk_bytes in SIZES {
        passage.chunk_bytes = chunk_bytes;
        assert_eq!(whole, vm.pass(&passage), "response in pieces of {chunk_bytes}");
    }
    passage.request_cut_bytes = Some(1000);
    let whole = native.pass(&passage);
    assert_eq!(json_of(&whole.request)["reason"], "cut_short");
    assert!(whole.response.is_none());
    for chunk_bytes in SIZES {
        passage.chunk_bytes = chunk_bytes;
        assert_eq!(whole, vm.pass(&passage), "request in pieces of {chunk_bytes}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// Any bytes as a body, any size of piece.
    #[test]
    fn any_bytes_in_any_pieces(
        body in prop_oneof![
            prop::collection::vec(any::<u8>(), 1..200),
            "[\\[\\]{}:,\"a-z\\\\u0-9 \n\r]{1,200}".prop_map(String::into_bytes),
            "(data: ?[{}\"a-z:,\\[\\]]{0,30}\r?\n\r?\n?){1,8}".prop_map(String::into_bytes),
        ],
        kind in prop::sample::select(vec!["application/json", "text/event-stream", "text/plain", "", "image/png"]),
        path in prop::sample::select(vec!["/v1/chat/completions", "/other"]),
        chunk_bytes in 1usize..40,
    ) {
        use std::cell::RefCell;
        thread_local! {
            static BOTH: RefCell<(Native, Vm)> = RefCell::new({
                let configuration = trained(json!({"uninspectable": "pass"}));
                (Native::start(&configuration), Vm::start(&configuration))
            });
        }
        let mut passage = chat(String::new(), kind, String::new());
        passage.request.target = path.to_owned();
        passage.request.headers[0].1 = kind.to_owned();
        passage.request.body.clone_from(&body);
        passage.response.body = body;
        BOTH.with_borrow_mut(|(native, vm)| {
            let whole = native.pass(&passage);
            passage.chunk_bytes = chunk_bytes;
            prop_assert_eq!(&whole, &native.pass(&passage), "natively");
            prop_assert_eq!(&whole, &vm.pass(&passage), "on wasmtime");
            Ok(())
        })?;
    }
}
