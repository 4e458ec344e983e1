//! Baselines learned in place, shared by all VMs of a process through proxy-wasm shared data.
//!
//! What: an index, one line a stream with the digest of its baseline, changed by compare-and-swap only; and
//! each baseline under its digest. The first VM that finishes a stream enters it; another that finishes
//! later finds the entry and adopts it, the rest adopt it at their next tick. A VM that starts later, after
//! a crash or a change of configuration, begins with all that is there.
//!
//! Why no two VMs can judge by different baselines: a stream is entered, or another's entry adopted, in the
//! same callback that ends its learning, before it judges anything.
//!
//! Cost: a shared value per stream, as long as the process lives. Shared data has no deletion; a baseline
//! that came second is never written.
//!
//! Left out on purpose: sharing between processes, for which snapshots are pulled.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::sync::Arc;

use driftlock_engine::baseline::{Digest, Snapshot, StreamBaseline};
use driftlock_engine::detector::Detector;

use super::{CAS_MISMATCH, Services};
use crate::host::{HostError, Level, Metric};

/// How often a change that another VM overtook is tried again.
const ATTEMPTS: u32 = 16;

/// The key under which a baseline or a snapshot is shared.
pub(super) fn blob_key(digest: impl core::fmt::Display) -> String {
    format!("driftlock.baseline/{digest}")
}

/// This VM's number among those of the same configuration, from 0; 0 if the proxy shares nothing.
pub(super) fn ordinal(fingerprint: &Digest, services: &mut impl Services) -> u32 {
    let key = format!("driftlock.vms/{fingerprint}");
    let change = |count: &str| {
        let ordinal: u32 = count.parse().unwrap_or(0);
        (Some(ordinal.wrapping_add(1).to_string()), ordinal)
    };
    swap(&key, services, change).unwrap_or(0)
}

/// Changes a shared text so that no other VM's change is lost. `change` gives the new text, if there is one.
fn swap<T>(
    key: &str,
    services: &mut impl Services,
    change: impl Fn(&str) -> (Option<String>, T),
) -> Result<T, HostError> {
    for _ in 0..ATTEMPTS {
        let Some((value, cas)) = services.shared(key)? else {
            // Only an existing value can be compared.
            services.set_shared(key, b"", 0)?;
            continue;
        };
        let (text, result) = change(core::str::from_utf8(&value).unwrap_or_default());
        let Some(text) = text else { return Ok(result) };
        match services.set_shared(key, text.as_bytes(), cas) {
            Ok(()) => return Ok(result),
            Err(CAS_MISMATCH) => {}
            Err(error) => return Err(error),
        }
    }
    Err(CAS_MISMATCH)
}

/// The entries of an index.
fn entries(index: &str) -> impl Iterator<Item = (&str, &str)> {
    index.lines().filter_map(|line| line.split_once(' '))
}

/// See the module.
#[derive(Debug)]
pub(super) struct Share {
    index: String,
    /// The index as it was last adopted.
    seen: Option<u32>,
}

impl Share {
    pub(super) fn new(fingerprint: &Digest) -> Self {
        Self { index: format!("driftlock.learned/{fingerprint}"), seen: None }
    }

    /// Has the index be there before anybody needs to compare it.
    pub(super) fn start(&self, services: &mut impl Services) {
        if let Err(error) = swap(&self.index, services, |_| (None, ())) {
            failed("the index of learned baselines cannot be shared", error, services);
        }
    }

    /// Takes over what is new in the index, except for streams that have a pulled baseline.
    pub(super) fn adopt(&mut self, pulled: &[String], detector: &mut Detector, services: &mut impl Services) {
        let (value, cas) = match services.shared(&self.index) {
            Ok(Some(entry)) => entry,
            Ok(None) => return,
            Err(error) => return failed("the index of learned baselines cannot be read", error, services),
        };
        if self.seen == Some(cas) {
            return;
        }
        self.seen = Some(cas);
        let index = core::str::from_utf8(&value).unwrap_or_default();
        for (digest, stream) in entries(index).filter(|(_, stream)| pulled.iter().all(|own| own != stream)) {
            take_over(digest, stream, detector, services);
        }
    }

    /// Enters a baseline, unless another VM was first.
    pub(super) fn publish(
        &self,
        baseline: &StreamBaseline,
        detector: &mut Detector,
        services: &mut impl Services,
    ) {
        let (stream, own) = (baseline.stream(), baseline.digest().to_string());
        // What the index names must be there.
        let known = services.shared(&self.index).ok().flatten();
        let first = known.is_none_or(|(index, _)| {
            let index = core::str::from_utf8(&index).unwrap_or_default();
            entries(index).all(|(_, entered)| entered != stream)
        });
        if first {
            let bytes = Snapshot::new([baseline.clone()]).encode();
            if let Err(error) = services.set_shared(&blob_key(&own), &bytes, 0) {
                return failed("a learned baseline cannot be shared", error, services);
            }
        }
        let entered = swap(&self.index, services, |index| {
            let winner = entries(index).find(|(_, entered)| *entered == stream);
            match winner {
                Some((digest, _)) => (None, digest.to_string()),
                None => (Some(format!("{index}{own} {stream}\n")), own.clone()),
            }
        });
        match entered {
            Ok(digest) if digest == own => services.count(Metric::BaselinesShared, 1),
            Ok(digest) => {
                if first {
                    // Written for nothing; nobody reads it.
                    let _ = services.set_shared(&blob_key(&own), b"", 0);
                }
                take_over(&digest, stream, detector, services);
            }
            Err(error) => failed("a learned baseline cannot be entered", error, services),
        }
    }
}

/// Replaces a stream's baseline with the shared one of that digest.
fn take_over(digest: &str, stream: &str, detector: &mut Detector, services: &mut impl Services) {
    if detector.digest(stream).is_some_and(|own| own.to_string() == digest) {
        return;
    }
    let bytes = match services.shared(&blob_key(digest)) {
        Ok(bytes) => bytes.map(|(bytes, _)| bytes).unwrap_or_default(),
        Err(error) => return failed("a shared baseline cannot be read", error, services),
    };
    let baseline = match Snapshot::decode(&bytes) {
        Ok(snapshot) => snapshot.into_streams().pop(),
        Err(error) => {
            services.count(Metric::ErrorBaseline, 1);
            return services.log(Level::Error, &format!("driftlock: a shared baseline is refused: {error}"));
        }
    };
    let named =
        |baseline: &StreamBaseline| baseline.stream() == stream && baseline.digest().to_string() == digest;
    match baseline.filter(named) {
        Some(baseline) => {
            detector.adopt(Arc::new(baseline));
            services.count(Metric::BaselinesAdopted, 1);
        }
        None => services.count(Metric::ErrorBaseline, 1),
    }
}

fn failed(what: &str, error: HostError, services: &mut impl Services) {
    services.count(Metric::ErrorBaseline, 1);
    services.log(Level::Error, &format!("driftlock: {what}: {error}"));
}
