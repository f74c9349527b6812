//! Rules of the database's owner, stated by triggers: whatever they raise refuses the data alone. So the batch is
//! halved until its culprit stands alone (see `ingest`), and nothing is taken for a database that is away.

use pisync::store::StoreError;
use pisync_core::SyncEvent;

use crate::support::{
    events::{at, batch_at, device_id, failure, now, success, write},
    store::TestStore,
};

both_stores!(whatever_a_trigger_raises_refuses_the_data);

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
