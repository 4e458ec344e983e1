//! A compiled filter: the expensive part of a start, done once and shared by every VM.
//!
//! Compilation costs seconds for a large filter, and its result can be kept on disk (see `cache`).
//! Each module has its own wasmtime engine, and with it one thread that advances the engine's epoch
//! every 10 ms, so that a guest which never returns is stopped; the check costs a load and a compare
//! per loop iteration, a tenth of the filter's time ([`CompileOptions::unwatched`]). The thread ends with the last VM. NaN bits and relaxed SIMD are made
//! deterministic.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use wasmtime::{Config, Engine, ExternType, InstancePre, Linker, OptLevel, UnknownImportError};

use super::cache::{self, CacheUse};
use super::error::AbiError;
use super::host::Host;

/// How often the epoch advances; deadlines are counted in these.
pub(super) const EPOCH_TICK: Duration = Duration::from_millis(10);

/// A compiled and linked proxy-wasm module; clones share it.
#[derive(Clone)]
pub struct Module {
    inner: Arc<Inner>,
}

struct Inner {
    engine: Engine,
    ready: InstancePre<Host>,
    abi: AbiVersion,
    fuel: bool,
    cache: CacheUse,
}

/// The ABI a module was built for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AbiVersion {
    /// 0.2.0.
    V0_2_0,
    /// 0.2.1, which adds `proxy_get_log_level`.
    V0_2_1,
}

/// How to compile.
#[derive(Debug, Clone, Default)]
pub struct CompileOptions {
    /// Keep compiled code in this directory and look for it there first. `None`: not on disk. What is
    /// found is checked against its digest; whoever may write there may run code as this process, so a
    /// directory that others may write to is not used.
    pub cache_directory: Option<PathBuf>,
    /// Leave out the checks by which a guest that never returns is stopped: the deadlines of
    /// [`Limits`](super::Limits) then bound nothing. For guests that are one's own and run where somebody can end the process.
    pub unwatched: bool,
    /// Meter instructions, for [`Limits::callback_fuel`](super::Limits). Costs some 10 % of speed.
    pub fuel: bool,
}

impl Module {
    /// Compiles `bytes` (a binary module) without touching the disk.
    ///
    /// # Errors
    /// See [`Module::compile_with`].
    pub fn compile(bytes: &[u8]) -> Result<Self, AbiError> {
        Self::compile_with(bytes, &CompileOptions::default())
    }

    /// Compiles `bytes` and checks that the result can be started.
    ///
    /// # Errors
    /// [`AbiError::Compile`] for bytes that are no module, [`AbiError::NotProxyWasm`] and
    /// [`AbiError::UnsupportedAbi`] by the version export, [`AbiError::UnknownImport`] and
    /// [`AbiError::WrongType`] for imports that this host cannot satisfy.
    pub fn compile_with(bytes: &[u8], options: &CompileOptions) -> Result<Self, AbiError> {
        let compile_error = |error: wasmtime::Error| AbiError::Compile { message: format!("{error:#}") };
        let mut config = Config::new();
        config
            .cranelift_opt_level(OptLevel::Speed)
            .cranelift_nan_canonicalization(true)
            .relaxed_simd_deterministic(true)
            .epoch_interruption(!options.unwatched)
            .consume_fuel(options.fuel);
        let engine = Engine::new(&config).map_err(compile_error)?;
        let (module, cache) = match &options.cache_directory {
            Some(directory) => cache::load_or_compile(&engine, bytes, directory).map_err(compile_error)?,
            None => (wasmtime::Module::new(&engine, bytes).map_err(compile_error)?, CacheUse::Off),
        };
        if cache != CacheUse::Hit {
            return_free_memory();
        }
        let abi = abi_version(&module)?;

        let mut linker = Linker::new(&engine);
        super::imports::register(&mut linker).map_err(compile_error)?;
        super::wasi::register(&mut linker).map_err(compile_error)?;
        let ready = link(&mut linker, &module)?;
        if !options.unwatched {
            start_epoch(&engine).map_err(|error| AbiError::Compile {
                message: format!("cannot start the watchdog thread: {error}"),
            })?;
        }
        Ok(Self { inner: Arc::new(Inner { engine, ready, abi, fuel: options.fuel, cache }) })
    }

    /// The ABI version that the module declares; 0.2.1 when it declares both.
    #[must_use]
    pub fn abi_version(&self) -> AbiVersion {
        self.inner.abi
    }

    /// Whether the compiled code came from the cache, and why not.
    #[must_use]
    pub fn cache_use(&self) -> &CacheUse {
        &self.inner.cache
    }

    pub(super) fn meters_fuel(&self) -> bool {
        self.inner.fuel
    }

    pub(super) fn engine(&self) -> &Engine {
        &self.inner.engine
    }

    pub(super) fn ready(&self) -> &InstancePre<Host> {
        &self.inner.ready
    }
}

impl std::fmt::Debug for Module {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Module").field("abi", &self.inner.abi).finish_non_exhaustive()
    }
}

/// Gives the system back what the compiler has freed: glibc keeps it otherwise, in an arena for each thread that
/// compiled, and a proxy that has compiled one filter would keep 16 MiB for nothing.
fn return_free_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: it takes a number, no pointer, and may be called at any time from any thread (malloc_trim(3));
    // no memory in use moves.
    unsafe {
        libc::malloc_trim(0);
    }
}

fn abi_version(module: &wasmtime::Module) -> Result<AbiVersion, AbiError> {
    let mut other = None;
    let mut found = None;
    for export in module.exports() {
        match export.name() {
            "proxy_abi_version_0_2_1" => return Ok(AbiVersion::V0_2_1),
            "proxy_abi_version_0_2_0" => found = Some(AbiVersion::V0_2_0),
            name if name.starts_with("proxy_abi_version_") => other = Some(name.to_owned()),
            _ => {}
        }
    }
    match (found, other) {
        (Some(version), _) => Ok(version),
        (None, Some(found)) => Err(AbiError::UnsupportedAbi { found }),
        (None, None) => Err(AbiError::NotProxyWasm),
    }
}

/// Links the module. An unknown import is replaced by a stub and noted, so that the error names all
/// of them.
fn link(linker: &mut Linker<Host>, module: &wasmtime::Module) -> Result<InstancePre<Host>, AbiError> {
    let wrong_type = |error: wasmtime::Error| AbiError::WrongType {
        name: "an import".to_owned(),
        message: format!("{error:#}"),
    };
    let mut names = Vec::new();
    loop {
        let error = match linker.instantiate_pre(module) {
            Ok(ready) if names.is_empty() => return Ok(ready),
            Ok(_) => return Err(AbiError::UnknownImport { names }),
            Err(error) => error,
        };
        let Some(unknown) = error.downcast_ref::<UnknownImportError>() else {
            return Err(wrong_type(error));
        };
        let (from, name) = (unknown.module().to_owned(), unknown.name().to_owned());
        names.push(format!("{from}.{name}"));
        let ExternType::Func(ty) = unknown.ty() else {
            // Nothing can stand in for a global, table or memory.
            return Err(AbiError::UnknownImport { names });
        };
        let stub = linker.func_new(&from, &name, ty, |_, _, _| Ok(()));
        stub.map_err(wrong_type)?;
    }
}

fn start_epoch(engine: &Engine) -> std::io::Result<()> {
    let engine = engine.weak();
    std::thread::Builder::new()
        .name("wasm-epoch".to_owned())
        .stack_size(64 * 1024)
        .spawn(move || {
            while let Some(engine) = engine.upgrade() {
                engine.increment_epoch();
                drop(engine);
                std::thread::sleep(EPOCH_TICK);
            }
        })
        .map(drop)
}
