//! The course of a fleet in simulated time: what happens to it, and a sweep every 15 s in between. Sweeps that would find
//! nothing are left out. [`run`] follows a scenario, and `replay` what a store has kept.

use std::{
    collections::BTreeSet,
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
};

use axum::{
    Router,
    body::Body,
    http::{Request as HttpRequest, header},
};
use http_body_util::BodyExt as _;
use pisync_core::{SyncEvent, Timestamp, Violation};
use serde_json::{Map, Value};
use tokio::sync::mpsc;
use tower::ServiceExt as _;

use super::{
    receivers::{Receivers, ReplayedChannel, SentMessage, create_receivers},
    scenario::{
        Action, DatabaseStep, Expected, IncidentEntry, Instant, Report, Request, Scenario,
        ServerStep, StateEntry, Step,
    },
    scenario_reader,
};
use crate::{
    api::{self, ApiParts},
    clock::Clock,
    config::http::{ANSWER_BYTES, AuthMode, HttpSettings, Timeouts},
    fleet::{SWEEP_INTERVAL, sweep::sweep},
    ingest::{Ingest, RunStartQueue, Writers},
    keys::Keyring,
    metrics::Metrics,
    middleware::client_address::Peer,
    random::Randomness,
    store::{Batch, Beat, EventWriter, Route, RouteDigest, RunKey, StartedRun, Store, StoreError},
};

/// The most steps, with their repetitions: as many as take some hundred megabytes.
const MOST_STEPS: usize = 10_000_000;

/// How many changes of states are read at a time.
const CHANGES_AT_ONCE: u32 = 1_000;

/// Why a scenario cannot be run.
#[derive(Debug, thiserror::Error)]
pub enum BacktestError {
    /// The database failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A step is not possible.
    #[error("{place} at {at}: {why}")]
    Step {
        /// Where it stands in the scenario, such as `steps[3]`.
        place: String,
        /// When.
        at: Timestamp,
        /// Why not.
        why: String,
    },
    /// The server's own parts do not fit together.
    #[error("{0}")]
    Server(String),
}

/// Runs a scenario on an empty database, and answers what came of it. Calls `watch` with the time that it has come to.
///
/// # Errors
/// See [`BacktestError`].
pub async fn run(
    scenario: &Scenario,
    store: &Arc<dyn Store>,
    mut watch: impl FnMut(Timestamp),
) -> Result<Expected, BacktestError> {
    let at = scenario.start.0;
    let mut course = Course::new(at, store)?;
    for (group, devices) in &scenario.groups {
        let devices: Vec<_> =
            devices.iter().map(|device| (device.clone(), Some(group.clone()))).collect();
        store.register_devices(&devices, scenario.start.0).await?;
    }
    for (index, request) in scenario.setup.iter().enumerate() {
        course.request(request).await.map_err(|fault| fault.of(format!("setup[{index}]"), at))?;
    }
    let channels: Vec<_> =
        scenario.channels.iter().map(|name| ReplayedChannel::unstored(name)).collect();
    create_receivers(&**store, &channels, &[], at).await?;
    course.read_routes().await?;
    course.beat(scenario.start.0, true).await?;
    let steps = in_order(scenario)?;
    let mut steps = steps.into_iter().peekable();
    for now in ticks(scenario.start.0, scenario.end.0) {
        while let Some((at, index)) = steps.next_if(|(at, _)| *at <= now) {
            let done = course.step(at, &scenario.steps[index]).await;
            done.map_err(|fault| fault.of(format!("steps[{index}]"), at))?;
        }
        course.tick(now).await?;
        watch(now);
    }
    let Course { mut came, messages, .. } = course;
    came.messages = messages.into_iter().map(Into::into).collect();
    Ok(came)
}

/// Why a step was not done.
enum Fault {
    /// It is not possible.
    Impossible(String),
    /// Something else has failed.
    Failed(BacktestError),
}

impl From<BacktestError> for Fault {
    fn from(error: BacktestError) -> Self {
        Self::Failed(error)
    }
}

impl From<StoreError> for Fault {
    fn from(error: StoreError) -> Self {
        Self::Failed(error.into())
    }
}

impl Fault {
    /// The error, with where and when it came.
    fn of(self, place: String, at: Timestamp) -> BacktestError {
        match self {
            Self::Impossible(why) => BacktestError::Step { place, at, why },
            Self::Failed(error) => error,
        }
    }
}

/// The times of sweeps: :00, :15, :30 and :45 of each minute.
pub(super) fn ticks(from: Timestamp, until: Timestamp) -> impl Iterator<Item = Timestamp> {
    let interval = i64::try_from(SWEEP_INTERVAL.as_millis()).unwrap_or(i64::MAX);
    let from = from.as_millisecond();
    let first = from + (interval - from.rem_euclid(interval)) % interval;
    (0..)
        .map_while(move |number| Timestamp::from_millisecond(first + number * interval))
        .take_while(move |now| *now <= until)
}

/// The times and numbers of all steps with their repetitions, in the order in which they happen.
fn in_order(scenario: &Scenario) -> Result<Vec<(Timestamp, usize)>, BacktestError> {
    let mut all = Vec::new();
    for (index, step) in scenario.steps.iter().enumerate() {
        let at = step.at.0;
        all.push((at, index));
        let Some(repeat) = step.repeat else { continue };
        let every = i64::from(repeat.every_seconds.max(1)) * 1000;
        let until = repeat.until.0.min(scenario.end.0);
        let mut next = at.saturating_add_milliseconds(every);
        while next <= until {
            all.push((next, index));
            if all.len() > MOST_STEPS {
                let why = format!("there are more than {MOST_STEPS} steps with their repetitions");
                return Err(BacktestError::Step { place: format!("steps[{index}]"), at, why });
            }
            let later = next.saturating_add_milliseconds(every);
            // The end of all times.
            if later <= next {
                break;
            }
            next = later;
        }
    }
    // The sort keeps the file's order of equal instants.
    all.sort_by_key(|(at, _)| *at);
    Ok(all)
}

pub(super) struct Course {
    pub(super) store: Arc<dyn Store>,
    pub(super) writer: Box<dyn EventWriter>,
    router: Router,
    /// In milliseconds.
    now: Arc<AtomicI64>,
    is_up: bool,
    is_away: bool,
    has_refused: bool,
    /// Whether something has happened since the last sweep.
    has_news: bool,
    /// The next sweep that may find something by itself.
    next_look: Option<Timestamp>,
    /// The times at which reminders and digests may be due.
    next_reminders: BTreeSet<Timestamp>,
    /// After which times people are reminded, in milliseconds.
    reminders: BTreeSet<i64>,
    /// The digests that there are.
    digests: Vec<RouteDigest>,
    /// Whether messages wait to be sent.
    has_waiting: bool,
    /// The last instant of which a beat is owed.
    unsaid: Option<Timestamp>,
    /// The last change of a state that was seen.
    last_change: i64,
    clock: Clock,
    receivers: Receivers,
    /// What came, but for messages.
    came: Expected,
    /// In the order in which they were sent.
    pub(super) messages: Vec<SentMessage>,
}

impl Course {
    /// A server that lives from `start` on.
    pub(super) fn new(start: Timestamp, store: &Arc<dyn Store>) -> Result<Self, BacktestError> {
        let now = Arc::new(AtomicI64::new(start.as_millisecond()));
        let hand = Arc::clone(&now);
        let clock = Clock::new(move || {
            let now = hand.load(Ordering::Relaxed);
            Timestamp::from_millisecond(now).unwrap_or(Timestamp::MAX)
        });
        let server = |error: &dyn std::fmt::Display| BacktestError::Server(error.to_string());
        let metrics = Arc::new(Metrics::new().map_err(|error| server(&error))?);
        let (_, observations) = mpsc::unbounded_channel();
        let writers = Writers { any: store.event_writer(), grouped: store.event_writer() };
        // Reports do not go through the queue: nothing waits for others here.
        let (ingest, _) = Ingest::new(writers, observations, &clock, &metrics);
        let parts = ApiParts {
            store: Arc::clone(store),
            ingest,
            run_starts: Arc::new(RunStartQueue::default()),
            clock: clock.clone(),
            metrics,
            randomness: Randomness::system(),
            keyring: Arc::new(Keyring::default()),
            address: (Ipv4Addr::LOCALHOST, 0).into(),
        };
        let router = api::router(parts, &http_settings()).map_err(|error| server(&error))?;
        Ok(Self {
            store: Arc::clone(store),
            writer: store.event_writer(),
            router,
            now,
            is_up: true,
            is_away: false,
            has_refused: false,
            has_news: true,
            next_look: None,
            next_reminders: BTreeSet::new(),
            reminders: BTreeSet::new(),
            digests: Vec::new(),
            has_waiting: false,
            unsaid: None,
            last_change: 0,
            clock,
            receivers: Receivers::default(),
            came: Expected::default(),
            messages: Vec::new(),
        })
    }

    async fn step(&mut self, at: Timestamp, step: &Step) -> Result<(), Fault> {
        self.now.store(at.as_millisecond(), Ordering::Relaxed);
        self.note_news();
        match &step.action {
            Action::Report(report) => {
                let events = events_of(report, at, step.repeat.is_some())?;
                self.receive(at, events).await?;
            }
            Action::Batch(batch) => {
                let events = batch.iter().map(|event| event_of(event.clone(), at));
                let events = events.collect::<Result<Vec<_>, _>>()?;
                self.receive(at, events).await?;
            }
            Action::Start(start) if self.can_store() => self.start_run(start, at).await?,
            Action::Request(request) if self.can_store() => {
                self.request(request).await?;
                self.read_routes().await?;
            }
            Action::Server(ServerStep::Stop) if self.is_up => {
                self.say_unsaid().await?;
                self.store.note_stop(at).await?;
                self.is_up = false;
            }
            Action::Server(ServerStep::Start) if !self.is_up => self.come_back(at).await?,
            Action::Database(DatabaseStep::Away) => {
                self.say_unsaid().await?;
                self.is_away = true;
            }
            Action::Database(DatabaseStep::Back) => self.is_away = false,
            Action::Start(_) | Action::Request(_) | Action::Server(_) => {}
        }
        Ok(())
    }

    /// From now on nobody can be heard.
    pub(super) async fn go_away(&mut self, at: Timestamp) -> Result<(), BacktestError> {
        self.unsaid = None;
        self.store.pass_over(at).await?;
        self.is_up = false;
        Ok(())
    }

    /// Somebody is there again.
    pub(super) async fn come_back(&mut self, at: Timestamp) -> Result<(), BacktestError> {
        self.is_up = true;
        self.note_news();
        self.beat(at, true).await
    }

    /// Whether somebody can be heard.
    pub(super) fn is_up(&self) -> bool {
        self.is_up
    }

    /// The next sweep may find something.
    pub(super) fn note_news(&mut self) {
        self.has_news = true;
    }

    fn can_store(&self) -> bool {
        self.is_up && !self.is_away
    }

    /// Stores events, unless the server is stopped or cannot.
    async fn receive(
        &mut self,
        at: Timestamp,
        events: Vec<SyncEvent>,
    ) -> Result<(), BacktestError> {
        if self.can_store() {
            self.writer.write(&Arc::new(Batch::new(at, events))).await?;
        } else if self.is_up {
            self.has_refused = true;
        }
        Ok(())
    }

    /// A beat and a sweep, where they may find something.
    pub(super) async fn tick(&mut self, now: Timestamp) -> Result<(), BacktestError> {
        if !self.can_store() {
            return Ok(());
        }
        self.now.store(now.as_millisecond(), Ordering::Relaxed);
        let looks = self.next_look.into_iter().chain(self.next_reminders.first().copied());
        let is_due = looks.min().is_some_and(|next| next <= now);
        if !self.has_news && !is_due {
            self.unsaid = Some(now);
            return self.dispatch(now).await;
        }
        self.say_unsaid().await?;
        self.beat(now, false).await?;
        let swept = sweep(&*self.store, now).await?;
        self.has_news = !swept.is_complete;
        self.next_look = self.store.next_look().await?;
        self.next_reminders.retain(|at| *at > now);
        self.next_reminders.extend(self.digests.iter().filter_map(|digest| digest.next_after(now)));
        self.has_waiting = self.has_messages().await?;
        self.receivers.learn(&swept.events);
        self.came.incidents.extend(swept.events.into_iter().map(|event| IncidentEntry {
            at: Instant(now),
            what: event.what.as_str().to_owned(),
            scope: event.scope.as_str().to_owned(),
            subject: event.subject,
            kind: event.kind.as_str().to_owned(),
            since: Some(Instant(event.since)),
            resolution: event.resolution.map(|why| why.as_str().to_owned()),
            members: Some(event.members),
        }));
        if swept.changes > 0 {
            self.read_changes().await?;
        }
        self.dispatch(now).await
    }

    /// Sends the messages that are due.
    async fn dispatch(&mut self, now: Timestamp) -> Result<(), BacktestError> {
        if !self.has_waiting {
            return Ok(());
        }
        let sent = self.receivers.receive(&*self.store, &self.clock, now).await?;
        if !sent.is_empty() {
            let reminders = self.reminders.iter();
            self.next_reminders
                .extend(reminders.map(|after| now.saturating_add_milliseconds(*after)));
            self.messages.extend(sent);
            self.has_waiting = self.has_messages().await?;
        }
        Ok(())
    }

    /// Whether any message waits to be sent at some time.
    async fn has_messages(&self) -> Result<bool, StoreError> {
        Ok(!self.store.due_channels(Timestamp::MAX).await?.is_empty())
    }

    /// Takes in the routes as they are now: sweeps at which they remind somebody are not passed over.
    pub(super) async fn read_routes(&mut self) -> Result<(), StoreError> {
        let routes = self.store.routes().await?.routes;
        let seconds = routes.iter().filter_map(|route| route.remind_seconds);
        self.reminders = seconds.map(|seconds| i64::from(seconds) * 1000).collect();
        self.digests = routes.into_iter().filter_map(|Route { digest, .. }| digest).collect();
        Ok(())
    }

    async fn beat(&mut self, at: Timestamp, is_first: bool) -> Result<(), BacktestError> {
        let has_refused = std::mem::take(&mut self.has_refused);
        let beat = Beat { at, is_first, has_refused, node: "backtest".to_owned() };
        self.store.beat(&beat).await?;
        Ok(())
    }

    /// Gives the signs of life that were left out.
    async fn say_unsaid(&mut self) -> Result<(), BacktestError> {
        if let Some(until) = self.unsaid.take() {
            self.store.pass_over(until).await?;
        }
        Ok(())
    }

    /// Takes in the changes of states since the last time.
    async fn read_changes(&mut self) -> Result<(), BacktestError> {
        let (mut before, mut newest) = (None, self.last_change);
        loop {
            let changes = self.store.state_changes(before, CHANGES_AT_ONCE).await?;
            let new: Vec<_> =
                changes.into_iter().filter(|change| change.id > self.last_change).collect();
            let Some(last) = new.last() else { break };
            before = Some(last.id);
            newest = newest.max(new[0].id);
            // The first evaluation of a device is no change.
            let entries = new.into_iter().filter(|change| change.from.is_some());
            self.came.states.extend(entries.map(|change| StateEntry {
                at: Instant(change.at),
                device_id: Some(change.device_id),
                device_ids: Vec::new(),
                state: change.to,
            }));
        }
        self.last_change = newest;
        Ok(())
    }

    async fn start_run(&mut self, start: &Map<String, Value>, at: Timestamp) -> Result<(), Fault> {
        let start = scenario_reader::run_start(start, at).map_err(impossible)?;
        let key = RunKey { device_id: start.device_id, job: start.job, run_id: start.run_id };
        let run = StartedRun { key, received_at: at, timestamp: start.timestamp, group: None };
        self.store.add_run_starts(&[run]).await?;
        Ok(())
    }

    /// Sends a request to the API, which must accept it.
    async fn request(&mut self, request: &Request) -> Result<(), Fault> {
        // Whoever is acknowledged until some time is reminded again from then on.
        let until = request.body.as_ref().and_then(|body| body.get("until")?.as_str());
        self.next_reminders.extend(until.and_then(|text| Timestamp::from_iso8601(text).ok()));
        let body = request.body.as_ref().map_or_else(Body::empty, |body| body.to_string().into());
        let peer = Peer(SocketAddr::from((Ipv4Addr::LOCALHOST, 1)));
        let sent = HttpRequest::builder()
            .method(request.method.as_str())
            .uri(&request.path)
            .header(header::CONTENT_TYPE, "application/json")
            .header(header::HOST, "localhost")
            .extension(peer)
            .body(body)
            .map_err(|error| Fault::Impossible(error.to_string()))?;
        let Ok(answer) = self.router.clone().oneshot(sent).await;
        let status = answer.status();
        if status.is_success() {
            return Ok(());
        }
        let body = answer.into_body().collect().await;
        let body = body.map(http_body_util::Collected::to_bytes).unwrap_or_default();
        let Request { method, path, .. } = request;
        let said = String::from_utf8_lossy(&body);
        Err(Fault::Impossible(format!("{method} {path} is answered {status}: {said}")))
    }
}

/// The events of a report. Those that are repeated have no id of their own.
fn events_of(report: &Report, at: Timestamp, is_repeated: bool) -> Result<Vec<SyncEvent>, Fault> {
    let mut fields = report.event.clone();
    if is_repeated {
        fields.remove("event_id");
    }
    let of = |device: &String| {
        let mut fields = fields.clone();
        fields.insert("device_id".to_owned(), device.as_str().into());
        event_of(fields, at)
    };
    report.device_ids.iter().map(of).collect()
}

fn event_of(fields: Map<String, Value>, at: Timestamp) -> Result<SyncEvent, Fault> {
    scenario_reader::event(fields, at).map_err(impossible)
}

fn impossible(violations: Vec<Violation>) -> Fault {
    let words: Vec<_> = violations.into_iter().map(|one| one.message).collect();
    Fault::Impossible(words.join(", "))
}

/// A server that asks nobody for anything.
fn http_settings() -> HttpSettings {
    HttpSettings {
        auth: AuthMode::Off,
        max_clock_skew_seconds: 300,
        sync_per_minute: 0,
        api_per_minute: 0,
        key_per_minute: 0,
        max_connections: 0,
        max_requests: 0,
        answer_bytes: ANSWER_BYTES,
        tls: None,
        trusted_proxies: Vec::new(),
        cors_origins: Vec::new(),
        timeouts: Timeouts::default(),
    }
}
