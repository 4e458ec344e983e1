//! TLS on both sides: rustls with ring, files read once per load.
//!
//! Listeners offer HTTP/2 and HTTP/1.1 by ALPN and may ask clients for certificates. Upstreams are
//! verified against the system's authorities or a file's; there is no switch that turns it off.
//! Costs what rustls costs; sessions are resumed by tickets.

use std::path::Path;
use std::sync::Arc;

use tokio_rustls::rustls::crypto::{CryptoProvider, ring};
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::{ClientConfig, RootCertStore, ServerConfig};

use super::config::HttpVersion;

pub(super) const HTTP2: &[u8] = b"h2";
pub(super) const HTTP1: &[u8] = b"http/1.1";

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

/// A listener's side. The error says what is wrong with which file.
pub(super) fn server(
    certificate: &Path,
    key: &Path,
    client_ca: Option<&Path>,
) -> Result<Arc<ServerConfig>, String> {
    let chain = certificates(certificate)?;
    let key_error = |error| format!("{} has no usable private key: {error}", key.display());
    let key_der = PrivateKeyDer::from_pem_file(key).map_err(key_error)?;
    let builder = ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?;
    let builder = match client_ca {
        None => builder.with_no_client_auth(),
        Some(path) => {
            let roots = Arc::new(roots_of(path, &certificates(path)?)?);
            let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider())
                .build()
                .map_err(|error| format!("{} cannot verify clients: {error}", path.display()))?;
            builder.with_client_cert_verifier(verifier)
        }
    };
    let mut config = builder.with_single_cert(chain, key_der).map_err(|error| {
        format!("{} and {} do not go together: {error}", certificate.display(), key.display())
    })?;
    config.alpn_protocols = vec![HTTP2.to_vec(), HTTP1.to_vec()];
    Ok(Arc::new(config))
}

/// An upstream's side.
pub(super) fn client(ca: Option<&Path>, http: HttpVersion) -> Result<Arc<ClientConfig>, String> {
    let roots = match ca {
        Some(path) => roots_of(path, &certificates(path)?)?,
        None => system_roots()?,
    };
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = match http {
        HttpVersion::Auto => vec![HTTP2.to_vec(), HTTP1.to_vec()],
        HttpVersion::Http1 => vec![HTTP1.to_vec()],
        HttpVersion::Http2 => vec![HTTP2.to_vec()],
    };
    Ok(Arc::new(config))
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let error = |error| format!("cannot read certificates from {}: {error}", path.display());
    let found: Vec<_> =
        CertificateDer::pem_file_iter(path).map_err(error)?.collect::<Result<_, _>>().map_err(error)?;
    if found.is_empty() {
        return Err(format!("{} has no certificate in PEM form", path.display()));
    }
    Ok(found)
}

fn roots_of(path: &Path, authorities: &[CertificateDer<'static>]) -> Result<RootCertStore, String> {
    let mut roots = RootCertStore::empty();
    for authority in authorities {
        roots
            .add(authority.clone())
            .map_err(|error| format!("{} has an unusable authority: {error}", path.display()))?;
    }
    Ok(roots)
}

fn system_roots() -> Result<RootCertStore, String> {
    let found = rustls_native_certs::load_native_certs();
    let mut roots = RootCertStore::empty();
    // A system store with a few certificates that rustls does not take is common; an empty one is not.
    let (added, _) = roots.add_parsable_certificates(found.certs);
    if added == 0 {
        return Err(
            "this system has no certificate authorities; install ca-certificates or name a file as `ca`"
                .to_owned(),
        );
    }
    Ok(roots)
}
