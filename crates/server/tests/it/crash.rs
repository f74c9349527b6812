//! Killed in the middle of everything: what was acknowledged is there exactly once, whatever is killed
//! and whenever, and everything adds up.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use pisync::store::Target;
use reqwest::Method;
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::support::{
    events::at,
    http::{Client, column, event, try_send, with},
    postgres::{PostgresServer, Stop},
    program::{Installed, Program, url},
};

both_stores!(the_server_is_killed_again_and_again);

/// How often.
const ROUNDS: usize = 20;

/// Clients that report at the same time.
pub(crate) const CLIENTS: usize = 8;

/// Devices that they report for: few, so that several clients report for the same.
const DEVICES: usize = 5;

/// What a client has to report, each event under an id of its own, until it is acknowledged.
pub(crate) struct Reporter {
    number: usize,
    made: usize,
    /// Sent, but nobody knows what became of it.
    unanswered: Vec<Value>,
    pub(crate) acknowledged: BTreeSet<String>,
}

impl Reporter {
    pub(crate) fn new(number: usize) -> Self {
        Self { number, made: 0, unanswered: Vec::new(), acknowledged: BTreeSet::new() }
    }

    fn make(&mut self) -> Value {
        self.made += 1;
        let made = i64::try_from(self.made).unwrap();
        let fields = json!({
            "device_id": format!("pi-{}", (self.number + self.made) % DEVICES),
            "event_id": format!("{}-{made}", self.number),
            // Out of order, so that streaks must be recounted.
            "timestamp": at(-(made * 37 % 101)),
            "total_files_synced": made,
            "total_errors": i64::from(made % 4 != 0),
            "job": (made % 3 == 0).then_some("nightly"),
        });
        with(event("pi"), &fields)
    }

    /// Reports, what is unanswered first, until nobody answers any more or `enough` more are acknowledged.
    async fn report(mut self, client: Client, enough: usize) -> Self {
        let enough = self.acknowledged.len().saturating_add(enough);
        while self.acknowledged.len() < enough {
            // By turns alone and several together.
            let count = if self.made.is_multiple_of(5) { 7 } else { 1 };
            while self.unanswered.len() < count {
                let event = self.make();
                self.unanswered.push(event);
            }
            let sent = &self.unanswered[..count];
            let request = if count == 1 {
                client.request(Method::POST, "/api/sync-event").json(&sent[0])
            } else {
                client.request(Method::POST, "/api/sync-events").json(sent)
            };
            let Ok(answer) = try_send(request).await else { return self };
            match answer.status {
                200 | 201 => {
                    for event in self.unanswered.drain(..count) {
                        self.acknowledged.insert(event["event_id"].as_str().unwrap().to_owned());
                    }
                }
                503 => tokio::time::sleep(Duration::from_millis(20)).await,
                status => panic!("{status}: {}", answer.text()),
            }
        }
        self
    }
}

/// Lets all of them report until nobody answers, or each has so many more acknowledged.
pub(crate) async fn all_report(
    reporters: Vec<Reporter>,
    client: &Client,
    enough: usize,
) -> Vec<Reporter> {
    let mut tasks = JoinSet::new();
    for reporter in reporters {
        tasks.spawn(reporter.report(client.clone(), enough));
    }
    tasks.join_all().await
}

/// How long to let them report before the next kill, in milliseconds: another moment in each round.
pub(crate) fn moment(round: usize) -> Duration {
    Duration::from_millis(u64::try_from(round * 89 % 160).unwrap() + 15)
}

/// Asserts that each acknowledged event is in its device's history exactly once, and no other event is.
async fn assert_all_there(client: &Client, reporters: &[Reporter]) {
    let expected = assert_reported(client, reporters).await;
    let total = client.get("/api/stats").await.data(200)["total_sync_events"].take();
    assert_eq!(total, expected);
}

/// As [`assert_all_there`], beside other devices; answers how many events these are.
pub(crate) async fn assert_reported(client: &Client, reporters: &[Reporter]) -> usize {
    let mut expected = BTreeMap::new();
    for reporter in reporters {
        assert!(reporter.unanswered.is_empty());
        for event_id in &reporter.acknowledged {
            expected.insert(event_id.clone(), 1);
        }
    }
    let mut found: BTreeMap<String, usize> = BTreeMap::new();
    for device in 0..DEVICES {
        let mut offset = 0;
        loop {
            let path = format!("/api/device/pi-{device}/sync-history?limit=1000&offset={offset}");
            let history = client.get(&path).await.data(200)["sync_history"].take();
            let page = column(&history, "event_id");
            for event_id in &page {
                *found.entry(event_id.as_str().unwrap().to_owned()).or_default() += 1;
            }
            offset += page.len();
            if page.len() < 1000 {
                break;
            }
        }
    }
    assert_eq!(found.len(), expected.len());
    assert_eq!(found, expected);
    expected.len()
}

async fn the_server_is_killed_again_and_again(installed: &Installed) {
    let Installed { program, database } = installed;
    let mut reporters: Vec<_> = (0..CLIENTS).map(Reporter::new).collect();
    for round in 0..ROUNDS {
        let serving = program.serve(&[]);
        let client = serving.client.clone();
        let reporting =
            tokio::spawn(async move { all_report(reporters, &client, usize::MAX).await });
        tokio::time::sleep(moment(round)).await;
        serving.signal("KILL");
        serving.wait();
        reporters = reporting.await.unwrap();
    }
    let acknowledged: usize = reporters.iter().map(|reporter| reporter.acknowledged.len()).sum();
    assert!(acknowledged > ROUNDS * 5, "only {acknowledged} acknowledged before the kills");

    let serving = program.serve(&[]);
    // What nobody answered for is sent again, and something new comes after it.
    let reporters = all_report(reporters, &serving.client, 40).await;
    let reporters = finish(reporters, &serving.client).await;
    assert_all_there(&serving.client, &reporters).await;
    serving.stop();
    program.run(&["verify"]).success();
    if let Some(file) = database.file() {
        let connection = rusqlite::Connection::open(file).unwrap();
        let check = |pragma| connection.query_row(pragma, [], |row| row.get::<_, String>(0));
        assert_eq!(check("pragma integrity_check").unwrap(), "ok");
        let dangling = check("pragma foreign_key_check");
        assert_eq!(dangling, Err(rusqlite::Error::QueryReturnedNoRows), "rows refer to nothing");
    }
}

/// Sends what is still unanswered.
pub(crate) async fn finish(reporters: Vec<Reporter>, client: &Client) -> Vec<Reporter> {
    let mut finished = Vec::new();
    for mut reporter in reporters {
        while !reporter.unanswered.is_empty() {
            let left = reporter.unanswered.len();
            let request = client.request(Method::POST, "/api/sync-events");
            try_send(request.json(&reporter.unanswered)).await.unwrap().data(200);
            for event in reporter.unanswered.drain(..left) {
                reporter.acknowledged.insert(event["event_id"].as_str().unwrap().to_owned());
            }
        }
        finished.push(reporter);
    }
    finished
}

/// The server stays; its database does not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn postgresql_is_killed_again_and_again() {
    let postgres = PostgresServer::dedicated();
    let target = Target::Postgres(Box::new(postgres.create_database("pisync").await));
    let program = Program::new()
        .with("DATABASE_URL", url(&target))
        .with("PORT", 0)
        .with("RATE_LIMIT_SYNC_PER_MINUTE", 0)
        .with("RATE_LIMIT_API_PER_MINUTE", 0);
    let serving = program.serve(&[]);
    let mut reporters: Vec<_> = (0..CLIENTS).map(Reporter::new).collect();
    for round in 0..ROUNDS {
        let client = serving.client.clone();
        let reporting = tokio::spawn(async move { all_report(reporters, &client, 30).await });
        tokio::time::sleep(moment(round)).await;
        postgres.stop(Stop::Immediate);
        postgres.start();
        reporters = reporting.await.unwrap();
    }
    let reporters = finish(reporters, &serving.client).await;
    assert_all_there(&serving.client, &reporters).await;
    serving.stop();
    program.run(&["verify"]).success();
}
