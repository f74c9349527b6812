//! Whose certificate a client of ours takes: PostgreSQL's (`store/postgres/tls`), a PiSync server's own (`cli/health`), and
//! those of receivers of messages (`notify`). Whatever is taken, the other side must prove that it has the certificate's key.

use std::sync::Arc;

use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme,
    client::{
        WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime},
};

/// The cryptography that clients use.
pub(crate) fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

/// The certificates that this system trusts, those that can be read.
pub(crate) fn system_roots() -> Vec<CertificateDer<'static>> {
    rustls_native_certs::load_native_certs().certs
}

/// A client that takes a certificate of the name that was asked for, which one of these vouches for.
///
/// # Errors
/// When the provider knows no version of TLS.
pub(crate) fn named_by(roots: RootCertStore) -> Result<ClientConfig, Error> {
    Ok(ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth())
}

/// Whose certificate is taken.
#[derive(Debug)]
pub(crate) enum Trust {
    /// Anybody's. It keeps eavesdroppers out, and not whoever stands between.
    Anybody,
    /// That of whoever has this one, whatever name it is for.
    Only(CertificateDer<'static>),
    /// A trusted one, of any name.
    AnyName(Arc<WebPkiServerVerifier>),
    /// A trusted one, of the name that was asked for.
    Named(Arc<WebPkiServerVerifier>),
}

impl Trust {
    /// A client that trusts so.
    ///
    /// # Errors
    /// When the provider knows no version of TLS.
    pub(crate) fn client(self, provider: Arc<CryptoProvider>) -> Result<ClientConfig, Error> {
        let verifier = Arc::new(Verifier { trust: self, provider: Arc::clone(&provider) });
        Ok(ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .dangerous()
            .with_custom_certificate_verifier(verifier)
            .with_no_client_auth())
    }
}

#[derive(Debug)]
struct Verifier {
    trust: Trust,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let by = |webpki: &WebPkiServerVerifier| {
            webpki.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
        };
        match &self.trust {
            Trust::Anybody => Ok(ServerCertVerified::assertion()),
            Trust::Only(certificate) if end_entity == certificate => {
                Ok(ServerCertVerified::assertion())
            }
            Trust::Only(_) => {
                Err(Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure))
            }
            Trust::AnyName(webpki) => match by(webpki) {
                Err(Error::InvalidCertificate(
                    CertificateError::NotValidForName
                    | CertificateError::NotValidForNameContext { .. },
                )) => Ok(ServerCertVerified::assertion()),
                other => other,
            },
            Trust::Named(webpki) => by(webpki),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
