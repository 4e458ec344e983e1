//! The hot paths, each beside what it is compared with, and with the answer it has to give.
//!
//! What: [`paths`] lists them once, for criterion (`benches/hot_paths.rs`: time) and for callgrind
//! (`instructions.rs`: instructions a byte). The texts are generated, or the evaluation data where it is
//! there. A path whose answer is not the one that the plain way gave panics, so a fast wrong result
//! cannot be recorded.
//!
//! Left out on purpose: whole programs; `driftlock bench` measures those.

use std::path::Path;

use driftlock_engine::baseline::{StreamBaseline, StreamTrainer, TrainingOptions};
use driftlock_engine::coder::Block;
use driftlock_engine::normalise::{DEFAULT_NORMALISED, Normaliser};
use driftlock_engine::score::{Scratch, UnitScorer};
use driftlock_engine::significance::{DEFAULT_PERMUTATIONS, Seed, permutation_test};
use driftlock_engine::words::WordTracker;
use driftlock_host::capture::{self, Exchange};
use driftlock_host::replay::native;
use driftlock_host::synth::{SynthOptions, generate};
use driftlock_host::train::train;
use driftlock_inspect::config::Config;
use driftlock_inspect::content::{ApiStyle, BodyParser, Sink, Unit};
use driftlock_inspect::session::Plugin;
use serde_json::Value;

/// Texts that are measured at once, at most.
const MAX_TEXTS: usize = 300;
const DICTIONARY_BYTES: usize = 112 << 10;

/// A piece of work that gives a number.
pub type Work = Box<dyn FnMut() -> u64>;

/// One hot path.
pub struct HotPath {
    /// Its name: `what/texts`.
    pub name: String,
    /// Bytes of text that one run takes.
    pub bytes: u64,
    /// The path.
    pub run: Work,
    /// What it has to give, found the plain way.
    pub expected: u64,
    /// What it is compared with: a name, and work over the same bytes.
    pub beside: (&'static str, Work),
}

impl HotPath {
    /// Runs it once.
    ///
    /// # Panics
    /// If the answer is wrong.
    pub fn check(&mut self) {
        let got = (self.run)();
        assert_eq!(got, self.expected, "{} gives another answer than the plain way", self.name);
    }
}

/// Texts of one kind, split for training and measuring.
struct Corpus {
    name: &'static str,
    train: Vec<Vec<u8>>,
    texts: Vec<Vec<u8>>,
}

impl Corpus {
    fn split(name: &'static str, mut texts: Vec<Vec<u8>>) -> Self {
        texts.iter_mut().for_each(|text| text.truncate(16_384));
        texts.retain(|text| !text.is_empty());
        let mut rest = texts.split_off(texts.len() * 7 / 10);
        rest.truncate(MAX_TEXTS);
        Self { name, train: texts, texts: rest }
    }

    fn bytes(&self) -> u64 {
        self.texts.iter().map(|text| text.len() as u64).sum()
    }

    /// Over the training texts, uncalibrated.
    fn baseline(&self) -> StreamBaseline {
        let options = TrainingOptions { max_ngrams: 1 << 23, ..TrainingOptions::default() };
        let mut trainer = StreamTrainer::new(options);
        let message = |text: &Vec<u8>| vec![("body", text.clone())];
        let (train, tune) = self.train.split_at(self.train.len() * 9 / 10);
        train.iter().for_each(|text| trainer.train(&message(text)));
        let held_out: Vec<_> = tune.iter().map(message).collect();
        trainer.freeze().tune("bench", &held_out)
    }

    /// Level 3, a prepared dictionary of the newest training texts, a reused context.
    fn zstd(&self) -> Work {
        let mut dictionary: Vec<u8> = Vec::new();
        for text in self.train.iter().rev() {
            if dictionary.len() + text.len() <= DICTIONARY_BYTES {
                dictionary.extend_from_slice(text);
            }
        }
        let prepared = zstd::dict::EncoderDictionary::copy(&dictionary, 3);
        let texts = self.texts.clone();
        let mut buffer = vec![0u8; zstd::zstd_safe::compress_bound(16_384)];
        // The dictionary's contents are copied into it: it may live as long as the program.
        let prepared: &'static zstd::dict::EncoderDictionary<'static> = Box::leak(Box::new(prepared));
        let mut compressor =
            zstd::bulk::Compressor::with_prepared_dictionary(prepared).expect("a prepared dictionary");
        Box::new(move || {
            let sizes = texts.iter().map(|text| {
                compressor
                    .compress_to_buffer(text, buffer.as_mut_slice())
                    .expect("the buffer is large enough")
            });
            sizes.sum::<usize>() as u64
        })
    }

    /// One pass over the bytes with a table: the least that a path over them can cost.
    fn one_pass(&self) -> Work {
        let texts = self.texts.clone();
        let table: Vec<u64> = (0..256).map(|byte| byte * 37 % 101).collect();
        Box::new(move || texts.iter().flatten().map(|&byte| table[usize::from(byte)]).sum())
    }
}

/// From the evaluation data, where it is there.
fn recorded() -> Vec<Corpus> {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/data");
    let rows = |file: &str, most: usize| {
        let rows = capture::exchanges(&data.join(file)).ok()?;
        let normal = rows.filter_map(Result::ok).map(|recorded| recorded.exchange);
        Some(normal.filter(|exchange| exchange.label == "normal").take(most).collect::<Vec<_>>())
    };
    let mut all = Vec::new();
    for (name, file, most) in
        [("torpeda", "torpeda_dev.jsonl.gz", 4000), ("llm", "llm_exchanges.jsonl.gz", 1800)]
    {
        let Some(exchanges) = rows(file, most) else { continue };
        all.push(Corpus::split(name, exchanges.into_iter().map(|exchange| exchange.request.body).collect()));
    }
    all
}

/// All of them; the names say over which texts.
pub fn paths() -> Vec<HotPath> {
    let mut paths = generated_paths();
    recorded().iter().for_each(|corpus| over_texts(corpus, &mut paths));
    paths
}

/// Those over generated texts, which everybody has.
pub fn generated_paths() -> Vec<HotPath> {
    let traffic = generate(&SynthOptions { count: 800, ..SynthOptions::default() });
    let traffic: Vec<Exchange> = traffic.into_iter().map(|labelled| labelled.exchange).collect();
    let bodies = traffic.iter().map(|exchange| exchange.request.body.clone());
    let mut paths = Vec::new();
    over_texts(&Corpus::split("generated", bodies.collect()), &mut paths);
    parsers(&mut paths);
    paths.push(permutation());
    paths.push(conversation(traffic));
    paths
}

fn normalised(text: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut normaliser = Normaliser::new(DEFAULT_NORMALISED);
    normaliser.push(text, 0, &mut |piece| out.extend_from_slice(piece.text));
    normaliser.finish(&mut |piece| out.extend_from_slice(piece.text));
    out
}

fn over_texts(corpus: &Corpus, paths: &mut Vec<HotPath>) {
    let baseline: &'static StreamBaseline = Box::leak(Box::new(corpus.baseline()));
    let unit = baseline.unit("body").expect("the corpus has bodies");
    let model = &unit.model;
    let mut push = |what: &str, run: Work, expected: u64, beside: (&'static str, Work)| {
        let name = format!("{what}/{}", corpus.name);
        paths.push(HotPath { name, bytes: corpus.bytes(), run, expected, beside });
    };

    let texts = corpus.texts.clone();
    let cost = move |step: usize| -> u64 {
        let mut block = Block::default();
        let of_text = |text: &Vec<u8>| {
            let mut state = model.coder.start();
            let mut sum = 0;
            for piece in text.chunks(step) {
                let mut rest = piece;
                while !rest.is_empty() {
                    let taken = model.coder.cost_block(&mut state, rest, &mut block);
                    sum += block.costs().iter().map(|&cost| u64::from(cost)).sum::<u64>();
                    rest = &rest[taken..];
                }
            }
            sum
        };
        texts.iter().map(of_text).sum()
    };
    let expected = cost(1);
    push("coder", Box::new(move || cost(usize::MAX)), expected, ("zstd -3 with dictionary", corpus.zstd()));

    let texts = corpus.texts.clone();
    let words = move |step: usize| -> u64 {
        let of_text = |text: &Vec<u8>| {
            let mut tracker = WordTracker::default();
            text.chunks(step).for_each(|piece| tracker.push(&model.vocabulary, piece, false));
            tracker.push(&model.vocabulary, &[], true);
            let tally = tracker.tally();
            u64::from(tally.words)
                + 1000 * u64::from(tally.new_words)
                + 1_000_000 * u64::from(tally.new_pairs)
        };
        texts.iter().map(of_text).sum()
    };
    let expected = words(1);
    push("words", Box::new(move || words(usize::MAX)), expected, ("one pass", corpus.one_pass()));

    let texts = corpus.texts.clone();
    let expected = texts
        .iter()
        .map(|text| {
            // In pieces of one byte.
            let mut bytes = 0;
            let mut normaliser = Normaliser::new(DEFAULT_NORMALISED);
            for (offset, byte) in (0..).zip(text) {
                normaliser.push(&[*byte], offset, &mut |piece| bytes += piece.text.len() as u64);
            }
            normaliser.finish(&mut |piece| bytes += piece.text.len() as u64);
            bytes
        })
        .sum();
    let normalise = move || texts.iter().map(|text| normalised(text).len() as u64).sum();
    push("normalise", Box::new(normalise), expected, ("one pass", corpus.one_pass()));

    let texts = corpus.texts.clone();
    let score = move |step: usize| -> u64 {
        // New every time: no text may be known from the round before.
        let mut scratch = Scratch::default();
        let of_text = |text: &Vec<u8>| {
            let mut scorer = UnitScorer::new(model);
            let mut offset = 0;
            for piece in text.chunks(step) {
                scorer.push(model, piece, offset, &mut scratch);
                offset += piece.len() as u64;
            }
            unit.ranges.statistic(&scorer.finish(model, &mut scratch)).unsigned_abs()
        };
        texts.iter().map(of_text).fold(0, u64::wrapping_add)
    };
    let expected = score(1);
    push("score", Box::new(move || score(usize::MAX)), expected, ("zstd -3 with dictionary", corpus.zstd()));
}

/// Adds up what a parser finds.
#[derive(Default)]
struct Count(u64);

impl Sink for Count {
    fn text(&mut self, _: Unit, text: &[u8], _: u64) {
        self.0 += text.len() as u64;
    }

    fn end(&mut self, _: Unit) {
        self.0 += 1_000_000;
    }

    fn skipped(&mut self, _: Unit, bytes: u64) {
        self.0 += bytes << 40;
    }
}

fn parsers(paths: &mut Vec<HotPath>) {
    let words = "The order of the twelfth has left the warehouse, and \\\"tomorrow\\\" it is with you.\\n";
    let message =
        |role: &str, times: usize| format!(r#"{{"role":"{role}","content":"{}"}}"#, words.repeat(times));
    let messages = [message("system", 8), message("user", 6), message("assistant", 10), message("user", 20)];
    let request = format!(r#"{{"model":"gpt-x","stream":true,"messages":[{}]}}"#, messages.join(","));
    let event = |i: usize| {
        format!(
            "data: {{\"id\":\"chatcmpl-1\",\"object\":\"chat.completion.chunk\",\"created\":1,\"choices\":[{{\"index\":0,\"delta\":{{\"content\":\" word{i}\"}},\"finish_reason\":null}}]}}\n\n"
        )
    };
    let stream: String = (0..40).map(event).collect::<String>() + "data: [DONE]\n\n";
    let form =
        "name=Jos%C3%A9+Garc%C3%ADa&street=Calle+Mayor+5&note=".to_owned() + &"plain+words+".repeat(300);
    type Make = fn() -> BodyParser;
    let bodies: [(&str, String, Make); 3] = [
        ("json", request, || {
            BodyParser::for_request(b"/v1/chat/completions", Some(b"application/json")).expect("a parser")
        }),
        ("sse", stream, || {
            let style = ApiStyle::of_path(b"/v1/chat/completions");
            BodyParser::for_response(style, Some(b"text/event-stream")).expect("a parser")
        }),
        ("form", form, || {
            BodyParser::for_request(b"/orders", Some(b"application/x-www-form-urlencoded")).expect("a parser")
        }),
    ];
    for (what, body, make) in bodies {
        let parse = move |body: &str, step: usize| {
            let (mut parser, mut count) = (make(), Count::default());
            body.as_bytes().chunks(step).for_each(|piece| parser.push(piece, &mut count));
            let _ = parser.finish(&mut count);
            count.0
        };
        let expected = parse(&body, 1);
        assert!(expected > 0, "the {what} parser finds nothing");
        let text = body.clone();
        let beside: (&'static str, Work) = match what {
            "form" => ("one pass", Box::new(move || text.bytes().map(u64::from).sum())),
            // The data of events, each a text of its own.
            _ => (
                "serde_json",
                Box::new(move || {
                    let parts = text.split("data: ").map(str::trim);
                    parts.filter(|part| serde_json::from_str::<serde_json::Value>(part).is_ok()).count()
                        as u64
                }),
            ),
        };
        let bytes = body.len() as u64;
        let run = Box::new(move || parse(&body, usize::MAX));
        paths.push(HotPath { name: format!("{what}/chat"), bytes, run, expected, beside });
    }
}

/// Turns of the conversation.
const TURNS: usize = 40;

/// A conversation whose requests have all that was said before, beside one where each is read whole.
fn conversation(traffic: Vec<Exchange>) -> HotPath {
    let mut train_on = traffic;
    train_on.retain(|exchange| exchange.request.target == "/v1/chat/completions");
    let said = train_on.split_off(train_on.len().saturating_sub(TURNS));
    let config = |fields: &str| Config::parse(fields.as_bytes()).expect("a configuration");
    let snapshot =
        train(train_on, config(r#"{"alpha": 0.02}"#), 0).expect("enough chats to learn from").snapshot;
    let messages = said.iter().filter_map(|exchange| {
        let body: Value = serde_json::from_slice(&exchange.request.body).ok()?;
        Some(body["messages"].as_array()?.last()?.to_string())
    });
    let messages: Vec<String> = messages.collect();
    assert_eq!(messages.len(), TURNS, "too few chats are generated");
    let requests: Vec<Exchange> = said
        .iter()
        .zip(1..)
        .map(|(exchange, turn)| {
            let body = format!(r#"{{"model":"m","messages":[{}]}}"#, messages[..turn].join(","));
            let mut exchange = Exchange { response: None, ..exchange.clone() };
            exchange.request.body = body.into_bytes();
            exchange
        })
        .collect();
    let bytes = requests.iter().map(|exchange| exchange.request.body.len() as u64).sum();
    let talk = move |fields: &str| -> u64 {
        // New every time: nothing may be known from the conversation before.
        let mut plugin = Plugin::new(Config { snapshot: snapshot.clone(), ..config(fields) });
        let verdicts = requests.iter().map(|exchange| {
            let verdict = native::inspect(&mut plugin, exchange).request.unwrap_or_default();
            verdict.bytes().fold(0, |sum: u64, byte| sum.wrapping_mul(31).wrapping_add(byte.into()))
        });
        verdicts.fold(0, u64::wrapping_add)
    };
    let (reused, anew) = (talk.clone(), talk);
    const ANEW: &str = r#"{"alpha": 0.02, "reuse_scores": false}"#;
    let expected = anew(ANEW);
    HotPath {
        name: "conversation/generated".to_owned(),
        bytes,
        run: Box::new(move || reused(r#"{"alpha": 0.02}"#)),
        expected,
        beside: ("each request read whole", Box::new(move || anew(ANEW))),
    }
}

/// A verdict of 1,000 permutations over 450 scores; its bytes are the scores'.
fn permutation() -> HotPath {
    let score = |i: u64| (i.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 44) as i64;
    let scores: Vec<i64> = (0..450).map(score).collect();
    let seed = Seed::derive("bench", 1, &[7; 32]);
    let test = move |scores: &[i64]| {
        let outcome = permutation_test(&scores[..400], &scores[400..], DEFAULT_PERMUTATIONS, &seed);
        outcome.map_or(0, |outcome| u64::from(outcome.p.rank))
    };
    // Adding the same to every score changes no rank.
    let moved: Vec<i64> = scores.iter().map(|score| score + 12_345).collect();
    let expected = test(&moved);
    let sums = scores.clone();
    HotPath {
        name: "permutation/450".to_owned(),
        bytes: 450 * 8,
        run: Box::new(move || test(&scores)),
        expected,
        beside: (
            "1,000 sums of the scores",
            Box::new(move || {
                (0..u64::from(DEFAULT_PERMUTATIONS))
                    .map(|i| sums.iter().fold(i, |sum, &score| sum.wrapping_add(score as u64)))
                    .fold(0, |all, sum| all ^ std::hint::black_box(sum))
            }),
        ),
    }
}
