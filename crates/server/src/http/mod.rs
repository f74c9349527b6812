//! The JSON API. One file per resource, each with its types, handlers, routes and documentation; here
//! they are put together, with everything that happens around every request.

mod admission;
mod audit;
mod auth;
mod charset;
mod client_address;
mod connection;
mod connection_clock;
mod decompress;
mod devices;
mod docs;
mod envelope;
mod error;
mod extract;
mod figures;
mod health;
mod history_stream;
mod keys;
mod listeners;
mod metrics;
mod node_paths;
mod observe;
pub mod query;
mod rate_limit;
mod repeated_failures;
mod security_headers;
mod sender;
mod serve;
mod stats;
mod sync_event;
mod sync_events;
mod sync_history;
mod tls;
mod welcome;
mod window;

use std::{collections::BTreeMap, net::SocketAddr, sync::Arc, time::Duration};

use axum::{
    Router,
    extract::Request,
    http::{HeaderName, HeaderValue, Method, header},
    middleware,
};
use ipnet::IpNet;
use pisync_core::Timestamp;
use tokio::sync::Semaphore;
use tower::ServiceExt;
use tower_http::{compression::CompressionLayer, cors::CorsLayer};
use utoipa_axum::router::OpenApiRouter;

pub use auth::AuthMode;
pub use listeners::Listeners;
pub use serve::{ConnectionSettings, serve};
pub use tls::{Tls, TlsFiles};

use self::{
    admission::Slots,
    auth::Gate,
    client_address::TrustedProxies,
    observe::{ObserveLayer, RequestIds, SeldomLogged},
    rate_limit::RateLimits,
};
use crate::{
    clock::Clock, ingest::Ingest, keys::Keyring, metrics::Metrics, random::Randomness, store::Store,
};

/// How the API is to behave.
#[derive(Debug, Clone)]
pub struct HttpSettings {
    /// Whether to ask for keys.
    pub auth: AuthMode,
    /// How far ahead of the server's clock an event may be dated, in seconds.
    pub max_clock_skew_seconds: u32,
    /// Requests a minute from one address to the endpoints that devices report to; 0 is no limit.
    pub sync_per_minute: u32,
    /// Requests a minute from one address to the rest of the API; 0 is no limit.
    pub api_per_minute: u32,
    /// Requests a minute with one key; 0 is no limit.
    pub key_per_minute: u32,
    /// Connections at a time; 0 is no limit.
    pub max_connections: usize,
    /// Requests being answered at a time; 0 is no limit.
    pub max_requests: usize,
    /// What to speak TLS with.
    pub tls: Option<TlsFiles>,
    /// Proxies whose word on a client's address is taken.
    pub trusted_proxies: Vec<IpNet>,
    /// Origins whose pages may call the API.
    pub cors_origins: Vec<HeaderValue>,
    /// How long clients may dawdle.
    pub timeouts: Timeouts,
}

/// How long a client may take to send a request, or to take the answer. Not for users to set, but for tests to shorten.
#[derive(Debug, Clone, Copy)]
pub struct Timeouts {
    /// For a request's head to arrive in full, from its first byte on.
    pub head: Duration,
    /// How long a connection may stay open without a request.
    pub idle: Duration,
    /// For a body to arrive in full.
    pub body: Duration,
    /// For the client to take some of an answer that waits to be sent.
    pub write: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        // 64 KiB at the 20 kbit/s of a poor mobile link take 26 s.
        // Proxies in front keep connections to send further requests on: nginx and AWS for 60 s, Traefik for 90.
        // Whoever closes first must be the proxy, or its next request meets a closed connection (a 502).
        Self {
            head: Duration::from_secs(30),
            idle: Duration::from_secs(120),
            body: Duration::from_secs(30),
            write: Duration::from_secs(30),
        }
    }
}

/// What every handler can reach.
pub struct ApiState {
    store: Arc<dyn Store>,
    ingest: Ingest,
    clock: Clock,
    metrics: Arc<Metrics>,
    gate: Gate,
    limits: RateLimits,
    slots: Slots,
    /// Turns at decompressing bodies.
    decoders: Semaphore,
    randomness: Randomness,
    /// Whether requests are admitted by a layer within CORS rather than by `observe`.
    admits_within_cors: bool,
    trusted_proxies: TrustedProxies,
    request_ids: RequestIds,
    seldom_logged: SeldomLogged,
    /// Milliseconds.
    max_clock_skew: i64,
    body_timeout: Duration,
    port: u16,
    /// Every endpoint by method and path, with its summary.
    endpoints: BTreeMap<String, String>,
}

type SharedState = Arc<ApiState>;

impl ApiState {
    /// Since when a device must have been heard from to be active.
    fn active_since(&self) -> Timestamp {
        self.clock.now().saturating_add_milliseconds(-stats::ACTIVE_MILLISECONDS)
    }
}

/// What the API stands on.
pub struct ApiParts {
    /// Where everything is kept.
    pub store: Arc<dyn Store>,
    /// Where events go.
    pub ingest: Ingest,
    /// What time it is.
    pub clock: Clock,
    /// Where measurements go.
    pub metrics: Arc<Metrics>,
    /// Where secrets come from.
    pub randomness: Randomness,
    /// The keys that open it.
    pub keyring: Arc<Keyring>,
    /// Where the server listens.
    pub address: SocketAddr,
}

/// Routes and document of all resources.
fn resources() -> OpenApiRouter<SharedState> {
    // Answers that can be long are compressed; the hot path's answer is not worth the work.
    let compressed = OpenApiRouter::new()
        .merge(sync_history::router())
        .merge(repeated_failures::router())
        .merge(stats::router())
        .merge(devices::router())
        .merge(welcome::router())
        .merge(keys::router())
        .merge(audit::router())
        .merge(metrics::router())
        .layer(CompressionLayer::new());
    OpenApiRouter::with_openapi(docs::outline())
        .merge(sync_event::router())
        .merge(sync_events::router())
        .merge(compressed)
        .merge(health::router())
}

/// The OpenAPI document, as JSON.
///
/// # Errors
/// When it cannot be written, which no input can cause.
pub fn openapi_json() -> Result<String, serde_json::Error> {
    let mut text = resources().into_openapi().to_pretty_json()?;
    text.push('\n');
    Ok(text)
}

/// The whole API.
pub fn router(parts: ApiParts, settings: &HttpSettings) -> Router {
    let (routes, document) = resources().split_for_parts();
    let gate = Gate::new(
        settings.auth,
        parts.address.ip(),
        parts.keyring,
        parts.clock.clone(),
        settings.cors_origins.clone(),
        &document,
    );
    let state = Arc::new(ApiState {
        gate,
        slots: Slots::new(settings.max_requests),
        decoders: Semaphore::new(sync_events::DECODERS),
        randomness: parts.randomness,
        admits_within_cors: !settings.cors_origins.is_empty(),
        store: parts.store,
        ingest: parts.ingest,
        request_ids: RequestIds::new(&parts.clock),
        seldom_logged: SeldomLogged::new(),
        clock: parts.clock,
        metrics: parts.metrics,
        limits: RateLimits::new(
            settings.sync_per_minute,
            settings.api_per_minute,
            settings.key_per_minute,
        ),
        trusted_proxies: TrustedProxies::new(&settings.trusted_proxies),
        max_clock_skew: i64::from(settings.max_clock_skew_seconds) * 1000,
        body_timeout: settings.timeouts.body,
        port: parts.address.port(),
        endpoints: docs::endpoints(&document),
    });
    let mut router = routes
        .with_state(Arc::clone(&state))
        .merge(docs::router(document))
        .fallback(health::unknown_route)
        .method_not_allowed_fallback(health::other_method);
    // Each layer costs every request some allocations: there are as few as can be.
    if state.admits_within_cors {
        router = router
            .layer(middleware::from_fn_with_state(Arc::clone(&state), admission::layer))
            .layer(cors(&settings.cors_origins));
    }
    let router = router.layer(ObserveLayer(state));
    // Outside of all layers: what is respelt passes through them once, under its route's name.
    let again = router.clone();
    router.fallback(move |mut request: Request| {
        if let Some(uri) = node_paths::respell(request.uri()) {
            *request.uri_mut() = uri;
        }
        again.clone().oneshot(request)
    })
}

fn cors(origins: &[HeaderValue]) -> CorsLayer {
    CorsLayer::new()
        .allow_origin(origins.to_vec())
        .allow_methods([Method::GET, Method::POST, Method::PUT, Method::PATCH, Method::DELETE])
        .allow_headers([header::CONTENT_TYPE, header::AUTHORIZATION])
        .expose_headers([
            header::WWW_AUTHENTICATE,
            header::RETRY_AFTER,
            observe::REQUEST_ID,
            HeaderName::from_static("ratelimit-limit"),
            HeaderName::from_static("ratelimit-remaining"),
            HeaderName::from_static("ratelimit-reset"),
        ])
}
