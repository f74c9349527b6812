//! Sends to the server, on as many connections as were asked for. The phases of `mod` hand over parcels; each is sent until
//! it is answered, with the same event ids, so that the record stays exact whatever happens to the server meanwhile.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use axum::http::{Method, StatusCode};
use bytes::Bytes;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::{
    sync::{Mutex as AsyncMutex, mpsc},
    task::JoinSet,
    time::{Instant, sleep},
};

use super::{
    SimulateError,
    client::{Answer, Connection, Servers},
    differences::Differences,
    fleet::Fleet,
    load::Load,
    record::Record,
    timeline::Delivery,
};

/// The first pause before a request is sent again, when the server does not say how long to wait.
const FIRST_PAUSE: Duration = Duration::from_millis(100);

/// The longest such pause.
const LONGEST_RETRY_PAUSE: Duration = Duration::from_secs(2);

/// Something to send in one request.
pub(super) enum Parcel {
    /// `POST /api/sync-events`.
    Batch(Vec<Delivery>),
    /// `POST /api/sync-event`.
    Single(Box<Delivery>),
    /// Puts a device into its group.
    Group(u32),
}

/// What all connections share.
pub(super) struct Shared {
    pub(super) fleet: Arc<Fleet>,
    pub(super) servers: Arc<Servers>,
    pub(super) record: Record,
    /// How long a request is sent again and again.
    pub(super) patience: Duration,
    /// Parcels that are done, counted by what is in them.
    pub(super) done: AtomicU64,
    /// What the server answered wrongly.
    pub(super) differences: Mutex<Differences>,
}

/// A parcel, and when it should have been sent if that matters.
type Due = (Parcel, Option<Instant>);

/// The connections of one phase.
pub(super) struct Pool {
    parcels: mpsc::Sender<Due>,
    workers: JoinSet<Result<Load, SimulateError>>,
    load: Load,
    began: Instant,
}

impl Pool {
    /// At most `waiting` parcels wait for a connection.
    pub(super) fn start(shared: &Arc<Shared>, connections: usize, waiting: usize) -> Self {
        let (parcels, receiver) = mpsc::channel(waiting);
        let receiver = Arc::new(AsyncMutex::new(receiver));
        let mut workers = JoinSet::new();
        for number in 0..connections {
            let worker = Worker {
                connection: Connection::new(&shared.servers, number),
                shared: Arc::clone(shared),
                load: Load::default(),
            };
            workers.spawn(worker.run(Arc::clone(&receiver)));
        }
        Self { parcels, workers, load: Load::default(), began: Instant::now() }
    }

    /// Hands a parcel over. `due` is when it should be sent, for the latency.
    pub(super) async fn send(
        &mut self,
        parcel: Parcel,
        due: Option<Instant>,
    ) -> Result<(), SimulateError> {
        let sent = tokio::select! {
            sent = self.parcels.send((parcel, due)) => sent.is_ok(),
            Some(ended) = self.workers.join_next() => { self.ended(ended)?; false }
        };
        if sent {
            Ok(())
        } else {
            Err(SimulateError::Failed("a connection's task has ended".into()))
        }
    }

    fn ended(
        &mut self,
        ended: Result<Result<Load, SimulateError>, tokio::task::JoinError>,
    ) -> Result<(), SimulateError> {
        let load = ended.map_err(|error| SimulateError::Failed(error.to_string()))??;
        self.load.add(load);
        Ok(())
    }

    /// Waits until everything is answered.
    pub(super) async fn finish(mut self) -> Result<Load, SimulateError> {
        let (closed, _) = mpsc::channel(1);
        self.parcels = closed;
        while let Some(ended) = self.workers.join_next().await {
            self.ended(ended)?;
        }
        self.load.took = self.began.elapsed();
        Ok(self.load)
    }
}

/// One connection's work.
struct Worker {
    connection: Connection,
    shared: Arc<Shared>,
    load: Load,
}

/// The answer to one event.
#[derive(Deserialize)]
struct StoredAnswer {
    data: StoredData,
}

#[derive(Deserialize)]
struct StoredData {
    id: i64,
    timestamp: pisync_core::Timestamp,
    #[serde(default)]
    duplicate: bool,
}

/// The answer to a batch.
#[derive(Deserialize)]
struct BatchAnswer {
    data: BatchData,
}

#[derive(Deserialize)]
struct BatchData {
    results: Vec<BatchResult>,
}

#[derive(Deserialize)]
struct BatchResult {
    status: String,
    id: Option<i64>,
    details: Option<Value>,
}

impl Worker {
    async fn run(
        mut self,
        parcels: Arc<AsyncMutex<mpsc::Receiver<Due>>>,
    ) -> Result<Load, SimulateError> {
        loop {
            let next = parcels.lock().await.recv().await;
            let Some((parcel, due)) = next else { return Ok(self.load) };
            let due = due.unwrap_or_else(Instant::now);
            let answer = match &parcel {
                Parcel::Batch(batch) => {
                    let lines = self.lines(batch);
                    let body = Some(("application/x-ndjson", lines));
                    self.insist(&Method::POST, "/api/sync-events", body).await?
                }
                Parcel::Single(delivery) => {
                    let body =
                        Some(("application/json", self.lines(std::slice::from_ref(delivery))));
                    self.insist(&Method::POST, "/api/sync-event", body).await?
                }
                Parcel::Group(device) => {
                    let path = format!("/api/device/{}", self.shared.fleet.device_id(*device));
                    let body = json!({"group": self.shared.fleet.group(*device)}).to_string();
                    self.insist(&Method::PATCH, &path, Some(("application/json", body.into())))
                        .await?
                }
            };
            self.load.requests += 1;
            self.load.add_latency(due.elapsed());
            let done = match parcel {
                Parcel::Batch(batch) => self.take_batch(&batch, &answer)?,
                Parcel::Single(delivery) => self.take_single(&delivery, &answer)?,
                Parcel::Group(_) => 1,
            };
            self.shared.done.fetch_add(done, Ordering::Relaxed);
        }
    }

    fn lines(&self, batch: &[Delivery]) -> Bytes {
        let mut lines = String::with_capacity(batch.len() * 256);
        for delivery in batch {
            delivery.event.write(&self.shared.fleet, delivery.device, &mut lines);
            lines.push('\n');
        }
        lines.into()
    }

    /// Sends until there is an answer that counts.
    async fn insist(
        &mut self,
        method: &Method,
        path: &str,
        body: Option<(&'static str, Bytes)>,
    ) -> Result<Answer, SimulateError> {
        insist(&mut self.connection, &mut self.load, self.shared.patience, method, path, body).await
    }

    fn take_single(&mut self, delivery: &Delivery, answer: &Answer) -> Result<u64, SimulateError> {
        if answer.status == StatusCode::BAD_REQUEST {
            let refusal: Value = serde_json::from_slice(&answer.body).unwrap_or_default();
            self.rejected(delivery, &refusal["details"]);
            return Ok(1);
        }
        let StoredAnswer { data } = read(&answer.body)?;
        self.load.events += 1;
        self.load.duplicates += u64::from(data.duplicate);
        self.acknowledged(delivery, data.id, Some(data.timestamp.as_millisecond()));
        Ok(1)
    }

    fn take_batch(&mut self, batch: &[Delivery], answer: &Answer) -> Result<u64, SimulateError> {
        if answer.status == StatusCode::BAD_REQUEST {
            return Err(SimulateError::Failed(format!(
                "a batch was refused: {}",
                excerpt(&answer.body)
            )));
        }
        let BatchAnswer { data } = read(&answer.body)?;
        if data.results.len() != batch.len() {
            let (told, sent) = (data.results.len(), batch.len());
            return Err(SimulateError::Failed(format!(
                "a batch of {sent} events has {told} results"
            )));
        }
        for (delivery, result) in batch.iter().zip(data.results) {
            match (result.status.as_str(), result.id) {
                ("created" | "duplicate", Some(id)) => {
                    self.load.events += 1;
                    self.load.duplicates += u64::from(result.status == "duplicate");
                    self.acknowledged(delivery, id, None);
                }
                _ => self.rejected(delivery, &result.details.unwrap_or_default()),
            }
        }
        Ok(batch.len() as u64)
    }

    fn acknowledged(&mut self, delivery: &Delivery, id: i64, timestamp: Option<i64>) {
        let Delivery { device, event, is_again } = delivery;
        self.load.twice += u64::from(*is_again);
        let arrival = timestamp.filter(|_| event.date().is_none());
        if let Err(before) = self.shared.record.acknowledge(*device, event.number, id, arrival) {
            let place = self.place(delivery);
            self.differ(
                place,
                "the id or date that the server gave it",
                json!(arrival.unwrap_or(id)),
                json!(before),
            );
        }
        if let (Some(told), Some(sent)) = (timestamp, event.date())
            && told != sent
        {
            let place = self.place(delivery);
            self.differ(
                place,
                "timestamp",
                json!(super::event::text(told)),
                json!(super::event::text(sent)),
            );
        }
    }

    fn rejected(&self, delivery: &Delivery, details: &Value) {
        self.differ(
            self.place(delivery),
            "its result",
            json!({"rejected": details}),
            json!("created"),
        );
    }

    fn place(&self, delivery: &Delivery) -> String {
        format!("{}, run-{}", self.shared.fleet.device_id(delivery.device), delivery.event.number)
    }

    fn differ(&self, place: String, figure: &str, told: Value, expected: Value) {
        let mut differences =
            self.shared.differences.lock().unwrap_or_else(PoisonError::into_inner);
        differences.push(place, figure, told, expected);
    }
}

/// Sends a request until it is answered with a success, or refused for what is in it (400).
pub(super) async fn insist(
    connection: &mut Connection,
    load: &mut Load,
    patience: Duration,
    method: &Method,
    path: &str,
    body: Option<(&'static str, Bytes)>,
) -> Result<Answer, SimulateError> {
    let began = Instant::now();
    let mut pause = FIRST_PAUSE;
    loop {
        let asked = connection.address().as_str().to_owned();
        let (problem, wait) = match connection.exchange(method, path, body.clone()).await {
            Ok(answer) => {
                *load.statuses.entry(answer.status.as_u16()).or_default() += 1;
                match answer.status.as_u16() {
                    200 | 201 | 400 => return Ok(answer),
                    401 | 403 => {
                        return Err(not_allowed(connection, &asked, method, path, &answer));
                    }
                    408 | 429 | 500 | 502 | 503 | 504 => {
                        let problem = format!("it answers {}", answer.status);
                        (problem, answer.retry_after.map(Duration::from_secs))
                    }
                    _ => {
                        let (status, text) = (answer.status, excerpt(&answer.body));
                        let message = format!(
                            "{method} {asked}{path} is answered {status}: {text}; is it a PiSync server?"
                        );
                        return Err(SimulateError::Failed(message));
                    }
                }
            }
            Err(problem) => {
                load.unanswered += 1;
                (problem, None)
            }
        };
        let wait = wait.unwrap_or(pause);
        if began.elapsed() + wait > patience {
            let seconds = patience.as_secs_f64();
            let message = format!(
                "no answer that counts from {asked} within {seconds} s: {problem}; look at the server, or wait longer with --patience"
            );
            return Err(SimulateError::Unanswered(message));
        }
        sleep(wait).await;
        pause = (pause * 2).min(LONGEST_RETRY_PAUSE);
        load.repeated += 1;
    }
}

/// What to do about a key that is missing, or does not open something.
fn not_allowed(
    connection: &Connection,
    asked: &str,
    method: &Method,
    path: &str,
    answer: &Answer,
) -> SimulateError {
    let said: Value = serde_json::from_slice(&answer.body).unwrap_or_default();
    let code = said["code"].as_str().unwrap_or_default();
    let status = answer.status.as_u16();
    let what = format!("{method} {path} at {asked} is answered {status} {code}");
    let advice = match code {
        _ if !connection.servers().has_key() => {
            "set PISYNC_KEY to a key that `pisync key create --scope admin` has made on the server"
        }
        "key_malformed" | "key_unknown" => {
            "PISYNC_KEY is no key of this server: make one there with `pisync key create --scope admin`"
        }
        "key_revoked" | "key_expired" => "make a new key with `pisync key create --scope admin`",
        "other_device" => {
            "the key is for other devices: make one with `pisync key create --scope admin`"
        }
        _ => {
            "sending, grouping and comparing need a key of scope admin; with --send-only and --groups 0, one of scope ingest is enough"
        }
    };
    SimulateError::Failed(format!("{what}: {advice}"))
}

/// Reads an answer of a PiSync server.
pub(super) fn read<'a, T: Deserialize<'a>>(body: &'a [u8]) -> Result<T, SimulateError> {
    serde_json::from_slice(body).map_err(|error| {
        SimulateError::Failed(format!("an answer is not PiSync's ({error}): {}", excerpt(body)))
    })
}

/// The beginning of a body, for a message.
fn excerpt(body: &[u8]) -> String {
    const SHOWN: usize = 300;
    String::from_utf8_lossy(&body[..body.len().min(SHOWN)]).trim().to_owned()
}
