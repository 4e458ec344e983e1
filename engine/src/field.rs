//! Which field of a message a byte stands in: path segment, query or form key and value, header, JSON key path,
//! column of an access log.
//!
//! What: a [`FieldTracker`] follows a unit byte by byte and names the field of the *next* byte by a hash
//! that depends on the bytes before it alone, so a model can use it as context. A delimiter belongs to
//! the field that it ends. What it follows, told apart by the unit's first bytes:
//! - an HTTP request or response head (RFC 9112, sections 2 to 5): path segments by the segment before,
//!   query keys by path and previous key, query values by path and key, header names by the name before,
//!   header values by name, then a body as below;
//! - JSON (RFC 8259): keys by their object's key path and the key before, values by key path, elements of
//!   an array alike;
//! - `key=value` pairs joined by `&` (forms and query strings): as in a query;
//! - a line of an access log, which begins with an IP address (the common and combined formats of nginx and
//!   Apache) or a time in brackets (Envoy's default format): columns by number, parted by spaces outside
//!   quotes and brackets, and the quoted request line as above;
//! - anything else is text without fields, [`FREE_TEXT`].
//!
//! Why hashes: a field is only ever compared for equality, a key path may be of any length, and a tracker
//! must not grow. Fields whose hashes collide (one in 4 thousand million pairs) share statistics.
//!
//! Cost: about 130 bytes; a byte inside a value costs one test of a table of byte classes, a delimiter
//! some ten operations.
//!
//! Left out on purpose: logs whose first column is a name or a number (no line of prose may be taken for a
//! log), and times in brackets that the normaliser leaves as they are. Deciding that bytes are malformed. Every input has fields; odd ones have odd
//! fields, which no baseline knows, and that costs bits.

use crate::coder::scatter;
use crate::normalise::{Class, MARKER};

/// The field of text that has none.
pub const FREE_TEXT: u32 = 0;

/// Field of a unit's first bytes, until they show what it is: a method, a first key, or text's first word.
pub(crate) const START: u32 = 1;
/// Field of what follows a path on the request line, or of a status line.
const LINE_REST: u32 = 2;
/// Field of the first byte of an HTTP body.
const BODY: u32 = 3;

/// Longest method or protocol name, and longest query or form key, bytes; what is longer is text.
const MAX_METHOD_BYTES: u32 = 8;
const MAX_KEY_BYTES: u32 = 64;
/// Bytes of a field that are counted: further on, where in it a byte stands says nothing.
const MAX_RUN: u32 = 2 * MAX_KEY_BYTES;
/// Deepest JSON nesting whose key path is followed.
const MAX_DEPTH: usize = 16;
/// The letter of a timestamp's marker.
const TIMESTAMP: u8 = Class::Timestamp.letter();
/// Columns of a log that are told apart; later ones share a field.
const MAX_COLUMNS: u32 = 32;

/// Kinds of named field, mixed into their hashes.
#[derive(Clone, Copy)]
#[repr(u32)]
enum Kind {
    Segment = 16,
    Key,
    Value,
    HeaderName,
    HeaderValue,
    JsonBetween,
    JsonKey,
    JsonString,
    JsonScalar,
    Column,
}

/// Where in the grammar the next byte stands. The discriminant is the bit in [`STOPS`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Place {
    Start,
    AfterMethod,
    Text,
    Segment,
    QueryKey,
    QueryValue,
    FormKey,
    FormValue,
    LineRest,
    HeaderName,
    HeaderValue,
    Body,
    JsonBetween,
    JsonKey,
    JsonString,
    JsonScalar,
    Marker,
    ColumnStart,
    ColumnMethod,
    ColumnQuoted,
    ColumnBracket,
    ColumnPlain,
}

/// For each byte, the places that it may end or change, as a bit set.
#[allow(clippy::indexing_slicing, reason = "evaluated by the compiler, which refuses a bad index")]
const STOPS: [u32; 256] = {
    const fn stops(place: Place, byte: u8) -> bool {
        match place {
            Place::Text => false,
            Place::Start | Place::AfterMethod | Place::Body | Place::Marker => true,
            Place::ColumnStart | Place::ColumnMethod => true,
            // The quote ends a log's request.
            Place::Segment => matches!(byte, b'/' | b'?' | b' ' | b'\n' | b'"'),
            Place::QueryKey => matches!(byte, b'=' | b'&' | b' ' | b'\n' | b'"'),
            Place::QueryValue => matches!(byte, b'&' | b' ' | b'\n' | b'"'),
            Place::FormKey => matches!(byte, b'=' | b'&'),
            Place::FormValue => matches!(byte, b'&'),
            Place::LineRest => matches!(byte, b'\n' | b'"'),
            Place::HeaderValue => matches!(byte, b'\n'),
            Place::HeaderName => matches!(byte, b':' | b'\n'),
            Place::JsonBetween => {
                matches!(
                    byte,
                    MARKER | b'"' | b'{' | b'}' | b'[' | b']' | b':' | b',' | b'-' | b'0'
                        ..=b'9' | b't' | b'f' | b'n'
                )
            }
            Place::JsonKey | Place::JsonString => matches!(byte, b'"' | b'\\'),
            Place::JsonScalar => matches!(byte, b',' | b'}' | b']' | b' ' | b'\n' | b'\r' | b'\t'),
            Place::ColumnQuoted => matches!(byte, b'"' | b'\\' | b'\n'),
            Place::ColumnBracket => matches!(byte, b']' | b'\n'),
            Place::ColumnPlain => matches!(byte, b' ' | b'\n'),
        }
    }
    const PLACES: [Place; 22] = [
        Place::Start,
        Place::AfterMethod,
        Place::Text,
        Place::Segment,
        Place::QueryKey,
        Place::QueryValue,
        Place::FormKey,
        Place::FormValue,
        Place::LineRest,
        Place::HeaderName,
        Place::HeaderValue,
        Place::Body,
        Place::JsonBetween,
        Place::JsonKey,
        Place::JsonString,
        Place::JsonScalar,
        Place::Marker,
        Place::ColumnStart,
        Place::ColumnMethod,
        Place::ColumnQuoted,
        Place::ColumnBracket,
        Place::ColumnPlain,
    ];
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        let mut i = 0;
        while i < PLACES.len() {
            if stops(PLACES[i], byte as u8) {
                table[byte] |= 1 << PLACES[i] as u8;
            }
            i += 1;
        }
        byte += 1;
    }
    table
};

/// One 32-bit hash of two.
const fn join(a: u32, b: u32) -> u32 {
    let x = a.wrapping_mul(0x9E37_79B1) ^ b.wrapping_add(0x7F4A_7C15);
    let x = (x ^ (x >> 15)).wrapping_mul(0x85EB_CA6B);
    x ^ (x >> 13)
}

/// A name's hash with one more byte (FNV-1a's step and a rotation).
#[inline(always)]
fn absorb(name: u32, byte: u8) -> u32 {
    (name ^ u32::from(byte)).wrapping_mul(0x0100_0193).rotate_left(5)
}

/// Follows one unit. See the module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FieldTracker {
    place: Place,
    /// The next byte of a JSON string or a quoted column is escaped.
    escaped: bool,
    /// In a JSON object, the value of a key is next.
    value_next: bool,
    field: u32,
    run: u32,
    /// Hash of the name under way: segment, key or header name.
    name: u32,
    /// Hash of the key, header or segment before.
    previous: u32,
    /// Hash of the path so far, and whether it was asked for since [`Self::watch_path`].
    path: u32,
    path_used: bool,
    /// Hash of the JSON key path to here.
    key_path: u32,
    depth: usize,
    /// Bit `depth` is set if that level is an object.
    objects: u32,
    key_paths: [u32; MAX_DEPTH],
    /// In a line of a log, its column from 1.
    column: u32,
    /// What the unit's first bytes have of an IP address.
    address: Address,
}

/// What has been seen of an IP address: counts, and kinds of byte.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Address {
    dots: u8,
    colons: u8,
    digits: bool,
    letters: bool,
    other: bool,
}

impl Address {
    fn absorb(&mut self, byte: u8) {
        match byte {
            b'0'..=b'9' => self.digits = true,
            b'a'..=b'f' | b'A'..=b'F' => self.letters = true,
            b'.' => self.dots = self.dots.saturating_add(1),
            b':' => self.colons = self.colons.saturating_add(1),
            _ => self.other = true,
        }
    }

    /// IPv6 (RFC 4291, section 2.2), of which the first group has a digit, or which begins with colons.
    fn may_have_colon(self) -> bool {
        !self.other && self.dots == 0 && (self.digits || (!self.letters && self.colons < 2))
    }

    fn is_whole(self) -> bool {
        let four = self.colons == 0 && self.dots == 3 && !self.letters;
        let six = self.colons >= 2 && matches!(self.dots, 0 | 3);
        !self.other && self.digits && (four || six)
    }
}

impl Default for FieldTracker {
    fn default() -> Self {
        Self {
            place: Place::Start,
            escaped: false,
            value_next: false,
            field: START,
            run: 0,
            name: 0,
            previous: 0,
            path: 0,
            path_used: false,
            key_path: 0,
            depth: 0,
            objects: 0,
            key_paths: [0; MAX_DEPTH],
            column: 0,
            address: Address::default(),
        }
    }
}

impl FieldTracker {
    /// The field of the next byte.
    #[inline(always)]
    pub fn field(&self) -> u32 {
        self.field
    }

    /// Hash of the path so far.
    pub(crate) fn path(&self) -> u32 {
        self.path
    }

    /// From here on [`Self::path_used`] tells whether the path made a difference.
    pub(crate) fn watch_path(&mut self) {
        self.path_used = false;
    }

    /// Whether what was followed since [`Self::watch_path`] depends on the path before it.
    pub(crate) fn path_used(&self) -> bool {
        self.path_used
    }

    /// As if this path had been followed.
    pub(crate) fn set_path(&mut self, path: u32) {
        self.path = path;
    }

    /// Whether the other differs in nothing but the path.
    pub(crate) fn is_like(&self, other: &Self) -> bool {
        let pathless = |tracker: &Self| Self { path: 0, path_used: false, ..tracker.clone() };
        pathless(self) == pathless(other)
    }

    /// A hash of what [`Self::is_like`] compares.
    pub(crate) fn hash(&self, seed: u64) -> u64 {
        let two = |a: u32, b: u32| u64::from(a) << 32 | u64::from(b);
        let Self { place, escaped, value_next, field, run, name, previous, key_path, depth, .. } = self;
        let flags = u64::from(*escaped) << 1 | u64::from(*value_next);
        let place = *place as u64 | flags << 8 | (*depth as u64) << 16 | u64::from(self.column) << 32;
        let hashes = [two(*field, *run), two(*name, *previous), two(*key_path, 0), place];
        hashes.into_iter().fold(seed, |hash, word| scatter(hash ^ word))
    }

    /// Bytes since the field began, at most 128.
    #[inline(always)]
    pub fn run(&self) -> u32 {
        self.run
    }

    /// Follows the first bytes of `text` up to and including the one behind which another field begins,
    /// and returns how many they are; all of `text` if its field goes on, or if `text` ends with it. The
    /// field has changed if [`Self::run`] is 0.
    #[inline]
    pub fn advance(&mut self, text: &[u8]) -> usize {
        let mut done = 0;
        while let Some(rest) = text.get(done..)
            && !rest.is_empty()
        {
            let limit = match self.place {
                Place::Text => {
                    self.run = self.run.saturating_add(rest.len() as u32).min(MAX_RUN);
                    return text.len();
                }
                Place::QueryKey | Place::FormKey => (MAX_KEY_BYTES.saturating_sub(self.run)) as usize,
                _ => usize::MAX,
            };
            let reach = rest.get(..limit).unwrap_or(rest);
            let inside = self.inside(reach);
            self.run = self.run.saturating_add(inside as u32).min(MAX_RUN);
            done += inside;
            if let Some(&byte) = reach.get(inside) {
                done += 1;
                self.stop(byte);
            } else if limit <= rest.len() {
                self.enter_rest();
            }
            if self.run == 0 {
                break;
            }
        }
        done
    }

    /// How many of the first bytes of `text` change nothing but a name's hash.
    #[inline(always)]
    fn inside(&mut self, text: &[u8]) -> usize {
        let stop = 1u32 << self.place as u8;
        match self.place {
            _ if self.escaped => 0,
            Place::JsonString => memchr::memchr2(b'"', b'\\', text).unwrap_or(text.len()),
            Place::Segment | Place::QueryKey | Place::FormKey | Place::HeaderName | Place::JsonKey => {
                let mut name = self.name;
                let mut len = 0;
                for &byte in text {
                    if stops(byte) & stop != 0 {
                        break;
                    }
                    name = absorb(name, byte);
                    len += 1;
                }
                self.name = name;
                len
            }
            _ => text.iter().position(|&byte| stops(byte) & stop != 0).unwrap_or(text.len()),
        }
    }

    fn enter(&mut self, place: Place, field: u32) {
        self.place = place;
        self.field = field;
        self.run = 0;
        self.name = 0;
    }

    fn enter_named(&mut self, place: Place, kind: Kind, name: u32) {
        self.enter(place, join(kind as u32, name));
    }

    fn enter_key(&mut self, place: Place) {
        self.path_used = true;
        self.enter_named(place, Kind::Key, join(self.path, self.previous));
    }

    /// One byte that may end the field.
    fn stop(&mut self, byte: u8) {
        self.run = (self.run + 1).min(MAX_RUN);
        match self.place {
            Place::Text => {}
            Place::Start => self.start(byte),
            Place::AfterMethod if byte == b'/' => self.enter_named(Place::Segment, Kind::Segment, 0),
            Place::AfterMethod if self.column > 0 && byte == b'"' => self.end_column(),
            Place::AfterMethod => self.enter_rest(),
            Place::Segment | Place::QueryKey | Place::QueryValue | Place::LineRest if byte == b'"' => {
                if self.column > 0 {
                    self.end_column();
                } else {
                    self.name = absorb(self.name, byte);
                }
            }
            Place::Segment | Place::QueryKey | Place::QueryValue | Place::LineRest
                if self.column > 0 && byte == b'\n' =>
            {
                self.begin_line();
            }
            Place::Segment => {
                let name = self.name;
                self.path_used = true;
                self.path = join(self.path, name);
                match byte {
                    b'/' => self.enter_named(Place::Segment, Kind::Segment, name),
                    b'?' => {
                        self.previous = 0;
                        self.enter_key(Place::QueryKey);
                    }
                    b' ' => self.enter(Place::LineRest, LINE_REST),
                    _ => self.enter_header(0),
                }
            }
            Place::QueryKey | Place::FormKey => {
                self.previous = self.name;
                self.path_used = true;
                let value = if self.place == Place::QueryKey { Place::QueryValue } else { Place::FormValue };
                match byte {
                    b'=' => self.enter_named(value, Kind::Value, join(self.path, self.name)),
                    b'&' => self.enter_key(self.place),
                    b' ' => self.enter(Place::LineRest, LINE_REST),
                    _ => self.enter_header(0),
                }
            }
            Place::QueryValue | Place::FormValue => {
                let key = if self.place == Place::QueryValue { Place::QueryKey } else { Place::FormKey };
                match byte {
                    b'&' => self.enter_key(key),
                    b' ' => self.enter(Place::LineRest, LINE_REST),
                    _ => self.enter_header(0),
                }
            }
            Place::LineRest => self.enter_header(0),
            Place::HeaderName if byte == b':' => {
                self.previous = self.name;
                self.enter_named(Place::HeaderValue, Kind::HeaderValue, self.name);
            }
            Place::HeaderName => {
                self.previous = 0;
                self.enter(Place::Body, BODY);
            }
            Place::HeaderValue => self.enter_header(self.previous),
            Place::Body if matches!(byte, b'{' | b'[') => {
                self.address.other = true;
                self.enter_json(byte);
            }
            Place::Body => {
                self.enter_key(Place::FormKey);
                self.name = absorb(0, byte);
            }
            Place::JsonBetween => self.between(byte),
            Place::Marker if byte == TIMESTAMP => {
                *self = Self { column: 1, ..Self::default() };
                self.enter_named(Place::ColumnBracket, Kind::Column, 1);
            }
            Place::Marker => {
                self.place = Place::JsonBetween;
                if stops(byte) & 1 << Place::JsonBetween as u8 != 0 {
                    self.between(byte);
                }
            }
            Place::JsonString if self.escaped => self.escaped = false,
            Place::JsonKey if self.escaped => {
                self.escaped = false;
                self.name = absorb(self.name, byte);
            }
            Place::JsonKey | Place::JsonString if byte == b'\\' => self.escaped = true,
            Place::JsonKey => {
                self.previous = self.name;
                self.key_path = join(self.parent(), self.name);
                self.enter_between();
            }
            Place::JsonString => self.enter_between(),
            Place::JsonScalar => {
                match byte {
                    b',' => self.value_next = false,
                    b'}' | b']' => self.leave_level(),
                    _ => {}
                }
                self.enter_between();
            }
            Place::ColumnStart => match byte {
                b' ' => self.enter_column(),
                b'\n' => self.begin_line(),
                b'"' => self.place = Place::ColumnMethod,
                b'[' => self.place = Place::ColumnBracket,
                _ => self.place = Place::ColumnPlain,
            },
            Place::ColumnMethod => match byte {
                b'A'..=b'Z' if self.run <= MAX_METHOD_BYTES => {}
                // After the quote and at least three capitals.
                b' ' if self.run > 4 => self.enter(Place::AfterMethod, LINE_REST),
                b'"' => self.end_column(),
                b'\n' => self.begin_line(),
                _ => {
                    self.escaped = byte == b'\\';
                    self.place = Place::ColumnQuoted;
                }
            },
            Place::ColumnQuoted if self.escaped => self.escaped = false,
            Place::ColumnQuoted if byte == b'\\' => self.escaped = true,
            Place::ColumnQuoted | Place::ColumnBracket | Place::ColumnPlain => match byte {
                b'\n' => self.begin_line(),
                b' ' => self.enter_column(),
                // What follows up to the space belongs to the column.
                _ => self.place = Place::ColumnPlain,
            },
        }
    }

    /// The quote behind a log's request: what follows up to the space is still its column.
    fn end_column(&mut self) {
        self.enter_named(Place::ColumnPlain, Kind::Column, self.column);
    }

    /// Behind the space that ends a column.
    fn enter_column(&mut self) {
        self.column = (self.column + 1).min(MAX_COLUMNS);
        self.path_used = true;
        self.path = 0;
        self.previous = 0;
        self.escaped = false;
        self.enter_named(Place::ColumnStart, Kind::Column, self.column);
    }

    /// Behind the end of a log's line.
    fn begin_line(&mut self) {
        self.column = 0;
        self.enter_column();
    }

    /// What has no grammar: text, or in a log the rest of the quoted column.
    fn enter_rest(&mut self) {
        if self.column > 0 {
            self.enter(Place::LineRest, LINE_REST);
        } else {
            self.enter(Place::Text, FREE_TEXT);
        }
    }

    /// A unit's first bytes: a method or protocol and what follows, a JSON value, or a key.
    fn start(&mut self, byte: u8) {
        match byte {
            b'{' | b'[' if self.run == 1 => self.enter_json(byte),
            b' ' if self.run > 3 && self.run <= MAX_METHOD_BYTES && self.previous == self.run - 1 => {
                self.previous = 0;
                self.enter(Place::AfterMethod, LINE_REST);
            }
            b' ' if self.address.is_whole() => {
                self.previous = 0;
                self.column = 1;
                self.enter_column();
            }
            b':' if self.address.may_have_colon() => self.address.absorb(byte),
            b'/' if self.run == 5 && self.previous == 4 => {
                self.previous = 0;
                self.enter(Place::LineRest, LINE_REST);
            }
            b'=' if self.run > 1 => {
                self.previous = self.name;
                self.path_used = true;
                self.enter_named(Place::FormValue, Kind::Value, join(self.path, self.name));
            }
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'_' | b'-' | b'.' | b'[' | b']' | b'%' | b'$'
                if self.run <= MAX_KEY_BYTES =>
            {
                self.address.absorb(byte);
                // While the unit may start with a method, `previous` counts its capitals.
                self.previous += u32::from(byte.is_ascii_uppercase());
                self.name = absorb(self.name, byte);
            }
            _ => {
                self.previous = 0;
                self.enter(Place::Text, FREE_TEXT);
            }
        }
    }

    fn enter_header(&mut self, previous: u32) {
        self.enter_named(Place::HeaderName, Kind::HeaderName, previous);
    }

    fn enter_json(&mut self, bracket: u8) {
        self.key_path = 1;
        self.open_level(bracket);
        self.enter_between();
    }

    fn enter_between(&mut self) {
        self.enter_named(Place::JsonBetween, Kind::JsonBetween, self.key_path);
    }

    /// A byte outside JSON strings and scalars.
    fn between(&mut self, byte: u8) {
        let first = self.address == Address::default();
        self.address.other = true;
        match byte {
            b'"' if self.objects >> self.depth & 1 == 1 && !self.value_next => {
                self.enter_named(Place::JsonKey, Kind::JsonKey, join(self.parent(), self.previous));
            }
            b'"' => {
                self.value_next = false;
                self.enter_named(Place::JsonString, Kind::JsonString, self.key_path);
            }
            b'{' | b'[' => {
                self.open_level(byte);
                self.enter_between();
            }
            b'}' | b']' => {
                self.leave_level();
                self.enter_between();
            }
            // Perhaps a log's time, made a marker; or a JSON number.
            MARKER if self.run == 1 && first => self.place = Place::Marker,
            MARKER => {}
            b':' => self.value_next = true,
            b',' => self.value_next = false,
            _ => self.enter_named(Place::JsonScalar, Kind::JsonScalar, self.key_path),
        }
    }

    /// The key path of the level that is open.
    fn parent(&self) -> u32 {
        self.key_paths.get(self.depth.saturating_sub(1)).copied().unwrap_or(0)
    }

    fn open_level(&mut self, bracket: u8) {
        self.value_next = false;
        self.previous = 0;
        if let Some(slot) = self.key_paths.get_mut(self.depth) {
            *slot = self.key_path;
            self.depth += 1;
            let object = 1 << self.depth;
            self.objects = if bracket == b'{' { self.objects | object } else { self.objects & !object };
        }
    }

    fn leave_level(&mut self) {
        self.value_next = false;
        self.key_path = self.parent();
        self.depth = self.depth.saturating_sub(1);
        self.previous = self.key_path;
    }
}

#[inline(always)]
fn stops(byte: u8) -> u32 {
    STOPS.get(usize::from(byte)).copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::string::String;
    use std::vec::Vec;

    /// The field of each byte, and of what would follow the last.
    fn fields(text: &[u8]) -> Vec<u32> {
        let mut tracker = FieldTracker::default();
        let mut fields = Vec::new();
        for byte in text {
            fields.push(tracker.field());
            assert_eq!(tracker.advance(core::slice::from_ref(byte)), 1);
        }
        fields.push(tracker.field());
        fields
    }

    /// The stretches of one field, joined by `|`.
    fn cut(text: &str) -> String {
        let mut tracker = FieldTracker::default();
        let (mut at, mut out) = (0, String::new());
        while at < text.len() {
            let len = tracker.advance(&text.as_bytes()[at..]);
            out.push_str(&text[at..at + len]);
            at += len;
            if tracker.run() == 0 && at < text.len() {
                out.push('|');
            }
        }
        out
    }

    fn field_at(text: &str, before: &str) -> u32 {
        fields(text.as_bytes())[text.find(before).unwrap()]
    }

    #[test]
    fn a_request_is_cut_at_its_delimiters() {
        assert_eq!(
            cut("POST /shop/item?id=7&q=a%20b HTTP/1.1\r\nHost: a\r\nX-Y: z\r\n\r\nname=joe&town="),
            "POST |/|shop/|item?|id=|7&|q=|a%20b |HTTP/1.1\r\n|Host:| a\r\n|X-Y:| z\r\n|\r\n|n|ame=|joe&|town="
        );
        assert_eq!(
            cut("HTTP/1.1 200 OK\r\nServer: x\r\n\r\n{\"a\":1}"),
            "HTTP/|1.1 200 OK\r\n|Server:| x\r\n|\r\n|{|\"|a\"|:1|}"
        );
        assert_eq!(cut("a=1&b=2"), "a=|1&|b=|2");
        assert_eq!(cut("where is my order, please"), "where |is my order, please");
        assert_eq!(cut("THE cat sat"), "THE |c|at sat");
    }

    #[test]
    fn json_is_cut_at_its_values() {
        assert_eq!(
            cut(r#"{"a":"x\"y","b":[1,{"c":true}]}"#),
            r#"{|"|a"|:"|x\"y"|,"|b"|:[|1|,|{|"|c"|:t|rue}|]|}"#
        );
    }

    #[test]
    fn a_log_is_cut_at_its_columns() {
        assert_eq!(
            cut(r#"10.1.2.3 - joe [06/Nov/1994:08:49:37 +0000] "GET /a/b?c=d HTTP/1.1" 200 12 "-" "curl 8""#),
            r#"10.1.2.3 |- |joe |[06/Nov/1994:08:49:37 +0000] |"GET |/|a/|b?|c=|d |HTTP/1.1"| |200 |12 |"-" |"curl 8""#
        );
        assert_eq!(
            cut("[\x01i5] \"POST /x\" 503 - \"a \\\" b\""),
            "[|\x01i|5] |\"POST |/|x\"| |503 |- |\"a \\\" b\""
        );
        assert_eq!(
            cut("2001:db8::7 - - \"\\x16\\x03\" 400\n::1 - - 1"),
            "2001:db8::7 |- |- |\"\\x16\\x03\" |400\n|::1 |- |- |1"
        );
        let line = r#"1.2.3.4 - - [x] "GET /shop?id=7 HTTP/1.1" 200 5"#;
        let other = r#"9.9.9.9 - ann [y z] "POST /shop?n=1&id=8 HTTP/1.1" 404 77"#;
        assert_eq!(field_at(line, "7 "), field_at(other, "8 "));
        assert_eq!(field_at(line, "200"), field_at(other, "404"));
        assert_ne!(field_at(other, "404"), field_at(other, "77"));
        for prose in ["1.2.3 - is it", "12:30 we met", "a.b.c.d is", "1.2.3.4, then", "[1] \"a\""] {
            assert!(!cut(prose).contains("- |"), "{}", cut(prose));
        }
    }

    #[test]
    fn a_field_is_known_by_its_path_and_key_alone() {
        // The same value field, whatever stands elsewhere.
        let a = field_at("GET /shop/buy?id=7 HTTP/1.1", "7 ");
        assert_eq!(a, field_at("GET /shop/buy?n=99&id=8&x=1 HTTP/1.0", "8&"));
        assert_ne!(a, field_at("GET /shop/sell?id=7 HTTP/1.1", "7 "), "another path");
        assert_ne!(a, field_at("GET /shop/buy?ix=7 HTTP/1.1", "7 "), "another key");
        let j = field_at(r#"{"m":[{"role":"user","content":"hi"}]}"#, "hi");
        assert_eq!(j, field_at(r#"{"n":{"q":2},"m":[{"x":1},{"content":"yo"}],"z":[]}"#, "yo"));
        assert_ne!(j, field_at(r#"{"m":[{"role":"hi"}]}"#, "hi"));
        let h = field_at("GET / HTTP/1.1\r\nHost: a\r\nAccept: b\r\n\r\n", " b");
        assert_eq!(h, field_at("POST /x HTTP/1.1\r\nAccept: b\r\n\r\n", " b"));
    }

    #[test]
    fn deep_nesting_and_long_keys_end_in_bounds() {
        let deep = "[".repeat(100) + &"]".repeat(120) + "{\"a\":1}";
        assert_eq!(fields(deep.as_bytes()).len(), deep.len() + 1);
        let long = std::format!("a=1&{}=2", "k".repeat(100));
        assert_eq!(*fields(long.as_bytes()).last().unwrap(), FREE_TEXT);
    }

    proptest! {
        #[test]
        fn every_split_gives_the_same_fields(
            text in prop::collection::vec(prop::sample::select(b"GETPOST /?=& \r\n:{}[]\",\\a1.\x01".to_vec()), 0..200),
            head in prop::sample::select(std::vec!["", "GET /a?", "{\"", "HTTP/1.1 2\r\nA: b\r\n", "POST /a/b HTTP/1.1\r\n\r\n", "1.2.3.4 - - [", "[\x01i5] \"", "::1 \"GET /"]),
            cuts in prop::collection::vec(0usize..200, 0..6),
        ) {
            let text = [head.as_bytes(), &text].concat();
            let bytewise = fields(&text);
            let mut cuts: Vec<usize> = cuts.into_iter().map(|c| c.min(text.len())).chain([0, text.len()]).collect();
            cuts.sort_unstable();
            let mut tracker = FieldTracker::default();
            for pair in cuts.windows(2) {
                let mut at = pair[0];
                while at < pair[1] {
                    let (field, run) = (tracker.field(), tracker.run());
                    let len = tracker.advance(&text[at..pair[1]]);
                    prop_assert!(len > 0);
                    // One field as far as the tracker went, and another one behind it if it says so.
                    prop_assert!(bytewise[at..at + len].iter().all(|&f| f == field));
                    prop_assert_eq!(bytewise[at + len], tracker.field());
                    prop_assert!(tracker.run() == 0 || tracker.run() == (run + len as u32).min(MAX_RUN));
                    at += len;
                }
            }
        }
    }
}
