//! Against the encoders of `flate2`, `brotli` and `zstd`, for every split.

use alloc::format;
use std::vec;

use flate2::Compression;
use flate2::write::{DeflateEncoder, GzEncoder, ZlibEncoder};
use proptest::prelude::*;

use super::*;

fn limits() -> Limits {
    Limits { max_ratio: 200, budget: Budget::new(64 << 20) }
}

/// What comes out of `body`, cut into pieces of `lengths` over and over.
fn decoded(
    codings: &[Coding],
    body: &[u8],
    lengths: &[usize],
    limits: &Limits,
) -> (Vec<u8>, Result<(), DecodeError>) {
    let mut out = Vec::new();
    let mut sink = |piece: &[u8]| {
        assert!(!piece.is_empty());
        out.extend_from_slice(piece);
        ControlFlow::Continue(())
    };
    let mut decoder = match Decoder::new(codings, limits) {
        Ok(decoder) => decoder,
        Err(error) => return (out, Err(error)),
    };
    let mut rest = body;
    for &length in lengths.iter().cycle().take_while(|_| !body.is_empty()) {
        let (piece, after) = rest.split_at(length.clamp(1, rest.len()));
        // An error comes back from finish, too.
        let _ = decoder.push(piece, &mut sink);
        rest = after;
        if rest.is_empty() {
            break;
        }
    }
    let result = decoder.finish(&mut sink);
    assert!(decoder.decoded_bytes() >= out.len() as u64);
    assert_eq!(decoder.finish(&mut |_| ControlFlow::Continue(())), result);
    (out, result)
}

fn gzip(text: &[u8], level: u32, flush_every: usize) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::new(level));
    write(&mut encoder, text, flush_every);
    encoder.finish().unwrap()
}

fn write(encoder: &mut impl std::io::Write, text: &[u8], flush_every: usize) {
    for piece in text.chunks(flush_every.max(1)) {
        encoder.write_all(piece).unwrap();
        if piece.len() < text.len() {
            encoder.flush().unwrap();
        }
    }
}

fn zlib(text: &[u8], level: u32, flush_every: usize) -> Vec<u8> {
    let mut encoder = ZlibEncoder::new(Vec::new(), Compression::new(level));
    write(&mut encoder, text, flush_every);
    encoder.finish().unwrap()
}

fn raw(text: &[u8], level: u32, flush_every: usize) -> Vec<u8> {
    let mut encoder = DeflateEncoder::new(Vec::new(), Compression::new(level));
    write(&mut encoder, text, flush_every);
    encoder.finish().unwrap()
}

fn br(text: &[u8], level: u32, flush_every: usize) -> Vec<u8> {
    let window = [22, 10, 16, 24][level as usize % 4];
    let mut encoder = ::brotli::CompressorWriter::new(Vec::new(), 4096, level.min(9), window);
    write(&mut encoder, text, flush_every);
    encoder.into_inner()
}

fn zstd(text: &[u8], level: u32, flush_every: usize) -> Vec<u8> {
    let mut encoder = ::zstd::Encoder::new(Vec::new(), level as i32).unwrap();
    encoder.include_checksum(level % 2 == 1).unwrap();
    encoder.window_log([10, 17, 21][level as usize % 3]).unwrap();
    write(&mut encoder, text, flush_every);
    encoder.finish().unwrap()
}

fn encode(coding: Coding, text: &[u8], level: u32, flush_every: usize) -> Vec<u8> {
    match coding {
        Coding::Gzip => gzip(text, level, flush_every),
        Coding::Deflate if level.is_multiple_of(2) => zlib(text, level, flush_every),
        Coding::Deflate => raw(text, level, flush_every),
        Coding::Brotli => br(text, level, flush_every),
        Coding::Zstd => zstd(text, level, flush_every),
    }
}

const ALL: [Coding; 4] = [Coding::Gzip, Coding::Deflate, Coding::Brotli, Coding::Zstd];

/// Text that compresses like JSON.
fn text(seed: u32, bytes: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9) | 1;
    let mut out = Vec::new();
    while out.len() < bytes {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        match state % 4 {
            0 => out.extend_from_slice(format!("{{\"id\":{state},\"role\":\"user\"}}").as_bytes()),
            1 => out.extend_from_slice(&state.to_le_bytes()),
            2 => out.extend_from_slice(b"the quick brown fox jumps over the lazy dog "),
            // From far back.
            _ => {
                let from = state as usize % (out.len() + 1);
                let copy = out[from..(from + 100).min(out.len())].to_vec();
                out.extend_from_slice(&copy);
            }
        }
    }
    out.truncate(bytes);
    out
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn every_coding_split_and_stack_gives_the_text(
        seed in any::<u32>(),
        bytes in prop_oneof![0usize..400, 0usize..60_000],
        level in 1u32..10,
        flush_every in prop_oneof![1usize..80, 1000usize..100_000],
        stack in prop::collection::vec(0usize..4, 1..4),
        lengths in prop::collection::vec(prop_oneof![1usize..4, 1usize..40_000], 1..6),
    ) {
        let text = text(seed, bytes);
        let stack: Vec<Coding> = stack.into_iter().map(|i| ALL[i]).collect();
        let flush_every = flush_every.max(bytes / 200);
        let body = stack.iter().fold(text.clone(), |body, &coding| encode(coding, &body, level, flush_every));
        let (out, result) = decoded(&stack, &body, &lengths, &limits());
        prop_assert_eq!(result, Ok(()));
        prop_assert!(out == text, "{:?}", stack);
    }

    #[test]
    fn damage_is_the_same_for_every_split(
        seed in any::<u32>(),
        bytes in 1usize..20_000,
        level in 1u32..10,
        coding in 0usize..4,
        at in any::<prop::sample::Index>(),
        value in any::<u8>(),
        cut in prop_oneof![Just(0usize), 0usize..200],
        room in prop_oneof![Just(64usize << 20), 0usize..200_000],
        lengths in prop::collection::vec(1usize..300, 1..6),
    ) {
        let coding = ALL[coding];
        let mut body = encode(coding, &text(seed, bytes), level, 997);
        let at = at.index(body.len());
        body[at] = value;
        body.truncate(body.len().saturating_sub(cut));
        let limits = || Limits { max_ratio: 10, budget: Budget::new(room) };
        let whole = decoded(&[coding], &body, &[usize::MAX], &limits());
        prop_assert_eq!(&decoded(&[coding], &body, &[1], &limits()), &whole);
        prop_assert_eq!(&decoded(&[coding], &body, &lengths, &limits()), &whole);
    }

    #[test]
    fn noise_does_no_harm(body in prop::collection::vec(any::<u8>(), 0..600), prefix in 0usize..5) {
        let prefix: &[u8] =
            [&b""[..], b"\x1f\x8b\x08\x1f\0\0\0\0\0\0", b"\x28\xb5\x2f\xfd", b"\x78\x9c", b"\x1b"][prefix];
        let body = [prefix, &body].concat();
        for coding in ALL {
            let whole = decoded(&[coding], &body, &[usize::MAX], &limits());
            prop_assert_eq!(&decoded(&[coding], &body, &[1], &limits()), &whole);
        }
    }
}

#[test]
fn headers_are_read_as_lists() {
    assert_eq!(codings(b" GZIP , br,identity,, zstd"), Ok(vec![Coding::Gzip, Coding::Brotli, Coding::Zstd]));
    assert_eq!(codings(b"x-gzip, deflate"), Ok(vec![Coding::Gzip, Coding::Deflate]));
    assert_eq!(codings(b"identity"), Ok(vec![]));
    assert_eq!(codings(b"gzip, compress\""), Err(Unknown("compress".into())));
    assert_eq!(codings(b"gzip,gzip,gzip,gzip"), Ok(vec![Coding::Gzip; 4]));
    assert_eq!(codings(b"gzip,gzip,gzip,gzip,gzip"), Err(Unknown("too_many".into())));
}

#[test]
fn members_and_frames_follow_each_other_and_nothing_else_does() {
    let parts = [&b"one "[..], b"", b"two"];
    let all =
        |encode: &dyn Fn(&[u8]) -> Vec<u8>| parts.iter().flat_map(|part| encode(part)).collect::<Vec<u8>>();
    let gzipped = all(&|part| gzip(part, 6, 9999));
    assert_eq!(decoded(&[Coding::Gzip], &gzipped, &[3], &limits()), (b"one two".to_vec(), Ok(())));
    let mut frames = all(&|part| zstd(part, 3, 9999));
    frames.extend_from_slice(&[
        0x57, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 1, 2, 3, 0x50, 0x2a, 0x4d, 0x18, 0, 0, 0, 0,
    ]);
    assert_eq!(decoded(&[Coding::Zstd], &frames, &[3], &limits()), (b"one two".to_vec(), Ok(())));
    for coding in ALL {
        for level in [1, 2] {
            let mut body = encode(coding, b"text", level, 9999);
            body.extend_from_slice(b"more");
            let expected = (b"text".to_vec(), Err(DecodeError::Malformed));
            assert_eq!(decoded(&[coding], &body, &[1], &limits()), expected, "{coding:?}");
        }
        assert_eq!(decoded(&[coding], b"", &[1], &limits()), (vec![], Ok(())));
    }
}

#[test]
fn a_gzip_header_may_have_every_part() {
    let body = gzip(b"text", 6, 9999);
    for flags in 0u8..32 {
        let mut full = body[..10].to_vec();
        full[3] = flags;
        for (flag, part) in [(4, &b"\x03\0abc"[..]), (8, b"name\0"), (16, b"comment\0"), (2, b"\x12\x34")] {
            if flags & flag != 0 {
                full.extend_from_slice(part);
            }
        }
        full.extend_from_slice(&body[10..]);
        for lengths in [[1], [usize::MAX]] {
            let expected = (b"text".to_vec(), Ok(()));
            assert_eq!(decoded(&[Coding::Gzip], &full, &lengths, &limits()), expected, "{flags}");
        }
    }
}

/// A streamed answer is flushed event by event; each has to be seen when it comes, but for a cell.
#[test]
fn what_was_flushed_is_seen_at_once() {
    for coding in ALL {
        let mut seen = 0;
        let events: Vec<Vec<u8>> = (0..2000).map(|i| text(i, 500)).collect();
        let body = encode(coding, &events.concat(), 1, 500);
        let mut decoder = Decoder::new(&[coding], &limits()).unwrap();
        let mut first_half = None;
        for (at, cell) in body.chunks(CELL_BYTES).enumerate() {
            let mut sink = |piece: &[u8]| {
                seen += piece.len();
                ControlFlow::Continue(())
            };
            decoder.push(cell, &mut sink).unwrap();
            if at * CELL_BYTES > body.len() / 2 && first_half.is_none() {
                first_half = Some(seen);
            }
        }
        let lag = (events.len() * 500 / 2).saturating_sub(first_half.unwrap());
        // The window of this zstd is 128 KiB and its ring has wrapped; the others give all.
        assert!(lag < if coding == Coding::Zstd { 200_000 } else { 20_000 }, "{coding:?} lags {lag} bytes");
    }
    let body = zstd(&text(7, 100_000), 1, 500);
    let mut seen = 0;
    let mut decoder = Decoder::new(&[Coding::Zstd], &limits()).unwrap();
    let mut sink = |piece: &[u8]| {
        seen += piece.len();
        ControlFlow::Continue(())
    };
    decoder.push(&body[..body.len() - 200], &mut sink).unwrap();
    assert!(seen > 96_000, "within the first window nothing lags: {seen}");
}

#[test]
fn bombs_are_stopped_by_ratio() {
    let zeros = vec![0u8; 32 << 20];
    for coding in ALL {
        let body = encode(coding, &zeros, 9, usize::MAX);
        let budget = Budget::new(64 << 20);
        let limits = Limits { max_ratio: 100, budget: budget.clone() };
        let (out, result) = decoded(&[coding], &body, &[4096], &limits);
        assert_eq!(result, Err(DecodeError::Ratio), "{coding:?} {}", body.len());
        assert!(out.len() <= (RATIO_FREE_BYTES as usize).max(body.len() * 100), "{coding:?} {}", out.len());
        assert_eq!(budget.used_bytes(), 0, "all leases came back");
        // Twice: the inner one is small, what comes of it is not.
        let twice = encode(Coding::Gzip, &body, 9, usize::MAX);
        let (out, result) = decoded(&[coding, Coding::Gzip], &twice, &[4096], &limits);
        assert_eq!(result, Err(DecodeError::Ratio), "{coding:?} twice");
        assert!(out.len() <= (RATIO_FREE_BYTES as usize).max(twice.len() * 100));
    }
}

#[test]
fn memory_is_bounded_over_all_decoders() {
    let body: Vec<Vec<u8>> =
        ALL.iter().map(|&coding| encode(coding, &text(3, 3 << 20), 2, usize::MAX)).collect();
    for (coding, body) in ALL.iter().zip(&body) {
        let budget = Budget::new(400 << 10);
        let limits = Limits { max_ratio: 200, budget: budget.clone() };
        let mut decoders = Vec::new();
        let mut refused = 0;
        for _ in 0..20 {
            let Ok(mut decoder) = Decoder::new(&[*coding], &limits) else {
                refused += 1;
                continue;
            };
            let result = decoder.push(body, &mut |_| ControlFlow::Continue(()));
            assert!(matches!(result, Ok(()) | Err(DecodeError::Memory)), "{coding:?} {result:?}");
            refused += usize::from(result.is_err());
            assert!(budget.used_bytes() <= 400 << 10);
            decoders.push(decoder);
        }
        assert!(refused > 10, "{coding:?}");
        drop(decoders);
        assert_eq!(budget.used_bytes(), 0);
    }
}

#[test]
fn a_window_that_is_only_declared_costs_nothing() {
    // Single-segment frame of 4 GiB - 1, then one of 16 MiB by its window descriptor.
    for header in
        [&[0x28, 0xb5, 0x2f, 0xfd, 0xa0, 0xff, 0xff, 0xff, 0xff][..], &[0x28, 0xb5, 0x2f, 0xfd, 0, 14 << 3]]
    {
        let body = [header, &[0; 20]].concat();
        assert_eq!(decoded(&[Coding::Zstd], &body, &[9], &limits()).1, Err(DecodeError::Memory));
    }
    // 8 MiB declared, 10 bytes there.
    let body = [&[0x28, 0xb5, 0x2f, 0xfd, 0, 13 << 3, 10 << 3 | 1, 0, 0][..], b"0123456789"].concat();
    let small = Limits { max_ratio: 200, budget: Budget::new(600 << 10) };
    assert_eq!(decoded(&[Coding::Zstd], &body, &[1], &small), (b"0123456789".to_vec(), Ok(())));
}

#[test]
fn the_sink_can_break_off() {
    for coding in ALL {
        let body = encode(coding, &text(5, 50_000), 2, usize::MAX);
        let mut decoder = Decoder::new(&[coding], &limits()).unwrap();
        let mut calls = 0;
        let mut sink = |_: &[u8]| {
            calls += 1;
            ControlFlow::Break(())
        };
        // A zstd block may end with the last cell.
        let pushed = decoder.push(&body, &mut sink);
        assert_eq!(decoder.finish(&mut sink), Err(DecodeError::Stopped), "{coding:?}");
        assert!(pushed.is_err() || coding == Coding::Zstd);
        assert_eq!(decoder.push(&body, &mut sink), Err(DecodeError::Stopped));
        assert_eq!(calls, 1);
    }
}
