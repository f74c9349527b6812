//! What the database refuses, and connections that break: nothing is stored by halves, nothing twice,
//! and what was acknowledged is there.

use pisync::store::{self, EventWriter, Freshness, HistoryQuery, StoreError, Target};
use pisync_core::SyncEvent;
use tokio_postgres::error::SqlState;

use crate::support::{
    events::{at, batch_at, device_id, failure, now, success, write},
    postgres::{PostgresServer, Stop, connect, postgres_target},
    proxy::{Fault, Proxy},
    store::{Fixture, TestDatabase, TestStore},
};

both_stores!(
    what_the_database_refuses_leaves_nothing_behind,
    a_device_that_others_delete,
    a_file_is_claimed_by_one,
);

/// How many events of a device are stored, counted by looking at them.
async fn stored(fixture: &TestStore, device: &str) -> usize {
    let query = HistoryQuery::newest(device_id(device), 1000);
    let Some(history) = fixture.store.sync_history(&query).await.unwrap() else { return 0 };
    // The figures are part of the same transaction.
    assert_eq!(history.events.len() as u64, history.total_events);
    history.events.len()
}

async fn what_the_database_refuses_leaves_nothing_behind(fixture: &TestStore) {
    let refuse = if fixture.is_postgres() {
        "alter table sync_events add constraint no_666 check (total_errors <> 666)"
    } else {
        "create trigger no_666 before insert on sync_events when new.total_errors = 666
         begin select raise(abort, 'refused'); end"
    };
    fixture.database.execute(refuse).await;
    let mut writer = fixture.writer();
    write(&mut *writer, vec![success("known", at(0))]).await;

    let poison = SyncEvent { total_errors: 666, ..failure("known", at(2)) };
    let events = vec![success("new", at(1)), failure("known", at(1)), poison, success("z", at(3))];
    for _ in 0..2 {
        let error = writer.write(&batch_at(now(), events.clone())).await.unwrap_err();
        assert!(matches!(error, StoreError::Rejected(_)), "{error:?}");
        assert_eq!(stored(fixture, "known").await, 1);
        assert!(fixture.store.device(&device_id("new")).await.unwrap().is_none());
        assert_eq!(
            fixture
                .store
                .fleet_stats(now(), 10, Freshness::Everything)
                .await
                .unwrap()
                .total_devices,
            1
        );
    }
    // The devices that it would have made are still new.
    let written = write(&mut *writer, vec![success("new", at(1)), failure("known", at(1))]).await;
    assert_eq!(written.new_devices, [device_id("new")]);
    assert_eq!(written.streaks.len(), 1);
    assert_eq!((stored(fixture, "known").await, stored(fixture, "new").await), (2, 1));
}

/// By SQL from outside, so that no writer is told.
async fn a_device_that_others_delete(fixture: &TestStore) {
    let mut writer = fixture.writer();
    let events = vec![failure("pi", at(0)), success("other", at(0))];
    write(&mut *writer, events.clone()).await;
    let delete = "pragma foreign_keys = on; delete from devices where device_id = 'pi'";
    let delete =
        if fixture.is_postgres() { &delete["pragma foreign_keys = on; ".len()..] } else { delete };
    fixture.database.execute(delete).await;
    assert_eq!(stored(fixture, "pi").await, 0);
    let written = write(&mut *writer, events).await;
    assert_eq!(written.new_devices, [device_id("pi")]);
    assert_eq!(written.streaks[0].after, 1);
    assert_eq!((stored(fixture, "pi").await, stored(fixture, "other").await), (1, 2));
}

/// One server per file; PostgreSQL takes as many as come.
async fn a_file_is_claimed_by_one(fixture: &TestStore) {
    let claim = store::claim(fixture.target()).unwrap();
    let second = store::claim(fixture.target());
    if fixture.is_postgres() {
        second.unwrap();
        return;
    }
    let error = second.unwrap_err();
    assert!(error.to_string().contains("in use by a running PiSync server"), "{error}");
    drop(claim);
    store::claim(fixture.target()).unwrap();
}

/// A store, and a writer to the same database that goes through a proxy.
pub(super) struct Behind {
    pub(super) fixture: TestStore,
    pub(super) proxy: Proxy,
    pub(super) writer: Box<dyn EventWriter>,
}

impl Behind {
    pub(super) async fn a_proxy() -> Self {
        let fixture = TestStore::prepare(TestDatabase::postgres().await).await;
        let Target::Postgres(target) = fixture.target() else { unreachable!() };
        let proxy = Proxy::before(target.config.get_ports()[0]).await;
        let through = Target::Postgres(Box::new(postgres_target(proxy.config(&target.config))));
        let mut writer = store::open(&through).await.unwrap().event_writer();
        // The devices are known, the statements prepared.
        write(&mut *writer, vec![success("pi", at(-10)), success("other", at(-10))]).await;
        Self { fixture, proxy, writer }
    }

    async fn stored(&self, device: &str) -> usize {
        stored(&self.fixture, device).await
    }
}

fn outcome_is_unknown<T: std::fmt::Debug>(result: Result<T, StoreError>) {
    let error = result.unwrap_err();
    assert!(matches!(error, StoreError::OutcomeUnknown(_)), "{error:?}");
}

/// The fault that a commit meets, and how many events are stored by then.
const LOST: [(Fault, usize); 2] = [(Fault::LoseCommit, 1), (Fault::LoseAnswer, 3)];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_without_an_answer_is_stored_once() {
    for (fault, stored_by_then) in LOST {
        let mut behind = Behind::a_proxy().await;
        let events = vec![failure("pi", at(0)), success("new", at(1)), failure("pi", at(0))];
        let batch = batch_at(now(), events);
        behind.proxy.set(fault);
        outcome_is_unknown(behind.writer.write(&batch).await);
        assert_eq!(behind.proxy.fault(), Fault::None, "{fault:?} has not happened");
        assert_eq!(behind.stored("pi").await, stored_by_then, "{fault:?}");

        let written = behind.writer.write(&batch).await.unwrap();
        assert_eq!(written.ids.len(), 3);
        assert!(written.ids.is_sorted_by(|left, right| left < right));
        assert_eq!((behind.stored("pi").await, behind.stored("new").await), (3, 1), "{fault:?}");
        // What follows is written as ever; and the same events in another batch are other events.
        let events = batch.events.clone();
        let again = behind.writer.write(&batch_at(now(), events)).await.unwrap();
        assert!(again.ids[0] > written.ids[2]);
        assert_eq!((behind.stored("pi").await, behind.stored("new").await), (5, 2), "{fault:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_first_connection_that_tells_nothing() {
    // The server is away for a while, then the next commit is lost, too.
    for (fault, stored_by_then) in LOST {
        for next_fault in [Fault::LoseCommit, Fault::LoseAnswer] {
            let mut behind = Behind::a_proxy().await;
            let batch = batch_at(now(), vec![failure("pi", at(0)), failure("pi", at(1))]);
            behind.proxy.set(fault);
            outcome_is_unknown(behind.writer.write(&batch).await);
            assert_eq!(behind.stored("pi").await, stored_by_then);
            behind.proxy.set(Fault::Refuse);
            for _ in 0..2 {
                outcome_is_unknown(behind.writer.write(&batch).await);
            }
            assert!(behind.writer.probe().await.is_err());

            behind.proxy.set(next_fault);
            // What is stored already is only looked up, without a commit.
            if stored_by_then == 1 {
                outcome_is_unknown(behind.writer.write(&batch).await);
            }
            behind.writer.probe().await.unwrap();
            assert_eq!(behind.writer.write(&batch).await.unwrap().ids.len(), 2);
            assert_eq!(behind.stored("pi").await, 3, "{fault:?}, then {next_fault:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn giving_up_an_unknown_commit_does_not_stop_the_next() {
    for (fault, stored_by_then) in LOST {
        let mut behind = Behind::a_proxy().await;
        let lost = batch_at(now(), vec![failure("pi", at(0)), failure("pi", at(1))]);
        behind.proxy.set(fault);
        outcome_is_unknown(behind.writer.write(&lost).await);
        write(&mut *behind.writer, vec![success("pi", at(2))]).await;
        assert_eq!(behind.stored("pi").await, stored_by_then + 1, "{fault:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_connection_is_not_an_unknown_outcome() {
    let mut behind = Behind::a_proxy().await;
    behind.proxy.set(Fault::Refuse);
    let Target::Postgres(target) = behind.fixture.target() else { unreachable!() };
    // As a restarted server does it: the connection is closed while nobody uses it.
    let client = connect(&target.config).await;
    const TERMINATE: &str = "
        select pg_terminate_backend(pid, 5000) from pg_stat_activity
         where datname = current_database() and pid <> pg_backend_pid()
    ";
    client.execute(TERMINATE, &[]).await.unwrap();
    let batch = batch_at(now(), vec![failure("pi", at(0))]);
    for _ in 0..2 {
        let error = behind.writer.write(&batch).await.unwrap_err();
        assert!(matches!(error, StoreError::Unavailable(_)), "{error:?}");
    }
    behind.proxy.set(Fault::None);
    behind.writer.write(&batch).await.unwrap();
    // A closed connection alone is nobody's concern: the batch goes over a new one.
    client.execute(TERMINATE, &[]).await.unwrap();
    behind.writer.write(&batch_at(now(), vec![success("pi", at(1))])).await.unwrap();
    assert_eq!(behind.stored("pi").await, 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_acknowledged_survives_a_crash() {
    let server = PostgresServer::dedicated();
    let target = Target::Postgres(Box::new(server.create_database("pisync").await));
    let database = TestDatabase::elsewhere(target);
    let fixture = TestStore::prepare(database).await;
    let mut writer = fixture.writer();
    for (number, how) in [Stop::Immediate, Stop::Orderly].into_iter().enumerate() {
        let second = i64::try_from(number).unwrap();
        let batch = batch_at(now(), vec![failure("pi", at(second)), success("new", at(second))]);
        writer.write(&batch).await.unwrap();
        server.stop(how);
        let next = batch_at(now(), vec![failure("pi", at(10 + second))]);
        let error = writer.write(&next).await.unwrap_err();
        assert!(matches!(error, StoreError::Unavailable(_)), "{error:?}");
        assert!(fixture.store.ping().await.is_err());
        server.start();
        assert_eq!(stored(&fixture, "pi").await, 2 * number + 1);
        writer.write(&next).await.unwrap();
        assert_eq!(stored(&fixture, "pi").await, 2 * number + 2);
    }
}

/// As retention by hand would do it, or a restored dump.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_partition_that_others_drop_is_made_again() {
    let fixture = TestStore::prepare(TestDatabase::postgres().await).await;
    let mut writer = fixture.writer();
    write(&mut *writer, vec![success("pi", at(0))]).await;
    fixture.database.execute("drop table sync_events_2026_11").await;
    let ids = write(&mut *writer, vec![success("pi", at(1)), failure("new", at(1))]).await.ids;
    assert_eq!(ids.len(), 2);
    assert_eq!(stored(&fixture, "new").await, 1);
    // One that was detached is attached again, with what is in it.
    let detach = "alter table sync_events detach partition sync_events_2026_11";
    fixture.database.execute(detach).await;
    write(&mut *writer, vec![success("new", at(2))]).await;
    assert_eq!(stored(&fixture, "new").await, 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn foreign_sql_cannot_add_an_event_of_an_unknown_device() {
    let fixture = TestStore::prepare(TestDatabase::postgres().await).await;
    let Target::Postgres(target) = fixture.target() else { unreachable!() };
    let client = connect(&target.config).await;
    let insert = |device: &str| {
        let received = now();
        format!(
            "insert into sync_events (device_id, timestamp, created_at)
             values ('{device}', '{received}', '{received}')"
        )
    };
    let error = client.batch_execute(&insert("nobody")).await.unwrap_err();
    assert_eq!(error.code(), Some(&SqlState::FOREIGN_KEY_VIOLATION));
    write(&mut *fixture.writer(), vec![success("pi", at(0))]).await;
    client.batch_execute(&insert("pi")).await.unwrap();
    // In a partition itself, too.
    let into_partition = insert("nobody").replace("sync_events", "sync_events_2026_11");
    let error = client.batch_execute(&into_partition).await.unwrap_err();
    assert_eq!(error.code(), Some(&SqlState::FOREIGN_KEY_VIOLATION));
}
