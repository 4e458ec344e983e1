//! Benchmarks of the hot paths, each beside the thing it is compared with.
//!
//! What: corpora for the benches, generated, or the evaluation data where it is there. Every bench
//! states the answer that it expects, so that a fast wrong result fails.

use std::path::Path;

use driftlock_engine::baseline::{StreamBaseline, StreamTrainer, TrainingOptions};
use driftlock_host::capture;
use driftlock_host::synth::{SynthOptions, generate};

/// Texts of one kind, split for training and scoring.
pub struct Corpus {
    /// What it is.
    pub name: String,
    /// For training.
    pub train: Vec<Vec<u8>>,
    /// For scoring.
    pub score: Vec<Vec<u8>>,
}

impl Corpus {
    fn split(name: &str, mut texts: Vec<Vec<u8>>) -> Self {
        texts.iter_mut().for_each(|text| text.truncate(16_384));
        texts.retain(|text| !text.is_empty());
        let score = texts.split_off(texts.len() * 7 / 10);
        Self { name: name.to_owned(), train: texts, score }
    }

    /// Bytes to score.
    pub fn bytes(&self) -> u64 {
        self.score.iter().map(|text| text.len() as u64).sum()
    }

    /// The baseline over the training texts, uncalibrated.
    pub fn baseline(&self) -> StreamBaseline {
        let mut trainer =
            StreamTrainer::new(TrainingOptions { max_ngrams: 1 << 23, ..TrainingOptions::default() });
        let message = |text: &Vec<u8>| vec![("body", text.clone())];
        let (train, tune) = self.train.split_at(self.train.len() * 9 / 10);
        train.iter().for_each(|text| trainer.train(&message(text)));
        let held_out: Vec<_> = tune.iter().map(message).collect();
        trainer.freeze().tune("bench", &held_out)
    }
}

/// The generator's request bodies; and, where the evaluation data is there, short HTTP messages and
/// recorded LLM bodies.
pub fn corpora() -> Vec<Corpus> {
    let generated = generate(&SynthOptions { count: 1500, ..SynthOptions::default() });
    let bodies = generated.into_iter().map(|labelled| labelled.exchange.request.body).collect();
    let mut all = vec![Corpus::split("generated LLM requests", bodies)];
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/data");
    for (file, name, limit) in
        [("torpeda_dev", "torpeda_dev messages", 6000), ("llm_exchanges", "llm_exchanges bodies", 1800)]
    {
        let Ok(rows) = capture::open(&data.join(format!("{file}.jsonl.gz"))) else { continue };
        let texts = rows.filter_map(Result::ok).filter(|row| row.label == "normal").take(limit);
        let texts = texts.map(|row| match file {
            "llm_exchanges" => row.into_exchange().map(|exchange| exchange.request.body).unwrap_or_default(),
            _ => row.text.into_bytes(),
        });
        all.push(Corpus::split(name, texts.collect()));
    }
    all
}
