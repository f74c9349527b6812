//! Connections: how long each may dawdle, what it may hold, and what load balancers ask over it.

use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::{Request, Response, body::Incoming, client::conn::http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use pisync::{
    config::http::{AuthMode, Timeouts},
    net::ConnectionSettings,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::TcpStream,
    task::JoinHandle,
    time::timeout,
};

use crate::{
    support::{
        http::{event, send},
        program::Program,
        server::TestServer,
        store::{TestDatabase, key_request},
    },
    tls::{Bare, Certificate, certificate, connect, tls_with},
};

const LITTLE: Duration = Duration::from_millis(300);

/// No test may take longer for one thing.
const PATIENCE: Duration = Duration::from_secs(30);

const REQUEST: &str = "HEAD / HTTP/1.1\r\nhost: localhost\r\n\r\n";

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

/// A server of one page, plain or over TLS.
struct Server {
    bare: Bare,
    own: Option<Certificate>,
}

impl Server {
    async fn start(timeouts: Timeouts, own: Option<Certificate>) -> Self {
        let tls = own.as_ref().map(tls_with);
        let settings = ConnectionSettings { max_connections: 0, timeouts, tls };
        Self { bare: Bare::start(settings).await, own }
    }

    /// A new connection for HTTP/1.1.
    async fn connect(&self) -> Box<dyn Stream> {
        match &self.own {
            Some(own) => Box::new(connect(self.bare.port, &[own], &["http/1.1"]).await),
            None => Box::new(TcpStream::connect(("127.0.0.1", self.bare.port)).await.unwrap()),
        }
    }

    /// A new connection for HTTP/2, of which every byte is the test's own.
    async fn connect_http2(&self) -> Box<dyn Stream> {
        let own = self.own.as_ref().unwrap();
        Box::new(connect(self.bare.port, &[own], &["h2"]).await)
    }
}

/// Waits for the answer to [`REQUEST`].
async fn assert_answered(stream: &mut dyn Stream) {
    let mut received = Vec::new();
    while !received.ends_with(b"\r\n\r\n") {
        received.push(timeout(PATIENCE, stream.read_u8()).await.unwrap().expect("it was closed"));
    }
    assert!(received.starts_with(b"HTTP/1.1 200 OK"));
}

/// Waits until the server closes the connection; whatever comes before does not matter.
async fn assert_closed(stream: &mut dyn Stream) {
    let mut received = Vec::new();
    let closed = timeout(PATIENCE, stream.read_to_end(&mut received)).await;
    assert!(closed.is_ok(), "it was not closed");
}

/// The beginning of HTTP/2, and a head that is not complete.
fn incomplete_http2_head() -> Vec<u8> {
    let settings = [0, 0, 0, 4, 0, 0, 0, 0, 0];
    // Without the flag that would say that the head ends here.
    let headers = [0, 0, 1, 1, 0, 0, 0, 0, 1, 0x82];
    [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", &settings[..], &headers].concat()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn idle_connections_outlive_slow_heads() {
    for own in [None, Some(certificate())] {
        let timeouts = Timeouts { head: LITTLE, ..Timeouts::default() };
        let server = Server::start(timeouts, own).await;
        let mut idle = server.connect().await;
        let mut answered = server.connect().await;
        answered.write_all(REQUEST.as_bytes()).await.unwrap();
        assert_answered(&mut answered).await;
        // One after another, each from its first byte on.
        for start in ["G", "HEAD / HTTP/1.1\r\nhost: ", "\r\n"] {
            let mut slow = server.connect().await;
            slow.write_all(start.as_bytes()).await.unwrap();
            assert_closed(&mut slow).await;
        }
        for kept in [&mut idle, &mut answered] {
            for part in [&REQUEST[..9], &REQUEST[9..]] {
                kept.write_all(part.as_bytes()).await.unwrap();
            }
            assert_answered(kept).await;
        }
        // After an answer, too.
        answered.write_all(b"HEAD /").await.unwrap();
        assert_closed(&mut answered).await;
        server.bare.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slow_heads_outlive_idle_connections() {
    for own in [None, Some(certificate())] {
        let timeouts = Timeouts { idle: LITTLE, ..Timeouts::default() };
        let server = Server::start(timeouts, own).await;
        let mut slow = server.connect().await;
        slow.write_all(&REQUEST.as_bytes()[..9]).await.unwrap();
        for asks in [false, true] {
            let mut idle = server.connect().await;
            if asks {
                idle.write_all(REQUEST.as_bytes()).await.unwrap();
                assert_answered(&mut idle).await;
            }
            assert_closed(&mut idle).await;
        }
        slow.write_all(&REQUEST.as_bytes()[9..]).await.unwrap();
        assert_answered(&mut slow).await;
        server.bare.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn heads_and_idleness_in_http_2() {
    let ask = async |sender: &mut http2::SendRequest<Full<Bytes>>| {
        let request = Request::head("https://localhost/").body(Full::default()).unwrap();
        assert_eq!(sender.send_request(request).await.unwrap().status().as_u16(), 200);
    };
    let timeouts = Timeouts { head: LITTLE, ..Timeouts::default() };
    let server = Server::start(timeouts, Some(certificate())).await;
    let io = TokioIo::new(server.connect_http2().await);
    let (mut sender, connection) = http2::handshake(TokioExecutor::new(), io).await.unwrap();
    tokio::spawn(connection);
    ask(&mut sender).await;
    for start in [&incomplete_http2_head()[..], b"PRI * HTTP/2.0"] {
        let mut slow = server.connect_http2().await;
        slow.write_all(start).await.unwrap();
        assert_closed(&mut slow).await;
    }
    // That one was idle for longer than a head may take.
    ask(&mut sender).await;
    drop(sender);
    server.bare.stop().await;

    let timeouts = Timeouts { idle: LITTLE, ..Timeouts::default() };
    let server = Server::start(timeouts, Some(certificate())).await;
    let io = TokioIo::new(server.connect_http2().await);
    let (mut sender, connection) = http2::handshake(TokioExecutor::new(), io).await.unwrap();
    let driving = tokio::spawn(connection);
    ask(&mut sender).await;
    // It is told, so that no request meets a closed connection.
    timeout(PATIENCE, driving).await.unwrap().unwrap().unwrap();
    // Nor do signs of life keep a connection that asks for nothing.
    let ping = [&[0, 0, 8, 6, 0, 0, 0, 0, 0][..], &[7; 8]].concat();
    let mut lively = server.connect_http2().await;
    let whole = incomplete_http2_head();
    lively.write_all(&whole[..whole.len() - 10]).await.unwrap();
    let began = Instant::now();
    while lively.write_all(&ping).await.is_ok() && lively.flush().await.is_ok() {
        assert!(began.elapsed() < PATIENCE, "it is never closed");
        // Answers are taken, so that nothing waits to be sent.
        let read = timeout(Duration::from_millis(20), lively.read(&mut [0; 1024])).await;
        if matches!(read, Ok(Ok(0) | Err(_))) {
            break;
        }
    }
    server.bare.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn idle_connections_make_room_for_others() {
    let timeouts = Timeouts { head: LITTLE, ..Timeouts::default() };
    let settings = ConnectionSettings { max_connections: 2, timeouts, tls: None };
    let server = Server { bare: Bare::start(settings).await, own: None };
    let mut idle = Vec::new();
    for _ in 0..2 {
        let mut stream = server.connect().await;
        stream.write_all(REQUEST.as_bytes()).await.unwrap();
        assert_answered(&mut stream).await;
        idle.push(stream);
    }
    // Long before an idle connection would otherwise be closed.
    let mut third = server.connect().await;
    third.write_all(REQUEST.as_bytes()).await.unwrap();
    assert_answered(&mut third).await;
    drop((idle, third));
    server.bare.stop().await;
}

/// A client's end of HTTP/2 on which an answer waits until `window` bytes of it are taken.
async fn http2_with_window(
    server: &Server,
    window: u32,
) -> (Sender, JoinHandle<Result<(), hyper::Error>>) {
    let io = TokioIo::new(server.connect_http2().await);
    let mut builder = http2::Builder::new(TokioExecutor::new());
    builder.initial_stream_window_size(window).initial_connection_window_size(1 << 20);
    let (sender, connection) = builder.handshake(io).await.unwrap();
    (sender, tokio::spawn(connection))
}

type Sender = http2::SendRequest<Full<Bytes>>;

/// Asks for a page; what comes of it.
fn ask_for(
    sender: &mut Sender,
    path: &str,
) -> impl Future<Output = hyper::Result<Response<Incoming>>> + use<> {
    let request = Request::get(format!("https://localhost{path}")).body(Full::default()).unwrap();
    sender.send_request(request)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_that_nobody_takes_end_their_connection_in_http_2() {
    let timeouts = Timeouts { write: LITTLE, ..Timeouts::default() };
    let server = Server::start(timeouts, Some(certificate())).await;
    // Nothing at all is taken, or only the beginning; of a large answer, a small one, or one that is made while it is sent.
    for window in [0, 1, 20_000] {
        for path in ["/", "/small", "/stream"] {
            if path == "/small" && window > 1 {
                continue;
            }
            let (mut sender, driving) = http2_with_window(&server, window).await;
            let mut answers = Vec::new();
            for _ in 0..3 {
                answers.push(ask_for(&mut sender, path).await.unwrap());
            }
            let ended = timeout(PATIENCE, driving).await;
            assert!(ended.is_ok(), "{path} waits for ever with a window of {window}");
        }
    }
    // Who takes it slowly gets it all, and so does who waits for the server: a second and more each.
    let (mut sender, driving) = http2_with_window(&server, 16 << 10).await;
    for path in ["/", "/slow"] {
        let mut body = ask_for(&mut sender, path).await.unwrap().into_body();
        let mut length = 0;
        while let Some(frame) = timeout(PATIENCE, body.frame()).await.unwrap() {
            length += frame.unwrap().into_data().unwrap().len();
            tokio::time::sleep(LITTLE / 15).await;
        }
        assert_eq!(length, if path == "/" { 1 << 20 } else { 3 });
    }
    // An idle one is none of this clock's business.
    tokio::time::sleep(LITTLE * 2).await;
    assert_eq!(ask_for(&mut sender, "/small").await.unwrap().status(), 200);
    drop(sender);
    driving.await.unwrap().unwrap();
    server.bare.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_that_nobody_takes_are_few_in_http_2() {
    let server = Server::start(Timeouts::default(), Some(certificate())).await;
    let (connections, streams) = (70, 128);
    let mut waiting = Vec::new();
    for _ in 0..connections {
        let (mut sender, driving) = http2_with_window(&server, 0).await;
        let asked: Vec<_> = (0..streams).map(|_| ask_for(&mut sender, "/small")).collect();
        waiting.push((futures_util::future::join_all(asked).await, sender, driving));
    }
    let answered =
        waiting.iter().flat_map(|(answers, ..)| answers).filter(|answer| answer.is_ok()).count();
    // All that there may be, and the few that each connection may always have.
    assert!((8_192..8_192 + 16 * 6).contains(&answered), "{answered}");
    // Others are served all the same, however much they ask.
    let (mut sender, _driving) = http2_with_window(&server, 1 << 10).await;
    for _ in 0..5 {
        let asked: Vec<_> = (0..8).map(|_| ask_for(&mut sender, "/small")).collect();
        for answer in futures_util::future::join_all(asked).await {
            let body = answer.unwrap().into_body().collect().await.unwrap();
            assert_eq!(body.to_bytes(), "small");
        }
    }
    // What they hold goes with them.
    drop(waiting);
    let began = Instant::now();
    loop {
        let (mut sender, _driving) = http2_with_window(&server, 0).await;
        let asked: Vec<_> = (0..streams).map(|_| ask_for(&mut sender, "/small")).collect();
        let answers = futures_util::future::join_all(asked).await;
        if answers.iter().all(Result::is_ok) {
            break;
        }
        assert!(began.elapsed() < PATIENCE, "it is never given back");
    }
    server.bare.stop().await;
}

/// Whoever asks needs no key, and is counted by no limit.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_document_of_the_api_is_no_copy_for_each() {
    let own = certificate();
    let program = Program::new()
        .with_file("cert.pem", own.certificate())
        .with_file("key.pem", own.key())
        .with("TLS_CERT", "cert.pem")
        .with("TLS_KEY", "key.pem")
        .with("PORT", 0)
        .with("LOG_DIR", "");
    let serving = program.serve(&[]);
    let mut held = Vec::new();
    let mut before = 0;
    for count in 0..20 {
        let stream = connect(serving.address().port(), &[&own], &["h2"]).await;
        let mut builder = http2::Builder::new(TokioExecutor::new());
        builder.initial_stream_window_size(0);
        let (mut sender, connection) = builder.handshake(TokioIo::new(stream)).await.unwrap();
        let driving = tokio::spawn(connection);
        let asked: Vec<_> =
            (0..100).map(|_| ask_for(&mut sender, "/api-docs/openapi.json")).collect();
        let answers = futures_util::future::join_all(asked).await;
        assert!(answers.iter().all(|answer| answer.as_ref().unwrap().status() == 200));
        held.push((answers, sender, driving));
        if count == 0 {
            // What the first ones need, such as the allocator's own, is needed once.
            before = serving.memory();
        }
    }
    // 1,900 copies of some 80 KB would be 150 MB.
    let more = serving.memory() - before;
    assert!(more < 40 << 20, "{more} bytes");
    drop(held);
    serving.stop();
}

/// What load balancers and orchestrators send to see whether a server is there.
const HEALTH_CHECKS: [&str; 12] = [
    // HAProxy, as it comes.
    "OPTIONS / HTTP/1.0\r\n\r\n",
    "OPTIONS * HTTP/1.0\r\n\r\n",
    "OPTIONS * HTTP/1.1\r\nhost: 10.0.0.5:3000\r\nconnection: close\r\n\r\n",
    "OPTIONS /health HTTP/1.0\r\n\r\n",
    "OPTIONS /api/sync-event HTTP/1.1\r\nhost: pisync.example\r\nconnection: close\r\n\r\n",
    "HEAD /health HTTP/1.0\r\n\r\n",
    "GET /health/ready HTTP/1.0\r\nuser-agent: HAProxy\r\n\r\n",
    // nginx plus, and whatever passes a client on.
    "GET /health HTTP/1.0\r\nhost: pisync\r\nx-forwarded-for: 192.0.2.1\r\nvia: 1.1 proxy\r\n\r\n",
    // AWS.
    "GET /health/ready HTTP/1.1\r\nhost: 10.0.0.5:3000\r\nuser-agent: ELB-HealthChecker/2.0\r\n\
     connection: close\r\naccept-encoding: gzip, compressed\r\n\r\n",
    // Kubernetes.
    "GET /health/live HTTP/1.1\r\nhost: 10.1.2.3:3000\r\nuser-agent: kube-probe/1.31\r\naccept: */*\r\n\
     connection: close\r\n\r\n",
    // curl or wget in a container.
    "GET /health HTTP/1.1\r\nhost: localhost:3000\r\nuser-agent: curl/8\r\naccept: */*\r\n\
     connection: close\r\n\r\n",
    "HEAD /health/ready HTTP/1.1\r\nhost: [::1]:3000\r\nuser-agent: Wget\r\nconnection: close\r\n\r\n",
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn health_checks_need_neither_key_nor_patience() {
    for (auth, origins) in
        [(AuthMode::Auto, vec![]), (AuthMode::Required, vec!["https://fleet.example"])]
    {
        let database = TestDatabase::sqlite();
        database.migrate().await;
        database.make_key(key_request(pisync::store::Scope::Admin)).await;
        let server = TestServer::start_with(database, |settings| {
            settings.http.auth = auth;
            settings.http.cors_origins =
                origins.iter().map(|origin| origin.parse().unwrap()).collect();
            (settings.http.sync_per_minute, settings.http.api_per_minute) = (1, 1);
        })
        .await;
        for check in HEALTH_CHECKS {
            // More often than the limits let anything else pass.
            for _ in 0..3 {
                let mut connection = server.connect().await;
                connection.write(check).await;
                let answer = connection.rest().await;
                let status = answer.split(' ').nth(1).unwrap_or_default();
                assert!(matches!(status, "200" | "204"), "{check}: {answer}");
                // A bare OPTIONS is no question of a page's.
                if check.starts_with("OPTIONS") && origins.is_empty() {
                    assert!(
                        answer.to_ascii_lowercase().contains("\r\nallow: "),
                        "{check}: {answer}"
                    );
                }
            }
        }
        // Anything else is refused as ever.
        let mut connection = server.connect().await;
        connection.write("OPTIONS /nothing HTTP/1.0\r\n\r\n").await;
        let answer = connection.rest().await;
        assert!(origins.len() == 1 || answer.contains(" 404 "), "{answer}");
        server.stop().await;
    }
}

/// The memory that a server takes, in bytes.
async fn memory(client: &crate::support::http::Client) -> f64 {
    let metrics = client.get("/metrics").await;
    let name = "process_resident_memory_bytes ";
    metrics.text().lines().find_map(|line| line.strip_prefix(name)).unwrap().parse().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn large_heads_are_refused() {
    let program = Program::new().with("PORT", 0).with("LOG_DIR", "");
    let serving = program.serve(&[]);
    let before = memory(&serving.client).await;
    let head = format!("GET /health HTTP/1.1\r\nhost: localhost\r\nx-much: {}", "x".repeat(62_000));
    let mut connections = Vec::new();
    for _ in 0..400 {
        let mut connection = TcpStream::connect(serving.address()).await.unwrap();
        // The server may have hung up in the middle of it.
        let _ = connection.write_all(head.as_bytes()).await;
        connections.push(connection);
    }
    let held = memory(&serving.client).await - before;
    // 400 times 62 KB are 25 MB.
    assert!(held < 15e6, "{held} bytes");
    let mut refused = 0;
    for mut connection in connections {
        let mut answer = Vec::new();
        // What was not read breaks the connection after the answer.
        let _ = timeout(PATIENCE, connection.read_to_end(&mut answer)).await.unwrap();
        refused += usize::from(answer.starts_with(b"HTTP/1.1 431 "));
    }
    assert_eq!(refused, 400);
    // What fits is let in.
    let request = serving.client.request(reqwest::Method::GET, "/health");
    send(request.header("x-much", "x".repeat(15_000))).await.json(200);
    serving.stop();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stalled_compressed_bodies_hold_what_they_sent() {
    let program = Program::new()
        .with("PORT", 0)
        .with("LOG_DIR", "")
        .with("RATE_LIMIT_SYNC_PER_MINUTE", 0)
        .with("RATE_LIMIT_API_PER_MINUTE", 0);
    let serving = program.serve(&[]);
    // Some hundred bytes whose decoder needs 8 MiB.
    let content = format!("{}\n{}", " ".repeat(9 << 20), event("pi"));
    let mut encoder = zstd::Encoder::new(Vec::new(), 3).unwrap();
    encoder.window_log(23).unwrap();
    std::io::Write::write_all(&mut encoder, content.as_bytes()).unwrap();
    let body = encoder.finish().unwrap();
    assert!(body.len() < 2_000, "{}", body.len());
    let head = "POST /api/sync-events HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/x-ndjson\r\n\
                content-encoding: zstd\r\ntransfer-encoding: chunked\r\n\r\n";
    let before = memory(&serving.client).await;
    let mut stalled = Vec::new();
    for _ in 0..150 {
        let mut connection = serving.client.connect().await;
        connection.write(format!("{head}{:x}\r\n", body.len())).await;
        connection.write(&body).await;
        connection.write("\r\n").await;
        stalled.push(connection);
    }
    // Others go on reporting, while the server could work on these.
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(1) {
        serving.client.store(&event("other")).await;
    }
    let held = memory(&serving.client).await - before;
    assert!(held < 60e6, "{held} bytes");
    // Those that go on have their turn. Passing over so many blanks takes a debug build a while, so they are few.
    for connection in &mut stalled[..8] {
        connection.write("0\r\n\r\n").await;
    }
    for connection in &mut stalled[..8] {
        assert_eq!(connection.answer().await.status, 200);
    }
    let held = memory(&serving.client).await - before;
    assert!(held < 120e6, "{held} bytes");
    serving.stop();
}
