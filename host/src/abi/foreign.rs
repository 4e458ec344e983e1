//! Functions that guests call by name through `proxy_call_foreign_function`.
//!
//! A caller registers its own; Envoy's `compress` and `uncompress` (zlib, RFC 1950) are there from the
//! start, and the ones that act on the exchange (`clear_route_cache`, `declare_property`) live with the
//! host calls. Left out on purpose: Envoy's CEL expressions (`expr_*`) and `sign`/`verify_signature`,
//! which bring a language and a cryptography library along; register them where a filter needs them.

use std::collections::BTreeMap;
use std::fmt;
use std::io::Read as _;
use std::sync::Arc;

use super::host::COPY_MAX_BYTES;
use super::status::Status;

/// A function that guests call by name: argument bytes to result bytes, or the status that the guest
/// gets instead.
pub type ForeignFunction = Arc<dyn Fn(&[u8]) -> Result<Vec<u8>, Status> + Send + Sync>;

/// Foreign functions by name. `Default` holds the built-in ones.
#[derive(Clone)]
pub struct ForeignFunctions {
    by_name: BTreeMap<String, ForeignFunction>,
}

impl ForeignFunctions {
    /// No functions at all, not even the built-in ones.
    #[must_use]
    pub fn none() -> Self {
        Self { by_name: BTreeMap::new() }
    }

    /// Registers `function` under `name`, in place of what was there.
    pub fn insert(
        &mut self,
        name: impl Into<String>,
        function: impl Fn(&[u8]) -> Result<Vec<u8>, Status> + Send + Sync + 'static,
    ) {
        self.by_name.insert(name.into(), Arc::new(function));
    }

    /// The names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.by_name.keys().map(String::as_str)
    }

    pub(super) fn find(&self, name: &[u8]) -> Option<ForeignFunction> {
        let name = std::str::from_utf8(name).ok()?;
        self.by_name.get(name).map(Arc::clone)
    }
}

impl Default for ForeignFunctions {
    fn default() -> Self {
        let mut functions = Self::none();
        functions.insert("compress", compress);
        functions.insert("uncompress", uncompress);
        functions
    }
}

impl fmt::Debug for ForeignFunctions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.by_name.keys()).finish()
    }
}

fn compress(data: &[u8]) -> Result<Vec<u8>, Status> {
    read_all(flate2::read::ZlibEncoder::new(data, flate2::Compression::default()))
}

fn uncompress(data: &[u8]) -> Result<Vec<u8>, Status> {
    read_all(flate2::read::ZlibDecoder::new(data))
}

/// A result over the bound is refused: a few bytes can unpack to gigabytes.
fn read_all(from: impl std::io::Read) -> Result<Vec<u8>, Status> {
    let limit = COPY_MAX_BYTES as u64;
    let mut out = Vec::new();
    let read = from.take(limit + 1).read_to_end(&mut out).map_err(|_| Status::SerializationFailure)?;
    if read as u64 > limit { Err(Status::SerializationFailure) } else { Ok(out) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_compressed_comes_back_and_a_bomb_does_not() {
        for data in [&b""[..], b"hello hello hello", &[0; 100_000]] {
            assert_eq!(uncompress(&compress(data).unwrap()).unwrap(), data);
        }
        assert_eq!(uncompress(b"not zlib"), Err(Status::SerializationFailure));
        let bomb = compress(&vec![0; COPY_MAX_BYTES + 1]);
        assert!(bomb.as_ref().is_ok_and(|bomb| bomb.len() < 100_000));
        assert_eq!(uncompress(&bomb.unwrap()), Err(Status::SerializationFailure));
    }

    #[test]
    fn an_envoy_zlib_stream_is_read() {
        // zlib's own compress("a").
        let bytes = [0x78, 0x9c, 0x4b, 0x04, 0x00, 0x00, 0x62, 0x00, 0x62];
        assert_eq!(uncompress(&bytes).unwrap(), b"a");
    }
}
