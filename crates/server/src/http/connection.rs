//! One connection: speaking TLS, HTTP/1.1 or HTTP/2 on it, and ending it when its client dawdles. What a
//! client sends late is seen to by hyper (the head) and by the handlers (the body); here, what it takes late.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use axum::{Router, body::Body, extract::Request, response::Response};
use hyper::{
    body::Incoming,
    server::conn::{http1, http2},
    service::service_fn,
};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::graceful::Watcher,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    time::Sleep,
};
use tokio_rustls::TlsAcceptor;
use tower::ServiceExt;

use super::{
    Timeouts,
    serve::Peer,
    tls::{HTTP_2, Tls},
};

/// Bytes of a request's head, at most. Slow clients hold so much each, until they are cut off.
const HEAD_LIMIT: usize = 64 << 10;

/// Requests that one HTTP/2 connection may have under way.
const STREAMS: u32 = 128;

/// How long a TLS handshake may take.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// Speaks HTTP/1.1 with a client.
pub(super) async fn serve_plain(
    stream: TcpStream,
    peer: Peer,
    router: Router,
    timeouts: Timeouts,
    watcher: Watcher,
) -> Result<(), hyper::Error> {
    serve_http1(Patient::new(stream, timeouts.write, None), peer, router, timeouts, watcher).await
}

/// Speaks HTTP/2 or HTTP/1.1 over TLS, as the client likes.
pub(super) async fn serve_tls(
    stream: TcpStream,
    peer: Peer,
    router: Router,
    timeouts: Timeouts,
    watcher: Watcher,
    tls: &Tls,
) -> Result<(), hyper::Error> {
    let activity = Arc::new(Activity::default());
    let stream = Patient::new(stream, timeouts.write, Some(Arc::clone(&activity)));
    let acceptor = TlsAcceptor::from(Arc::clone(&tls.config));
    let timeout = HANDSHAKE_TIMEOUT.min(timeouts.head);
    let stream = match tokio::time::timeout(timeout, acceptor.accept(stream)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => {
            tracing::debug!(peer = %peer.0, %error, "TLS handshake failed");
            return Ok(());
        }
        Err(_) => return Ok(()),
    };
    if stream.get_ref().1.alpn_protocol() != Some(HTTP_2) {
        return serve_http1(stream, peer, router, timeouts, watcher).await;
    }
    let counted = Arc::clone(&activity);
    let service = service_fn(move |request: Request<Incoming>| {
        let under_way = UnderWay::begin(Arc::clone(&counted));
        let answer = answer(&router, peer, request);
        async move {
            let answer = answer.await;
            drop(under_way);
            answer
        }
    });
    let connection = http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .max_concurrent_streams(STREAMS)
        .max_header_list_size(u32::try_from(HEAD_LIMIT).unwrap_or(u32::MAX))
        .serve_connection(TokioIo::new(stream), service);
    let connection = watcher.watch(connection);
    tokio::pin!(connection);
    // HTTP/2 knows no end of idleness.
    loop {
        tokio::select! {
            result = &mut connection => return result,
            () = tokio::time::sleep(timeouts.head) => if activity.is_over() { return Ok(()) },
        }
    }
}

async fn serve_http1(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    peer: Peer,
    router: Router,
    timeouts: Timeouts,
    watcher: Watcher,
) -> Result<(), hyper::Error> {
    let service = service_fn(move |request: Request<Incoming>| answer(&router, peer, request));
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(timeouts.head)
        .max_buf_size(HEAD_LIMIT)
        .serve_connection(TokioIo::new(stream), service);
    watcher.watch(connection).await
}

fn answer(
    router: &Router,
    peer: Peer,
    request: Request<Incoming>,
) -> impl Future<Output = Result<Response, std::convert::Infallible>> + use<> {
    let mut request = request.map(Body::new);
    request.extensions_mut().insert(peer);
    router.clone().oneshot(request)
}

/// What happens on a connection.
#[derive(Default)]
struct Activity {
    /// Whether bytes have moved since somebody last looked.
    moved: AtomicBool,
    /// Requests that are being answered.
    requests: AtomicUsize,
}

impl Activity {
    /// Whether nothing has happened since this was last asked, and nothing is under way.
    fn is_over(&self) -> bool {
        !self.moved.swap(false, Ordering::Relaxed) && self.requests.load(Ordering::Relaxed) == 0
    }
}

/// A request being answered, for as long as this lives.
struct UnderWay(Arc<Activity>);

impl UnderWay {
    fn begin(activity: Arc<Activity>) -> Self {
        activity.requests.fetch_add(1, Ordering::Relaxed);
        Self(activity)
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.requests.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A stream that waits only so long for the other end to take what is written to it. Any progress starts
/// the time anew: a slow link is no attack.
struct Patient<S> {
    stream: S,
    limit: Duration,
    /// Runs while the other end takes nothing.
    stalled: Option<Pin<Box<Sleep>>>,
    activity: Option<Arc<Activity>>,
}

impl<S> Patient<S> {
    fn new(stream: S, limit: Duration, activity: Option<Arc<Activity>>) -> Self {
        Self { stream, limit, stalled: None, activity }
    }

    fn has_moved(&self) {
        if let Some(activity) = &self.activity {
            activity.moved.store(true, Ordering::Relaxed);
        }
    }

    /// What became of an attempt to write.
    fn written<T>(
        &mut self,
        context: &mut Context<'_>,
        result: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if result.is_ready() {
            self.stalled = None;
            self.has_moved();
            return result;
        }
        let stalled = self.stalled.get_or_insert_with(|| Box::pin(tokio::time::sleep(self.limit)));
        ready!(stalled.as_mut().poll(context));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Patient<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let result = Pin::new(&mut self.stream).poll_read(context, buffer);
        if result.is_ready() {
            self.has_moved();
        }
        result
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Patient<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.written(context, result)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.stream).poll_write_vectored(context, slices);
        self.written(context, result)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
