//! Rules of the database's owner, stated by triggers: whatever they raise refuses the data alone. So the batch is
//! halved until its culprit stands alone (see `ingest`), and nothing is taken for a database that is away.

use std::sync::Arc;

use pisync::store::{Batch, NewKey, Revocation, Scope, StoreError};
use pisync_core::{EventId, SyncEvent};

use crate::support::{
    events::{at, batch_at, device_id, failure, job_name, now, somebody, success, write},
    store::{TestStore, assert_right, differences},
};

both_stores!(
    whatever_a_trigger_raises_refuses_the_data,
    whatever_a_trigger_drops_refuses_the_data,
    a_change_of_keys_that_a_trigger_drops_is_no_success,
);

/// What a trigger on PostgreSQL may do about an event: say no in its own words, with a code that means something
/// else elsewhere, with one that nobody else has, or by a mistake.
const POSTGRES: [&str; 19] = [
    "raise exception 'no'",
    "raise exception 'no' using errcode = 'P0002'",
    "raise exception using errcode = 'check_violation'",
    "raise exception 'no' using errcode = 'unique_violation'",
    "raise exception 'no' using errcode = 'foreign_key_violation'",
    "raise exception 'no' using errcode = '22023'",
    "raise exception 'no' using errcode = '22012'",
    "raise exception 'no' using errcode = 'ZZ001'",
    "raise exception 'no' using errcode = '45000'",
    "raise exception 'no' using errcode = '0A000'",
    "raise exception 'no' using errcode = 'insufficient_privilege'",
    "raise exception 'no' using errcode = 'serialization_failure'",
    "raise exception 'no' using errcode = 'query_canceled'",
    "raise exception 'no' using errcode = 'disk_full'",
    "raise exception 'no' using errcode = 'connection_failure'",
    "raise exception 'no' using errcode = 'read_only_sql_transaction'",
    "perform 1 / (new.total_errors - 666)",
    "assert new.total_errors <> 666",
    "perform * from there_is_no_such_table",
];

/// On SQLite a rule may also end the whole transaction.
const SQLITE: [&str; 3] = ["raise(abort, 'no')", "raise(fail, 'no')", "raise(rollback, 'no')"];

/// Statements that make the rule and take it back.
fn rules(fixture: &TestStore) -> Vec<(String, &'static str)> {
    if !fixture.is_postgres() {
        let rule = |raise: &&str| {
            format!(
                "create trigger no_666 before insert on sync_events when new.total_errors = 666
                 begin select {raise}; end"
            )
        };
        return SQLITE.iter().map(|raise| (rule(raise), "drop trigger no_666")).collect();
    }
    let function = |raise: &&str| {
        format!(
            "create function no_666() returns trigger language plpgsql as $$
             begin if new.total_errors = 666 then {raise}; end if; return new; end $$;"
        )
    };
    let at_once = "create trigger no_666 before insert on sync_events
                      for each row execute function no_666()";
    // Only the commit hears of it.
    let at_commit = "create constraint trigger no_666 after insert on sync_events
                     deferrable initially deferred for each row execute function no_666()";
    let undo = "drop function no_666 cascade";
    let mut rules: Vec<_> =
        POSTGRES.iter().map(|raise| (function(raise) + at_once, undo)).collect();
    rules.push((function(&POSTGRES[0]) + at_commit, undo));
    rules
}

async fn whatever_a_trigger_raises_refuses_the_data(fixture: &TestStore) {
    let mut writer = fixture.writer();
    write(&mut *writer, vec![success("pi", at(0))]).await;
    let poison = || SyncEvent { total_errors: 666, ..failure("pi", at(1)) };
    let mut stored = 1;
    for (rule, undo) in rules(fixture) {
        fixture.database.execute(&rule).await;
        for events in [vec![success("pi", at(2)), poison(), success("new", at(2))], vec![poison()]]
        {
            let error = writer.write(&batch_at(now(), events)).await.unwrap_err();
            assert!(matches!(error, StoreError::Rejected(_)), "{rule}: {error:?}");
        }
        assert!(fixture.store.device(&device_id("new")).await.unwrap().is_none(), "{rule}");
        // The others pass.
        write(&mut *writer, vec![success("pi", at(3))]).await;
        stored += 1;
        let device = fixture.store.device(&device_id("pi")).await.unwrap().unwrap();
        assert_eq!(device.device.figures.total_syncs, stored, "{rule}");
        fixture.database.execute(undo).await;
    }
}

/// A trigger that drops rows of `table` under this condition without an error, and the statement that removes it.
fn dropping(fixture: &TestStore, table: &str, change: &str, when: &str) -> (String, String) {
    if !fixture.is_postgres() {
        let make = format!(
            "create trigger dropping before {change} on {table} when {when}
             begin select raise(ignore); end"
        );
        return (make, "drop trigger dropping".to_owned());
    }
    let make = format!(
        "create function dropping() returns trigger language plpgsql as $$
         begin if {when} then return null; end if; return new; end $$;
         create trigger dropping before {change} on {table} for each row execute function dropping()"
    );
    (make, "drop function dropping cascade".to_owned())
}

/// A row that is nowhere is not stored, although no statement has failed: neither the event, nor its id among the
/// known ones, nor its share of the figures, nor its device.
async fn whatever_a_trigger_drops_refuses_the_data(fixture: &TestStore) {
    let mut writer = fixture.writer();
    write(&mut *writer, vec![success("pi", at(0))]).await;
    let named = |name: &str, event: SyncEvent| SyncEvent {
        event_id: Some(EventId::new(name).unwrap()),
        job: Some(job_name(name)),
        ..event
    };
    let poison = || SyncEvent { total_errors: 666, ..named("666", failure("666", at(1))) };
    let mut stored = 1;
    for (table, change, when) in [
        ("sync_events", "insert", "new.total_errors = 666"),
        ("event_keys", "insert", "new.event_id = '666'"),
        ("device_jobs", "insert", "new.job = '666'"),
        ("device_jobs", "update", "new.job = '666'"),
        ("devices", "insert", "new.device_id = '666'"),
    ] {
        let is_update = change == "update";
        if is_update {
            // There is something to update.
            let known = SyncEvent { job: Some(job_name("666")), ..failure("666", at(0)) };
            write(&mut *writer, vec![known]).await;
        }
        let (rule, undo) = dropping(fixture, table, change, when);
        fixture.database.execute(&rule).await;
        let alone = vec![poison()];
        let among = vec![success("pi", at(2)), poison(), success("new", at(2))];
        // One that comes again makes its batch be looked through for others.
        let twice =
            vec![poison(), named("a", success("pi", at(2))), named("a", success("pi", at(2)))];
        for events in [alone, among, twice] {
            let at_once = Batch::new(now(), events.clone());
            // As an import has them.
            let mut received_before = Batch::new(now(), events);
            received_before.received_at = vec![at(-1); received_before.events.len()];
            for batch in [at_once, received_before] {
                let error = writer.write(&Arc::new(batch)).await.unwrap_err();
                assert!(matches!(error, StoreError::Rejected(_)), "{rule}: {error:?}");
            }
        }
        assert!(fixture.store.device(&device_id("new")).await.unwrap().is_none(), "{rule}");
        // The others pass.
        write(&mut *writer, vec![success("pi", at(3))]).await;
        stored += 1;
        let device = fixture.store.device(&device_id("pi")).await.unwrap().unwrap();
        assert_eq!(device.device.figures.total_syncs, stored, "{rule}");
        fixture.database.execute(&undo).await;
        // Nothing is left of it.
        let left = "(select count(*) from sync_events where total_errors = 666)";
        assert_eq!(fixture.database.number(left).await, 0, "{rule}");
        if is_update {
            fixture.store.delete_device(&device_id("666"), &somebody()).await.unwrap();
        }
        assert_right(&differences(&*fixture.store, false).await);
    }
}

/// Who is told that a key is there, or revoked, relies on it; and a change without its line in the audit log is none.
async fn a_change_of_keys_that_a_trigger_drops_is_no_success(fixture: &TestStore) {
    let key = |hash: u8| NewKey {
        hash: [hash; 32],
        hint: "abcd".to_owned(),
        name: None,
        scope: Scope::Read,
        device_id: None,
        group: None,
        expires_at: None,
    };
    let id = fixture.store.create_key(&key(0), &somebody()).await.unwrap();
    for (hash, (table, change)) in (1_u8..).zip([
        ("api_keys", "insert"),
        ("api_keys", "update"),
        ("api_key_changes", "update"),
        ("audit_log", "insert"),
    ]) {
        let (rule, undo) = dropping(fixture, table, change, "true");
        fixture.database.execute(&rule).await;
        if (table, change) != ("api_keys", "update") {
            fixture.store.create_key(&key(hash), &somebody()).await.unwrap_err();
        }
        if (table, change) != ("api_keys", "insert") {
            fixture.store.revoke_key(id, &somebody()).await.unwrap_err();
        }
        fixture.database.execute(&undo).await;
        let keys = fixture.store.keys().await.unwrap().keys;
        assert_eq!(keys.len(), 1, "{rule}");
        assert_eq!(keys[0].revoked_at, None, "{rule}");
    }
    let revoked = fixture.store.revoke_key(id, &somebody()).await.unwrap();
    assert_eq!(revoked, Revocation::Revoked);
}
