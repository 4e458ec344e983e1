//! The normal text that is most like the one that decided.
//!
//! A baseline holds statistics, no texts, so the nearest text comes from a capture of normal traffic that
//! the operator names. Likeness is the share of the text's five-byte shingles that the other has, the
//! usual estimate of containment (Broder, 1997); ties go to the shorter text, then to the earlier.
//!
//! Cost: one pass over the capture, at most [`MAX_EXCHANGES`]; a hash set of the text's shingles.

use std::collections::HashSet;
use std::path::Path;

use driftlock_inspect::content::Role;
use serde_json::Value;

use super::{ExplainError, UnitText, decides, unit_texts};
use crate::capture::{self, Exchange};

/// Exchanges of the reference that are looked at.
const MAX_EXCHANGES: usize = 50_000;
/// Bytes of a text that count.
const MAX_BYTES: usize = 64 << 10;
const SHINGLE: usize = 5;

/// A text like the one that decided.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Nearest {
    pub(super) id: String,
    pub(super) text: Vec<u8>,
    /// Share of the shingles that both have.
    pub(super) likeness: f64,
}

fn shingles(text: &[u8]) -> HashSet<&[u8]> {
    text.get(..MAX_BYTES).unwrap_or(text).windows(SHINGLE).collect()
}

/// For request and response the nearest text of the same kind of unit; none for a message whose verdict
/// names no unit.
pub(super) fn nearest(
    reference: &Path,
    exchange: &Exchange,
    selected: &[String],
    verdicts: &[Option<Value>; 2],
    texts: &[Vec<UnitText>; 2],
) -> Result<[Option<Nearest>; 2], ExplainError> {
    let mut best: [Option<Nearest>; 2] = [None, None];
    let deciding = [0, 1].map(|side: usize| {
        let verdict = verdicts[side].as_ref()?;
        texts[side].iter().find(|text| decides(verdict, text.unit))
    });
    let wanted = deciding.map(|text| text.map(|text| shingles(&text.text)));
    for recorded in capture::exchanges(reference)?.take(MAX_EXCHANGES) {
        let Ok(recorded) = recorded else { continue };
        let normal = matches!(recorded.exchange.label.as_str(), "normal" | "unlabelled");
        if !normal || recorded.exchange == *exchange {
            continue;
        }
        for ((texts, best), (deciding, wanted)) in
            unit_texts(&recorded.exchange, selected).iter().zip(&mut best).zip(deciding.iter().zip(&wanted))
        {
            let (Some(deciding), Some(wanted)) = (deciding, wanted) else { continue };
            // Ordinals tell headers apart; of other units they are only an order.
            let alike = |text: &&UnitText| match deciding.unit.role {
                Role::Header => text.unit == deciding.unit,
                role => text.unit.role == role,
            };
            for text in texts.iter().filter(alike) {
                let shared = shingles(&text.text).intersection(wanted).count();
                let likeness = shared as f64 / wanted.len().max(1) as f64;
                let better = best.as_ref().is_none_or(|best| {
                    likeness > best.likeness
                        || (likeness == best.likeness && text.text.len() < best.text.len())
                });
                if better {
                    *best =
                        Some(Nearest { id: recorded.exchange.id.clone(), text: text.text.clone(), likeness });
                }
            }
        }
    }
    Ok(best)
}
