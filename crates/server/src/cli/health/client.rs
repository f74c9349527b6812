//! One request to `/health/ready`, over hyper as the server itself uses it. `health` calls it. It keeps no connection, follows
//! no redirect, and never sends a key.

use std::{fmt::Display, net::SocketAddr, path::Path, sync::Arc, time::Duration};

use axum::http::{Request, StatusCode, header};
use bytes::Bytes;
use futures_util::future::join;
use http_body_util::{BodyExt, Empty, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use rustls::pki_types::{CertificateDer, ServerName, pem::PemObject};
use serde::Deserialize;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpStream, lookup_host},
    time::timeout,
};
use tokio_rustls::TlsConnector;

use super::Health;
use crate::{
    config::ListenArgs,
    tls_trust::{self, Trust},
};

/// How long connecting, and the answer, may take. The server itself gives its database up after about as long; Docker waits 30 s
/// for a health check.
const PATIENCE: Duration = Duration::from_secs(10);

/// The most that an answer may have: a server's own has some hundred bytes.
const ANSWER_BYTES: usize = 64 << 10;

/// What a server answers.
#[derive(Deserialize)]
struct Answer {
    status: String,
}

pub(super) async fn ask(listen: &ListenArgs) -> Result<Health, String> {
    let tls = listen.certificate().map(connector).transpose()?;
    let mut problem = "no such host".to_owned();
    let (host, port) = listen.reachable();
    let addresses: Vec<SocketAddr> = match lookup_host((host, port)).await {
        Ok(found) => found.collect(),
        Err(error) => return Ok(Health::Silent(error.to_string())),
    };
    for address in addresses {
        let stream = match timeout(PATIENCE, TcpStream::connect(address)).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => {
                problem = error.to_string();
                continue;
            }
            Err(_) => {
                problem = late(&"to connect");
                continue;
            }
        };
        let exchange = async {
            let Some(tls) = &tls else { return exchange(stream, address).await };
            // The certificate is compared as a whole, whatever name it is for.
            match tls.connect(ServerName::IpAddress(address.ip().into()), stream).await {
                Ok(stream) => exchange(stream, address).await,
                Err(error) => Ok(Health::Foreign(format!("TLS: {error}"))),
            }
        };
        return Ok(match timeout(PATIENCE, exchange).await {
            Ok(Ok(health)) => health,
            Ok(Err(error)) => Health::Foreign(error),
            Err(_) => Health::Silent(late(&"to answer")),
        });
    }
    Ok(Health::Silent(problem))
}

fn late(what: &dyn Display) -> String {
    format!("it takes more than {} s {what}", PATIENCE.as_secs())
}

/// Asks on a connection.
async fn exchange(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    address: SocketAddr,
) -> Result<Health, String> {
    let (mut sender, connection) =
        http1::handshake(TokioIo::new(stream)).await.map_err(|error| error.to_string())?;
    let answer = async move {
        let request = Request::get("/health/ready")
            .header(header::HOST, address.to_string())
            .header(header::CONNECTION, "close")
            .body(Empty::<Bytes>::new())
            .map_err(|error| error.to_string())?;
        let answer = sender.send_request(request).await.map_err(|error| error.to_string())?;
        let status = answer.status();
        let body = Limited::new(answer.into_body(), ANSWER_BYTES).collect().await;
        Ok::<_, String>((status, body.map_err(|error| error.to_string())?.to_bytes()))
    };
    // The connection ends once its sender is gone. How it ended is of no interest beside the answer.
    let (answer, _) = join(answer, connection).await;
    let (status, body) = answer?;
    let answer: Option<Answer> = serde_json::from_slice(&body).ok();
    Ok(match (status, answer.as_ref().map(|answer| answer.status.as_str())) {
        (StatusCode::OK, Some("OK")) => Health::Ready,
        (StatusCode::SERVICE_UNAVAILABLE, _) => Health::Unready,
        _ => Health::Foreign(format!("it answers {status}")),
    })
}

/// Speaks TLS with whoever has the first certificate of the file, and its key.
fn connector(path: &Path) -> Result<TlsConnector, String> {
    let failed = |error: &dyn Display| {
        let path = path.display();
        format!(
            "cannot read TLS_CERT {path}: {error}; set TLS_CERT to the server's certificate, a PEM file"
        )
    };
    let mut found = CertificateDer::pem_file_iter(path).map_err(|error| failed(&error))?;
    let certificate = found.next().ok_or_else(|| failed(&"there is no PEM certificate in it"))?;
    let certificate = certificate.map_err(|error| failed(&error))?;
    // A server's own certificate may be private, and need not be for the address that it is asked at.
    let config = Trust::Only(certificate).client(tls_trust::provider());
    let config = config.map_err(|error| format!("TLS: {error}"))?;
    Ok(TlsConnector::from(Arc::new(config)))
}
