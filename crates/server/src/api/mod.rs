//! The JSON API. Each resource is one file with its types, handlers, routes and documentation. `app` calls `router`,
//! which combines them and adds the layers around every request. No handler may reach the database except through the
//! store's traits.

mod access;
pub(crate) mod devices;
mod events;
pub(crate) mod fleet;
pub(crate) mod server;
pub mod wire;

use std::{collections::BTreeMap, net::SocketAddr, sync::Arc, time::Duration};

use axum::{
    Router,
    extract::Request,
    http::{HeaderValue, Method, header},
    middleware::{from_fn_with_state, map_request, map_response_with_state},
};
use pisync_core::Timestamp;
use tokio::sync::Semaphore;
use tower::ServiceExt;
use tower_http::{compression::CompressionLayer, cors::CorsLayer};
use utoipa::openapi::OpenApi as Document;

use self::fleet::channels::ChannelTests;
use self::{
    access::{audit, keys},
    devices::{explain, history, list, one as device, repeated_failures, roster},
    events::{many, one, start},
    fleet::{channels, groups, incidents, notifications, routes, stats, whole, windows},
    server::{docs, health, metrics, welcome},
    wire::{
        large::{self, LargeAnswers},
        routes::Routes,
    },
};
use crate::{
    clock::Clock,
    config::http::{ANSWER_BYTES, HttpSettings},
    ingest::{Ingest, RunStartQueue},
    keys::Keyring,
    metrics::Metrics,
    middleware::{
        accept_encoding::allow_identity,
        admission::{self, Slots},
        auth::Gate,
        client_address::TrustedProxies,
        node_paths,
        observe::{LogThrottles, ObserveLayer, RequestIds},
        rate_limit::RateLimits,
        route_policy::Policies,
    },
    notify::{courier::SystemCourier, secrets::Secrets},
    random::Randomness,
    store::Store,
};

/// The state that every handler can reach.
pub struct ApiState {
    pub(crate) store: Arc<dyn Store>,
    pub(crate) ingest: Ingest,
    /// Started runs that are not stored yet.
    pub(crate) run_starts: Arc<RunStartQueue>,
    pub(crate) clock: Clock,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) gate: Gate,
    /// The policy of each route.
    pub(crate) policies: Policies,
    pub(crate) limits: RateLimits,
    pub(crate) slots: Slots,
    /// Places for requests whose keys are looked up.
    pub(crate) look_ups: Slots,
    pub(crate) large_answers: LargeAnswers,
    /// Permits for decompressing bodies.
    pub(crate) decoders: Semaphore,
    pub(crate) randomness: Randomness,
    /// The secrets of channels.
    pub(crate) secrets: Secrets,
    /// What sends to channels; `None` where nothing is sent.
    pub(crate) courier: Option<Arc<SystemCourier>>,
    /// When somebody last tried a channel.
    pub(crate) channel_tests: ChannelTests,
    /// True if a layer inside CORS admits requests, instead of `observe`.
    pub(crate) admits_within_cors: bool,
    pub(crate) trusted_proxies: TrustedProxies,
    pub(crate) request_ids: RequestIds,
    pub(crate) log_throttles: LogThrottles,
    /// In milliseconds.
    pub(crate) max_clock_skew: i64,
    pub(crate) body_timeout: Duration,
    pub(crate) port: u16,
    /// The summary of each endpoint, by method and path.
    pub(crate) endpoints: BTreeMap<String, String>,
}

pub(crate) type SharedState = Arc<ApiState>;

impl ApiState {
    /// A device is active if the server has heard from it since this time.
    pub(crate) fn active_since(&self) -> Timestamp {
        self.clock.now().saturating_add_milliseconds(-stats::ACTIVE_MILLISECONDS)
    }
}

/// What the API needs to run.
pub struct ApiParts {
    /// The store.
    pub store: Arc<dyn Store>,
    /// The ingest queue for events.
    pub ingest: Ingest,
    /// The started runs that are not stored yet.
    pub run_starts: Arc<RunStartQueue>,
    /// The server's clock.
    pub clock: Clock,
    /// The server's metrics.
    pub metrics: Arc<Metrics>,
    /// The source of new keys.
    pub randomness: Randomness,
    /// The known API keys.
    pub keyring: Arc<Keyring>,
    /// The address that the server listens on.
    pub address: SocketAddr,
}

/// The routes, the OpenAPI document and the policies of all resources.
fn resources(large_answers: &LargeAnswers) -> (Router<SharedState>, Document, Policies) {
    // Long responses are compressed. The response on the hot path is too small for that.
    let compressed = history::routes()
        .merge(repeated_failures::routes())
        .merge(stats::routes())
        .merge(list::routes())
        .merge(device::routes())
        .merge(explain::routes())
        .merge(roster::routes())
        .merge(groups::routes())
        .merge(whole::routes())
        .merge(windows::routes())
        .merge(welcome::routes())
        .merge(keys::routes())
        .merge(audit::routes())
        .merge(incidents::routes())
        .merge(notifications::routes())
        .merge(channels::routes())
        .merge(routes::routes())
        .merge(metrics::routes())
        .layer(map_response_with_state(large_answers.clone(), large::count))
        // Brotli's encoder would hold some 10 MiB while a client reads its response; gzip's holds 0.3 MiB.
        .layer(CompressionLayer::new().no_br())
        .layer(map_request(allow_identity));
    let (router, mut document, policies) = Routes::within(docs::outline())
        .merge(one::routes())
        .merge(many::routes())
        .merge(start::routes())
        .merge(compressed)
        .merge(health::routes())
        .into_parts();
    docs::declare_headers(&mut document, &policies);
    (router, document, policies)
}

/// The OpenAPI document, as JSON.
///
/// # Errors
/// When it cannot be serialized. No input can cause that.
pub fn openapi_json() -> Result<String, serde_json::Error> {
    let (_, document, _) = resources(&LargeAnswers::new(ANSWER_BYTES));
    let mut text = document.to_pretty_json()?;
    text.push('\n');
    Ok(text)
}

/// The router of the entire API, without a key for the secrets of channels: those that have some are locked.
///
/// # Errors
/// When the document cannot be serialized, or a file of the documentation is missing. No input can cause that.
pub fn router(parts: ApiParts, settings: &HttpSettings) -> Result<Router, std::io::Error> {
    router_of(parts, settings, Secrets::unavailable(), None)
}

/// The router of the entire API, with what sends to channels.
///
/// # Errors
/// The same as [`router`].
pub fn router_with_courier(
    parts: ApiParts,
    settings: &HttpSettings,
    courier: Arc<SystemCourier>,
) -> Result<Router, std::io::Error> {
    router_of(parts, settings, courier.secrets.clone(), Some(courier))
}

fn router_of(
    parts: ApiParts,
    settings: &HttpSettings,
    secrets: Secrets,
    courier: Option<Arc<SystemCourier>>,
) -> Result<Router, std::io::Error> {
    let large_answers = LargeAnswers::new(settings.answer_bytes);
    let (routes, document, mut policies) = resources(&large_answers);
    let (pages, _, policies_of_pages) = docs::routes(&document)?.into_parts();
    policies.merge(policies_of_pages);
    let gate = Gate::new(
        settings.auth,
        parts.address.ip(),
        parts.keyring,
        parts.clock.clone(),
        settings.cors_origins.clone(),
    );
    let state = Arc::new(ApiState {
        gate,
        policies,
        slots: Slots::new(settings.max_requests),
        look_ups: Slots::new(admission::MOST_LOOK_UPS),
        large_answers,
        decoders: Semaphore::new(many::DECODERS),
        randomness: parts.randomness,
        secrets,
        courier,
        channel_tests: ChannelTests::default(),
        admits_within_cors: !settings.cors_origins.is_empty(),
        store: parts.store,
        ingest: parts.ingest,
        run_starts: parts.run_starts,
        request_ids: RequestIds::new(&parts.clock),
        log_throttles: LogThrottles::new(),
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
        .merge(pages)
        .with_state(Arc::clone(&state))
        .fallback(health::unknown_route)
        .method_not_allowed_fallback(health::other_method);
    // Each layer costs every request some allocations, so there are as few as possible.
    if state.admits_within_cors {
        router = router
            .layer(from_fn_with_state(Arc::clone(&state), admission::layer))
            .layer(cors(&settings.cors_origins));
    }
    let router = router.layer(ObserveLayer(state));
    // Outside all layers: a respelled request passes through them once, under its route's name.
    let again = router.clone();
    Ok(router.fallback(move |mut request: Request| {
        if let Some(uri) = node_paths::respell(request.uri()) {
            *request.uri_mut() = uri;
        }
        again.clone().oneshot(request)
    }))
}

fn cors(origins: &[HeaderValue]) -> CorsLayer {
    CorsLayer::new()
        .allow_origin(origins.to_vec())
        .allow_methods([Method::GET, Method::POST, Method::PUT, Method::PATCH, Method::DELETE])
        .allow_headers([header::CONTENT_TYPE, header::AUTHORIZATION])
        .expose_headers(docs::header_names().collect::<Vec<_>>())
}
