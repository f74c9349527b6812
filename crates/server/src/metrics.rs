//! The server's Prometheus metrics. Ingest and the HTTP layer update them, and `GET /metrics` renders them. No label
//! may take its value from a client, so that their number stays bounded.

use std::time::Duration;

use pisync_core::{
    Violation, ViolationCode,
    health::{IncidentScope, State},
};
use prometheus::{
    Encoder, Gauge, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge,
    IntGaugeVec, Opts, Registry, TextEncoder, core::Collector, process_collector::ProcessCollector,
};

use crate::build_info;
use crate::store::{FleetStats, HealthCounts, INCIDENT_KINDS, PoolUsage};

/// Upper bounds of the response time buckets, in seconds. The Node service promised a median of 6 ms and 50 ms for the
/// 95th percentile. The buckets are fine around both.
const DURATION_BUCKETS: [f64; 12] =
    [0.001, 0.0025, 0.006, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0];

/// Upper bounds of the batch size buckets, in events.
const BATCH_BUCKETS: [f64; 11] =
    [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0];

/// Why valid events are not stored, as the metric names it.
pub(crate) const REFUSALS: [&str; 3] = ["overloaded", "unavailable", "failed"];

/// The metrics of one server. They belong to a server, not to the process, so that tests can run several.
pub struct Metrics {
    registry: Registry,
    requests: IntCounterVec,
    request_duration: HistogramVec,
    /// Events in the queue, which wait until the batch in progress is committed.
    pub queue_events: IntGauge,
    /// Events per committed batch.
    pub batch_events: Histogram,
    /// Seconds per committed batch.
    pub batch_duration: Histogram,
    events: IntCounterVec,
    notifications: IntCounterVec,
    sweep_duration: Histogram,
    events_refused: IntCounterVec,
    events_rejected: IntCounterVec,
    event_id_conflicts: IntCounter,
    connections: IntGaugeVec,
    devices: IntGaugeVec,
    active_devices: IntGauge,
    success_ratio: Gauge,
    incidents_open: IntGaugeVec,
    last_sweep: Gauge,
    notifications_waiting: IntGauge,
}

/// The status of devices that no sweep has evaluated yet.
const UNKNOWN: &str = "unknown";

impl Metrics {
    /// Creates the metrics with value zero.
    ///
    /// # Errors
    /// When two of them have the same name. No input can cause that.
    pub fn new() -> Result<Self, prometheus::Error> {
        let registry = Registry::new();
        let build = IntGauge::with_opts(
            Opts::new(
                "pisync_build_info",
                "Always 1; the labels tell what was built, and by which compiler.",
            )
            .const_label("version", build_info::PACKAGE_VERSION)
            .const_label("commit", build_info::COMMIT)
            .const_label("rustc", build_info::RUSTC),
        )?;
        build.set(1);
        registry.register(Box::new(build))?;
        registry.register(Box::new(ProcessCollector::for_self()))?;
        let keep = Keep { registry: &registry };
        let success_ratio = keep.this(Gauge::new(
            "pisync_sync_success_ratio",
            "Share of all syncs of all time that had no errors; NaN before the first sync.",
        )?)?;
        // The success ratio is unknown at the start.
        success_ratio.set(f64::NAN);
        Ok(Self {
            requests: keep.this(IntCounterVec::new(
                Opts::new("http_requests_total", "Requests answered, by method, route and status."),
                &["method", "route", "status"],
            )?)?,
            request_duration: keep.this(HistogramVec::new(
                HistogramOpts::new(
                    "http_request_duration_seconds",
                    "Time from the request's head to the answer's, by method and route.",
                )
                .buckets(DURATION_BUCKETS.to_vec()),
                &["method", "route"],
            )?)?,
            queue_events: keep.this(IntGauge::new(
                "pisync_ingest_queue_events",
                "Events waiting for the batch in flight to be committed.",
            )?)?,
            batch_events: keep.this(Histogram::with_opts(
                HistogramOpts::new("pisync_ingest_batch_events", "Events per committed batch.")
                    .buckets(BATCH_BUCKETS.to_vec()),
            )?)?,
            batch_duration: keep.this(Histogram::with_opts(
                HistogramOpts::new(
                    "pisync_ingest_batch_duration_seconds",
                    "Time to store and commit one batch.",
                )
                .buckets(DURATION_BUCKETS.to_vec()),
            )?)?,
            sweep_duration: keep.this(Histogram::with_opts(
                HistogramOpts::new("pisync_sweep_seconds", "Time that a sweep over the fleet took.")
                    .buckets(DURATION_BUCKETS.to_vec()),
            )?)?,
            notifications: keep.this(IntCounterVec::new(
                Opts::new("pisync_notifications_total", "Attempts to send a notification, by the kind of channel and by result."),
                &["kind", "result"],
            )?)?,
            events: keep.this(IntCounterVec::new(
                Opts::new("pisync_sync_events_total", "Sync events acknowledged, by their result: stored as ok or failed, or a duplicate of one stored before."),
                &["result"],
            )?)?,
            events_refused: keep.this(IntCounterVec::new(
                Opts::new(
                    "pisync_sync_events_refused_total",
                    "Valid sync events that were answered with an error, by reason.",
                ),
                &["reason"],
            )?)?,
            events_rejected: keep.this(IntCounterVec::new(
                Opts::new(
                    "pisync_sync_events_rejected_total",
                    "Sync events that were wrong and not stored, by the code of what was wrong first.",
                ),
                &["reason"],
            )?)?,
            event_id_conflicts: keep.this(IntCounter::new(
                "pisync_sync_event_id_conflicts_total",
                "Duplicates whose content is not what is stored under their event id. What is stored stays.",
            )?)?,
            connections: keep.this(IntGaugeVec::new(
                Opts::new(
                    "pisync_database_connections",
                    "Connections for reading: the most there can be, those in use, and requests waiting for one.",
                ),
                &["state"],
            )?)?,
            devices: keep.this(IntGaugeVec::new(
                Opts::new(
                    "pisync_devices",
                    "Registered devices by their status; unknown until a sweep has evaluated them.",
                ),
                &["status"],
            )?)?,
            active_devices: keep.this(IntGauge::new(
                "pisync_active_devices",
                "Devices heard from in the last 24 hours.",
            )?)?,
            success_ratio,
            incidents_open: keep.this(IntGaugeVec::new(
                Opts::new("pisync_incidents_open", "Open incidents, by kind and scope."),
                &["kind", "scope"],
            )?)?,
            notifications_waiting: keep.this(IntGauge::new(
                "pisync_notifications_waiting",
                "Notifications that wait to be sent.",
            )?)?,
            last_sweep: keep.this(Gauge::new(
                "pisync_last_sweep_timestamp_seconds",
                "When the last sweep over the devices began that was completed; 0 before the first.",
            )?)?,
            registry,
        })
    }

    /// Counts an answered request.
    pub fn answered(&self, method: &str, route: &str, status: u16, duration: Duration) {
        let status = StatusText::of(status);
        self.requests.with_label_values(&[method, route, status.as_str()]).inc();
        self.request_duration.with_label_values(&[method, route]).observe(duration.as_secs_f64());
    }

    /// Counts an attempt to send a notification: sent, failed, refused or disabled.
    pub fn notified(&self, kind: &str, result: &str) {
        self.notifications.with_label_values(&[kind, result]).inc();
    }

    /// Notes how long a sweep took.
    pub fn swept(&self, duration: Duration) {
        self.sweep_duration.observe(duration.as_secs_f64());
    }

    /// Counts committed events, and duplicates of events stored before.
    pub fn stored(&self, ok: usize, failed: usize, duplicates: usize) {
        self.events.with_label_values(&["ok"]).inc_by(ok as u64);
        self.events.with_label_values(&["failed"]).inc_by(failed as u64);
        self.events.with_label_values(&["duplicate"]).inc_by(duplicates as u64);
    }

    /// Counts valid events that were not stored.
    pub fn refused(&self, reason: &str, events: u64) {
        self.events_refused.with_label_values(&[reason]).inc_by(events);
    }

    /// The number of valid events that were not stored.
    #[must_use]
    pub fn refused_events(&self) -> u64 {
        REFUSALS.map(|reason| self.events_refused.with_label_values(&[reason]).get()).iter().sum()
    }

    /// Counts an invalid event by the code of its first violation.
    pub fn rejected(&self, violations: &[Violation]) {
        let code = violations.first().map_or(ViolationCode::MalformedJson, |first| first.code);
        self.events_rejected.with_label_values(&[code.as_str()]).inc();
    }

    /// The number of events refused because they were dated in the future.
    #[must_use]
    pub fn refused_as_future(&self) -> u64 {
        self.events_rejected.with_label_values(&[ViolationCode::Future.as_str()]).get()
    }

    /// The number of stored events.
    #[must_use]
    pub fn stored_events(&self) -> u64 {
        ["ok", "failed"].map(|result| self.events.with_label_values(&[result]).get()).iter().sum()
    }

    /// Counts an event whose content differs from the one stored under its id.
    pub fn event_id_conflict(&self) {
        self.event_id_conflicts.inc();
    }

    /// Sets the gauges of the store's connections.
    pub fn set_pool(&self, usage: PoolUsage) {
        let set = |state: &str, value: usize| {
            self.connections
                .with_label_values(&[state])
                .set(i64::try_from(value).unwrap_or(i64::MAX));
        };
        set("max", usage.max);
        set("in_use", usage.in_use);
        set("waiting", usage.waiting);
    }

    /// Sets the gauges of the fleet. The sum over all statuses is the number of devices.
    #[expect(clippy::cast_precision_loss, reason = "milliseconds of this age are exact")]
    pub fn set_fleet(&self, stats: &FleetStats, health: &HealthCounts) {
        let mut rest = stats.total_devices;
        for state in State::ALL {
            let of_state = health.devices.iter().filter(|(word, _)| word == state.as_str());
            let count: u64 = of_state.map(|(_, count)| count).sum();
            rest = rest.saturating_sub(count);
            self.devices.with_label_values(&[state.as_str()]).set(count.cast_signed());
        }
        self.devices.with_label_values(&[UNKNOWN]).set(rest.cast_signed());
        for (kind, scope) in INCIDENT_KINDS
            .into_iter()
            .flat_map(|kind| IncidentScope::ALL.map(|scope| (kind, scope)))
        {
            let (kind, scope) = (kind.as_str(), scope.as_str());
            let counted = health.incidents.iter().filter(|(k, s, _)| k == kind && s == scope);
            let count: u64 = counted.map(|(.., count)| count).sum();
            self.incidents_open.with_label_values(&[kind, scope]).set(count.cast_signed());
        }
        let swept_at = health.swept_at.map_or(0.0, |at| at.as_millisecond() as f64 / 1000.0);
        self.last_sweep.set(swept_at);
        self.notifications_waiting.set(health.waiting_notifications.cast_signed());
        self.active_devices.set(stats.active_devices.cast_signed());
        self.success_ratio.set(stats.figures.success_ratio().unwrap_or(f64::NAN));
    }

    /// All metrics in Prometheus' text format.
    ///
    /// # Errors
    /// When the library cannot write it. No input can cause that.
    pub fn render(&self) -> Result<String, prometheus::Error> {
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text)?;
        String::from_utf8(text).map_err(|error| prometheus::Error::Msg(error.to_string()))
    }
}

impl std::fmt::Debug for Metrics {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("Metrics")
    }
}

struct Keep<'a> {
    registry: &'a Registry,
}

impl Keep<'_> {
    /// Registers a metric and returns it.
    fn this<T: Collector + Clone + 'static>(&self, instrument: T) -> Result<T, prometheus::Error> {
        self.registry.register(Box::new(instrument.clone()))?;
        Ok(instrument)
    }
}

/// A status code as text, without an allocation.
struct StatusText([u8; 3]);

impl StatusText {
    fn of(status: u16) -> Self {
        let digit = |place: u16| u8::try_from(status / place % 10).unwrap_or(0) + b'0';
        Self([digit(100), digit(10), digit(1)])
    }

    fn as_str(&self) -> &str {
        std::str::from_utf8(&self.0).unwrap_or("000")
    }
}
