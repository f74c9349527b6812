//! Accepts connections, limits their number, and lets them finish when the server stops. `app` calls it. It must not
//! look into requests.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use axum::Router;
use tokio::sync::{Semaphore, watch};

use crate::{
    config::http::Timeouts,
    middleware::client_address::Peer,
    net::{
        connection::{Shared, serve_plain, serve_tls},
        listeners::Listeners,
        tls::Tls,
    },
};

/// How long requests in flight may take to finish when the server stops. Ingest gets the rest of the 30 s after which a
/// supervisor kills the process.
const GRACE: Duration = Duration::from_secs(20);

/// The pause after an accept failed because file descriptors ran out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How often to warn that the limit of connections is reached.
const WARNING_INTERVAL: Duration = Duration::from_secs(60);

/// Settings of connections.
#[derive(Debug)]
pub struct ConnectionSettings {
    /// The largest number of connections at a time. Beyond it, new connections wait until another one ends. 0 means no
    /// limit.
    pub max_connections: usize,
    /// How long clients may stall.
    pub timeouts: Timeouts,
    /// TLS; `None` serves plain HTTP.
    pub tls: Option<Tls>,
}

/// Serves `router` until `shutdown` completes. Then it accepts nothing more, and returns when the requests in flight
/// are answered, or after 20 s.
pub async fn serve(
    listeners: Listeners,
    router: Router,
    settings: ConnectionSettings,
    shutdown: impl Future<Output = ()>,
) {
    let ConnectionSettings { max_connections, timeouts, tls } = settings;
    let tls = tls.map(Arc::new);
    let bound = if max_connections == 0 { Semaphore::MAX_PERMITS } else { max_connections };
    let permits = Arc::new(Semaphore::new(bound.min(Semaphore::MAX_PERMITS)));
    let shared = Arc::new(Shared {
        router,
        timeouts,
        places: Arc::clone(&permits),
        heads: Arc::default(),
        unread: Arc::default(),
    });
    let mut warned: Option<Instant> = None;
    let (stop, _) = watch::channel(());
    tokio::pin!(shutdown);
    loop {
        if permits.available_permits() == 0
            && warned.is_none_or(|warned| warned.elapsed() >= WARNING_INTERVAL)
        {
            warned = Some(Instant::now());
            tracing::warn!(
                max_connections,
                "the limit of connections is reached; new ones wait: set MAX_CONNECTIONS higher, and the limit of open files with it"
            );
        }
        let place = tokio::select! {
            () = &mut shutdown => break,
            place = Arc::clone(&permits).acquire_owned() => place,
        };
        let (stream, peer) = tokio::select! {
            () = &mut shutdown => break,
            accepted = listeners.accept() => match accepted {
                Ok(connection) => connection,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            },
        };
        // Responses are small and written at once, so waiting to fill a packet (Nagle's algorithm) only delays them.
        let _ = stream.set_nodelay(true);
        let (shared, stopped, tls) = (Arc::clone(&shared), stop.subscribe(), tls.clone());
        tokio::spawn(async move {
            let peer = Peer(peer);
            let ended = match &tls {
                None => serve_plain(stream, peer, &shared, stopped).await,
                Some(tls) => serve_tls(stream, peer, &shared, stopped, tls).await,
            };
            // Clients disconnect at any time; that is not worth more than a trace line.
            if let Err(error) = ended {
                tracing::trace!(peer = %peer.0, %error, "connection ended");
            }
            drop(place);
        });
    }
    drop(listeners);
    let _ = stop.send(());
    // Each connection holds a receiver until it has ended.
    if tokio::time::timeout(GRACE, stop.closed()).await.is_err() {
        tracing::warn!("some requests did not finish in time and were cut off");
    }
}
