//! Undoing content codings: every split gives the same bytes and the same end, bounds hold, and what an
//! independent decoder takes whole is taken here with the same result (damaged zstd frames excepted, see
//! below).
//!
//! The body is arbitrary bytes, or a text that a real encoder encoded and a few bytes of which were then
//! changed: noise alone seldom gets past a header.

use std::io::{Read as _, Write as _};
use std::ops::ControlFlow;

use driftlock_inspect::decode::{Budget, Coding, DecodeError, Decoder, Limits, RATIO_FREE_BYTES};

use crate::input::{Cuts, Input};

const CODINGS: [Coding; 4] = [Coding::Gzip, Coding::Deflate, Coding::Brotli, Coding::Zstd];
/// Longest text.
const MAX_TEXT_BYTES: usize = 1 << 20;

/// See the module.
pub fn holds(data: &[u8]) {
    let mut input = Input::new(data);
    let coding = input.pick(&CODINGS);
    let choice = input.byte();
    let room = input.pick(&[64 << 20, 64 << 20, 300_000, 60_000, 0]);
    let max_ratio = input.pick(&[1 << 30, 200, 3]);
    let cuts = input.cuts();
    let damage: Vec<(usize, u8)> = (0..choice >> 6).map(|_| (input.u16(), input.byte())).collect();
    let repeats = input.u16();
    let rest = input.rest(1 << 16);
    let mut body = rest.to_vec();
    let whole_frame = choice & 1 == 0 && damage.is_empty();
    if choice & 1 == 0 {
        let text = rest.repeat((repeats % 512).min(MAX_TEXT_BYTES / rest.len().max(1)));
        body = encoded(coding, &text, choice);
        for (at, value) in damage {
            let at = at % body.len().max(1);
            if let Some(byte) = body.get_mut(at) {
                *byte = value;
            }
        }
    }
    let limits = || Limits { max_ratio, budget: Budget::new(room) };
    let whole = decoded(coding, &body, Cuts::default(), &limits());
    assert_eq!(decoded(coding, &body, cuts, &limits()), whole, "the split decides");
    let (out, result) = whole;
    let most = (body.len() as u64).saturating_mul(u64::from(max_ratio)).max(RATIO_FREE_BYTES);
    assert!(out.len() as u64 <= most, "{} bytes from {}", out.len(), body.len());
    // A zstd frame damaged on purpose without a checksum: libzstd and ruzstd may read it differently, which
    // is a known weakness (DECISIONS.md).
    if coding == Coding::Zstd && !whole_frame {
        return;
    }
    if let Some(expected) = oracle(coding, &body, MAX_TEXT_BYTES) {
        match result {
            Ok(()) => assert!(out == expected, "{coding:?}: other bytes than the oracle's"),
            Err(DecodeError::Ratio | DecodeError::Memory) => {
                assert!(expected.starts_with(&out), "{coding:?}: not the oracle's first bytes");
            }
            // What follows its end, the oracle may not look at.
            Err(DecodeError::Malformed) if coding == Coding::Brotli => assert!(out == expected),
            Err(error) => panic!("{coding:?}: the oracle takes it, here it is {error}"),
        }
    }
}

fn decoded(
    coding: Coding,
    body: &[u8],
    cuts: Cuts<'_>,
    limits: &Limits,
) -> (Vec<u8>, Result<(), DecodeError>) {
    let mut out = Vec::new();
    let mut sink = |piece: &[u8]| {
        out.extend_from_slice(piece);
        ControlFlow::Continue(())
    };
    let result = Decoder::new(&[coding], limits).and_then(|mut decoder| {
        for range in cuts.of(body.len()) {
            decoder.push(&body[range], &mut sink)?;
        }
        decoder.finish(&mut sink)
    });
    assert_eq!(limits.budget.used_bytes(), 0, "a lease is left");
    (out, result)
}

fn encoded(coding: Coding, text: &[u8], choice: u8) -> Vec<u8> {
    let level = u32::from(choice >> 1 & 7) + 1;
    let compression = flate2::Compression::new(level);
    match coding {
        Coding::Gzip => {
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), compression);
            encoder.write_all(text).expect("memory");
            encoder.finish().expect("memory")
        }
        Coding::Deflate if choice & 16 == 0 => {
            let mut encoder = flate2::write::ZlibEncoder::new(Vec::new(), compression);
            encoder.write_all(text).expect("memory");
            encoder.finish().expect("memory")
        }
        Coding::Deflate => {
            let mut encoder = flate2::write::DeflateEncoder::new(Vec::new(), compression);
            encoder.write_all(text).expect("memory");
            encoder.finish().expect("memory")
        }
        Coding::Brotli => {
            let mut encoder = brotli::CompressorWriter::new(Vec::new(), 4096, level, 10 + level * 2);
            encoder.write_all(text).expect("memory");
            encoder.into_inner()
        }
        Coding::Zstd => {
            let mut encoder = zstd::Encoder::new(Vec::new(), level as i32).expect("memory");
            encoder.include_checksum(choice & 16 == 0).expect("before the first byte");
            for piece in text.chunks(9000) {
                encoder.write_all(piece).expect("memory");
                encoder.flush().expect("memory");
            }
            encoder.finish().expect("memory")
        }
    }
}

/// What an independent decoder makes of the body, if it takes it to its end. `brotli` decodes with the
/// same crate, but in one piece.
fn oracle(coding: Coding, body: &[u8], most: usize) -> Option<Vec<u8>> {
    let mut out = Vec::new();
    let mut take = |reader: &mut dyn std::io::Read| {
        reader.take(most as u64 + 1).read_to_end(&mut out).ok().filter(|&length| length <= most)
    };
    match coding {
        Coding::Gzip => take(&mut flate2::read::MultiGzDecoder::new(body)),
        Coding::Deflate => {
            let mut decoder = flate2::Decompress::new(true);
            out.reserve(most);
            let status = decoder.decompress_vec(body, &mut out, flate2::FlushDecompress::Finish).ok()?;
            let whole = status == flate2::Status::StreamEnd && decoder.total_in() == body.len() as u64;
            return whole.then_some(out);
        }
        Coding::Brotli => {
            let mut decoder = brotli::Decompressor::new(body, 1 << 16);
            take(&mut decoder)
        }
        Coding::Zstd => take(&mut zstd::Decoder::new(body).ok()?),
    }?;
    Some(out)
}
