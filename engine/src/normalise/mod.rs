//! Tokens that mean nothing are made alike for scoring; tokens that must not leave are taken out.
//!
//! What: a streaming [`Scanner`] over the bytes of a content unit finds identifiers, times, digests and
//! blobs, and keys, passwords, addresses and account numbers. Two use it: the [`Normaliser`] puts a marker
//! of three bytes in the place of each, so that a UUID never seen before is not a surprise of a hundred
//! bits; the [`Redactor`] puts `[REDACTED:class]` there. Both say where each piece came from, so a span
//! found in the rewritten text can be shown in the source.
//!
//! Why by hand: a token must be found while the text comes in pieces of any size, with the same result
//! for every split, in bounded memory, and several times faster than bytes are scored. An automaton made
//! when the program is built (`automaton`) skips ordinary words; matchers check the few others, with
//! the check digits of cards and IBANs and the ranges of dates and addresses; a blob without end is
//! counted, not kept. Nothing is compiled or allocated per event but the bytes not yet decided.
//!
//! Bounds: a token is decided 256 bytes after its start, or at the end of the text; at most that much is
//! kept between pieces. A scanner is under 256 bytes beside it.
//!
//! Cost: `cargo run --release -p driftlock-engine --example normalise_speed` measures it; DECISIONS.md
//! has the figures.
//!
//! What is normalised by default is [`DEFAULT_NORMALISED`], chosen by the ablation in
//! `examples/ablation.rs`: what attacks hide in is scored as it is.
//!
//! Left out on purpose: names, postal addresses and other data that only a language model finds; secrets
//! without a shape of their own (a bare password, an AWS secret key); mail addresses with quoted local
//! parts; telephone numbers without separators or `+`. What is left out is not redacted.

mod automaton;
mod class;
mod find;
mod personal;
mod rewrite;
mod scan;
mod secrets;
mod token;
mod volatile;

pub use class::{Class, ClassSet};
pub use rewrite::{MARKER, Normaliser, OffsetMap, Piece, Redacted, Redactor, redact, redact_json_string};
pub use scan::{Found, Scanner};
pub(crate) use scan::{Part, Sourced};

/// What is normalised unless configuration says otherwise: what has a shape so narrow that nothing can be
/// hidden in it, and blobs of base64, which stay as dear as their bytes are (see
/// [`crate::score::BLOB_BYTE_COST`]). Not long numbers (in answers they are what differs, and false alarms
/// rise), not digests and tokens, whose bytes an attacker chooses, and nothing that must not leak: the first
/// card number in a completion has to cost what it is worth. The ablation's figures are in DECISIONS.md.
pub const DEFAULT_NORMALISED: ClassSet = ClassSet::NONE
    .with(Class::Email)
    .with(Class::Traceparent)
    .with(Class::Uuid)
    .with(Class::Timestamp)
    .with(Class::HttpDate)
    .with(Class::Epoch)
    .with(Class::Id)
    .with(Class::Base64);
