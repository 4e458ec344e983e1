//! Compiled modules on disk.
//!
//! Cranelift takes seconds for a large filter and a few milliseconds to load what it made. An entry's
//! name is the SHA-256 of the module and of everything that shapes the code (compiler version and
//! settings); its content begins with a magic word and the SHA-256 of the code, checked before a byte of
//! it is used, so that a truncated or rotten file is compiled again and replaced. Files are written
//! beside their name and renamed, so that readers never see half of one.
//!
//! The digest is no signature: code in a directory that an attacker writes to is the attacker's. So the
//! directory is created for its owner alone, and one that others may write to is not used.

use std::fs;
use std::hash::{Hash, Hasher};
use std::io::{self, Read as _, Write as _};
use std::path::Path;

use sha2::{Digest as _, Sha256};
use wasmtime::{Engine, Module};

/// What the on-disk cache did for one compilation.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum CacheUse {
    /// No directory was given.
    Off,
    /// The code was there and whole.
    Hit,
    /// The code was compiled and written.
    Miss,
    /// There was an entry, but not a whole one; it was compiled again and replaced.
    Replaced {
        /// What was wrong with it.
        reason: String,
    },
    /// The directory cannot be used; the code was compiled and not kept.
    Unusable {
        /// Why.
        reason: String,
    },
}

const MAGIC: &[u8; 8] = b"dlwasm01";
const DIGEST_BYTES: usize = 32;
/// Largest entry that is read, in bytes.
const ENTRY_MAX_BYTES: u64 = 1 << 30;

/// Takes the compiled `wasm` from `directory`, or compiles it and puts it there. Only a compiler's error
/// is an error: a cache that fails costs time, not the filter.
pub(super) fn load_or_compile(
    engine: &Engine,
    wasm: &[u8],
    directory: &Path,
) -> wasmtime::Result<(Module, CacheUse)> {
    let unusable = |reason: String| CacheUse::Unusable { reason };
    if let Err(error) = prepare(directory) {
        return Ok((Module::new(engine, wasm)?, unusable(error.to_string())));
    }
    let path = directory.join(format!("{}.cwasm", key(engine, wasm)));
    let mut outcome = CacheUse::Miss;
    match read(&path) {
        Ok(Some(code)) => {
            // SAFETY: the bytes are what `Module::serialize` gave, by their digest, in a directory that
            // only this user may write to; wasmtime itself refuses those of another version or setting.
            match unsafe { Module::deserialize(engine, &code) } {
                Ok(module) => return Ok((module, CacheUse::Hit)),
                Err(error) => outcome = CacheUse::Replaced { reason: error.to_string() },
            }
        }
        Ok(None) => {}
        Err(error) => outcome = CacheUse::Replaced { reason: error.to_string() },
    }
    let module = Module::new(engine, wasm)?;
    let written = match module.serialize() {
        Ok(code) => write(directory, &path, &code).map_err(|error| error.to_string()),
        Err(error) => Err(error.to_string()),
    };
    Ok((module, written.map_or_else(unusable, |()| outcome)))
}

/// Names the entry: the module, and everything that shapes its code.
fn key(engine: &Engine, wasm: &[u8]) -> String {
    /// Feeds `Hash` implementations to SHA-256.
    struct Feed(Sha256);
    impl Hasher for Feed {
        fn finish(&self) -> u64 {
            0
        }
        fn write(&mut self, bytes: &[u8]) {
            self.0.update(bytes);
        }
    }
    let mut feed = Feed(Sha256::new());
    engine.precompile_compatibility_hash().hash(&mut feed);
    feed.0.update(wasm);
    feed.0.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

fn prepare(directory: &Path) -> io::Result<()> {
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(directory)?;
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt as _;
        let mode = fs::metadata(directory)?.permissions().mode();
        if mode & 0o022 != 0 {
            return Err(io::Error::other(format!(
                "others may write to the cache directory (mode {:o}); chmod go-w it",
                mode & 0o777
            )));
        }
    }
    Ok(())
}

/// The code of an entry; `None` when there is no entry.
fn read(path: &Path) -> io::Result<Option<Vec<u8>>> {
    let file = match fs::File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut file = file.take(ENTRY_MAX_BYTES);
    let mut head = [0; MAGIC.len() + DIGEST_BYTES];
    file.read_exact(&mut head)?;
    let (magic, digest) = head.split_at(MAGIC.len());
    if magic != MAGIC {
        return Err(io::Error::other("it is no entry of this cache"));
    }
    let mut code = Vec::new();
    file.read_to_end(&mut code)?;
    if Sha256::digest(&code).as_slice() != digest {
        return Err(io::Error::other("its digest does not match its content"));
    }
    Ok(Some(code))
}

fn write(directory: &Path, path: &Path, code: &[u8]) -> io::Result<()> {
    let mut file = tempfile::NamedTempFile::new_in(directory)?;
    file.write_all(MAGIC)?;
    file.write_all(&Sha256::digest(code))?;
    file.write_all(code)?;
    file.as_file().sync_all()?;
    file.persist(path).map(drop).map_err(|error| error.error)
}
