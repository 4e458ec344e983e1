//! Code lengths and the router, for any bytes and any table: no panic, windows kept, distances in their
//! range, the past without effect.

use driftlock_engine::adapters::router::{ContentKind, DEFAULT_ROUTES, Route, Router};
use driftlock_engine::adapters::{Adapter, AdapterError, Compressor};
use driftlock_engine::metrics;

use crate::input::Input;

/// What a compressor may take more than its input: blocks that are stored, with their headers.
const OVERHEAD_BITS: u64 = 8 * 32;

/// See the module.
pub fn holds(data: &[u8]) {
    let mut input = Input::new(data);
    routes(&mut input);
    let adapter = input.pick(&Adapter::ALL);
    // Repeating a short text comes near the windows and goes past them.
    let (len, repeats) = (usize::from(input.byte()), 1 + (input.u16() % 400));
    let baseline = input.take(len).repeat(repeats);
    let x = input.rest(1 << 12);
    match adapter.compressor() {
        Ok(mut compressor) => lengths(compressor.as_mut(), x, &baseline),
        Err(error) => assert_eq!(error, AdapterError::NotBuilt(adapter)),
    }
}

fn lengths(compressor: &mut dyn Compressor, x: &[u8], y: &[u8]) {
    let adapter = compressor.adapter();
    let fits = |bytes: usize| bytes as u64 <= adapter.match_window_bytes();
    let expect = |what: Result<u64, AdapterError>, bytes: usize| match what {
        Ok(bits) => {
            assert!(fits(bytes), "{adapter} took {bytes} bytes");
            Some(bits)
        }
        Err(AdapterError::WindowTooShort { needed_bytes, window_bytes, .. }) => {
            assert!(
                !fits(bytes) && window_bytes == adapter.match_window_bytes() && needed_bytes > window_bytes
            );
            None
        }
        Err(error) => panic!("{error}"),
    };
    let both = x.len() + y.len();
    let cx = expect(compressor.code_length_bits(x), x.len());
    let cy = expect(compressor.code_length_bits(y), y.len());
    let cxy = expect(compressor.joint_bits(x, y), both);
    let x_given_y = expect(compressor.conditional_bits(x, y), both);
    // Stored blocks take 3 bytes for each 64 KiB or less, lz4 a byte for 255 literals. Nothing tighter holds
    // for any bytes: that C(xy) is at most C(x) + C(y) is a property of texts, not of greedy searches.
    for (bits, bytes) in [(cx, x.len()), (cy, y.len()), (cxy, both)] {
        let stored = 8 * bytes as u64 + 8 * bytes as u64 / 200 + OVERHEAD_BITS;
        assert!(bits.is_none_or(|bits| bits <= stored), "{adapter}: {bits:?} bits of {bytes}");
    }
    if let Some(cx) = cx {
        assert_eq!(compressor.code_length_bits(x), Ok(cx), "{adapter} remembers");
    }
    if let (Some(cx), Some(cy), Some(cxy)) = (cx, cy, cxy) {
        assert_eq!(compressor.code_length_bits(&[x, y].concat()), Ok(cxy), "{adapter}: C(xy) is that of xy");
        if let Some(distance) = metrics::ncd(cx, cy, cxy) {
            assert!(distance.is_finite());
            assert_eq!(metrics::ncd(cy, cx, cxy), Some(distance));
        }
    }
    if let (Some(bits), Ok(mut given)) = (x_given_y, compressor.given(y)) {
        assert_eq!(given.code_length_bits(x), Ok(bits));
        assert_eq!(given.code_length_bits(x), Ok(bits), "{adapter} remembers, given a baseline");
    }
    let entropy = metrics::entropy_bits_per_byte(x);
    assert!(entropy.is_none_or(|bits| (0.0..=8.0).contains(&bits)), "{entropy:?}");
}

/// The first route of the kind that is long enough, and never one beyond its window.
fn routes(input: &mut Input<'_>) {
    let count = usize::from(input.byte()) % 8;
    let overrides: Vec<Route> = (0..count)
        .map(|_| Route {
            kind: input.pick(&ContentKind::ALL),
            max_bytes: (input.u16() as u64) << (input.byte() % 20),
            adapter: input.pick(&Adapter::ALL),
        })
        .collect();
    let (kind, bytes) = (input.pick(&ContentKind::ALL), (input.u16() as u64) << (input.byte() % 20));
    let Ok(router) = Router::with(&overrides) else {
        assert!(overrides.iter().any(|route| route.max_bytes > route.adapter.match_window_bytes()));
        return;
    };
    let expected =
        overrides.iter().chain(DEFAULT_ROUTES).find(|route| route.kind == kind && bytes <= route.max_bytes);
    assert_eq!(router.route(kind, bytes).ok(), expected.map(|route| route.adapter));
    assert!(
        router.route(kind, bytes).is_ok_and(|adapter| bytes <= adapter.match_window_bytes())
            || expected.is_none()
    );
}
