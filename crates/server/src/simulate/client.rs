//! One keep-alive connection to a PiSync server, over HTTP or HTTPS. `sender` sends on it and `reader` asks on it. It
//! follows no redirect, because a fleet's devices follow none with a POST either.

use std::{path::Path, sync::Arc, time::Duration};

use axum::http::{HeaderValue, Method, Request, StatusCode, Uri, header};
use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use rustls::{
    RootCertStore,
    client::WebPkiServerVerifier,
    pki_types::{CertificateDer, ServerName, pem::PemObject},
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    time::timeout,
};
use tokio_rustls::TlsConnector;

use crate::tls_trust::{self, Trust};

/// How long connecting may take.
const CONNECTING: Duration = Duration::from_secs(10);

/// How long an answer may take. The server itself gives up earlier.
const ANSWERING: Duration = Duration::from_secs(60);

/// The most that an answer may have. A batch of 10,000 results has half a megabyte.
const ANSWER_BYTES: usize = 64 << 20;

/// Where a server is.
#[derive(Debug, Clone)]
pub struct Address {
    text: String,
    is_tls: bool,
    host: String,
    port: u16,
    /// As the header names it.
    authority: HeaderValue,
    /// What all paths begin with, behind a proxy.
    path: String,
}

impl Address {
    /// Reads a URL.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(text: &str) -> Result<Self, String> {
        let uri: Uri = text.parse().map_err(|error| format!("not a URL: {error}"))?;
        let is_tls = match uri.scheme_str() {
            Some("http") => false,
            Some("https") => true,
            _ => return Err("must begin with http:// or https://".to_owned()),
        };
        let authority = uri.authority().ok_or("names no host")?;
        if authority.as_str().contains('@') {
            return Err(
                "must hold no user and no password; give the key with PISYNC_KEY".to_owned()
            );
        }
        if uri.query().is_some() {
            return Err("must hold no query".to_owned());
        }
        let host = authority.host().trim_start_matches('[').trim_end_matches(']');
        Ok(Self {
            text: text.trim_end_matches('/').to_owned(),
            is_tls,
            host: host.to_owned(),
            port: authority.port_u16().unwrap_or(if is_tls { 443 } else { 80 }),
            authority: HeaderValue::from_str(authority.as_str())
                .map_err(|error| error.to_string())?,
            path: uri.path().trim_end_matches('/').to_owned(),
        })
    }

    /// As it was typed.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.text
    }
}

/// Servers on one database, and what is needed to talk with them.
pub struct Servers {
    addresses: Vec<Address>,
    authorization: Option<HeaderValue>,
    tls: TlsConnector,
}

impl Servers {
    /// `ca_cert` is a file of certificates to trust; without one, the system's are trusted.
    ///
    /// # Errors
    /// When the certificates cannot be read.
    pub fn new(
        addresses: Vec<Address>,
        key: Option<&str>,
        ca_cert: Option<&Path>,
    ) -> Result<Self, String> {
        let authorization = key
            .map(|key| {
                let mut value = HeaderValue::from_str(&format!("Bearer {key}"))
                    .map_err(|_| "the key holds characters that no key has".to_owned())?;
                value.set_sensitive(true);
                Ok::<_, String>(value)
            })
            .transpose()?;
        let is_tls = addresses.iter().any(|address| address.is_tls);
        Ok(Self { tls: connector(ca_cert, is_tls)?, addresses, authorization })
    }

    fn address(&self, number: usize) -> &Address {
        &self.addresses[number % self.addresses.len()]
    }

    pub(super) fn has_key(&self) -> bool {
        self.authorization.is_some()
    }
}

/// Never shows the key.
impl std::fmt::Debug for Servers {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_list().entries(&self.addresses).finish()
    }
}

fn connector(ca_cert: Option<&Path>, is_tls: bool) -> Result<TlsConnector, String> {
    let mut roots = RootCertStore::empty();
    let provider = tls_trust::provider();
    if let Some(path) = ca_cert {
        let bad = |why: String| format!("cannot read --ca-cert {}: {why}", path.display());
        for certificate in
            CertificateDer::pem_file_iter(path).map_err(|error| bad(error.to_string()))?
        {
            let certificate = certificate.map_err(|error| bad(error.to_string()))?;
            roots.add(certificate).map_err(|error| bad(error.to_string()))?;
        }
        if roots.is_empty() {
            return Err(bad("there is no PEM certificate in it".to_owned()));
        }
    } else if is_tls {
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        if roots.is_empty() {
            return Err("this system has no root certificates; name some with --ca-cert".to_owned());
        }
    }
    let trust = if roots.is_empty() {
        // Plain HTTP never uses it.
        Trust::Only(CertificateDer::from(Vec::new()))
    } else {
        let webpki =
            WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider));
        Trust::Named(webpki.build().map_err(|error| format!("TLS: {error}"))?)
    };
    let config = trust.client(provider).map_err(|error| format!("TLS: {error}"))?;
    Ok(TlsConnector::from(Arc::new(config)))
}

/// What a server answered.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) status: StatusCode,
    /// Seconds.
    pub(super) retry_after: Option<u64>,
    pub(super) body: Bytes,
}

/// A connection, which is made when it is needed. After a failure the next one leads to the next server.
pub(super) struct Connection {
    servers: Arc<Servers>,
    current: usize,
    sender: Option<SendRequest<Full<Bytes>>>,
}

impl Connection {
    /// `number` tells which of the servers it begins with.
    pub(super) fn new(servers: &Arc<Servers>, number: usize) -> Self {
        Self { servers: Arc::clone(servers), current: number, sender: None }
    }

    pub(super) fn address(&self) -> &Address {
        self.servers.address(self.current)
    }

    pub(super) fn servers(&self) -> &Servers {
        &self.servers
    }

    /// Sends a request and waits for its answer. When there is none, nobody knows what became of the request.
    ///
    /// # Errors
    /// Why there is no answer.
    pub(super) async fn exchange(
        &mut self,
        method: &Method,
        path: &str,
        body: Option<(&'static str, Bytes)>,
    ) -> Result<Answer, String> {
        let answer = match timeout(ANSWERING, self.try_exchange(method, path, body)).await {
            Ok(answer) => answer,
            Err(_) => Err(format!("it takes more than {} s to answer", ANSWERING.as_secs())),
        };
        if answer.is_err() {
            self.sender = None;
            self.current += 1;
        }
        answer
    }

    async fn try_exchange(
        &mut self,
        method: &Method,
        path: &str,
        body: Option<(&'static str, Bytes)>,
    ) -> Result<Answer, String> {
        let mut sender = match self.sender.take() {
            Some(sender) if !sender.is_closed() => sender,
            _ => timeout(CONNECTING, self.connect()).await.map_err(|_| {
                format!("it takes more than {} s to connect", CONNECTING.as_secs())
            })??,
        };
        let address = self.address();
        let mut request = Request::builder()
            .method(method.clone())
            .uri(format!("{}{path}", address.path))
            .header(header::HOST, address.authority.clone());
        if let Some(authorization) = &self.servers.authorization {
            request = request.header(header::AUTHORIZATION, authorization.clone());
        }
        let body = match body {
            Some((kind, body)) => {
                request = request.header(header::CONTENT_TYPE, kind);
                body
            }
            None => Bytes::new(),
        };
        let request = request.body(Full::new(body)).map_err(|error| error.to_string())?;
        let answer = sender.send_request(request).await.map_err(|error| cause(&error))?;
        let status = answer.status();
        let retry_after = answer.headers().get(header::RETRY_AFTER);
        let retry_after = retry_after.and_then(|value| value.to_str().ok()?.parse().ok());
        let body = Limited::new(answer.into_body(), ANSWER_BYTES).collect().await;
        let body = body.map_err(|error| error.to_string())?.to_bytes();
        if sender.ready().await.is_ok() {
            self.sender = Some(sender);
        }
        Ok(Answer { status, retry_after, body })
    }

    async fn connect(&self) -> Result<SendRequest<Full<Bytes>>, String> {
        let address = self.address();
        let stream = TcpStream::connect((address.host.as_str(), address.port))
            .await
            .map_err(|error| error.to_string())?;
        // Small requests must not wait for more to send.
        stream.set_nodelay(true).map_err(|error| error.to_string())?;
        if !address.is_tls {
            return speak(stream).await;
        }
        let name = ServerName::try_from(address.host.clone()).map_err(|error| error.to_string())?;
        let stream = self.servers.tls.connect(name, stream).await;
        speak(stream.map_err(|error| {
            format!("TLS: {error}; name the server's certificate with --ca-cert")
        })?)
        .await
    }
}

async fn speak(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
) -> Result<SendRequest<Full<Bytes>>, String> {
    let (sender, connection) =
        handshake(TokioIo::new(stream)).await.map_err(|error| error.to_string())?;
    // It ends with its sender; how is told by the requests.
    tokio::spawn(async move {
        let _ = connection.await;
    });
    Ok(sender)
}

/// An error of hyper with its cause, which it does not show by itself.
fn cause(error: &hyper::Error) -> String {
    match std::error::Error::source(error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls() {
        let address = Address::parse("https://fleet.example/pisync/").unwrap();
        assert_eq!((address.is_tls, address.port, address.path.as_str()), (true, 443, "/pisync"));
        assert_eq!(address.as_str(), "https://fleet.example/pisync");
        let address = Address::parse("http://[::1]:8080").unwrap();
        assert_eq!((address.host.as_str(), address.port), ("::1", 8080));
        assert_eq!(address.authority, "[::1]:8080");
        for wrong in ["fleet.example", "ftp://x", "http://u:p@x", "http://x/?a=b", "", "http://"] {
            assert!(Address::parse(wrong).is_err(), "{wrong}");
        }
    }
}
