//! TLS for clients, with rustls. `app` loads the certificate and key from files and runs the task that reloads them
//! when they change, as they do every few weeks. Open connections keep the certificate they started with.

use std::{
    path::PathBuf,
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use rustls::{
    ServerConfig,
    crypto::{CryptoProvider, ring},
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};
use sha2::{Digest, Sha256};
use tokio::task::JoinError;

use crate::config::http::TlsFiles;

/// How often to check whether the files have changed.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// The ALPN name of HTTP/2.
pub(crate) const HTTP_2: &[u8] = b"h2";

/// The server's TLS configuration.
#[derive(Debug)]
pub struct Tls {
    pub(crate) config: Arc<ServerConfig>,
}

/// The certificate for new connections.
#[derive(Debug)]
struct Current(RwLock<Arc<CertifiedKey>>);

impl ResolvesServerCert for Current {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner)))
    }
}

/// The contents of both files, and a fingerprint to detect changes.
struct Contents {
    certificate: Vec<u8>,
    key: Vec<u8>,
    fingerprint: [u8; 32],
}

impl TlsFiles {
    fn read(&self) -> Result<Contents, String> {
        let read = |name: &str, path: &PathBuf| {
            std::fs::read(path)
                .map_err(|error| {
                    let path = path.display();
                    format!("cannot read {name} {path}: {error}; set {name} to a PEM file that the server may read")
                })
        };
        let certificate = read("TLS_CERT", &self.certificate)?;
        let key = read("TLS_KEY", &self.key)?;
        let mut hasher = Sha256::new();
        hasher.update(&certificate);
        hasher.update(&key);
        Ok(Contents { certificate, key, fingerprint: hasher.finalize().into() })
    }

    fn parse(&self, contents: &Contents) -> Result<CertifiedKey, String> {
        let bad_certificate = |error: &dyn std::fmt::Display| {
            format!(
                "TLS_CERT {} is no PEM certificate: {error}; set TLS_CERT to the certificate's file",
                self.certificate.display()
            )
        };
        let chain = CertificateDer::pem_slice_iter(&contents.certificate)
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| bad_certificate(&error))?;
        if chain.is_empty() {
            return Err(bad_certificate(&"there is none in it"));
        }
        let key = PrivateKeyDer::from_pem_slice(&contents.key).map_err(|error| {
            format!(
                "TLS_KEY {} is no PEM private key: {error}; set TLS_KEY to the private key's file",
                self.key.display()
            )
        })?;
        CertifiedKey::from_der(chain, key, &provider())
            .map_err(|error| format!("TLS_CERT and TLS_KEY do not fit together: {error}; set both to the files of one pair"))
    }
}

fn provider() -> CryptoProvider {
    ring::default_provider()
}

impl Tls {
    /// Reads the files.
    ///
    /// # Errors
    /// When a file is missing or invalid. The message says which.
    pub fn load(files: TlsFiles) -> Result<(Self, TlsWatch), String> {
        let contents = files.read()?;
        let certified = files.parse(&contents)?;
        let current = Arc::new(Current(RwLock::new(Arc::new(certified))));
        let resolver: Arc<dyn ResolvesServerCert> = Arc::clone(&current) as _;
        let mut config = ServerConfig::builder_with_provider(Arc::new(provider()))
            .with_safe_default_protocol_versions()
            .map_err(|error| format!("TLS: {error}"))?
            .with_no_client_auth()
            .with_cert_resolver(resolver);
        config.alpn_protocols = vec![HTTP_2.to_vec(), b"http/1.1".to_vec()];
        let watch = TlsWatch { files, current, seen: contents.fingerprint };
        Ok((Self { config: Arc::new(config) }, watch))
    }
}

/// Reloads the files when they change.
#[derive(Debug)]
pub struct TlsWatch {
    files: TlsFiles,
    current: Arc<Current>,
    seen: [u8; 32],
}

impl TlsWatch {
    /// Checks the files for as long as the server runs. While they are invalid, the current certificate stays: one file
    /// is often written before the other.
    pub async fn follow(mut self) {
        loop {
            tokio::time::sleep(LOOK_INTERVAL).await;
            let looked = tokio::task::spawn_blocking(move || {
                self.look();
                self
            });
            self = match looked.await.map_err(JoinError::try_into_panic) {
                Ok(watch) => watch,
                // Whoever waits for this task then gets the panic's message.
                Err(Ok(panic)) => std::panic::resume_unwind(panic),
                Err(Err(_)) => return,
            };
        }
    }

    fn look(&mut self) {
        // A file that is missing for a moment is being replaced.
        let Ok(contents) = self.files.read() else { return };
        if contents.fingerprint == self.seen {
            return;
        }
        self.seen = contents.fingerprint;
        match self.files.parse(&contents) {
            Ok(certified) => {
                *self.current.0.write().unwrap_or_else(PoisonError::into_inner) =
                    Arc::new(certified);
                tracing::info!("the TLS certificate has changed; new connections get the new one");
            }
            Err(error) => {
                tracing::error!(
                    error,
                    "the TLS files have changed, but cannot be used; the certificate stays: put back a certificate and its key"
                );
            }
        }
    }
}
