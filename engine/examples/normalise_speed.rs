//! How fast text is normalised and redacted: `cargo run --release -p driftlock-engine --example
//! normalise_speed [CAPTURE]`.
//!
//! Without a capture (JSON Lines, gzip) it makes its own text: prose, JSON of an API, one that is all
//! tokens, and some that look like the beginning of one at every word. One thread.
#![allow(clippy::unwrap_used, reason = "an example says what is wrong by stopping")]

use std::hint::black_box;
use std::io::Read;
use std::time::Instant;

use driftlock_engine::normalise::{ClassSet, DEFAULT_NORMALISED, Normaliser, Piece, Redactor};

const PROSE: &str = "The quick answer is that a baseline, once frozen, does not change: what was normal stays \
    normal. You can ask for a new one at any time, and it's well-known that most teams do so weekly. ";

const JSON: &str = r#"{"id": "chatcmpl-9aXbC3dEfGhIjKlMnOpQ", "object": "chat.completion.chunk", "created": 1781208959,
 "model": "gpt-4.1-nano-2025-04-14", "choices": [{"index": 0, "delta": {"role": "assistant", "content": "Yes, of course."},
 "logprobs": null, "finish_reason": null}], "usage": {"prompt_tokens": 25, "completion_tokens": 117}}
"#;

const TOKENS: &str =
    "550e8400-e29b-41d4-a716-446655440000 2026-11-23T01:27:22Z 10.0.0.1 jane@example.com 4111111111111111 ";

/// Who wants to be slow to read writes like this.
const HOSTILE: [(&str, &str); 4] = [
    ("a/b/c/", "a/b/c/d-e_f+"),
    ("Abcde1/", "Abcde1/Fghij2-Klmno3_"),
    ("a@b.", "a.b@c.d-e.f_"),
    ("12-ab-", "12-ab-2026-1f-"),
];

fn texts() -> Vec<(String, Vec<u8>)> {
    let Some(path) = std::env::args().nth(1) else {
        let repeat = |text: &str| text.repeat((4 << 20) / text.len()).into_bytes();
        let texts = [("prose", PROSE), ("JSON", JSON), ("tokens", TOKENS)];
        return texts.into_iter().chain(HOSTILE).map(|(n, t)| (n.to_owned(), repeat(t))).collect();
    };
    let mut capture = String::new();
    flate2::read::MultiGzDecoder::new(std::fs::File::open(&path).unwrap())
        .read_to_string(&mut capture)
        .unwrap();
    let (mut requests, mut responses) = (Vec::new(), Vec::new());
    for row in capture.lines() {
        let row: serde_json::Value = serde_json::from_str(row).unwrap();
        requests.extend_from_slice(row["text"].as_str().unwrap_or_default().as_bytes());
        responses.extend_from_slice(row["extra"]["response"].as_str().unwrap_or_default().as_bytes());
    }
    vec![(format!("{path}: text"), requests), (format!("{path}: response"), responses)]
}

/// Bytes that are timed at once: short enough to run undisturbed on a machine with other work.
const SLICE_BYTES: usize = 128 << 10;

/// MB/s of `run`, which returns the bytes it wrote, and their share of the source: of each slice of the
/// text the best of nine runs.
fn measure(text: &[u8], run: impl Fn(&[u8]) -> usize) -> (f64, f64) {
    let (mut seconds, mut written) = (0.0, 0);
    for slice in text.chunks(SLICE_BYTES) {
        let timed = (0..9).map(|_| {
            let started = Instant::now();
            let written = black_box(run(black_box(slice)));
            (started.elapsed().as_secs_f64(), written)
        });
        let (best, bytes) = timed.min_by(|a, b| a.0.total_cmp(&b.0)).unwrap();
        seconds += best;
        written += bytes;
    }
    (text.len() as f64 / seconds / 1e6, written as f64 / text.len() as f64)
}

fn main() {
    for (name, text) in texts().iter().filter(|(_, text)| !text.is_empty()) {
        let normalise = |classes: ClassSet| {
            measure(text, move |text| {
                let (mut normaliser, mut written) = (Normaliser::new(classes), 0);
                let mut emit = |piece: Piece<'_>| written += piece.text.len();
                normaliser.push(text, 0, &mut emit);
                normaliser.finish(&mut emit);
                written
            })
        };
        let redact = measure(text, |text| {
            let (mut redactor, mut written) = (Redactor::new(ClassSet::REDACTED), 0);
            let mut emit = |piece: Piece<'_>| written += piece.text.len();
            // As it comes off the wire.
            text.chunks(16 << 10).for_each(|chunk| redactor.push(chunk, 0, &mut emit));
            redactor.finish(&mut emit);
            written
        });
        println!("{name}, {:.1} MB", text.len() as f64 / 1e6);
        for (what, (speed, share)) in [
            ("normalise, default", normalise(DEFAULT_NORMALISED)),
            ("normalise, volatile", normalise(ClassSet::VOLATILE)),
            ("normalise, all", normalise(ClassSet::ALL)),
            ("redact, 16 KiB chunks", redact),
        ] {
            println!("  {what:<22} {speed:6.0} MB/s  {:5.1} % of the bytes left", share * 100.0);
        }
    }
}
