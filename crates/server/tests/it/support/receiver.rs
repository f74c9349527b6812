//! A local server that receives what is posted to it, and behaves as a service of the Internet may: well, slowly, or badly.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use axum::http::{HeaderMap, HeaderName, HeaderValue};
use pisync_core::Timestamp;
use rustls::ServerConfig;
use serde_json::Value;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::TcpListener,
    sync::Semaphore,
    time::{sleep, timeout},
};
use tokio_rustls::TlsAcceptor;

/// No request may take longer to arrive, however loaded the machine is.
const PATIENCE: Duration = Duration::from_secs(30);

/// What arrived.
#[derive(Debug, Clone)]
pub(crate) struct Received {
    /// The first line without the version, such as `POST /hook`.
    pub(crate) line: String,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Vec<u8>,
    /// When all of it was there.
    pub(crate) at: Instant,
}

impl Received {
    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map(|value| value.to_str().unwrap()).unwrap_or_default()
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap()
    }
}

/// What is done about a request.
#[derive(Debug, Clone)]
pub(crate) enum Reply {
    /// An answer: status line, further header lines, body.
    Answer(&'static str, &'static str, String),
    /// Nothing, and the connection stays.
    Stall,
    /// A status line and the beginning of a body, of which the rest never comes.
    StallWithin(&'static str),
    /// The connection ends without an answer.
    Close,
    /// Not HTTP.
    Garbage,
    /// A body that does not end for as long as somebody reads it.
    Endless(&'static str),
    /// The beginning of an answer. Then the connection ends.
    Cut(&'static str),
    /// The beginning of an answer, and then a letter now and then.
    Drip(&'static str),
    /// Nothing until the test opens the gate, and then this.
    Behind(Gate, Box<Reply>),
}

/// What holds answers back until it is opened.
#[derive(Debug, Clone)]
pub(crate) struct Gate(Arc<Semaphore>);

impl Gate {
    pub(crate) fn closed() -> Self {
        Self(Arc::new(Semaphore::new(0)))
    }

    pub(crate) fn open(&self) {
        self.0.close();
    }

    async fn passed(&self) {
        // It is open when there is nothing to wait for any more.
        let _ = self.0.acquire().await;
    }
}

impl Reply {
    pub(crate) fn status(line: &'static str) -> Self {
        Self::Answer(line, "", String::new())
    }

    pub(crate) fn says(line: &'static str, body: impl Into<String>) -> Self {
        Self::Answer(line, "", body.into())
    }
}

/// The server. It ends with the test's runtime.
pub(crate) struct Receiver {
    pub(crate) address: SocketAddr,
    received: Arc<Mutex<Vec<Received>>>,
}

impl Receiver {
    /// One that answers each request as `reply` says.
    pub(crate) async fn start(reply: impl Fn(&Received) -> Reply + Send + Sync + 'static) -> Self {
        Self::start_with(None, reply).await
    }

    /// The same by TLS.
    pub(crate) async fn start_with(
        tls: Option<ServerConfig>,
        reply: impl Fn(&Received) -> Reply + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let received = Arc::new(Mutex::new(Vec::new()));
        let (noted, reply) = (Arc::clone(&received), Arc::new(reply));
        let tls = tls.map(|tls| TlsAcceptor::from(Arc::new(tls)));
        tokio::spawn(async move {
            loop {
                let Ok((stream, _)) = listener.accept().await else { return };
                let (noted, reply, tls) = (Arc::clone(&noted), Arc::clone(&reply), tls.clone());
                tokio::spawn(async move {
                    let reply = move |request: &Received| reply(request);
                    match tls {
                        Some(tls) => {
                            if let Ok(stream) = tls.accept(stream).await {
                                serve(stream, &noted, reply).await;
                            }
                        }
                        None => serve(stream, &noted, reply).await,
                    }
                });
            }
        });
        Self { address, received }
    }

    /// The address of `path` there.
    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    /// What has arrived.
    pub(crate) fn received(&self) -> Vec<Received> {
        self.received.lock().unwrap().clone()
    }

    /// The only request that has arrived.
    pub(crate) fn only(&self) -> Received {
        let [only] = &self.received()[..] else { panic!("{:?}", self.received()) };
        only.clone()
    }
}

async fn serve(
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    noted: &Mutex<Vec<Received>>,
    reply: impl Fn(&Received) -> Reply,
) {
    let Ok(Some(request)) = timeout(PATIENCE, read(&mut stream)).await else { return };
    let mut reply = reply(&request);
    noted.lock().unwrap().push(request);
    while let Reply::Behind(gate, then) = reply {
        gate.passed().await;
        reply = *then;
    }
    // Whoever asks may be gone before the answer's end.
    let _ = match reply {
        Reply::Answer(status, headers, body) => {
            let length = body.len();
            let answer =
                format!("HTTP/1.1 {status}\r\n{headers}content-length: {length}\r\n\r\n{body}");
            stream.write_all(answer.as_bytes()).await
        }
        Reply::Stall => {
            sleep(PATIENCE).await;
            Ok(())
        }
        Reply::StallWithin(status) => {
            let answer = format!("HTTP/1.1 {status}\r\ncontent-length: 1000\r\n\r\nbeginning");
            let written = stream.write_all(answer.as_bytes()).await;
            sleep(PATIENCE).await;
            written
        }
        Reply::Close => Ok(()),
        Reply::Garbage => stream.write_all(b"220 this is no web server\r\n").await,
        Reply::Endless(status) => {
            let answer = format!("HTTP/1.1 {status}\r\ntransfer-encoding: chunked\r\n\r\n");
            let mut written = stream.write_all(answer.as_bytes()).await;
            let chunk = format!("10000\r\n{}\r\n", "x".repeat(0x10000));
            while written.is_ok() {
                written = stream.write_all(chunk.as_bytes()).await;
            }
            written
        }
        Reply::Cut(beginning) => stream.write_all(beginning.as_bytes()).await,
        Reply::Drip(beginning) => {
            let mut written = stream.write_all(beginning.as_bytes()).await;
            let until = Instant::now() + PATIENCE;
            while written.is_ok() && Instant::now() < until {
                sleep(Duration::from_millis(100)).await;
                written = stream.write_all(b"x").await;
            }
            written
        }
        Reply::Behind(..) => Ok(()),
    };
    let _ = stream.shutdown().await;
}

/// Reads one request; `None` when there is none.
async fn read(stream: &mut (impl AsyncRead + Unpin)) -> Option<Received> {
    let mut bytes = Vec::new();
    let end = loop {
        if let Some(end) = bytes.windows(4).position(|end| end == b"\r\n\r\n") {
            break end;
        }
        if stream.read_buf(&mut bytes).await.ok()? == 0 {
            return None;
        }
    };
    let head = String::from_utf8(bytes[..end].to_vec()).unwrap();
    let mut lines = head.split("\r\n");
    let line = lines.next()?.strip_suffix(" HTTP/1.1")?.to_owned();
    let headers: HeaderMap = lines
        .map(|line| {
            let (name, value) = line.split_once(": ").unwrap();
            (name.parse::<HeaderName>().unwrap(), HeaderValue::from_str(value).unwrap())
        })
        .collect();
    let length =
        headers.get("content-length").map_or(0, |length| length.to_str().unwrap().parse().unwrap());
    let mut body = bytes.split_off(end + 4);
    while body.len() < length {
        if stream.read_buf(&mut body).await.ok()? == 0 {
            return None;
        }
    }
    Some(Received { line, headers, body, at: Instant::now() })
}

/// The present time, for receivers that compare it with a signature's.
pub(crate) fn now() -> Timestamp {
    pisync::clock::Clock::system().set_time().unwrap()
}
