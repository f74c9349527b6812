//! The course of a fleet in simulated time: what happens to it, and a sweep every 15 s in between. Sweeps that would find
//! nothing are left out. [`run`] follows a scenario, and `replay` what a store has kept.

use std::{
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
use pisync_core::{
    DeviceId, EventId, JobName, ParseError, SyncEvent, Timestamp, sync_event::Arrival,
};
use serde_json::{Map, Value};
use tokio::sync::mpsc;
use tower::ServiceExt as _;

use super::{
    receivers::{Receivers, create_receiver},
    scenario::{
        DatabaseStep, Expected, IncidentEntry, Instant, Report, Request, Scenario, ServerStep,
        StateEntry, Step,
    },
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
    store::{Batch, Beat, EventWriter, FleetSettings, RunKey, StartedRun, Store, StoreError},
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
    #[error("{at}: {why}")]
    Step {
        /// When.
        at: Timestamp,
        /// Why not.
        why: String,
    },
    /// The server's own parts do not fit together.
    #[error("{0}")]
    Server(String),
}

/// Runs a scenario on an empty database, and answers what came of it.
///
/// # Errors
/// See [`BacktestError`].
pub async fn run(scenario: &Scenario, store: &Arc<dyn Store>) -> Result<Expected, BacktestError> {
    let mut course = Course::new(scenario.start.0, store)?;
    for (group, devices) in &scenario.groups {
        let devices: Vec<_> =
            devices.iter().map(|device| (device.clone(), Some(group.clone()))).collect();
        store.register_devices(&devices, scenario.start.0).await?;
    }
    for request in &scenario.setup {
        course.request(request).await?;
    }
    for channel in &scenario.channels {
        create_receiver(&**store, channel, scenario.start.0).await?;
    }
    course.beat(scenario.start.0, true).await?;
    let steps = in_order(scenario)?;
    let mut steps = steps.into_iter().peekable();
    for now in ticks(scenario.start.0, scenario.end.0) {
        while let Some((at, step)) = steps.next_if(|(at, _)| *at <= now) {
            course.step(at, step).await?;
        }
        course.tick(now).await?;
    }
    Ok(course.came)
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

/// All steps with their repetitions, in the order in which they happen.
fn in_order(scenario: &Scenario) -> Result<Vec<(Timestamp, &Step)>, BacktestError> {
    let mut all = Vec::new();
    for step in &scenario.steps {
        let at = step.at.0;
        if !(scenario.start.0..=scenario.end.0).contains(&at) {
            let why = "the step is not between start and end".to_owned();
            return Err(BacktestError::Step { at, why });
        }
        all.push((at, step));
        let Some(repeat) = step.repeat else { continue };
        let every = i64::from(repeat.every_seconds.max(1)) * 1000;
        let until = repeat.until.0.min(scenario.end.0);
        let mut next = at.saturating_add_milliseconds(every);
        while next <= until {
            all.push((next, step));
            if all.len() > MOST_STEPS {
                let why = format!("there are more than {MOST_STEPS} steps with their repetitions");
                return Err(BacktestError::Step { at, why });
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
    /// The settings, while they have people told of something because it is time.
    reminding: Option<Arc<FleetSettings>>,
    /// The last instant of which a beat is owed.
    unsaid: Option<Timestamp>,
    /// The last change of a state that was seen.
    last_change: i64,
    clock: Clock,
    receivers: Receivers,
    came: Expected,
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
            reminding: None,
            unsaid: None,
            last_change: 0,
            clock,
            receivers: Receivers::default(),
            came: Expected::default(),
        })
    }

    async fn step(&mut self, at: Timestamp, step: &Step) -> Result<(), BacktestError> {
        self.now.store(at.as_millisecond(), Ordering::Relaxed);
        self.note_news();
        let impossible = |why: String| BacktestError::Step { at, why };
        if let Some(report) = &step.report {
            let events = events_of(report, at, step.repeat.is_some()).map_err(impossible)?;
            self.receive(at, events).await?;
        }
        if let Some(batch) = &step.batch {
            let events = batch.iter().map(|event| event_of(event.clone(), at));
            let events = events.collect::<Result<Vec<_>, _>>().map_err(impossible)?;
            self.receive(at, events).await?;
        }
        if let Some(start) = &step.start
            && self.can_store()
        {
            self.start_run(start, at).await?;
        }
        if let Some(request) = &step.request
            && self.can_store()
        {
            self.request(request).await?;
        }
        match step.server {
            Some(ServerStep::Stop) if self.is_up => {
                self.say_unsaid().await?;
                self.store.note_stop(at).await?;
                self.is_up = false;
            }
            Some(ServerStep::Start) if !self.is_up => self.come_back(at).await?,
            _ => {}
        }
        match step.database {
            Some(DatabaseStep::Away) => {
                self.say_unsaid().await?;
                self.is_away = true;
            }
            Some(DatabaseStep::Back) => self.is_away = false,
            None => {}
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
        let is_due = self.next_look.is_some_and(|next| next <= now);
        if !self.has_news && !is_due {
            self.unsaid = Some(now);
            if let Some(settings) = &self.reminding {
                self.store.add_reminders(settings, now).await?;
            }
            return self.dispatch(now).await;
        }
        self.say_unsaid().await?;
        self.beat(now, false).await?;
        let swept = sweep(&*self.store, now).await?;
        self.has_news = !swept.is_complete;
        self.next_look = self.store.next_look().await?;
        let settings = Arc::new(self.store.fleet_settings().await?);
        self.reminding = Some(settings).filter(|settings| settings.tells_by_the_clock());
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
        self.came.messages.extend(self.receivers.receive(&*self.store, &self.clock, now).await?);
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

    async fn start_run(&mut self, start: &Value, at: Timestamp) -> Result<(), BacktestError> {
        let impossible = |why: String| BacktestError::Step { at, why };
        let text = |field: &str| start.get(field).and_then(Value::as_str);
        let device_id = DeviceId::new(text("device_id").unwrap_or_default());
        let job = text("job").map(JobName::new).transpose();
        let run_id = text("run_id").map(EventId::new).transpose();
        let key = RunKey {
            device_id: device_id.map_err(|error| impossible(format!("device_id {error}")))?,
            job: job.map_err(|error| impossible(format!("job {error}")))?,
            run_id: run_id.map_err(|error| impossible(format!("run_id {error}")))?,
        };
        let run = StartedRun { key, received_at: at, timestamp: None, group: None };
        self.store.add_run_starts(&[run]).await?;
        Ok(())
    }

    /// Sends a request to the API, which must accept it.
    async fn request(&mut self, request: &Request) -> Result<(), BacktestError> {
        let at = Timestamp::from_millisecond(self.now.load(Ordering::Relaxed));
        let at = at.unwrap_or(Timestamp::MAX);
        let impossible = |why: String| BacktestError::Step { at, why };
        let body = request.body.as_ref().map_or_else(Body::empty, |body| body.to_string().into());
        let peer = Peer(SocketAddr::from((Ipv4Addr::LOCALHOST, 1)));
        let sent = HttpRequest::builder()
            .method(request.method.as_str())
            .uri(&request.path)
            .header(header::CONTENT_TYPE, "application/json")
            .header(header::HOST, "localhost")
            .extension(peer)
            .body(body)
            .map_err(|error| impossible(error.to_string()))?;
        let Ok(answer) = self.router.clone().oneshot(sent).await;
        let status = answer.status();
        if status.is_success() {
            return Ok(());
        }
        let body = answer.into_body().collect().await;
        let body = body.map(http_body_util::Collected::to_bytes).unwrap_or_default();
        let Request { method, path, .. } = request;
        let said = String::from_utf8_lossy(&body);
        Err(impossible(format!("{method} {path} is answered {status}: {said}")))
    }
}

/// The events of a report. Those that are repeated have no id of their own.
fn events_of(report: &Report, at: Timestamp, is_repeated: bool) -> Result<Vec<SyncEvent>, String> {
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

/// An event of which only what matters is given.
fn event_of(mut fields: Map<String, Value>, at: Timestamp) -> Result<SyncEvent, String> {
    fields.entry("timestamp").or_insert_with(|| at.to_string().into());
    fields.entry("total_files_synced").or_insert_with(|| 1.into());
    fields.entry("total_errors").or_insert_with(|| 0.into());
    let body = Value::Object(fields).to_string();
    // A scenario may have clocks that are ahead; what the server does with them is tested elsewhere.
    let arrival = Arrival { received: at, latest: Timestamp::MAX };
    SyncEvent::from_json(body.as_bytes(), arrival).map_err(|error| match error {
        ParseError::Malformed(why) => format!("{body}: {why}"),
        ParseError::Invalid(violations) => {
            let words: Vec<_> = violations.into_iter().map(|one| one.message).collect();
            format!("{body}: {}", words.join(", "))
        }
    })
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
