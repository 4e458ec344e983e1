//! The adapters against naive uses of their codecs, at the edge of their match windows, and the router
//! against a plain reading of its table. Runs with whatever features are on; `cargo xtask test` runs it
//! with all of them.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]

use driftlock_engine::adapters::router::{ContentKind, DEFAULT_ROUTES, Route, RouteError, Router};
use driftlock_engine::adapters::{Adapter, AdapterError, Compressor};
use driftlock_engine::metrics;
use proptest::prelude::*;

fn built() -> Vec<Box<dyn Compressor>> {
    Adapter::ALL.into_iter().filter_map(|adapter| adapter.compressor().ok()).collect()
}

/// Bytes that no compressor shortens.
fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut x = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        (x.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 56) as u8
    };
    (0..len).map(|_| next()).collect()
}

fn text(len: usize) -> Vec<u8> {
    let line =
        |i: u32| format!("GET /orders/{}?page={} HTTP/1.1\r\n", i.wrapping_mul(2_654_435_761) >> 20, i % 7);
    (0..).flat_map(|i| line(i).into_bytes()).take(len).collect()
}

#[test]
fn what_is_not_built_says_so() {
    for adapter in Adapter::ALL {
        match adapter.compressor() {
            Ok(compressor) => assert_eq!(compressor.adapter(), adapter),
            Err(error) => {
                assert_eq!(error, AdapterError::NotBuilt(adapter));
                assert!(error.to_string().contains(adapter.name()));
            }
        }
        assert_eq!(Adapter::from_name(adapter.name()), Some(adapter));
    }
    assert_eq!(Adapter::from_name("gzip"), None);
    #[cfg(all(feature = "zstd", feature = "openzl", feature = "lz4", feature = "deflate"))]
    assert_eq!(built().len(), Adapter::ALL.len());
}

/// The last bytes of the longest input that is accepted repeat the first ones, and the compressor sees it:
/// the window covers what the guard lets through. One byte more is refused, in each of the three lengths.
#[test]
fn the_window_covers_all_that_is_accepted() {
    const SECRET: usize = 1024;
    for mut compressor in built() {
        let adapter = compressor.adapter();
        // zstd's window is tried at 9 MiB, far beyond the 2 MiB that its level would choose by itself.
        let window = usize::try_from(adapter.match_window_bytes()).unwrap();
        let longest = window.min(9 << 20);
        let secret = noise(SECRET, 1);
        let mut repeated = secret.clone();
        // A filler with few distinct strings: what displaces old positions from the hash tables of a fast
        // compressor is not its window.
        repeated.resize(longest - SECRET, b'.');
        let alone = compressor.code_length_bits(&repeated).unwrap();
        let bits = compressor.joint_bits(&repeated, &secret).unwrap();
        assert!(bits < alone + SECRET as u64, "{adapter}: {bits} bits with the repetition, {alone} without");
        let given = compressor.conditional_bits(&secret, &repeated).unwrap();
        assert!(given < SECRET as u64, "{adapter}: {given} bits of {}", SECRET * 8);

        if longest == window {
            let refused = AdapterError::WindowTooShort {
                adapter,
                needed_bytes: window as u64 + 1,
                window_bytes: window as u64,
            };
            let too_long = vec![b'.'; window + 1];
            assert_eq!(compressor.code_length_bits(&too_long).unwrap_err(), refused);
            assert_eq!(compressor.joint_bits(&too_long[..window], b"x").unwrap_err(), refused);
            assert_eq!(compressor.conditional_bits(b"x", &too_long[..window]).unwrap_err(), refused);
            assert_eq!(compressor.given(&too_long).err().unwrap(), refused);
        }
    }
}

#[test]
fn zstd_refuses_more_than_its_largest_window() {
    let Ok(mut zstd) = Adapter::Zstd.compressor() else { return };
    let window = usize::try_from(Adapter::Zstd.match_window_bytes()).unwrap();
    let zeros = vec![0; window + 1];
    assert!(matches!(zstd.code_length_bits(&zeros), Err(AdapterError::WindowTooShort { .. })));
    // libzstd drops the beginning of a longer dictionary; the beginning of this one is still known.
    let longest = (1 << 24) - 2;
    let refused = zstd.given(&zeros[..=longest]).err().unwrap();
    assert!(
        matches!(refused, AdapterError::WindowTooShort { window_bytes, .. } if window_bytes == longest as u64)
    );
    for len in [(1 << 20) + 1, 3 << 20, longest] {
        let mut baseline = noise(1000, 5);
        baseline.resize(len, b'.');
        let bits = zstd.conditional_bits(&baseline[..1000], &baseline).unwrap();
        assert!(bits < 1000, "{len}: {bits}");
    }
}

#[test]
fn a_baseline_that_looks_like_a_dictionary_is_text() {
    for mut compressor in built() {
        let mut baseline = vec![0x37, 0xA4, 0x30, 0xEC, 1, 0, 0, 0];
        baseline.extend(noise(500, 3));
        let bits = compressor.conditional_bits(&baseline[8..], &baseline).unwrap();
        assert!(bits < 300, "{}: {bits}", compressor.adapter());
    }
}

#[test]
fn known_text_is_near_and_noise_is_far() {
    let (baseline, same, other) = (text(12_000), text(2_000), noise(2_000, 7));
    for mut compressor in built() {
        let name = compressor.adapter();
        let distance = |compressor: &mut dyn Compressor, x: &[u8], y: &[u8]| {
            let (cx, cy) = (compressor.code_length_bits(x).unwrap(), compressor.code_length_bits(y).unwrap());
            metrics::ncd(cx, cy, compressor.joint_bits(x, y).unwrap()).unwrap()
        };
        let near = distance(compressor.as_mut(), &same, &same);
        let far = distance(compressor.as_mut(), &same, &other);
        assert!(near < 0.35 && (0.9..1.1).contains(&far), "{name}: {near} {far}");
        let (cx, cy) =
            (compressor.code_length_bits(&baseline).unwrap(), compressor.code_length_bits(&same).unwrap());
        assert!(compressor.joint_bits(&baseline, &same).unwrap() < cx + cy, "{name}: C(xy) for {cx} + {cy}");
        let mut given = compressor.given(&baseline).unwrap();
        let (same, other) = (given.code_length_bits(&same).unwrap(), given.code_length_bits(&other).unwrap());
        assert!(same * 30 < other, "{name}: {same} {other}");
    }
}

#[test]
fn an_empty_text_costs_next_to_nothing() {
    for mut compressor in built() {
        let name = compressor.adapter();
        assert!(compressor.code_length_bits(b"").unwrap() <= 24, "{name}");
        assert!(compressor.conditional_bits(b"", b"").unwrap() <= 24, "{name}");
        assert!(compressor.conditional_bits(b"", &text(1000)).unwrap() <= 24, "{name}");
        assert_eq!(
            compressor.conditional_bits(b"abcabcabc", b"").unwrap(),
            compressor.given(b"").unwrap().code_length_bits(b"abcabcabc").unwrap()
        );
    }
}

/// The codecs used in the plainest way, for the same length.
mod naive {
    #[cfg(feature = "deflate")]
    pub(crate) fn deflate(text: &[u8]) -> u64 {
        8 * miniz_oxide::deflate::compress_to_vec(text, 6).len() as u64
    }

    /// By flate2's streaming interface, all of its output kept.
    #[cfg(feature = "deflate")]
    pub(crate) fn deflate_given(text: &[u8], baseline: &[u8]) -> u64 {
        use flate2::{Compress, Compression, FlushCompress};
        let mut compress = Compress::new(Compression::new(6), false);
        let mut out = Vec::with_capacity(2 * (text.len() + baseline.len()) + 1000);
        if !baseline.is_empty() {
            compress.compress_vec(baseline, &mut out, FlushCompress::Sync).unwrap();
        }
        let before = compress.total_out();
        compress.compress_vec(text, &mut out, FlushCompress::Finish).unwrap();
        8 * (compress.total_out() - before)
    }

    #[cfg(feature = "lz4")]
    pub(crate) fn lz4(text: &[u8]) -> u64 {
        8 * lz4_flex::block::compress(text).len() as u64
    }

    /// A new context, a frame as others write it, its header read and taken off, the rest decoded.
    #[cfg(feature = "zstd")]
    pub(crate) fn zstd_given(text: &[u8], baseline: &[u8]) -> u64 {
        use zstd_safe::{CCtx, CParameter, DCtx};
        let covered = (text.len() + baseline.len()).max(1024) as u64;
        let log = (0..).find(|log| 1u64 << log >= covered).unwrap();
        let mut context = CCtx::create();
        context.set_parameter(CParameter::CompressionLevel(3)).unwrap();
        context.set_parameter(CParameter::WindowLog(log)).unwrap();
        context.set_parameter(CParameter::ChecksumFlag(true)).unwrap();
        context.load_dictionary(baseline).unwrap();
        let mut frame = vec![0; zstd_safe::compress_bound(text.len())];
        let written = context.compress2(frame.as_mut_slice(), text).unwrap();
        frame.truncate(written);
        let mut decoder = DCtx::create();
        decoder.load_dictionary(baseline).unwrap();
        let mut back = vec![0; text.len()];
        assert_eq!(decoder.decompress(back.as_mut_slice(), &frame), Ok(text.len()));
        assert_eq!(back, text);
        // RFC 8878, section 3.1.1.1: magic, descriptor, window unless single-segment, content size.
        let descriptor = frame[4];
        let single = descriptor & 0x20 != 0;
        let size_bytes = match descriptor >> 6 {
            0 => usize::from(single),
            flag => 1 << flag,
        };
        let header = 5 + usize::from(!single) + size_bytes;
        8 * (frame.len() - header - 4) as u64
    }
}

fn messages() -> impl Strategy<Value = Vec<u8>> {
    let piece = prop_oneof![
        prop::collection::vec(any::<u8>(), 0..60),
        Just(b"{\"model\":\"m\",\"messages\":[".to_vec()),
        Just(b"content-type: application/json\r\n".to_vec()),
        "[a-z ]{0,40}".prop_map(String::into_bytes),
    ];
    prop::collection::vec(piece, 0..12).prop_map(|pieces| pieces.concat())
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(64) })]

    #[test]
    fn lengths_are_those_of_the_codec(x in messages(), baseline in messages()) {
        #[cfg(feature = "deflate")]
        {
            let mut deflate = Adapter::Deflate.compressor().unwrap();
            prop_assert_eq!(deflate.code_length_bits(&x).unwrap(), naive::deflate(&x));
            prop_assert_eq!(
                deflate.conditional_bits(&x, &baseline).unwrap(),
                naive::deflate_given(&x, &baseline)
            );
        }
        #[cfg(feature = "lz4")]
        {
            let mut lz4 = Adapter::Lz4.compressor().unwrap();
            prop_assert_eq!(lz4.code_length_bits(&x).unwrap(), naive::lz4(&x));
            let both = [baseline.as_slice(), x.as_slice()].concat();
            prop_assert_eq!(
                lz4.conditional_bits(&x, &baseline).unwrap(),
                naive::lz4(&both).saturating_sub(naive::lz4(&baseline))
            );
        }
        #[cfg(feature = "zstd")]
        {
            let mut zstd = Adapter::Zstd.compressor().unwrap();
            prop_assert_eq!(zstd.code_length_bits(&x).unwrap(), naive::zstd_given(&x, b""));
            prop_assert_eq!(zstd.conditional_bits(&x, &baseline).unwrap(), naive::zstd_given(&x, &baseline));
        }
        let _ = (x, baseline);
    }

    /// What went through a compressor before leaves no trace in it.
    #[test]
    fn the_past_changes_nothing(texts in prop::collection::vec(messages(), 1..6), baseline in messages()) {
        for mut used in built() {
            let adapter = used.adapter();
            let mut given = used.given(&baseline).unwrap();
            for x in &texts {
                let mut fresh = adapter.compressor().unwrap();
                prop_assert_eq!(used.code_length_bits(x).unwrap(), fresh.code_length_bits(x).unwrap());
                prop_assert_eq!(given.code_length_bits(x).unwrap(), fresh.conditional_bits(x, &baseline).unwrap());
                let both = [baseline.as_slice(), x.as_slice()].concat();
                prop_assert_eq!(
                    used.joint_bits(&baseline, x).unwrap(),
                    fresh.code_length_bits(&both).unwrap()
                );
            }
        }
    }

    #[test]
    fn the_first_fitting_route_decides(
        overrides in prop::collection::vec((0usize..6, 0u64..100_000, 0usize..4), 0..6),
        kind in 0usize..6,
        bytes in prop_oneof![0u64..100_000, Just(1u64 << 27), any::<u64>()],
    ) {
        let overrides: Vec<Route> = overrides
            .into_iter()
            .map(|(kind, max_bytes, adapter)| Route {
                kind: ContentKind::ALL[kind],
                max_bytes,
                adapter: Adapter::ALL[adapter],
            })
            .collect();
        let kind = ContentKind::ALL[kind];
        let beyond = overrides.iter().find(|route| route.max_bytes > route.adapter.match_window_bytes());
        match Router::with(&overrides) {
            Err(error) => {
                let RouteError::BeyondWindow { adapter, max_bytes, .. } = error else { panic!("{error}") };
                prop_assert_eq!(Some((adapter, max_bytes)), beyond.map(|route| (route.adapter, route.max_bytes)));
            }
            Ok(router) => {
                prop_assert!(beyond.is_none());
                let mut expected = None;
                for route in overrides.iter().chain(DEFAULT_ROUTES) {
                    if expected.is_none() && route.kind == kind && route.max_bytes >= bytes {
                        expected = Some(route.adapter);
                    }
                }
                prop_assert_eq!(router.route(kind, bytes).ok(), expected);
                prop_assert!(expected.is_none_or(|adapter| bytes <= adapter.match_window_bytes()));
            }
        }
    }
}

#[test]
fn the_default_table_covers_every_kind_up_to_the_largest_window() {
    let router = Router::default();
    assert_eq!(
        Router::with(DEFAULT_ROUTES).unwrap().route(ContentKind::Text, 1),
        router.route(ContentKind::Text, 1)
    );
    for kind in ContentKind::ALL {
        assert_eq!(ContentKind::from_name(kind.name()), Some(kind));
        for bytes in [0, 1, 300, 32_510, 32_511, 65_535, 1 << 20, 1 << 27] {
            let adapter = router.route(kind, bytes).unwrap();
            assert!(bytes <= adapter.match_window_bytes(), "{} {bytes} {adapter}", kind.name());
        }
        let error = router.route(kind, (1 << 27) + 1).unwrap_err();
        assert_eq!(error, RouteError::TooLong { kind: kind.name(), bytes: (1 << 27) + 1 });
    }
}
