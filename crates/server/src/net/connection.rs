//! Serves one connection: TLS, then HTTP/1.1 or HTTP/2. `serve` calls it for each accepted socket. It ends the
//! connection when its client stalls (see `timeouts`) or the server stops.

use std::{
    sync::{Arc, atomic::AtomicUsize},
    time::{Duration, Instant},
};

use axum::{Router, body::Body, extract::Request, response::Response};
use hyper::{
    body::{Body as _, Incoming},
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
        timeouts::{Activity, HeadClock, InProgress, IncompleteHeads, WriteClock},
        tls::{HTTP_2, Tls},
        unread::{Outgoing, Unread},
    },
};

/// The largest head of a request, in bytes: the limit that Node has. A larger head is answered with 431. A slow client
/// may hold this much on each of its connections until it is cut off.
const HEAD_LIMIT: usize = 16 << 10;

/// The number of requests that one HTTP/2 connection may have in flight.
const STREAMS: u32 = 128;

/// How many bytes of a response HTTP/2 takes from its body before they are written. Taking them makes the server
/// generate and compress them. A client must not make the server do that far ahead of what it reads.
const SEND_BUFFER: usize = 32 << 10;

/// How long a TLS handshake may take.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a closing connection stays open for its idle client to notice. In HTTP/2 the client may have sent a request
/// meanwhile, which is still answered.
const GOODBYE: Duration = Duration::from_secs(1);

/// The state that all connections share.
pub(crate) struct Shared {
    pub(crate) router: Router,
    pub(crate) timeouts: Timeouts,
    /// One permit per connection. When none is left, idle connections are closed sooner.
    pub(crate) places: Arc<Semaphore>,
    pub(crate) heads: Arc<IncompleteHeads>,
    /// The number of response pieces that HTTP/2 clients have not read yet.
    pub(crate) unread: Arc<AtomicUsize>,
}

/// Serves HTTP/1.1 without TLS.
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

/// Serves TLS, with HTTP/2 or HTTP/1.1 as the client chooses.
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
    let unread = Unread::new(&shared.unread);
    let waiting = Some(Arc::clone(&unread));
    let service = service_fn(move |request: Request<Incoming>| {
        answer(&router, peer, &counted, waiting.clone(), request)
    });
    let connection = http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .max_concurrent_streams(STREAMS)
        .max_send_buf_size(SEND_BUFFER)
        .max_header_list_size(u32::try_from(HEAD_LIMIT).unwrap_or(u32::MAX))
        .serve_connection(TokioIo::new(stream), service);
    drive(connection, shared, &activity, Some(&unread), stop).await
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
    let service = service_fn(move |request: Request<Incoming>| {
        answer(&router, peer, &counted, None, request)
    });
    let connection = http1::Builder::new()
        // hyper's timer for heads starts when the previous request ends. `HeadClock` times them instead.
        .header_read_timeout(None)
        .max_buf_size(HEAD_LIMIT)
        .serve_connection(TokioIo::new(stream), service);
    drive(connection, shared, &activity, None, stop).await
}

/// Serves a connection until it ends. The client may close it, be idle for too long, or read none of the `unread`
/// pieces; or the server stops.
async fn drive<C>(
    connection: C,
    shared: &Shared,
    activity: &Activity,
    unread: Option<&Unread>,
    mut stop: watch::Receiver<()>,
) -> Result<(), hyper::Error>
where
    C: GracefulConnection<Error = hyper::Error>,
{
    let Timeouts { head, idle, write, .. } = shared.timeouts;
    // How often to check whether idle connections must be closed sooner because no permit is left.
    let interval = idle.min(head);
    let (mut is_stopping, mut is_closing) = (false, false);
    tokio::pin!(connection);
    let look = tokio::time::sleep(interval.min(write));
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
                let stalled = unread.and_then(Unread::since).map(|since| since + write);
                if stalled.is_some_and(|deadline| deadline <= now) {
                    return Ok(());
                }
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
                let next = stalled.unwrap_or(now + write).min(next);
                look.as_mut().reset(next.into());
            }
        }
    }
}

/// Why a response is not sent.
#[derive(Debug, thiserror::Error)]
#[error("too many answers wait for their clients to take them")]
struct TooManyWait;

fn answer(
    router: &Router,
    peer: Peer,
    activity: &Arc<Activity>,
    unread: Option<Arc<Unread>>,
    request: Request<Incoming>,
) -> impl Future<Output = Result<Response<Outgoing>, TooManyWait>> + use<> {
    let in_progress = InProgress::begin(Arc::clone(activity));
    let mut request = request.map(Body::new);
    request.extensions_mut().insert(peer);
    let answer = router.clone().oneshot(request);
    async move {
        let Ok(response) = answer.await;
        // The error resets the stream, which needs no memory.
        if unread.as_ref().is_some_and(|unread| unread.is_full()) {
            return Err(TooManyWait);
        }
        // A complete body only has to be written, and the write clock limits that.
        let is_complete = response.body().size_hint().exact().is_some();
        let in_progress = (!is_complete).then_some(in_progress);
        Ok(response.map(|body| Outgoing::new(body, in_progress, unread)))
    }
}
