//! A folder of snapshots, found by digest.
//!
//! What: each file that decodes is offered under the digest it ends with; the one changed last is the
//! current one. Files come and go while the service runs: `driftlock train -o` into the folder publishes.
//!
//! Cost: a listing for each question; a file is decoded once, then known by its size and time.
//!
//! Left out on purpose: files that do not decode, which are passed over and logged once.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use driftlock_engine::baseline::{Digest, Snapshot};

use super::ServeError;

/// A file as it was when it was decoded.
type Version = (u64, SystemTime);

#[derive(Debug)]
pub(super) struct Snapshots {
    folder: PathBuf,
    /// The digest of each file, none for one that is no snapshot.
    known: Mutex<HashMap<PathBuf, (Version, Option<String>)>>,
}

/// A snapshot in the folder.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) digest: String,
    path: PathBuf,
}

impl Found {
    /// Its bytes, if they are still those of the digest.
    pub(super) fn read(&self) -> io::Result<Vec<u8>> {
        let bytes = fs::read(&self.path)?;
        if stated(&bytes).as_deref() == Some(self.digest.as_str()) {
            Ok(bytes)
        } else {
            Err(io::ErrorKind::InvalidData.into())
        }
    }
}

/// The digest that a snapshot ends with.
fn stated(bytes: &[u8]) -> Option<String> {
    bytes.last_chunk().map(|digest| Digest(*digest).to_string())
}

impl Snapshots {
    pub(super) fn open(folder: &Path) -> Result<Self, ServeError> {
        let failed = |source| ServeError::File { action: "read", path: folder.to_owned(), source };
        fs::read_dir(folder).map_err(failed)?;
        Ok(Self { folder: folder.to_owned(), known: Mutex::default() })
    }

    /// The snapshot with the digest `wanted`, or the one changed last for `current`.
    pub(super) fn find(&self, wanted: &str) -> Option<Found> {
        let all = self.all();
        let newest = || all.iter().max_by(|a, b| (a.0, &a.1.path).cmp(&(b.0, &b.1.path)));
        let found = if wanted == "current" {
            newest()
        } else {
            all.iter().find(|(_, found)| found.digest.eq_ignore_ascii_case(wanted))
        };
        found.map(|(_, found)| Found { digest: found.digest.clone(), path: found.path.clone() })
    }

    fn all(&self) -> Vec<(SystemTime, Found)> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let mut all = Vec::new();
        let mut there = HashMap::new();
        for entry in fs::read_dir(&self.folder).into_iter().flatten().flatten() {
            let path = entry.path();
            let Ok(metadata) = fs::metadata(&path) else { continue };
            let Ok(changed) = metadata.modified() else { continue };
            if !metadata.is_file() {
                continue;
            }
            let version = (metadata.len(), changed);
            let digest = match known.remove(&path) {
                Some((decoded, digest)) if decoded == version => digest,
                _ => decode(&path),
            };
            if let Some(digest) = &digest {
                all.push((changed, Found { digest: digest.clone(), path: path.clone() }));
            }
            there.insert(path, (version, digest));
        }
        *known = there;
        all
    }
}

fn decode(path: &Path) -> Option<String> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) => {
            tracing::warn!("{} cannot be read: {error}", path.display());
            return None;
        }
    };
    match Snapshot::decode(&bytes) {
        Ok(_) => stated(&bytes),
        Err(error) => {
            tracing::warn!("{} is not offered: {error}", path.display());
            None
        }
    }
}
