//! What becomes of events whose statement or commit PostgreSQL does not simply carry out: an answer of 201 means
//! durable, a definite failure costs nobody else anything, and what is in doubt is looked up.

use std::cell::Cell;

use pisync::store::{self, Scope, Target};
use reqwest::Method;
use serde_json::{Value, json};
use tokio::task::JoinHandle;
use tokio_postgres::Client;

use crate::{
    ingest::{assert_unavailable, mixed_events, on_its_own, report_all, stored_ids, until},
    support::{
        http::{self, Answer, event, with},
        postgres::{PostgresServer, Stop, connect},
        program::{Program, url},
        server::TestServer,
        store::{TestDatabase, assert_right, differences, key_request},
    },
};

/// A connection of the test's own to the server's database.
async fn database_of(server: &TestServer) -> Client {
    let Target::Postgres(target) = &server.database.target else { unreachable!() };
    connect(&target.config).await
}

/// Reports an event beside the test.
fn reporting(server: &TestServer, event: &Value) -> JoinHandle<Answer> {
    let (client, event) = (http::Client::clone(server), event.clone());
    tokio::spawn(async move { client.report(&event).await })
}

/// The transaction of PiSync's that waits for a lock, by its process and when it began.
type Waiting = (i32, jiff::Timestamp);

async fn find_waiting(client: &Client) -> Option<Waiting> {
    const WAITING: &str = "
        select pid, xact_start
          from pg_stat_activity
         where datname = current_database() and application_name = 'pisync' and wait_event_type = 'Lock'
    ";
    let found = client.query_opt(WAITING, &[]).await.unwrap();
    found.map(|row| (row.get(0), row.get(1)))
}

/// Waits for one that is not this one.
async fn another_waiting(client: &Client, than: Option<Waiting>) -> Waiting {
    let found = Cell::new(None);
    until(async || {
        found.set(find_waiting(client).await.filter(|found| Some(*found) != than));
        found.get().is_some()
    })
    .await;
    found.get().unwrap()
}

async fn cancel(client: &Client, (process, _): Waiting) {
    client.execute("select pg_cancel_backend($1)", &[&process]).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_statement_that_is_cancelled_is_tried_again_and_costs_the_others_nothing() {
    const HOLD: &str = "select from device_jobs where device_id = 'held' for update";
    let server = TestServer::start(TestDatabase::postgres().await).await;
    server.store(&event("held")).await;
    let looking = database_of(&server).await;
    let mut holder = database_of(&server).await;
    let lock = holder.transaction().await.unwrap();
    lock.execute(HOLD, &[]).await.unwrap();

    // Once: nobody hears of it.
    let report = reporting(&server, &event("held"));
    let first = another_waiting(&looking, None).await;
    cancel(&looking, first).await;
    another_waiting(&looking, Some(first)).await;
    lock.rollback().await.unwrap();
    report.await.unwrap().data(201);

    // Again and again: it is given up, alone.
    let lock = holder.transaction().await.unwrap();
    lock.execute(HOLD, &[]).await.unwrap();
    let report = reporting(&server, &event("held"));
    until(async || {
        if let Some(waiting) = find_waiting(&looking).await {
            cancel(&looking, waiting).await;
        }
        report.is_finished()
    })
    .await;
    assert_unavailable(&report.await.unwrap());
    assert_eq!(server.get("/health/ready").await.status, 200);
    server.store(&event("other")).await;
    lock.rollback().await.unwrap();
    server.store(&event("held")).await;
    assert_eq!(stored_ids(&server, "held").await.len(), 3);
    server.stop().await;
}

/// The processes of PiSync's that wait for a standby after a statement that is like this.
async fn waiting_for_standby(client: &Client, statement: &str) -> Vec<i32> {
    const WAITING: &str = "
        select pid
          from pg_stat_activity
         where datname = current_database() and application_name = 'pisync' and wait_event = 'SyncRep'
           and query like $1
    ";
    client.query(WAITING, &[&statement]).await.unwrap().iter().map(|row| row.get(0)).collect()
}

async fn count_events(client: &Client) -> i64 {
    client.query_one("select count(*) from sync_events", &[]).await.unwrap().get(0)
}

/// A commit that waits for its standby and is made to stop waiting is there for all to see, and yet lost when the
/// standby takes over. The answer has to wait, whoever ended the waiting and how.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_stored_but_not_replicated_is_not_acknowledged() {
    let primary = PostgresServer::dedicated();
    let target = Target::Postgres(Box::new(primary.create_database("pisync").await));
    let admin = connect(&primary.config("pisync")).await;
    // What the database's owner wants of commits is not enough for a 201.
    admin.batch_execute("alter database pisync set synchronous_commit = local").await.unwrap();
    let server = TestServer::start(TestDatabase::elsewhere(target)).await;
    let other = TestServer::start(TestDatabase::elsewhere(server.database.target.clone())).await;
    let standby = primary.standby();
    for setting in ["alter system set synchronous_standby_names = '*'", "select pg_reload_conf()"] {
        admin.batch_execute(setting).await.unwrap();
    }
    let followed = "select exists (select from pg_stat_replication where sync_state = 'sync')";
    until(async || admin.query_one(followed, &[]).await.unwrap().get(0)).await;

    // The answer to one is lost, the other's comes with a warning.
    for end in ["pg_terminate_backend", "pg_cancel_backend"] {
        // Nothing but the event is new.
        server.store(&event("pi")).await;
        other.store(&event("pi")).await;
        let stored = count_events(&admin).await;
        let event = with(event("pi"), &json!({"event_id": end}));

        standby.stop(Stop::Immediate);
        let report = reporting(&server, &event);
        until(async || waiting_for_standby(&admin, "with %").await.len() == 1).await;
        let process = waiting_for_standby(&admin, "with %").await[0];
        admin.execute(&format!("select {end}($1)"), &[&process]).await.unwrap();
        // It can be seen now, and the one who is to answer waits for the standby.
        let confirming = "%pg_logical_emit_message%";
        until(async || waiting_for_standby(&admin, confirming).await.len() == 1).await;
        assert_eq!(count_events(&admin).await, stored + 1, "{end}");
        // So does another server that finds it.
        let again = reporting(&other, &event);
        until(async || waiting_for_standby(&admin, "commit").await.len() == 1).await;
        assert!(!report.is_finished() && !again.is_finished(), "{end}");

        standby.start();
        report.await.unwrap().data(201);
        again.await.unwrap().data(200);
        assert_eq!(count_events(&admin).await, stored + 1, "{end}");
        let follower = connect(&standby.config("pisync")).await;
        until(async || count_events(&follower).await == stored + 1).await;
    }
    other.stop().await;
    server.stop().await;
}

/// Cancels what waits for a standby, again and again until this is over.
async fn without_standby(admin: &Client, is_over: impl Fn() -> bool) {
    const CANCEL: &str = "
        select count(pg_cancel_backend(pid))
          from pg_stat_activity
         where application_name = 'pisync' and wait_event = 'SyncRep'
    ";
    until(async || {
        admin.query_one(CANCEL, &[]).await.unwrap();
        is_over()
    })
    .await;
}

/// Whoever is told that a change was made relies on it, and a standby that takes over may not have it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_that_may_not_be_replicated_is_not_confirmed() {
    let primary = PostgresServer::dedicated();
    let target = Target::Postgres(Box::new(primary.create_database("pisync").await));
    let admin = connect(&primary.config("pisync")).await;
    let server = TestServer::start(TestDatabase::elsewhere(target)).await;
    for device in ["pi", "going"] {
        server.store(&event(device)).await;
    }
    let (id, _) = server.database.make_key(key_request(Scope::Read)).await;
    let empty = Target::Postgres(Box::new(primary.create_database("empty").await));
    for setting in
        ["alter system set synchronous_standby_names = 'nobody'", "select pg_reload_conf()"]
    {
        admin.batch_execute(setting).await.unwrap();
    }
    // Until a commit waits for the standby that there is not.
    let waiter = connect(&primary.config("pisync")).await;
    let process: i32 = waiter.query_one("select pg_backend_pid()", &[]).await.unwrap().get(0);
    let commits = tokio::spawn(async move {
        loop {
            let commit = "select pg_logical_emit_message(true, 'test', '')";
            waiter.batch_execute(commit).await.unwrap();
        }
    });
    let waits =
        "select wait_event is not distinct from 'SyncRep' from pg_stat_activity where pid = $1";
    until(async || admin.query_one(waits, &[&process]).await.unwrap().get(0)).await;
    commits.abort();

    let named = json!({"name": "Named", "scope": "read"});
    let requests = [
        server.request(Method::POST, "/api/keys").json(&named),
        server.request(Method::PATCH, "/api/device/pi").json(&json!({"name": "Named"})),
        server.request(Method::DELETE, "/api/device/going"),
        server.request(Method::DELETE, &format!("/api/key/{id}")),
    ];
    for (place, request) in requests.into_iter().enumerate() {
        let answer = tokio::spawn(http::send(request));
        without_standby(&admin, || answer.is_finished()).await;
        let error = answer.await.unwrap().error(503);
        let expected = "The change was made on this database server, but may not be replicated";
        assert!(error.starts_with(expected), "request {place}: {error}");
    }
    for (target, command) in [
        (&server.database.target, &["key", "create", "--scope", "read", "--name", "Named"][..]),
        (&empty, &["migrate", "up"]),
    ] {
        let program = Program::new().with("DATABASE_URL", url(target));
        let running = std::cell::RefCell::new(program.start(command));
        without_standby(&admin, || running.borrow_mut().has_ended()).await;
        let ended = running.into_inner().wait();
        // It may also warn of the clock: the server's is the test's own.
        assert_eq!(ended.code(), 1, "{command:?}: {ended:?}");
        assert!(ended.stderr.contains("may not be replicated"), "{command:?}: {ended:?}");
    }
    let made = "
        select (select count(*) from api_keys where name = 'Named' or revoked_at is not null),
               (select count(*) from devices where name = 'Named')
    ";
    let made = admin.query_one(made, &[]).await.unwrap();
    assert_eq!((made.get::<_, i64>(0), made.get::<_, i64>(1)), (3, 1), "it was made here");
    for setting in ["alter system reset synchronous_standby_names", "select pg_reload_conf()"] {
        admin.batch_execute(setting).await.unwrap();
    }
    // The sessions that were warned are not used again.
    until(async || server.get("/api/stats").await.status == 200).await;
    server.patch("/api/device/pi", &json!({"name": "Again"})).await.data(200);
    server.stop().await;
}

/// A row that somebody has locked keeps the events that need it from being stored for ten seconds, and the others
/// for as long.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_that_others_keep_locked_costs_the_others_nothing_but_time() {
    const HOLD: &str = "select from device_jobs where device_id = 'held' for update";
    let server = TestServer::start(TestDatabase::postgres().await).await;
    server.store(&event("held")).await;
    let looking = database_of(&server).await;
    let mut holder = database_of(&server).await;
    let lock = holder.transaction().await.unwrap();
    lock.execute(HOLD, &[]).await.unwrap();
    let began = std::time::Instant::now();
    let report = reporting(&server, &event("held"));
    another_waiting(&looking, None).await;
    let others = ["a", "b"].map(|device| reporting(&server, &event(device)));
    assert_unavailable(&report.await.unwrap());
    for other in others {
        other.await.unwrap().data(201);
    }
    assert!(began.elapsed() < std::time::Duration::from_secs(15), "{:?}", began.elapsed());
    assert_eq!(server.get("/health/ready").await.status, 200);
    lock.rollback().await.unwrap();
    server.store(&event("held")).await;
    assert_eq!(stored_ids(&server, "held").await.len(), 2);
    server.stop().await;
}

/// Streaks are counted again within the statement, which never fails for it. Each failure would be an error in the log,
/// with the whole batch, and the batch written twice.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reports_that_arrive_out_of_order_make_no_statement_fail() {
    let (postgres, server) = on_its_own().await;
    let before = postgres.errors();
    for answer in report_all(&server, mixed_events()).await {
        answer.data(201);
    }
    assert_eq!(postgres.errors(), before);
    let store = store::open(&server.database.target).await.unwrap();
    assert_right(&differences(&*store, false).await);
    server.stop().await;
}

/// Settings of a server on which nothing is durable, and a table that a crash empties.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_that_could_lose_what_is_acknowledged_is_told_of() {
    let database = TestDatabase::postgres().await;
    database.migrate().await;
    let Target::Postgres(target) = &database.target else { unreachable!() };
    let name = target.config.get_dbname().unwrap();
    database.execute(&format!("alter database {name} set synchronous_commit = off")).await;
    let program = Program::new().with("DATABASE_URL", url(&database.target)).with("PORT", 0);
    let serving = program.serve(&[]);
    serving.client.store(&event("pi")).await;
    serving.stop();
    // The tests' shared server does without fsync.
    let log = program.log("combined.log");
    for warning in ["commits were not durable", "PostgreSQL does not write durably"] {
        let warned = |line: &&Value| {
            line["level"] == "WARN" && line["message"].as_str().unwrap().starts_with(warning)
        };
        assert_eq!(log.iter().filter(warned).count(), 1, "{log:#?}");
    }

    database.execute("alter table device_jobs set unlogged").await;
    let refused = program.run(&["serve"]);
    assert_eq!(refused.code(), 1);
    assert!(refused.stderr.contains("run: alter table device_jobs set logged"), "{refused:?}");
    database.execute("alter table device_jobs set logged").await;
    program.serve(&[]).stop();
    database.remove().await;
}
