//! HTTPS: both versions of HTTP, certificates that change, and clients that dawdle over it.

use std::{convert::Infallible, sync::Arc, time::Duration};

use axum::{Router, body::Body, routing::get};
use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use http_body_util::{BodyExt, Full};
use hyper::{Request, Version, client::conn};
use hyper_util::rt::{TokioExecutor, TokioIo};
use pisync::{
    config::http::{Timeouts, TlsFiles},
    net::{ConnectionSettings, Tls, serve},
};
use rustls::{
    ClientConfig, RootCertStore,
    crypto::ring,
    pki_types::{CertificateDer, ServerName},
};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::oneshot,
};
use tokio_rustls::{TlsConnector, client::TlsStream};

use crate::support::{http::event, program::Program};

/// A certificate for localhost and its key, as files hold them, and as a client sees it.
pub(crate) struct Certificate {
    certificate: String,
    key: String,
    der: CertificateDer<'static>,
}

impl Certificate {
    /// The file of the certificate.
    pub(crate) fn certificate(&self) -> &str {
        &self.certificate
    }

    /// The file of its key.
    pub(crate) fn key(&self) -> &str {
        &self.key
    }
}

pub(crate) fn certificate() -> Certificate {
    let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    Certificate {
        certificate: made.cert.pem(),
        key: made.signing_key.serialize_pem(),
        der: made.cert.der().clone(),
    }
}

/// A client's end of a connection to somebody who shows one of these certificates.
pub(crate) async fn connect(
    port: u16,
    trusted: &[&Certificate],
    protocols: &[&str],
) -> TlsStream<TcpStream> {
    let mut roots = RootCertStore::empty();
    for certificate in trusted {
        roots.add(certificate.der.clone()).unwrap();
    }
    let mut config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = protocols.iter().map(|name| name.as_bytes().to_vec()).collect();
    let stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    let name = ServerName::try_from("localhost").unwrap();
    TlsConnector::from(Arc::new(config)).connect(name, stream).await.unwrap()
}

fn shown(stream: &TlsStream<TcpStream>) -> CertificateDer<'static> {
    stream.get_ref().1.peer_certificates().unwrap()[0].clone().into_owned()
}

fn report(host: &str) -> Request<Full<Bytes>> {
    Request::post(format!("https://{host}/api/sync-event"))
        .header("host", host)
        .header("content-type", "application/json")
        .body(Full::new(Bytes::from(event("pi").to_string())))
        .unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn both_versions_of_http() {
    let own = certificate();
    let program = Program::new()
        .with_file("cert.pem", &own.certificate)
        .with_file("key.pem", &own.key)
        .with("TLS_CERT", "cert.pem")
        .with("TLS_KEY", "key.pem")
        .with("PORT", 0);
    let serving = program.serve(&[]);
    let port = serving.address().port();

    let stream = connect(port, &[&own], &["h2", "http/1.1"]).await;
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
    let io = TokioIo::new(stream);
    let (mut sender, connection) = conn::http2::handshake(TokioExecutor::new(), io).await.unwrap();
    let driving = tokio::spawn(connection);
    for _ in 0..3 {
        let mut request = report("localhost");
        request.headers_mut().remove("host");
        let answer = sender.send_request(request).await.unwrap();
        assert_eq!((answer.status().as_u16(), answer.version()), (201, Version::HTTP_2));
        assert!(answer.headers().contains_key("strict-transport-security"));
        let body = answer.into_body().collect().await.unwrap().to_bytes();
        assert!(std::str::from_utf8(&body).unwrap().contains("\"device_id\":\"pi\""));
    }
    // What a page elsewhere would ask for is refused here, too.
    let mut foreign = report("evil.example");
    foreign.headers_mut().remove("host");
    assert_eq!(sender.send_request(foreign).await.unwrap().status().as_u16(), 401);
    drop(sender);
    driving.await.unwrap().unwrap();

    for protocols in [&["http/1.1"][..], &[]] {
        let io = TokioIo::new(connect(port, &[&own], protocols).await);
        let (mut sender, connection) = conn::http1::handshake(io).await.unwrap();
        let driving = tokio::spawn(connection);
        let answer = sender.send_request(report("localhost")).await.unwrap();
        assert_eq!((answer.status().as_u16(), answer.version()), (201, Version::HTTP_11));
        drop((answer, sender));
        driving.await.unwrap().unwrap();
    }
    // Who speaks no TLS is told nothing, and does no harm.
    let mut plain = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    plain.write_all(b"GET /api/stats HTTP/1.1\r\nhost: localhost\r\n\r\n").await.unwrap();
    let mut received = Vec::new();
    let _ = plain.read_to_end(&mut received).await;
    assert!(!String::from_utf8_lossy(&received).contains("HTTP/1.1"), "{received:?}");
    serving.stop();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_changed_certificate_is_taken_over() {
    let (old, new) = (certificate(), certificate());
    let program = Program::new()
        .with_file("cert.pem", &old.certificate)
        .with_file("key.pem", &old.key)
        .with("TLS_CERT", "cert.pem")
        .with("TLS_KEY", "key.pem")
        .with("PORT", 0);
    let mut serving = program.serve(&[]);
    let port = serving.address().port();
    let both = [&old, &new];
    assert_eq!(shown(&connect(port, &both, &[]).await), old.der);
    // One file before the other: the old pair stays until both fit.
    let program = program.with_file("cert.pem", &new.certificate);
    serving.wait_for("but cannot be used; the certificate stays");
    assert_eq!(shown(&connect(port, &both, &[]).await), old.der);
    let program = program.with_file("key.pem", &new.key);
    serving.wait_for("the TLS certificate has changed");
    assert_eq!(shown(&connect(port, &both, &[]).await), new.der);
    // Gone altogether, it stays what it was.
    std::fs::remove_file(program.path("cert.pem")).unwrap();
    assert_eq!(shown(&connect(port, &both, &[]).await), new.der);
    serving.stop();
}

#[test]
fn files_of_no_use_are_told_in_one_line() {
    let (one, other) = (certificate(), certificate());
    for (certificate, key, expected) in [
        ("absent", "", "cannot read TLS_CERT absent: No such file or directory"),
        ("cert.pem", "absent", "cannot read TLS_KEY absent: No such file or directory"),
        ("empty.pem", "key.pem", "TLS_CERT empty.pem is no PEM certificate: there is none in it"),
        ("cert.pem", "empty.pem", "TLS_KEY empty.pem is no PEM private key: "),
        ("cert.pem", "other.pem", "TLS_CERT and TLS_KEY do not fit together: "),
        ("cert.pem", "", "TLS_CERT is set, but TLS_KEY is not"),
        ("", "key.pem", "TLS_KEY is set, but TLS_CERT is not"),
    ] {
        let program = Program::new()
            .with_file("cert.pem", &one.certificate)
            .with_file("key.pem", &one.key)
            .with_file("other.pem", &other.key)
            .with_file("empty.pem", "")
            .with("TLS_CERT", certificate)
            .with("TLS_KEY", if certificate == "absent" { "key.pem" } else { key })
            .with("PORT", 0);
        let ended = program.run(&[]);
        // Settings that contradict each other are wrong usage.
        let is_usage = expected.contains("is set, but");
        let said = if is_usage { ended.wrong_usage() } else { ended.failure() };
        assert!(said.starts_with(expected), "{expected}: {ended:?}");
    }
}

/// A server of a few pages, with connections as given.
pub(crate) struct Bare {
    pub(crate) port: u16,
    stop: oneshot::Sender<()>,
    task: tokio::task::JoinHandle<()>,
}

impl Bare {
    pub(crate) async fn start(settings: ConnectionSettings) -> Self {
        let page = "x".repeat(1 << 20);
        let pieces = |pieces: usize, bytes: usize, pause: Duration| {
            let pieces = stream::iter((0..pieces).map(move |_| Bytes::from(vec![b'x'; bytes])));
            let pieces = pieces.then(move |piece| async move {
                tokio::time::sleep(pause).await;
                Ok::<_, Infallible>(piece)
            });
            Body::from_stream(pieces)
        };
        let router = Router::new()
            .route("/", get(async move || page))
            .route("/small", get(async || "small"))
            .route("/stream", get(async move || pieces(1_000, 10_000, Duration::ZERO)))
            .route("/slow", get(async move || pieces(3, 1, Duration::from_millis(600))));
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (stop, stopped) = oneshot::channel();
        let task = tokio::spawn(serve(listener.into(), router, settings, async {
            let _ = stopped.await;
        }));
        Self { port, stop, task }
    }

    pub(crate) async fn stop(self) {
        self.stop.send(()).unwrap();
        self.task.await.unwrap();
    }
}

/// What a server speaks TLS with that shows this certificate.
pub(crate) fn tls_with(own: &Certificate) -> Tls {
    let folder = TempDir::new().unwrap();
    let files = TlsFiles {
        certificate: folder.path().join("cert.pem"),
        key: folder.path().join("key.pem"),
    };
    std::fs::write(&files.certificate, &own.certificate).unwrap();
    std::fs::write(&files.key, &own.key).unwrap();
    Tls::load(files).unwrap().0
}

/// Little patience in everything.
pub(crate) fn impatient() -> Timeouts {
    let little = Duration::from_millis(300);
    Timeouts { head: little, idle: little, body: little, write: little }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_dawdles_over_tls_is_cut_off() {
    let own = certificate();
    let tls = Some(tls_with(&own));
    let settings = ConnectionSettings { max_connections: 0, timeouts: impatient(), tls };
    let server = Bare::start(settings).await;
    // In the handshake.
    let mut silent = TcpStream::connect(("127.0.0.1", server.port)).await.unwrap();
    assert_eq!(silent.read(&mut [0]).await.unwrap_or(0), 0);
    // With nothing to say in either version.
    for protocol in ["http/1.1", "h2"] {
        let mut stream = connect(server.port, &[&own], &[protocol]).await;
        let mut received = Vec::new();
        let _ = stream.read_to_end(&mut received).await;
    }
    // After a request, in HTTP/2.
    let io = TokioIo::new(connect(server.port, &[&own], &["h2"]).await);
    let (mut sender, connection) = conn::http2::handshake(TokioExecutor::new(), io).await.unwrap();
    let driving = tokio::spawn(connection);
    let request = Request::get("https://localhost/").body(Full::<Bytes>::default()).unwrap();
    let answer = sender.send_request(request).await.unwrap();
    assert_eq!(answer.into_body().collect().await.unwrap().to_bytes().len(), 1 << 20);
    let _ = driving.await.unwrap();
    assert!(sender.is_closed());
    server.stop().await;
}
