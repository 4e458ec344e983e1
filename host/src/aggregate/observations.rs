//! Observations, appended to a file.
//!
//! What: a batch is taken whole or not at all: every line has to be a JSON object, and they are written in
//! one call. Cost: a parse that builds nothing, and the write.
//!
//! Left out on purpose: rotation (move the file away and restart), a database.

use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use serde::de::{Deserializer as _, IgnoredAny, MapAccess, Visitor};

use super::ServeError;

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
    file: Mutex<File>,
}

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
    pub(super) fn open(path: &Path) -> Result<Self, ServeError> {
        let file = OpenOptions::new().append(true).create(true).open(path);
        let failed = |source| ServeError::File { action: "open", path: path.to_owned(), source };
        Ok(Self { file: Mutex::new(file.map_err(failed)?) })
    }

    /// Takes a batch; says how many lines it had.
    pub(super) fn append(&self, batch: &[u8]) -> Result<usize, Refused> {
        let mut out = Vec::with_capacity(batch.len() + 1);
        let mut taken = 0;
        for (line, number) in batch.split(|&byte| byte == b'\n').zip(1..) {
            if line.trim_ascii().is_empty() {
                continue;
            }
            if !is_object(line) {
                return Err(Refused::Line(number));
            }
            out.extend_from_slice(line.trim_ascii());
            out.push(b'\n');
            taken += 1;
        }
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        file.write_all(&out).map_err(Refused::Write)?;
        Ok(taken)
    }
}
