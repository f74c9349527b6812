//! Keys of a group: whether a device is in it is decided in the transaction that stores its events, so that nothing can
//! come in between, and a batch that is refused leaves nothing behind.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicU64, Ordering},
};

use pisync::{
    keys::KeyRequest,
    store::{self, Batch, DeviceChange, GroupClaim, Scope, StoreError, Target},
};
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::support::locked_server::{LockedServer, forbidden, until};
use crate::support::{
    events::{at, device_id, group_name, now, somebody, success},
    http::{Client, event, with},
    postgres::connect,
    store::{TestStore, key_request, on_postgres},
};

/// Over HTTP.
mod served {
    use super::*;

    both_stores!(
        a_key_of_a_group_reports_for_its_devices,
        a_refused_batch_leaves_no_trace,
        whoever_is_refused_costs_the_others_nothing,
        a_device_that_is_deleted_while_it_reports_stays_in_its_group,
        a_device_that_is_moved_while_it_reports,
        a_group_that_is_renamed,
        repeated_events_are_stored_once,
    );

    fn of(group: &str) -> KeyRequest {
        KeyRequest { group: Some(group_name(group)), ..key_request(Scope::Ingest) }
    }

    fn batch(devices: &[&str]) -> Value {
        Value::Array(devices.iter().map(|name| event(name)).collect())
    }

    const REFUSED: &str = "This key is for other devices";

    async fn a_key_of_a_group_reports_for_its_devices(server: &LockedServer) {
        let admin = server.admin().await;
        let (_, north) = server.key(of("north")).await;
        let (_, south) = server.key(of("south")).await;
        // A new device joins the group, in which it stays.
        north.report(&event("new")).await.data(201);
        north.report(&event("new")).await.data(201);
        assert_eq!(admin.get("/api/device/new").await.data(200)["group"], "north");
        forbidden(&south.report(&event("new")).await, "This key is for other devices");
        // A device of no group is nobody's.
        admin.report(&event("old")).await.data(201);
        forbidden(&north.report(&event("old")).await, "This key is for other devices");
        admin.patch("/api/device/old", &json!({"group": "south"})).await.data(200);
        south.report(&event("old")).await.data(201);
        forbidden(&north.report(&event("old")).await, "This key is for other devices");
        assert_eq!(admin.get("/api/stats").await.data(200)["total_sync_events"], 4);
    }

    async fn a_refused_batch_leaves_no_trace(server: &LockedServer) {
        let admin = server.admin().await;
        let (_, north) = server.key(of("north")).await;
        let (_, south) = server.key(of("south")).await;
        let own = KeyRequest { device_id: Some(device_id("new-1")), ..key_request(Scope::Ingest) };
        let (_, own) = server.key(own).await;
        south.report(&event("theirs")).await.data(201);
        admin.report(&event("nobodys")).await.data(201);
        let named = |device: &str, id: &str| with(event(device), &json!({"event_id": id}));
        for foreign in ["theirs", "nobodys"] {
            for devices in [
                ["new-1", foreign, "new-2"],
                [foreign, "new-1", "new-2"],
                ["new-1", "new-2", foreign],
            ] {
                forbidden(&north.post("/api/sync-events", &batch(&devices)).await, REFUSED);
            }
            let mut ids = [named("new-1", "a"), named(foreign, "b"), named("new-2", "c")];
            ids.reverse();
            forbidden(&north.post("/api/sync-events", &json!(ids)).await, REFUSED);
        }
        forbidden(&own.post("/api/sync-events", &batch(&["new-1", "new-2"])).await, REFUSED);
        for device in ["new-1", "new-2"] {
            admin.get(&format!("/api/device/{device}")).await.error(404);
        }
        assert_eq!(admin.get("/api/stats").await.data(200)["total_devices"], 2);
        // So neither a device nor an event id is taken.
        let taken =
            south.post("/api/sync-events", &json!([named("new-1", "a"), event("new-2")])).await;
        assert_eq!(taken.data(200)["accepted"], 2);
        for device in ["new-1", "new-2"] {
            let found = admin.get(&format!("/api/device/{device}")).await.data(200);
            assert_eq!(found["group"], "south");
        }
        // What is wrong by itself is rejected; it does not say whose it is.
        let mut mixed = batch(&["mine", "mine"]);
        mixed[1]["total_errors"] = json!(-1);
        let stored = north.post("/api/sync-events", &mixed).await.data(200);
        assert_eq!((&stored["accepted"], &stored["rejected"]), (&json!(1), &json!(1)));
    }

    /// They are in one transaction, and each gets what is due to it.
    async fn whoever_is_refused_costs_the_others_nothing(server: &LockedServer) {
        let (_, north) = server.key(of("north")).await;
        let (_, south) = server.key(of("south")).await;
        north.report(&event("pi")).await.data(201);
        let mut reports = JoinSet::new();
        for number in 0..60 {
            let (client, device, status) = match number % 3 {
                0 => (&north, format!("north-{}", number % 7), 201),
                1 => (&south, format!("south-{}", number % 7), 201),
                _ => (&south, "pi".to_owned(), 403),
            };
            let client = client.clone();
            reports.spawn(async move {
                let answer = client.report(&event(&device)).await;
                assert_eq!(answer.status, status, "{device}: {}", answer.text());
            });
        }
        while let Some(report) = reports.join_next().await {
            report.unwrap();
        }
        let stats = server.admin().await.get("/api/stats").await.data(200);
        assert_eq!(stats["total_sync_events"], 41);
        assert_eq!(stats["total_devices"], 1 + 7 + 7);
    }

    /// Reports for a device all the time, and counts the reports that were stored; any other answer fails.
    struct Reporters {
        tasks: JoinSet<()>,
        stop: Arc<AtomicBool>,
        stored: Arc<AtomicU64>,
    }

    impl Reporters {
        fn start(client: &Client, refusal: Option<u16>) -> Self {
            let stop = Arc::new(AtomicBool::new(false));
            let stored = Arc::new(AtomicU64::new(0));
            let mut tasks = JoinSet::new();
            for _ in 0..4 {
                let (client, stop, stored) =
                    (client.clone(), Arc::clone(&stop), Arc::clone(&stored));
                tasks.spawn(async move {
                    while !stop.load(Ordering::SeqCst) {
                        let answer = client.report(&event("pi")).await;
                        if answer.status == 201 {
                            stored.fetch_add(1, Ordering::SeqCst);
                        } else {
                            assert_eq!(Some(answer.status), refusal, "{}", answer.text());
                        }
                    }
                });
            }
            Self { tasks, stop, stored }
        }

        fn stored(&self) -> u64 {
            self.stored.load(Ordering::SeqCst)
        }

        /// Waits for some more that are stored.
        async fn go_on(&self) {
            let enough = self.stored() + 3;
            until(async || self.stored() >= enough).await;
        }

        async fn stop(mut self) {
            self.stop.store(true, Ordering::SeqCst);
            while let Some(ended) = self.tasks.join_next().await {
                ended.unwrap();
            }
        }
    }

    async fn a_device_that_is_deleted_while_it_reports_stays_in_its_group(server: &LockedServer) {
        let admin = server.admin().await;
        let (_, north) = server.key(of("north")).await;
        north.report(&event("pi")).await.data(201);
        let reporters = Reporters::start(&north, None);
        for _ in 0..40 {
            reporters.go_on().await;
            admin.delete("/api/device/pi").await.data(200);
        }
        reporters.go_on().await;
        reporters.stop().await;
        assert_eq!(admin.get("/api/device/pi").await.data(200)["group"], "north");
        north.report(&event("pi")).await.data(201);
    }

    /// What was taken before the move was stored; what is sent after it is refused.
    async fn a_device_that_is_moved_while_it_reports(server: &LockedServer) {
        let admin = server.admin().await;
        let (_, north) = server.key(of("north")).await;
        north.report(&event("pi")).await.data(201);
        let reporters = Reporters::start(&north, Some(403));
        for _ in 0..10 {
            reporters.go_on().await;
            admin.patch("/api/device/pi", &json!({"group": "south"})).await.data(200);
            forbidden(&north.report(&event("pi")).await, REFUSED);
            admin.patch("/api/device/pi", &json!({"group": "north"})).await.data(200);
        }
        reporters.go_on().await;
        let stored = Arc::clone(&reporters.stored);
        reporters.stop().await;
        let found = admin.get("/api/stats").await.data(200)["total_sync_events"].as_u64();
        assert_eq!(found, Some(stored.load(Ordering::SeqCst) + 1));
    }

    /// A group is a name that devices and keys have: each of them is given another one.
    async fn a_group_that_is_renamed(server: &LockedServer) {
        let admin = server.admin().await;
        let (id, north) = server.key(of("north")).await;
        north.post("/api/sync-events", &batch(&["pi-1", "pi-2"])).await.data(200);
        admin.patch("/api/device/pi-1", &json!({"group": "north 2"})).await.data(200);
        // The one that was moved is lost to the old name, and takes the rest of its batch with it.
        forbidden(&north.report(&event("pi-1")).await, REFUSED);
        let both = batch(&["pi-2", "pi-3", "pi-1"]);
        forbidden(&north.post("/api/sync-events", &both).await, REFUSED);
        north.report(&event("pi-2")).await.data(201);
        admin.get("/api/device/pi-3").await.error(404);
        admin.patch("/api/device/pi-2", &json!({"group": "north 2"})).await.data(200);
        // The key itself, as SQL can.
        let rename = format!("update api_keys set \"group\" = 'north 2' where id = {id}");
        let count = "update api_key_changes set version = version + 1";
        server.0.database.execute(&format!("{rename}; {count}")).await;
        until(async || north.report(&event("pi-1")).await.status == 201).await;
        let stored = north.post("/api/sync-events", &both).await.data(200);
        assert_eq!(stored["accepted"], 3);
        assert_eq!(admin.get("/api/device/pi-3").await.data(200)["group"], "north 2");
        // A name that differs in case alone is another one.
        let (_, other) = server.key(of("North 2")).await;
        forbidden(&other.report(&event("pi-1")).await, REFUSED);
    }

    async fn repeated_events_are_stored_once(server: &LockedServer) {
        let admin = server.admin().await;
        let (_, north) = server.key(of("north")).await;
        let named = |id: &str| with(event("pi"), &json!({"event_id": id}));
        let first = north.report(&named("a")).await.data(201)["id"].take();
        let again = north.report(&named("a")).await.data(200);
        assert_eq!((&again["id"], &again["duplicate"]), (&first, &json!(true)));
        let events = json!([named("a"), named("b"), named("b"), event("pi-2")]);
        let stored = north.post("/api/sync-events", &events).await.data(200);
        assert_eq!((&stored["accepted"], &stored["duplicates"]), (&json!(2), &json!(2)));
        // By whichever way the first one came.
        admin.report(&named("c")).await.data(201);
        assert_eq!(north.report(&named("c")).await.status, 200);
        assert_eq!(admin.report(&named("b")).await.status, 200);
        assert_eq!(admin.get("/api/stats").await.data(200)["total_sync_events"], 4);
    }
}

/// Of several nodes.
mod nodes {
    use super::*;

    both_stores!(one_group_gets_a_new_device);

    fn claiming(group: &str, devices: &[String]) -> Arc<Batch> {
        let events: Vec<_> = devices.iter().map(|device| success(device, at(-1))).collect();
        let claims = vec![GroupClaim { events: 0..events.len(), group: group_name(group) }];
        Arc::new(Batch { claims, ..Batch::new(now(), events) })
    }

    /// Two nodes report for the same new devices, in opposite orders, each with a key of another group.
    async fn one_group_gets_a_new_device(fixture: &TestStore) {
        const ROUNDS: usize = 30;
        let mut nodes = JoinSet::new();
        let barrier = Arc::new(tokio::sync::Barrier::new(2));
        for group in ["north", "south"] {
            let store = store::open(fixture.target()).await.unwrap();
            let barrier = Arc::clone(&barrier);
            nodes.spawn(async move {
                let mut writer = store.event_writer();
                let mut stored = Vec::new();
                for round in 0..ROUNDS {
                    let mut devices: Vec<_> = (0..5).map(|n| format!("pi-{round}-{n}")).collect();
                    if group == "south" {
                        devices.reverse();
                    }
                    let batch = claiming(group, &devices);
                    barrier.wait().await;
                    match writer.write(&batch).await {
                        Ok(written) => {
                            assert_eq!(written.new_devices.len(), 5);
                            stored.push((round, group));
                        }
                        Err(StoreError::OtherGroup(other)) => assert_eq!(other.refused, [0]),
                        Err(error) => panic!("{error}"),
                    }
                }
                stored
            });
        }
        let mut stored = nodes.join_all().await.concat();
        stored.sort_unstable();
        let rounds: Vec<_> = stored.iter().map(|(round, _)| *round).collect();
        assert_eq!(rounds, (0..ROUNDS).collect::<Vec<_>>(), "one of the two, each time");
        for (round, group) in stored {
            for number in 0..5 {
                let id = device_id(&format!("pi-{round}-{number}"));
                let found = fixture.store.device(&id).await.unwrap().unwrap().device;
                assert_eq!((found.group.as_deref(), found.figures.total_syncs), (Some(group), 1));
            }
        }
    }

    /// Whoever moves a device waits for a transaction that has found it in its group.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn postgres_keeps_a_claim_until_the_commit() {
        on_postgres(async |fixture: &TestStore| {
            let Target::Postgres(target) = fixture.target() else { panic!() };
            let client = connect(&target.config).await;
            let devices = ["pi".to_owned()];
            let mut writer = fixture.writer();
            writer.write(&claiming("north", &devices)).await.unwrap();
            // Its transaction has got as far as the events.
            client.batch_execute("begin; lock table sync_events in exclusive mode").await.unwrap();
            let waiting = async || -> i64 {
                let count = "
                    select count(*) from pg_stat_activity
                     where datname = current_database() and wait_event_type = 'Lock'
                ";
                client.query_one(count, &[]).await.unwrap().get(0)
            };
            let writing = tokio::spawn(async move {
                writer.write(&claiming("north", &["pi".to_owned()])).await.map(drop)
            });
            until(async || waiting().await == 1).await;
            let store = Arc::clone(&fixture.store);
            let moving = tokio::spawn(async move {
                store.update_device(&device_id("pi"), &change("south"), &somebody()).await
            });
            until(async || waiting().await == 2).await;
            assert!(!writing.is_finished() && !moving.is_finished());
            client.batch_execute("commit").await.unwrap();
            writing.await.unwrap().unwrap();
            assert!(moving.await.unwrap().unwrap());
            let mut writer = fixture.writer();
            let refused = writer.write(&claiming("north", &devices)).await;
            assert!(matches!(refused, Err(StoreError::OtherGroup(_))), "{refused:?}");
        })
        .await;
    }

    fn change(group: &str) -> DeviceChange {
        DeviceChange { group: Some(Some(group_name(group))), ..DeviceChange::default() }
    }
}
