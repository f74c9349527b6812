//! `POST /api/sync-start`: starts of runs are answered at once and stored within a second.

use pisync::{
    keys::KeyRequest,
    store::{MOST_STARTS, RunKey, Scope, StartedRun},
};
use pisync_core::{EventId, Timestamp};
use reqwest::Method;
use serde_json::{Value, json};

use crate::support::{
    events::{at, device_id, group_name, job_name, now, success, write},
    http::{event, send, with},
    locked_server::{LockedServer, forbidden, until},
    server::TestServer,
    store::{TestDatabase, TestStore, key_request},
};

/// What is stored, as one text for each run, in byte-wise order.
async fn stored(database: &TestDatabase) -> Vec<String> {
    let (device, join) = match database.target {
        pisync::store::Target::Sqlite(_) => ("d.device_id", "d.id = r.device"),
        pisync::store::Target::Postgres(_) => ("r.device_id", "d.device_id = r.device_id"),
    };
    let select = format!(
        "select {device} || '/' || r.job || '/' || r.run_id
           from run_starts r join devices d on {join}"
    );
    let mut runs = database.texts(&select).await;
    runs.sort();
    runs
}

/// A number about a stored run, in milliseconds.
async fn millisecond(database: &TestDatabase, column: &str, run_id: &str) -> i64 {
    let value = match database.target {
        pisync::store::Target::Sqlite(_) => column.to_owned(),
        pisync::store::Target::Postgres(_) => format!("extract(epoch from {column}) * 1000"),
    };
    let expression = format!("(select {value} from run_starts where run_id = '{run_id}')");
    database.number(&expression).await
}

/// The store alone.
mod in_the_store {
    use super::*;

    both_stores!(known_runs_stay_as_they_are, starts_of_a_device_are_bounded);

    fn run(device: &str, job: Option<&str>, run_id: &str, received_at: Timestamp) -> StartedRun {
        let key = RunKey {
            device_id: device_id(device),
            job: job.map(job_name),
            run_id: (!run_id.is_empty()).then(|| EventId::new(run_id).unwrap()),
        };
        StartedRun { key, received_at, timestamp: None, group: None }
    }

    async fn known_runs_stay_as_they_are(fixture: &TestStore) {
        let TestStore { store, database, .. } = fixture;
        write(&mut *fixture.writer(), vec![success("pi", now()), success("pi-2", now())]).await;
        let runs = [
            run("pi", None, "r1", at(0)),
            run("pi", None, "", at(0)),
            run("pi", Some("nightly"), "r1", at(0)),
            // Twice in one batch.
            run("pi", None, "r1", at(5)),
            run("pi-2", None, "r1", at(0)),
            run("nobody", None, "r1", at(0)),
        ];
        assert_eq!(store.add_run_starts(&runs).await.unwrap(), 4);
        assert_eq!(store.add_run_starts(&runs).await.unwrap(), 0);
        let later = run("pi", Some("nightly"), "r1", at(9));
        assert_eq!(store.add_run_starts(&[later]).await.unwrap(), 0);
        assert_eq!(stored(database).await, ["pi-2//r1", "pi//", "pi//r1", "pi/nightly/r1"]);
        let times =
            "(select count(*) from run_starts where received_at = due_at and timestamp is null)";
        assert_eq!(database.number(times).await, 4);
        // Groups are checked again when runs are stored.
        let of = |device: &str| StartedRun {
            group: Some(group_name("north")),
            ..run(device, None, "of a group", at(0))
        };
        database.execute("update devices set \"group\" = 'north' where device_id = 'pi'").await;
        assert_eq!(store.add_run_starts(&[of("pi"), of("pi-2"), of("new")]).await.unwrap(), 1);
        for (device, group, expected) in [
            ("pi", "north", true),
            ("pi", "south", false),
            ("pi-2", "north", false),
            ("new", "north", true),
        ] {
            let may = store.may_report_in(&device_id(device), &group_name(group)).await.unwrap();
            assert_eq!(may, expected, "{device} {group}");
        }
    }

    async fn starts_of_a_device_are_bounded(fixture: &TestStore) {
        let TestStore { store, database, .. } = fixture;
        write(&mut *fixture.writer(), vec![success("pi", now()), success("pi-2", now())]).await;
        let runs = |device: &str, numbers: std::ops::Range<u32>| -> Vec<_> {
            numbers
                .map(|number| run(device, None, &number.to_string(), at(number.into())))
                .collect()
        };
        let first = store.add_run_starts(&runs("pi", 0..40)).await.unwrap();
        let mut rest = runs("pi", 20..MOST_STARTS + 50);
        rest.extend(runs("pi-2", 0..1));
        let second = store.add_run_starts(&rest).await.unwrap();
        assert_eq!((first, second), (40, u64::from(MOST_STARTS) - 40 + 1));
        // The oldest are kept.
        assert_eq!(stored(database).await.len(), MOST_STARTS as usize + 1);
        let last = millisecond(database, "max(received_at)", "99").await;
        assert_eq!(last, at(99).as_millisecond());
        // When one is over, there is a place again.
        database.execute("delete from run_starts where run_id = '0'").await;
        assert_eq!(store.add_run_starts(&runs("pi", 200..210)).await.unwrap(), 1);
    }
}

/// Over HTTP.
mod served {
    use super::*;

    both_stores!(
        a_start_is_stored_within_a_second,
        starts_are_stored_before_the_server_ends,
        what_is_wrong_is_named,
    );

    async fn a_start_is_stored_within_a_second(server: &TestServer) {
        server.store(&event("pi")).await;
        let start = json!({
            "device_id": "pi", "job": "nightly", "run_id": "r1", "timestamp": at(-30),
        });
        let noted = server.post("/api/sync-start", &start).await.data(202);
        let expected = json!({
            "device_id": "pi", "job": "nightly", "run_id": "r1", "received_at": at(0),
        });
        assert_eq!(noted, expected);
        until(async || stored(&server.database).await == ["pi/nightly/r1"]).await;
        assert_eq!(
            millisecond(&server.database, "timestamp", "r1").await,
            at(-30).as_millisecond()
        );
        // Sent again, also later: nothing changes.
        server.clock.set(at(10));
        server.post("/api/sync-start", &start).await.data(202);
        let unsynced = json!({
            "device_id": "pi", "run_id": "r2", "clock": "unsynced", "timestamp": "2099-01-01",
        });
        server.post("/api/sync-start", &unsynced).await.data(202);
        // The first start of a device is no report.
        server.post("/api/sync-start", &json!({"device_id": "new"})).await.data(202);
        until(async || stored(&server.database).await == ["pi//r2", "pi/nightly/r1"]).await;
        assert_eq!(
            millisecond(&server.database, "received_at", "r1").await,
            at(0).as_millisecond()
        );
        assert_eq!(millisecond(&server.database, "timestamp", "r2").await, at(10).as_millisecond());
        server.get("/api/device/new").await.error(404);
        let device = server.get("/api/device/pi").await.data(200);
        assert_eq!(device["total_syncs"], 1);
        // A deleted device takes them along.
        server.delete("/api/device/pi").await.data(200);
        assert_eq!(server.database.number("(select count(*) from run_starts)").await, 0);
    }

    async fn starts_are_stored_before_the_server_ends(database: &TestDatabase) {
        let elsewhere = TestDatabase::elsewhere(database.target.clone());
        let server = TestServer::start(elsewhere).await;
        server.store(&event("pi")).await;
        for number in 0..30 {
            let start = json!({"device_id": "pi", "run_id": number.to_string()});
            server.post("/api/sync-start", &start).await.data(202);
        }
        server.stop().await;
        assert_eq!(stored(database).await.len(), 30);
    }

    async fn what_is_wrong_is_named(server: &TestServer) {
        let body = json!({
            "job": "", "run_id": "x".repeat(65), "timestamp": at(301), "clock": "odd", "event_id": "1",
        });
        let wrong = server.post("/api/sync-start", &body).await.wrong_fields();
        let expected = [
            ("device_id", "required"),
            ("job", "length"),
            ("run_id", "length"),
            ("clock", "format"),
            ("timestamp", "future"),
            ("event_id", "unknown_field"),
        ];
        assert_eq!(wrong, expected.map(|(field, code)| (field.to_owned(), code.to_owned())));
        let request = server.request(Method::POST, "/api/sync-start");
        let malformed = send(request.header("content-type", "application/json").body("{")).await;
        assert_eq!(malformed.code(400), "malformed_json");
        let query = server.post("/api/sync-start?x=1", &json!({"device_id": "pi"})).await;
        assert_eq!(query.wrong_fields(), [("x".to_owned(), "unknown_field".to_owned())]);
        server.get("/api/sync-start").await.error(405);
        // A clock that is not set cannot date anything.
        server.clock.set(Timestamp::from_millisecond(0).unwrap());
        let start = json!({"device_id": "pi", "clock": "unsynced"});
        assert_eq!(server.post("/api/sync-start", &start).await.code(503), "clock_not_set");
    }
}

/// Over HTTP, with keys.
mod locked {
    use super::*;

    both_stores!(keys_report_for_their_devices);

    async fn keys_report_for_their_devices(locked: &LockedServer) {
        let bound = |device: Option<&str>, group: Option<&str>| KeyRequest {
            device_id: device.map(device_id),
            group: group.map(group_name),
            ..key_request(Scope::Ingest)
        };
        let (_, any) = locked.key(bound(None, None)).await;
        let (_, own) = locked.key(bound(Some("pi"), None)).await;
        let (_, north) = locked.key(bound(None, Some("north"))).await;
        let (_, south) = locked.key(bound(None, Some("south"))).await;
        let (_, reader) = locked.key(key_request(Scope::Read)).await;
        any.report(&event("pi")).await.data(201);
        north.report(&event("northern")).await.data(201);
        const REFUSED: &str = "This key is for other devices";
        let start = async |client: &crate::support::http::Client, device: &str, run_id: &str| {
            let start = json!({"device_id": device, "run_id": run_id});
            client.post("/api/sync-start", &start).await
        };
        forbidden(&start(&own, "northern", "1").await, REFUSED);
        forbidden(&start(&south, "northern", "2").await, REFUSED);
        // A device of no group is nobody's.
        forbidden(&start(&north, "pi", "3").await, REFUSED);
        forbidden(&start(&reader, "pi", "4").await, "This key does not open this");
        start(&own, "pi", "5").await.data(202);
        start(&north, "northern", "6").await.data(202);
        start(&any, "northern", "7").await.data(202);
        start(&south, "new", "8").await.data(202);
        let expected = ["northern//6", "northern//7", "pi//5"];
        until(async || stored(&locked.0.database).await == expected).await;
        let answer = start(&any, "pi", "9").await.data(202);
        assert_eq!(with(answer.clone(), &json!({"job": Value::Null})), answer);
    }
}
