//! Connections: taking them in, bounding how long they may dawdle, and letting them finish when the
//! server stops.

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

/// How long requests under way may take to finish when the server stops. Ingest then has the rest of
/// the 30 s after which a supervisor would kill the process.
const GRACE: Duration = Duration::from_secs(20);

/// How long to wait when no connection can be taken in, for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How often to say that there is no room.
const WARNING_INTERVAL: Duration = Duration::from_secs(60);

/// How the server deals with connections.
#[derive(Debug)]
pub struct ConnectionSettings {
    /// Connections at a time, at most; beyond, new ones wait to be taken in until another ends. 0 is no
    /// limit.
    pub max_connections: usize,
    /// How long clients may dawdle.
    pub timeouts: Timeouts,
    /// What to speak TLS with; plain when there is nothing.
    pub tls: Option<Tls>,
}

/// Serves `router` until `shutdown` comes, then takes nothing more in and returns when the requests
/// under way are answered, or after 20 s.
pub async fn serve(
    listeners: Listeners,
    router: Router,
    settings: ConnectionSettings,
    shutdown: impl Future<Output = ()>,
) {
    let ConnectionSettings { max_connections, timeouts, tls } = settings;
    let tls = tls.map(Arc::new);
    let bound = if max_connections == 0 { Semaphore::MAX_PERMITS } else { max_connections };
    let room = Arc::new(Semaphore::new(bound.min(Semaphore::MAX_PERMITS)));
    let shared = Arc::new(Shared {
        router,
        timeouts,
        places: Arc::clone(&room),
        heads: Arc::default(),
        untaken: Arc::default(),
    });
    let mut warned: Option<Instant> = None;
    let (stop, _) = watch::channel(());
    tokio::pin!(shutdown);
    loop {
        if room.available_permits() == 0
            && warned.is_none_or(|warned| warned.elapsed() >= WARNING_INTERVAL)
        {
            warned = Some(Instant::now());
            tracing::warn!(max_connections, "there is no room for more connections; new ones wait");
        }
        let place = tokio::select! {
            () = &mut shutdown => break,
            place = Arc::clone(&room).acquire_owned() => place,
        };
        let (stream, peer) = tokio::select! {
            () = &mut shutdown => break,
            accepted = listeners.accept() => match accepted {
                Ok(connection) => connection,
                Err(error) => {
                    tracing::warn!(%error, "cannot take in a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            },
        };
        // Answers are small and complete: they must not wait for more to send.
        let _ = stream.set_nodelay(true);
        let (shared, stopped, tls) = (Arc::clone(&shared), stop.subscribe(), tls.clone());
        tokio::spawn(async move {
            let peer = Peer(peer);
            let ended = match &tls {
                None => serve_plain(stream, peer, &shared, stopped).await,
                Some(tls) => serve_tls(stream, peer, &shared, stopped, tls).await,
            };
            // Clients hang up as they like; that is no event.
            if let Err(error) = ended {
                tracing::trace!(peer = %peer.0, %error, "connection ended");
            }
            drop(place);
        });
    }
    drop(listeners);
    let _ = stop.send(());
    // Each connection listens until it has ended.
    if tokio::time::timeout(GRACE, stop.closed()).await.is_err() {
        tracing::warn!("some requests did not finish in time and were cut off");
    }
}
