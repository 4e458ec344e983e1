//! Scoring against zstd level 3 with a 112 KiB dictionary of the same training texts, in one run.
#![allow(missing_docs, reason = "criterion's macros make undocumented functions")]

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use driftlock_benches::{Corpus, corpora};
use driftlock_engine::coder::MAX_COST;

const DICTIONARY_BYTES: usize = 112 << 10;

fn dictionary(corpus: &Corpus) -> Vec<u8> {
    let mut bytes = Vec::new();
    for text in corpus.train.iter().rev() {
        if bytes.len() + text.len() > DICTIONARY_BYTES {
            break;
        }
        bytes.extend_from_slice(text);
    }
    bytes
}

fn score(c: &mut Criterion) {
    for corpus in corpora() {
        let mut group = c.benchmark_group(&corpus.name);
        group.throughput(Throughput::Bytes(corpus.bytes())).sample_size(10);
        let baseline = corpus.baseline();
        let unit = baseline.unit("body").expect("the corpus has bodies");
        let cost = || -> u64 { corpus.score.iter().map(|text| unit.score(text).cost).sum() };
        // The expected answer: byte by byte, without the scorer, and the ends.
        let bytes: u64 = corpus.score.iter().flat_map(|text| unit.costs(text)).map(u64::from).sum();
        let ends = bytes..=bytes + u64::from(MAX_COST) * corpus.score.len() as u64;
        group.bench_function("driftlock score", |b| b.iter(|| assert!(ends.contains(&cost()))));
        let mut zstd =
            zstd::bulk::Compressor::with_dictionary(3, &dictionary(&corpus)).expect("a dictionary");
        let mut buffer = vec![0u8; zstd::zstd_safe::compress_bound(16_384)];
        group.bench_function("zstd -3 with dictionary", |b| {
            b.iter(|| {
                for text in &corpus.score {
                    let size =
                        zstd.compress_to_buffer(text, &mut buffer).expect("the buffer is large enough");
                    assert!(size > 0);
                }
            });
        });
        group.finish();
    }
}

criterion_group!(benches, score);
criterion_main!(benches);
