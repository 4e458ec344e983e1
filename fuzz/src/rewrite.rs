//! Normalising and redacting of arbitrary text, cut anywhere: nothing is lost or told twice, what is no token
//! is copied as it is, every split gives the same. A JSON string stays one.
//!
//! Not so: that redacting twice is redacting once. What stands beside a token can become one when it is gone
//! (`192.168.0.1.` before a UUID).

use driftlock_engine::normalise::{ClassSet, Normaliser, Piece, Redactor, redact, redact_json_string};

use crate::input::{Cuts, Input, classes_of};

/// See the module.
pub fn holds(data: &[u8]) {
    let mut input = Input::new(data);
    let classes = match input.byte() % 4 {
        0 => ClassSet::ALL,
        1 => ClassSet::VOLATILE,
        2 => ClassSet::REDACTED,
        _ => classes_of((input.u16() << 3) as u32 | u32::from(input.byte())),
    };
    let cuts = input.cuts();
    let text = input.rest(1 << 13);

    let normalised = |cuts: Cuts<'_>| {
        let (mut rewritten, mut normaliser) = (Rewritten::new(text), Normaliser::new(classes));
        for range in cuts.of(text.len()) {
            normaliser.push(&text[range.clone()], BODY_OFFSET + range.start as u64, &mut |piece| {
                rewritten.add(piece)
            });
        }
        normaliser.finish(&mut |piece| rewritten.add(piece));
        rewritten.complete()
    };
    assert_eq!(normalised(cuts), normalised(Cuts::default()), "the split decides");
    let redacted = |cuts: Cuts<'_>| {
        let (mut rewritten, mut redactor) = (Rewritten::new(text), Redactor::new(classes));
        for range in cuts.of(text.len()) {
            redactor.push(&text[range.clone()], BODY_OFFSET + range.start as u64, &mut |piece| {
                rewritten.add(piece)
            });
        }
        redactor.finish(&mut |piece| rewritten.add(piece));
        rewritten.complete()
    };
    let whole = redacted(Cuts::default());
    assert_eq!(redacted(cuts), whole, "the split decides");
    if let Ok(text) = std::str::from_utf8(text) {
        let once = redact(text, classes);
        assert_eq!(once.text.as_bytes(), whole);
        assert_eq!(once.offsets.source(0..once.text.len() as u64), 0..text.len() as u64);
        let quoted = |content: &str| serde_json::from_str::<String>(&format!("\"{content}\""));
        if quoted(text).is_ok() {
            let content = redact_json_string(text, classes);
            let decoded = quoted(&content).expect("a redacted JSON string is one");
            assert_eq!(decoded, redact(&quoted(text).expect("as before"), classes).text);
        }
    }
}

const BODY_OFFSET: u64 = 1 << 40;

/// Rewritten text, with a check of where each piece came from.
struct Rewritten<'a> {
    source: &'a [u8],
    at: usize,
    out: Vec<u8>,
}

impl<'a> Rewritten<'a> {
    fn new(source: &'a [u8]) -> Self {
        Self { source, at: 0, out: Vec::new() }
    }

    fn add(&mut self, piece: Piece<'_>) {
        let end = self.at + piece.source_len as usize;
        assert_eq!(piece.offset, self.at as u64, "in order, without a gap");
        assert!(end <= self.source.len());
        assert_eq!(
            (piece.body_start, piece.body_end),
            (BODY_OFFSET + self.at as u64, BODY_OFFSET + end as u64)
        );
        if piece.class.is_none() {
            assert_eq!(piece.text, &self.source[self.at..end]);
        }
        self.out.extend_from_slice(piece.text);
        self.at = end;
    }

    fn complete(self) -> Vec<u8> {
        assert_eq!(self.at, self.source.len(), "the end is missing");
        self.out
    }
}
