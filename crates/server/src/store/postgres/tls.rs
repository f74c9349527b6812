//! Encryption of connections to PostgreSQL, with libpq's meaning of `sslmode`. `connect` calls it. `prefer` and
//! `require` keep eavesdroppers out but trust any server; `verify-ca` and `verify-full` check its certificate.

use std::{fmt, path::Path, sync::Arc};

use rustls::{
    RootCertStore,
    client::WebPkiServerVerifier,
    pki_types::{CertificateDer, pem::PemObject},
};
use tokio_postgres_rustls::MakeRustlsConnect;

use crate::{
    store::{SslMode, StoreError},
    tls_trust::{self, Trust},
};

pub(super) fn connector(
    mode: SslMode,
    root_cert: Option<&Path>,
) -> Result<MakeRustlsConnect, StoreError> {
    let provider = tls_trust::provider();
    let failed = |error: &dyn fmt::Display| StoreError::Failed(format!("TLS: {error}"));
    // Like libpq: with a root certificate, `require` checks the certificate too.
    let trust = match (mode, root_cert) {
        (SslMode::Disable | SslMode::Prefer, _) | (SslMode::Require, None) => Trust::Anybody,
        (SslMode::Require | SslMode::VerifyCa | SslMode::VerifyFull, _) => {
            let roots = Arc::new(roots(root_cert)?);
            let webpki = WebPkiServerVerifier::builder_with_provider(roots, Arc::clone(&provider))
                .build()
                .map_err(|error| failed(&error))?;
            if mode == SslMode::VerifyFull { Trust::Named(webpki) } else { Trust::AnyName(webpki) }
        }
    };
    let config = trust.client(provider).map_err(|error| failed(&error))?;
    Ok(MakeRustlsConnect::new(config))
}

fn roots(file: Option<&Path>) -> Result<RootCertStore, StoreError> {
    let mut roots = RootCertStore::empty();
    match file {
        Some(path) => {
            let bad = |error: &dyn fmt::Display| {
                StoreError::Failed(format!("cannot read sslrootcert {}: {error}", path.display()))
            };
            for certificate in CertificateDer::pem_file_iter(path).map_err(|error| bad(&error))? {
                let certificate = certificate.map_err(|error| bad(&error))?;
                roots.add(certificate).map_err(|error| bad(&error))?;
            }
            if roots.is_empty() {
                return Err(bad(&"there is no PEM certificate in it"));
            }
        }
        None => {
            roots.add_parsable_certificates(tls_trust::system_roots());
            if roots.is_empty() {
                return Err(StoreError::Failed(
                    "TLS: this system has no root certificates to check PostgreSQL's certificate with; name some with \
                     sslrootcert"
                        .into(),
                ));
            }
        }
    }
    Ok(roots)
}
