//! Cuts values out of a JSON text while it streams by.
//!
//! A HAR file is one object whose `log.entries` can be gigabytes; a tap file is a sequence of objects,
//! often printed over many lines. [`Cutter`] finds where each value begins and ends, without building
//! it, so that memory is that of one value. What it hands out is parsed by whoever reads it; a value
//! that is broken inside but closed outside does not hurt the ones after it.
//!
//! Cost: one pass over the bytes. Left out on purpose: checking the grammar, which the parser does.

use std::io::{self, BufRead};

/// A larger value is no exchange.
const MAX_VALUE_BYTES: usize = 256 << 20;

/// Why no further value can be cut out.
#[derive(Debug, thiserror::Error)]
pub enum CutError {
    /// The source.
    #[error(transparent)]
    Read(#[from] io::Error),
    /// Not the text that was expected.
    #[error("{0}")]
    Unexpected(&'static str),
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum At {
    Start,
    Elements,
    Sequence,
    End,
}

/// Cuts one value after the other.
pub(super) struct Cutter<R> {
    source: R,
    path: &'static [&'static str],
    at: At,
    /// 1-based line of the next byte.
    line: u64,
}

impl<R: BufRead> Cutter<R> {
    /// The elements of the array at `path`; with an empty path, the values of the text itself.
    pub(super) fn new(source: R, path: &'static [&'static str]) -> Self {
        Self { source, path, at: if path.is_empty() { At::Sequence } else { At::Start }, line: 1 }
    }

    /// Line of the next byte, from 1.
    pub(super) fn line(&self) -> u64 {
        self.line
    }

    /// Appends the next value's bytes to `out`; gives the line on which it begins, none at the end.
    pub(super) fn next(&mut self, out: &mut Vec<u8>) -> Result<Option<u64>, CutError> {
        if self.at == At::Start {
            self.descend()?;
        }
        loop {
            match (self.peek()?, self.at) {
                (_, At::End) => return Ok(None),
                (None, At::Sequence) => return Ok(None),
                (None, _) => return Err(CutError::Unexpected("the list of entries is not closed")),
                (Some(b','), _) => self.skip(1),
                (Some(b']'), At::Elements) => self.at = At::End,
                (Some(_), _) => {
                    let line = self.line;
                    self.value(Some(out))?;
                    return Ok(Some(line));
                }
            }
        }
    }

    /// Into the array at the path.
    fn descend(&mut self) -> Result<(), CutError> {
        for (i, wanted) in self.path.iter().enumerate() {
            self.expect(b'{', "an object is expected")?;
            loop {
                match self.peek()? {
                    Some(b',') => self.skip(1),
                    Some(b'"') => {
                        let mut key = Vec::new();
                        self.value(Some(&mut key))?;
                        self.expect(b':', "a key has no colon after it")?;
                        if key[1..].strip_suffix(b"\"") == Some(wanted.as_bytes()) {
                            break;
                        }
                        self.peek()?;
                        self.value(None)?;
                    }
                    _ => {
                        return Err(CutError::Unexpected(match i {
                            0 => "there is no `log`",
                            _ => "there is no list of entries",
                        }));
                    }
                }
            }
        }
        self.expect(b'[', "the entries are not a list")?;
        self.at = At::Elements;
        Ok(())
    }

    fn expect(&mut self, byte: u8, reason: &'static str) -> Result<(), CutError> {
        if self.peek()? != Some(byte) {
            return Err(CutError::Unexpected(reason));
        }
        self.skip(1);
        Ok(())
    }

    /// The next byte that is no blank, still unread.
    fn peek(&mut self) -> Result<Option<u8>, CutError> {
        loop {
            let bytes = self.source.fill_buf()?;
            if bytes.is_empty() {
                return Ok(None);
            }
            // RFC 8259 section 2, and the record separator of JSON text sequences (RFC 7464).
            let blank = |b: &u8| !matches!(b, b' ' | b'\t' | b'\r' | b'\n' | 0x1e);
            let end = bytes.iter().position(blank);
            let blanks = end.unwrap_or(bytes.len());
            self.line += memchr::memchr_iter(b'\n', &bytes[..blanks]).count() as u64;
            let next = end.map(|end| bytes[end]);
            self.source.consume(blanks);
            if next.is_some() {
                return Ok(next);
            }
        }
    }

    fn skip(&mut self, bytes: usize) {
        self.source.consume(bytes);
    }

    /// Steps over one value, which begins at the next byte.
    fn value(&mut self, mut out: Option<&mut Vec<u8>>) -> Result<(), CutError> {
        let start = out.as_ref().map_or(0, |out| out.len());
        let (mut depth, mut in_string, mut escaped) = (0u64, false, false);
        let mut begun = false;
        loop {
            let bytes = self.source.fill_buf()?;
            if bytes.is_empty() {
                // A number at the very end of a text ends with it.
                return match begun && depth == 0 && !in_string {
                    true => Ok(()),
                    false => Err(CutError::Unexpected("a value is not closed")),
                };
            }
            let (mut taken, mut done) = (0, false);
            for &byte in bytes {
                if in_string {
                    taken += 1;
                    if escaped {
                        escaped = false;
                    } else if byte == b'\\' {
                        escaped = true;
                    } else if byte == b'"' {
                        in_string = false;
                        done = depth == 0;
                    }
                } else {
                    match byte {
                        b'"' if !begun || depth > 0 => in_string = true,
                        b'{' | b'[' if !begun || depth > 0 => depth += 1,
                        b'}' | b']' if depth > 0 => {
                            depth -= 1;
                            done = depth == 0;
                        }
                        // A plain value ends before what cannot be part of it.
                        b',' | b'}' | b']' | b'{' | b'[' | b'"' | b' ' | b'\t' | b'\r' | b'\n' | b':'
                            if depth == 0 =>
                        {
                            // A stray closing byte is a value of its own, or nothing would move.
                            taken += usize::from(!begun);
                            done = true;
                            break;
                        }
                        _ => {}
                    }
                    taken += 1;
                }
                begun = true;
                if done {
                    break;
                }
            }
            if let Some(out) = &mut out {
                out.extend_from_slice(&bytes[..taken]);
                if out.len() - start > MAX_VALUE_BYTES {
                    return Err(CutError::Unexpected("a value is larger than 256 MiB"));
                }
            }
            self.line += memchr::memchr_iter(b'\n', &bytes[..taken]).count() as u64;
            self.source.consume(taken);
            if done {
                return Ok(());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::BufReader;

    fn cut(text: &str, path: &'static [&'static str], buffer: usize) -> Result<Vec<(u64, String)>, CutError> {
        let mut cutter = Cutter::new(BufReader::with_capacity(buffer, text.as_bytes()), path);
        let mut values = Vec::new();
        loop {
            let mut out = Vec::new();
            match cutter.next(&mut out)? {
                Some(line) => values.push((line, String::from_utf8(out).unwrap())),
                None => return Ok(values),
            }
        }
    }

    const HAR: &str = "{\"x\": [\"]\", {\"entries\": [9]}],\n \"log\": {\"pages\": [{}], \"entries\":\n [{\"a\": \"}\\\"]\"}, [1,[2]],\n\n 7 , \"s,\\\\\"] , \"after\": 1}}";

    #[test]
    fn entries_are_found_behind_look_alikes_for_every_buffer() {
        let expected = [(3, "{\"a\": \"}\\\"]\"}"), (3, "[1,[2]]"), (5, "7"), (5, "\"s,\\\\\"")];
        let expected: Vec<_> = expected.iter().map(|(line, text)| (*line, (*text).to_owned())).collect();
        for buffer in 1..HAR.len() {
            assert_eq!(cut(HAR, &["log", "entries"], buffer).unwrap(), expected, "buffer of {buffer}");
        }
    }

    #[test]
    fn a_cut_text_is_an_error_not_an_end() {
        for end in 1..HAR.len() - "] , \"after\": 1}}".len() {
            if HAR.is_char_boundary(end) {
                assert!(cut(&HAR[..end], &["log", "entries"], 64).is_err(), "cut at {end}");
            }
        }
    }

    proptest! {
        #[test]
        fn a_sequence_comes_back_as_it_was(
            values in prop::collection::vec(prop_oneof![
                "[a-z\\\\\"{}\\[\\],: ]{0,12}".prop_map(|s| serde_json::json!({"k": s, "l": [s, 1, null]})),
                "[a-z\\\\\"{}\\[\\],: ]{0,12}".prop_map(serde_json::Value::from),
                any::<u32>().prop_map(serde_json::Value::from),
            ], 0..6),
            buffer in 1usize..40,
            pretty in any::<bool>(),
        ) {
            let print = |v: &serde_json::Value| if pretty { serde_json::to_string_pretty(v) } else { serde_json::to_string(v) };
            let texts: Vec<String> = values.iter().map(|v| print(v).unwrap()).collect();
            let cut: Vec<String> = cut(&texts.join("\n"), &[], buffer).unwrap().into_iter().map(|(_, text)| text).collect();
            prop_assert_eq!(cut, texts);
        }
    }
}
