//! The files that an operator starts from, run as they are in a real Envoy.
//!
//! What: [`Attached`] lays out a folder like the workspace's root (`dist/` with the filter, the Envoy files
//! under the names they have) and starts Envoy there; [`Provider`] stands for every upstream that such a file
//! names, over TLS where it says so.
//!
//! **What is changed in a file** is what `envoy/README.md` tells an operator to change, by [`edited`]: the
//! text between the braces of a `socket_address`, the file of trusted authorities, and how long to learn. An
//! edit whose text is no longer in the file is a failure, so that this list stays true.
//!
//! Cost: an Envoy about half a second to start.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::sleep;
use std::time::{Duration, Instant};

use driftlock_host::envoy::{admin_request, read_addresses};
use serde_json::Value;
use tokio_rustls::rustls::pki_types::PrivateKeyDer;
use tokio_rustls::rustls::{ServerConfig, ServerConnection, Stream};

use crate::{envoy_binary, filter, workspace};

const PATIENCE: Duration = Duration::from_secs(30);

/// Replaces each first text by its second.
///
/// # Panics
/// If one is not there.
pub fn edited(text: &str, edits: &[(&str, String)]) -> String {
    edits.iter().fold(text.to_owned(), |text, (from, to)| {
        assert!(text.contains(from), "there is no {from:?} to be replaced in\n{text}");
        text.replace(from, to)
    })
}

/// The edits that let any of the files run beside others: any free ports.
pub fn free_ports() -> Vec<(&'static str, String)> {
    ["port_value: 10000", "port_value: 9901"].map(|port| (port, "port_value: 0".to_owned())).to_vec()
}

/// The edits that make a stream judge after 80 messages instead of 1,000.
pub fn learns_soon() -> Vec<(&'static str, String)> {
    vec![
        ("\"alpha\": 0.002", "\"alpha\": 0.02".to_owned()),
        ("\"messages\": 1000", "\"messages\": 80".to_owned()),
    ]
}

/// An Envoy that runs files of this repository. Ended with the value.
pub struct Attached {
    child: Child,
    folder: tempfile::TempDir,
    /// Where clients connect.
    pub listen: SocketAddr,
    /// The admin interface.
    pub admin: SocketAddr,
}

impl Attached {
    /// Starts Envoy by the first of these files, given by their paths in the workspace and their texts.
    ///
    /// # Panics
    /// With Envoy's words if it does not take them.
    pub fn start(files: &[(&str, String)]) -> Self {
        let folder = laid_out(files);
        let create = |name: &str| std::fs::File::create(folder.path().join(name)).expect("a file");
        let admin_path = folder.path().join("admin");
        let child = Command::new(envoy_binary())
            .args(["-c", files[0].0, "--concurrency", "1", "--disable-hot-restart"])
            .args(["--file-flush-interval-msec", "20"])
            .args(["--log-level", "warning", "--component-log-level", "wasm:info"])
            .arg("--admin-address-path")
            .arg(&admin_path)
            .current_dir(folder.path())
            .stdin(Stdio::null())
            .stdout(create("stdout"))
            .stderr(create("stderr"))
            .spawn()
            .expect("Envoy starts");
        let unknown = SocketAddr::from(([127, 0, 0, 1], 0));
        let mut envoy = Self { child, folder, listen: unknown, admin: unknown };
        let started = Instant::now();
        loop {
            if let Some((listen, admin)) = read_addresses(&admin_path) {
                (envoy.listen, envoy.admin) = (listen, admin);
                return envoy;
            }
            let ended = envoy.child.try_wait().expect("a child").is_some();
            assert!(!ended && started.elapsed() < PATIENCE, "{}: {}", files[0].0, envoy.read("stderr"));
            sleep(Duration::from_millis(20));
        }
    }

    fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.folder.path().join(name)).unwrap_or_default()
    }

    /// An answer of the admin interface.
    ///
    /// # Panics
    /// If it does not answer with 200.
    pub fn ask_admin(&self, path: &str) -> String {
        let (status, body) = admin_request(self.admin, "GET", path).expect("the admin interface answers");
        assert_eq!(status, 200, "{path}: {body}");
        body
    }

    /// A line of the access log that agrees with `wanted`, waited for.
    ///
    /// # Panics
    /// If there is none after a while.
    pub fn logged(&self, wanted: impl Fn(&Value) -> bool) -> Value {
        let started = Instant::now();
        loop {
            let log = self.read("stdout");
            let mut lines = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
            if let Some(line) = lines.find(&wanted) {
                return line;
            }
            assert!(started.elapsed() < PATIENCE, "no such line in\n{log}\n{}", self.read("stderr"));
            sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Envoy's own check of such files.
///
/// # Panics
/// With Envoy's words if it refuses them.
pub fn validate(files: &[(&str, String)]) {
    let folder = laid_out(files);
    let output = Command::new(envoy_binary())
        .args(["--mode", "validate", "--log-level", "error", "-c", files[0].0])
        .current_dir(folder.path())
        .output()
        .expect("Envoy runs");
    assert!(output.status.success(), "{}: {}", files[0].0, String::from_utf8_lossy(&output.stderr));
}

fn laid_out(files: &[(&str, String)]) -> tempfile::TempDir {
    let folder = tempfile::Builder::new().prefix("driftlock-attach-").tempdir().expect("a folder");
    std::fs::create_dir(folder.path().join("dist")).expect("a folder");
    let module = std::path::absolute(filter()).expect("a path");
    std::os::unix::fs::symlink(module, folder.path().join("dist/driftlock_filter.wasm")).expect("a link");
    for (path, text) in files {
        let path = folder.path().join(path);
        std::fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
        std::fs::write(path, text).expect("a file");
    }
    folder
}

/// A file of the workspace.
///
/// # Panics
/// If it is not there.
pub fn file(path: &str) -> String {
    std::fs::read_to_string(workspace().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// A request as an upstream saw it.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// Server name of the TLS handshake; none without TLS.
    pub server_name: Option<String>,
    /// The request's target.
    pub path: String,
    /// Fields, names in lower case.
    pub headers: BTreeMap<String, String>,
    /// The body.
    pub body: String,
}

/// An upstream that answers every request with 200 and the JSON that `answer` makes of it.
pub struct Provider {
    /// Where it listens.
    pub address: SocketAddr,
    seen: Arc<Mutex<Vec<Seen>>>,
}

/// What a provider answers.
pub type Answering = fn(&Seen) -> String;

impl Provider {
    /// Without TLS.
    ///
    /// # Panics
    /// If there is no free port.
    pub fn plain(answer: Answering) -> Self {
        Self::start(None, answer)
    }

    /// With a certificate for `names`, signed by an authority whose certificate is written to `authority`.
    ///
    /// # Panics
    /// If the certificates cannot be made.
    pub fn tls(names: &[&str], authority: &Path, answer: Answering) -> Self {
        use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
        let key = KeyPair::generate().expect("a key");
        let mut parameters = CertificateParams::new(vec!["authority.test".to_owned()]).expect("a name");
        // By default rcgen gives all certificates one name, and one issued by its own name is self-signed.
        parameters.distinguished_name.push(DnType::CommonName, "authority.test");
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let certificate = parameters.self_signed(&key).expect("a certificate");
        std::fs::write(authority, certificate.pem()).expect("a file");
        let issuer = Issuer::new(parameters, key);
        let key = KeyPair::generate().expect("a key");
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let leaf = CertificateParams::new(names).expect("names").signed_by(&key, &issuer).expect("signed");
        let provider = Arc::new(tokio_rustls::rustls::crypto::ring::default_provider());
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("ring knows them")
            .with_no_client_auth()
            .with_single_cert(vec![leaf.der().clone()], PrivateKeyDer::Pkcs8(key.serialize_der().into()))
            .expect("a certificate and its key");
        Self::start(Some(Arc::new(config)), answer)
    }

    fn start(tls: Option<Arc<ServerConfig>>, answer: Answering) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("an address");
        let seen = Arc::new(Mutex::new(Vec::new()));
        let all = Arc::clone(&seen);
        // Ends with the test program.
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (tls, all) = (tls.clone(), Arc::clone(&all));
                std::thread::spawn(move || match tls {
                    None => serve(stream, None, &all, answer),
                    Some(config) => {
                        let Ok(mut connection) = ServerConnection::new(config) else { return };
                        let mut socket = stream;
                        if connection.complete_io(&mut socket).is_err() {
                            return;
                        }
                        let name = connection.server_name().map(str::to_owned);
                        serve(Stream::new(&mut connection, &mut socket), name, &all, answer);
                    }
                });
            }
        });
        Self { address, seen }
    }

    /// What it was sent so far.
    ///
    /// # Panics
    /// If a connection's thread panicked.
    pub fn seen(&self) -> Vec<Seen> {
        self.seen.lock().expect("no panic").clone()
    }

    /// As the inside of a `socket_address`.
    pub fn socket_address(&self) -> String {
        format!("address: {}, port_value: {}", self.address.ip(), self.address.port())
    }
}

/// Requests of one connection, until it ends.
fn serve(stream: impl Read + Write, server_name: Option<String>, all: &Mutex<Vec<Seen>>, answer: Answering) {
    let mut stream = BufReader::new(stream);
    loop {
        let mut seen = Seen { server_name: server_name.clone(), ..Seen::default() };
        let mut line = String::new();
        while stream.read_line(&mut line).is_ok_and(|count| count > 2) {
            match line.split_once(": ") {
                Some((name, value)) => {
                    seen.headers.insert(name.to_ascii_lowercase(), value.trim_end().to_owned());
                }
                None => seen.path = line.split(' ').nth(1).unwrap_or_default().to_owned(),
            }
            line.clear();
        }
        if seen.path.is_empty() {
            return;
        }
        let length = seen.headers.get("content-length").and_then(|length| length.parse().ok());
        let mut body = vec![0; length.unwrap_or(0)];
        if stream.read_exact(&mut body).is_err() {
            return;
        }
        seen.body = String::from_utf8_lossy(&body).into_owned();
        let text = answer(&seen);
        all.lock().expect("no panic").push(seen);
        let head = format!(
            "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
            text.len()
        );
        let stream = stream.get_mut();
        if stream.write_all((head + &text).as_bytes()).and_then(|()| stream.flush()).is_err() {
            return;
        }
    }
}
