//! Observations, appended to a file and followed as they come.
//!
//! What: a batch is taken whole or not at all: every line has to be a JSON object. Each gets the time of its
//! receipt, `received_unix_ms`, since what is made of them ([`Watch`]) may depend on it and has to be the same
//! when it is made again from the file. They are written in one call and followed in the file's order.
//!
//! Cost: a parse that builds nothing, the write, and what following costs; at the start a pass over the file.
//!
//! Left out on purpose: rotation (move the file away and restart, and following starts anew), a database.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use serde::de::{Deserializer as _, IgnoredAny, MapAccess, Visitor};

use super::ServeError;
use super::watch::{Report, Watch};

/// Why a batch was not taken.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Refused {
    /// A line, counted from 1.
    #[error("line {0} is not a JSON object; send one object a line")]
    Line(usize),
    /// The file.
    #[error("the observations cannot be written: {0}")]
    Write(io::Error),
}

#[derive(Debug)]
pub(super) struct Observations {
    /// One lock, so that they are followed in the order in which they are written.
    state: Mutex<(File, Watch)>,
}

/// Longest line that is followed.
const MAX_LINE_BYTES: usize = 8 << 20;

/// An object of which nothing is kept.
struct Object;

impl<'de> Visitor<'de> for Object {
    type Value = ();

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(())
    }
}

fn is_object(line: &[u8]) -> bool {
    let mut json = serde_json::Deserializer::from_slice(line);
    json.deserialize_map(Object).and_then(|()| json.end()).is_ok()
}

impl Observations {
    /// Follows what the file holds, and will append to it.
    pub(super) fn open(path: &Path, mut watch: Watch) -> Result<Self, ServeError> {
        let failed = |source| ServeError::File { action: "open", path: path.to_owned(), source };
        let file = OpenOptions::new().append(true).create(true).read(true).open(path).map_err(failed)?;
        let mut earlier = BufReader::new(File::open(path).map_err(failed)?);
        let mut line = Vec::new();
        while earlier.read_until(b'\n', &mut line).map_err(failed)? > 0 {
            if line.len() <= MAX_LINE_BYTES {
                watch.observe(&line);
            }
            line.clear();
        }
        Ok(Self { state: Mutex::new((file, watch)) })
    }

    /// Takes a batch received at `unix_ms`; says how many lines it had.
    pub(super) fn append(&self, batch: &[u8], unix_ms: u64) -> Result<usize, Refused> {
        let mut out = Vec::with_capacity(batch.len() + 1);
        let mut taken = 0;
        for (line, number) in batch.split(|&byte| byte == b'\n').zip(1..) {
            let line = line.trim_ascii();
            if line.is_empty() {
                continue;
            }
            let rest = line.strip_prefix(b"{").filter(|_| is_object(line)).ok_or(Refused::Line(number))?;
            let comma = if rest.trim_ascii_start().starts_with(b"}") { "" } else { "," };
            out.extend_from_slice(format!("{{\"received_unix_ms\":{unix_ms}{comma}").as_bytes());
            out.extend_from_slice(rest);
            out.push(b'\n');
            taken += 1;
        }
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let (file, watch) = &mut *state;
        file.write_all(&out).map_err(Refused::Write)?;
        out.split(|&byte| byte == b'\n').filter(|line| !line.is_empty()).for_each(|line| watch.observe(line));
        Ok(taken)
    }

    /// What they say together.
    pub(super) fn report(&self) -> Report {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).1.report()
    }
}
