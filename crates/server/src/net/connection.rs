//! One connection: speaking TLS, HTTP/1.1 or HTTP/2 on it, and ending it when its client dawdles
//! (`timeouts`) or the server stops.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use axum::{
    Router,
    body::{Body, Bytes},
    extract::Request,
    response::Response,
};
use hyper::{
    body::{Body as _, Frame, Incoming, SizeHint},
    server::conn::{http1, http2},
    service::service_fn,
};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::graceful::GracefulConnection,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    sync::{Semaphore, watch},
};
use tokio_rustls::TlsAcceptor;
use tower::ServiceExt;

use crate::{
    config::http::Timeouts,
    middleware::client_address::Peer,
    net::{
        timeouts::{Activity, HeadClock, IncompleteHeads, UnderWay, WriteClock},
        tls::{HTTP_2, Tls},
    },
};

/// Bytes of a request's head, at most, as many as Node allows; a larger one is answered 431. A slow client may hold
/// so many until it is cut off, on each of its connections.
const HEAD_LIMIT: usize = 16 << 10;

/// Requests that one HTTP/2 connection may have under way.
const STREAMS: u32 = 128;

/// How long a TLS handshake may take.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// How long an idle client may take to hear that the connection is being closed. In HTTP/2 it may have sent a
/// request meanwhile, which is then answered.
const GOODBYE: Duration = Duration::from_secs(1);

/// What all connections share.
pub(crate) struct Shared {
    pub(crate) router: Router,
    pub(crate) timeouts: Timeouts,
    /// Places for connections. When none is left, idle ones make room sooner.
    pub(crate) places: Arc<Semaphore>,
    pub(crate) heads: Arc<IncompleteHeads>,
}

/// Speaks HTTP/1.1 with a client.
pub(crate) async fn serve_plain(
    stream: TcpStream,
    peer: Peer,
    shared: &Shared,
    stop: watch::Receiver<()>,
) -> Result<(), hyper::Error> {
    let activity = Activity::new();
    let stream = WriteClock::new(stream, &activity, shared.timeouts.write);
    serve_http1(stream, peer, shared, activity, stop).await
}

/// Speaks HTTP/2 or HTTP/1.1 over TLS, as the client likes.
pub(crate) async fn serve_tls(
    stream: TcpStream,
    peer: Peer,
    shared: &Shared,
    stop: watch::Receiver<()>,
    tls: &Tls,
) -> Result<(), hyper::Error> {
    let Timeouts { head, write, .. } = shared.timeouts;
    let activity = Activity::new();
    let stream = WriteClock::new(stream, &activity, write);
    let acceptor = TlsAcceptor::from(Arc::clone(&tls.config));
    let timeout = HANDSHAKE_TIMEOUT.min(head);
    let stream = match tokio::time::timeout(timeout, acceptor.accept(stream)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => {
            tracing::debug!(peer = %peer.0, %error, "TLS handshake failed");
            return Ok(());
        }
        Err(_) => return Ok(()),
    };
    if stream.get_ref().1.alpn_protocol() != Some(HTTP_2) {
        return serve_http1(stream, peer, shared, activity, stop).await;
    }
    let stream = HeadClock::http2(stream, &activity, head, &shared.heads);
    let (router, counted) = (shared.router.clone(), Arc::clone(&activity));
    let service =
        service_fn(move |request: Request<Incoming>| answer(&router, peer, &counted, request));
    let connection = http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .max_concurrent_streams(STREAMS)
        .max_header_list_size(u32::try_from(HEAD_LIMIT).unwrap_or(u32::MAX))
        .serve_connection(TokioIo::new(stream), service);
    drive(connection, shared, &activity, stop).await
}

async fn serve_http1(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    peer: Peer,
    shared: &Shared,
    activity: Arc<Activity>,
    stop: watch::Receiver<()>,
) -> Result<(), hyper::Error> {
    let stream = HeadClock::http1(stream, &activity, shared.timeouts.head, &shared.heads);
    let (router, counted) = (shared.router.clone(), Arc::clone(&activity));
    let service =
        service_fn(move |request: Request<Incoming>| answer(&router, peer, &counted, request));
    let connection = http1::Builder::new()
        // Its clock for heads begins with the end of the last request, so it is ours that counts.
        .header_read_timeout(None)
        .max_buf_size(HEAD_LIMIT)
        .serve_connection(TokioIo::new(stream), service);
    drive(connection, shared, &activity, stop).await
}

/// Serves a connection until its client ends it, is idle for too long, or the server stops.
async fn drive<C>(
    connection: C,
    shared: &Shared,
    activity: &Activity,
    mut stop: watch::Receiver<()>,
) -> Result<(), hyper::Error>
where
    C: GracefulConnection<Error = hyper::Error>,
{
    let Timeouts { head, idle, .. } = shared.timeouts;
    // As often as this it is looked whether there is still room for the idle.
    let interval = idle.min(head);
    let (mut is_stopping, mut is_closing) = (false, false);
    tokio::pin!(connection);
    let look = tokio::time::sleep(interval);
    tokio::pin!(look);
    loop {
        tokio::select! {
            result = &mut connection => return result,
            _ = stop.changed(), if !is_stopping => {
                is_stopping = true;
                connection.as_mut().graceful_shutdown();
            }
            () = &mut look => {
                let limit = if shared.places.available_permits() == 0 { interval } else { idle };
                let now = Instant::now();
                let deadline = activity.idle_since().map(|since| since + limit);
                let next = match deadline {
                    Some(deadline) if deadline > now => deadline.min(now + interval),
                    None => now + interval,
                    Some(_) if is_closing => return Ok(()),
                    Some(_) => {
                        is_closing = true;
                        connection.as_mut().graceful_shutdown();
                        now + GOODBYE
                    }
                };
                look.as_mut().reset(next.into());
            }
        }
    }
}

fn answer(
    router: &Router,
    peer: Peer,
    activity: &Arc<Activity>,
    request: Request<Incoming>,
) -> impl Future<Output = Result<Response, std::convert::Infallible>> + use<> {
    let under_way = UnderWay::begin(Arc::clone(activity));
    let mut request = request.map(Body::new);
    request.extensions_mut().insert(peer);
    let answer = router.clone().oneshot(request);
    async move {
        let response = answer.await?;
        // What is complete already is only to be written, which has a clock of its own.
        if response.body().size_hint().exact().is_some() {
            return Ok(response);
        }
        Ok(response.map(|body| Body::new(Streamed { body, _under_way: under_way })))
    }
}

/// A body that comes into being while it is sent: its request is under way until then.
struct Streamed {
    body: Body,
    _under_way: UnderWay,
}

impl hyper::body::Body for Streamed {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
