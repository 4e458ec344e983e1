//! What is measured: short HTTP messages, LLM bodies, LLM exchanges.
//!
//! From the evaluation data where it is there (torpeda_dev: about 300 bytes; llm_exchanges), else from the
//! generator. The two give different figures, so the report names which it was.
//!
//! Cost: the data's two files in memory.

use std::collections::HashSet;
use std::path::Path;

use driftlock_engine::adapters::router::ContentKind;

use super::BenchError;
use crate::capture::{self, Exchange};
use crate::eval::protocol::{MAX_TEXT_BYTES, Sample, Set, Split};
use crate::synth::{self, SynthOptions};

/// Short messages are nearest to this size, in bytes.
const SHORT_BYTES: usize = 300;
const SHORT_MESSAGES: usize = 4000;
/// Texts of LLM bodies, at most: what fits into the time.
const LLM_BODIES: usize = 1600;

/// The texts, split by the protocol of `driftlock eval`.
pub(super) struct Corpora {
    /// Whole requests: line, headers, body.
    pub(super) short: Split,
    /// Bodies of LLM requests and answers.
    pub(super) llm: Split,
    /// LLM exchanges.
    pub(super) exchanges: Vec<Exchange>,
    /// `data` or `synth`.
    pub(super) source: &'static str,
}

impl Corpora {
    /// From the evaluation data's folder; without it from the generator.
    pub(super) fn load(data: &Path) -> Result<Self, BenchError> {
        let short = data.join("torpeda_dev.jsonl.gz");
        let llm = data.join("llm_exchanges.jsonl.gz");
        if !(short.is_file() && llm.is_file()) {
            return Self::generated();
        }
        let exchanges = capture::exchanges(&llm)?.filter_map(Result::ok).map(|recorded| recorded.exchange);
        let exchanges: Vec<Exchange> = exchanges.collect();
        Ok(Self {
            short: Set::read(&short)?.split(&short, 0)?,
            llm: bodies(&exchanges).split(&llm, 0)?,
            exchanges,
            source: "data",
        })
    }

    fn generated() -> Result<Self, BenchError> {
        let traffic = synth::generate(&SynthOptions { count: 12_000, ..SynthOptions::default() });
        let (chats, calls): (Vec<_>, Vec<_>) =
            traffic.into_iter().partition(|labelled| labelled.exchange.request.target.contains("/v1/"));
        let mut requests: Vec<Vec<u8>> = calls
            .iter()
            .map(|labelled| {
                let request = &labelled.exchange.request;
                let start = format!("{} {} HTTP/1.1", request.method, request.target);
                synth::raw_message(&start, &request.headers, &request.body).into_bytes()
            })
            .collect();
        requests.sort_by_key(|text| text.len().abs_diff(SHORT_BYTES));
        requests.truncate(SHORT_MESSAGES);
        let exchanges: Vec<Exchange> =
            chats.into_iter().map(|labelled| labelled.exchange).take(1800).collect();
        let name = Path::new("generated traffic");
        Ok(Self {
            short: set(requests).split(name, 0)?,
            llm: bodies(&exchanges).split(name, 0)?,
            exchanges,
            source: "synth",
        })
    }
}

fn bodies(exchanges: &[Exchange]) -> Set {
    let response = |exchange: &Exchange| exchange.response.as_ref().map(|response| response.body.clone());
    let both =
        exchanges.iter().flat_map(|exchange| [Some(exchange.request.body.clone()), response(exchange)]);
    let mut texts: Vec<Vec<u8>> = both.flatten().filter(|body| !body.is_empty()).collect();
    // Neighbours are of one conversation: take them from everywhere.
    let step = texts.len().div_ceil(LLM_BODIES).max(1);
    texts = texts.into_iter().step_by(step).collect();
    set(texts)
}

fn set(texts: Vec<Vec<u8>>) -> Set {
    let mut seen = HashSet::new();
    let mut normals = Vec::new();
    for mut text in texts {
        text.truncate(MAX_TEXT_BYTES);
        if seen.insert(text.clone()) {
            normals.push(Sample::new("normal".to_owned(), ContentKind::Http, text));
        }
    }
    Set { normals, attacks: Vec::new() }
}
