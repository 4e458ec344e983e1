//! Incremental reader of AWS event-stream messages (`application/vnd.amazon.eventstream`).
//!
//! Bedrock streams its answers this way. A message is: total length and headers' length (4 bytes each, big
//! endian), CRC-32 of those 8 bytes, headers, payload, CRC-32 of all that came before. A header is a name (1
//! byte of length), a type and a value; a string's value has 2 bytes of length (Amazon Transcribe and S3 Select
//! developer guides, "event stream encoding"). The payload is handed over as it comes, before its checksum is
//! known, since holding it would delay what is judged while it flows; a wrong checksum is reported at its end.
//!
//! Carried from one push to the next: counts, a running checksum, one header's name and value (cut after
//! `Label::MAX_BYTES`). Cost: the checksum (one table, a byte a step) and one match per header byte.
//! Left out on purpose: the values of headers that are no strings.

use crate::content::{ContentError, Label};

/// Longest message and longest headers that are read, as the SDKs bound them.
const MAX_MESSAGE_BYTES: u32 = 24 << 20;
const MAX_HEADERS_BYTES: u32 = 128 << 10;
const PRELUDE_BYTES: u32 = 12;
const CHECKSUM_BYTES: u32 = 4;

/// Receives the parts of messages, in order.
pub(crate) trait Handler {
    /// Next bytes of a header's name or string value.
    fn header_text(&mut self, piece: &[u8], body_offset: u64);
    /// A header with a string is complete.
    fn header(&mut self, name: &[u8], value: &[u8]);
    /// Next bytes of the payload.
    fn payload(&mut self, piece: &[u8], body_offset: u64);
    /// The message is complete; `body_offset` is that of its end.
    fn end(&mut self, body_offset: u64);
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Prelude,
    Headers(Header),
    Payload,
    Checksum,
    Failed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Header {
    NameLength,
    Name(u8),
    Type,
    LengthHigh { string: bool },
    LengthLow { string: bool, high: u8 },
    Value { string: bool, missing: u16 },
}

/// The reader's whole state between two pushes.
#[derive(Clone, Debug)]
pub(crate) struct FrameReader {
    state: State,
    /// Fixed fields being read, and how many of their bytes.
    fixed: [u8; 12],
    filled: usize,
    headers_left: u32,
    payload_left: u32,
    checksum: Crc32,
    name: Label,
    value: Label,
    /// Where the current message begins.
    start: u64,
    error: Option<ContentError>,
}

/// The checksum of IEEE 802.3, as gzip has it: reflected, polynomial 0x04C11DB7. With one table of 1 KiB, since
/// the sixteen of `crc32fast` are a part of the module that nothing else needs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Crc32(u32);

impl Crc32 {
    #[allow(clippy::indexing_slicing, reason = "a constant: it panics while it is compiled, or never")]
    const TABLE: [u32; 256] = {
        let mut table = [0; 256];
        let mut byte = 0;
        while byte < 256 {
            let (mut value, mut bit) = (byte as u32, 0);
            while bit < 8 {
                value = if value & 1 == 1 { value >> 1 ^ 0xedb8_8320 } else { value >> 1 };
                bit += 1;
            }
            table[byte] = value;
            byte += 1;
        }
        table
    };

    pub(crate) fn new() -> Self {
        Self(u32::MAX)
    }

    pub(crate) fn of(bytes: &[u8]) -> u32 {
        let mut checksum = Self::new();
        checksum.update(bytes);
        checksum.value()
    }

    pub(crate) fn update(&mut self, bytes: &[u8]) {
        self.0 = bytes.iter().fold(self.0, |value, &byte| {
            let place = usize::from(value as u8 ^ byte);
            Self::TABLE.get(place).map_or(0, |entry| value >> 8 ^ entry)
        });
    }

    pub(crate) fn value(self) -> u32 {
        !self.0
    }
}

impl FrameReader {
    pub(crate) fn new() -> Self {
        Self {
            state: State::Prelude,
            fixed: [0; 12],
            filled: 0,
            headers_left: 0,
            payload_left: 0,
            checksum: Crc32::new(),
            name: Label::default(),
            value: Label::default(),
            start: 0,
            error: None,
        }
    }

    pub(crate) fn error(&self) -> Option<ContentError> {
        self.error
    }

    /// Reads `chunk`, whose first byte stands at `base` in the body, and returns how many bytes were read: all
    /// of them, or those before a message that is none. Once failed it reads nothing more.
    pub(crate) fn push(&mut self, chunk: &[u8], base: u64, handler: &mut impl Handler) -> usize {
        let mut index = 0;
        while let Some(rest) = chunk.get(index..).filter(|rest| !rest.is_empty()) {
            let at = base + index as u64;
            let read = match self.state {
                State::Failed => return index,
                State::Prelude => {
                    if self.filled == 0 {
                        self.start = at;
                    }
                    let read = self.fill(rest, 12);
                    if self.filled == 12 {
                        self.prelude();
                    }
                    read
                }
                State::Headers(header) => self.headers(header, rest, at, handler),
                State::Payload => {
                    let piece = take(rest, self.payload_left as usize);
                    self.checksum.update(piece);
                    handler.payload(piece, at);
                    self.payload_left -= piece.len() as u32;
                    if self.payload_left == 0 {
                        self.state = State::Checksum;
                    }
                    piece.len()
                }
                State::Checksum => {
                    let read = self.fill(rest, 4);
                    if self.filled == 4 {
                        self.filled = 0;
                        let expected = core::mem::replace(&mut self.checksum, Crc32::new()).value();
                        handler.end(at + read as u64);
                        if self.number(0) == expected { self.state = State::Prelude } else { self.fail() }
                    }
                    read
                }
            };
            index += read;
        }
        index
    }

    /// Ends the input.
    pub(crate) fn finish(&mut self, body_bytes: u64, handler: &mut impl Handler) -> Result<(), ContentError> {
        let open = self.state != State::Prelude || self.filled > 0;
        if open && self.error.is_none() {
            handler.end(body_bytes);
            return Err(ContentError::Truncated);
        }
        self.error.map_or(Ok(()), Err)
    }

    fn fail(&mut self) {
        self.state = State::Failed;
        self.error = Some(ContentError::Frame { offset: self.start });
    }

    /// Keeps bytes of the fixed fields until there are `wanted`; returns how many it took.
    fn fill(&mut self, rest: &[u8], wanted: usize) -> usize {
        let place = self.fixed.get_mut(self.filled..wanted).unwrap_or_default();
        let taken = place.len().min(rest.len());
        for (place, byte) in place.iter_mut().zip(rest) {
            *place = *byte;
        }
        self.filled += taken;
        taken
    }

    fn number(&self, at: usize) -> u32 {
        let bytes = self.fixed.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
        u32::from_be_bytes(bytes.unwrap_or_default())
    }

    fn prelude(&mut self) {
        self.filled = 0;
        let (total, headers) = (self.number(0), self.number(4));
        let lengths = self.fixed;
        self.checksum.update(lengths.get(..8).unwrap_or_default());
        let right = self.checksum.value() == self.number(8);
        self.checksum.update(lengths.get(8..).unwrap_or_default());
        let payload =
            total.checked_sub(PRELUDE_BYTES + CHECKSUM_BYTES).and_then(|rest| rest.checked_sub(headers));
        match payload {
            Some(payload) if right && total <= MAX_MESSAGE_BYTES && headers <= MAX_HEADERS_BYTES => {
                (self.headers_left, self.payload_left) = (headers, payload);
                self.state = self.after_header();
            }
            _ => self.fail(),
        }
    }

    fn after_header(&self) -> State {
        if self.headers_left > 0 {
            State::Headers(Header::NameLength)
        } else if self.payload_left > 0 {
            State::Payload
        } else {
            State::Checksum
        }
    }

    /// Reads some of the headers' bytes; returns how many.
    fn headers(&mut self, header: Header, rest: &[u8], at: u64, handler: &mut impl Handler) -> usize {
        let rest = take(rest, self.headers_left as usize);
        let Some(&byte) = rest.first() else {
            self.fail(); // the headers end inside one
            return 0;
        };
        let (next, read) = match header {
            Header::NameLength => {
                (self.name, self.value) = (Label::default(), Label::default());
                (Some(if byte == 0 { Header::Type } else { Header::Name(byte) }), 1)
            }
            Header::Name(missing) => {
                let piece = take(rest, usize::from(missing));
                self.name.push(piece);
                handler.header_text(piece, at);
                let missing = missing - piece.len() as u8;
                (Some(if missing == 0 { Header::Type } else { Header::Name(missing) }), piece.len())
            }
            Header::Type => {
                let fixed = |missing| Some(Header::Value { string: false, missing });
                let next = match byte {
                    0 | 1 => None,
                    2 => fixed(1),
                    3 => fixed(2),
                    4 => fixed(4),
                    5 | 8 => fixed(8),
                    9 => fixed(16),
                    6 | 7 => Some(Header::LengthHigh { string: byte == 7 }),
                    _ => {
                        self.fail();
                        return 0;
                    }
                };
                (next, 1)
            }
            Header::LengthHigh { string } => (Some(Header::LengthLow { string, high: byte }), 1),
            Header::LengthLow { string, high } => {
                let missing = u16::from_be_bytes([high, byte]);
                (if missing == 0 { None } else { Some(Header::Value { string, missing }) }, 1)
            }
            Header::Value { string, missing } => {
                let piece = take(rest, usize::from(missing));
                if string {
                    self.value.push(piece);
                    handler.header_text(piece, at);
                }
                let missing = missing - piece.len() as u16;
                let next = (missing > 0).then_some(Header::Value { string, missing });
                if next.is_none() && string {
                    handler.header(self.name.bytes(), self.value.bytes());
                }
                (next, piece.len())
            }
        };
        self.checksum.update(take(rest, read));
        self.headers_left -= read as u32;
        match next {
            Some(_) if self.headers_left == 0 => self.fail(),
            Some(next) => self.state = State::Headers(next),
            None => self.state = self.after_header(),
        }
        read
    }
}

fn take(bytes: &[u8], at_most: usize) -> &[u8] {
    bytes.get(..at_most).unwrap_or(bytes)
}
