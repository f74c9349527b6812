//! The log of changes can be added to, and nothing else, whatever SQL is tried.

use pisync::store::{AuditEntry, Scope, Store};

use crate::support::store::{TestDatabase, TestStore, key_request};

both_stores!(it_is_append_only, it_can_be_added_to, it_is_counted_up_to_a_bound);

/// A store with three lines in its log.
async fn with_three_lines(fixture: &TestStore) -> Vec<String> {
    for _ in 0..3 {
        fixture.database.make_key(key_request(Scope::Read)).await;
    }
    let lines = lines(&*fixture.store).await;
    assert_eq!(lines.len(), 3);
    lines
}

async fn lines(store: &dyn Store) -> Vec<String> {
    let entries: Vec<AuditEntry> = store.audit(None, 100).await.unwrap();
    entries.iter().map(|entry| format!("{entry:?}")).collect()
}

const COLUMNS: &str = "(id, at, via, action, subject, details)";

/// Statements that would change or remove lines, or slip one in between them, where the lines are 1 to 3.
fn attempts(is_postgres: bool) -> Vec<String> {
    let line = |id: i64| {
        let at = if is_postgres { "now()" } else { "0" };
        format!("values ({id}, {at}, 'local', 'device.delete', 'x', '{{}}')")
    };
    let mut attempts = [
        "delete from audit_log",
        "delete from audit_log where id = 2",
        "update audit_log set subject = 'x'",
    ]
    .map(str::to_owned)
    .to_vec();
    if is_postgres {
        let insert = format!("insert into audit_log {COLUMNS} overriding system value");
        attempts.extend([
            "delete from audit_log where id = 77".to_owned(),
            "truncate audit_log".to_owned(),
            "truncate audit_log restart identity cascade".to_owned(),
            "with gone as (delete from audit_log returning *) select * from gone".to_owned(),
            format!("{insert} {} on conflict (id) do update set subject = 'x'", line(2)),
            format!("{insert} {} on conflict (id) do update set subject = 'x'", line(77)),
        ]);
        // As in a session that replays what another database did.
        let replayed = attempts.iter().map(|sql| {
            let replay = "begin; set local session_replication_role = replica";
            format!("{replay}; {sql}; commit")
        });
        attempts.extend(replayed.collect::<Vec<_>>());
        return attempts;
    }
    attempts.extend([
        "update or replace audit_log set id = 2 where id = 3".to_owned(),
        "update audit_log set id = 77 where id = 2".to_owned(),
        "update or ignore audit_log set subject = 'x'".to_owned(),
        format!(
            "insert or replace into audit_log {COLUMNS} select id, at, via, action, 'x', details from audit_log"
        ),
        format!(
            "insert into audit_log {COLUMNS} {} on conflict (id) do update set subject = 'x'",
            line(2)
        ),
        format!("replace into audit_log (rowid, at, via, action, subject, details) {}", line(3)),
    ]);
    for how in ["", "or replace", "or ignore", "or fail", "or rollback", "or abort"] {
        for id in [i64::MIN, -1, 0, 1, 2, 3] {
            attempts.push(format!("insert {how} into audit_log {COLUMNS} {}", line(id)));
        }
    }
    // By themselves, replacing inserts call delete triggers only with this.
    let eager = attempts.iter().map(|sql| format!("pragma recursive_triggers = on; {sql}"));
    attempts.extend(eager.collect::<Vec<_>>());
    attempts
}

async fn it_is_append_only(fixture: &TestStore) {
    let before = with_three_lines(fixture).await;
    for sql in attempts(fixture.is_postgres()) {
        let target = fixture.target().clone();
        let (attempt, tried) = (TestDatabase::elsewhere(target), sql.clone());
        let refused = tokio::spawn(async move { attempt.execute(&tried).await }).await.unwrap_err();
        let panic = refused.into_panic();
        let why = panic.downcast_ref::<String>().expect("an error's text");
        assert!(why.contains("audit_log is append-only"), "{sql}: {why}");
        assert_eq!(lines(&*fixture.store).await, before, "{sql}");
    }
}

/// What is refused leaves nothing behind that would keep out the lines to come.
async fn it_can_be_added_to(fixture: &TestStore) {
    let before = with_three_lines(fixture).await;
    // By the server, and by whoever else keeps to the order; ids may have gaps.
    let line = if fixture.is_postgres() {
        "(at, via, action, subject, details) values (now(), 'local', 'x', 'x', '{}')"
    } else {
        "(id, at, via, action, subject, details) values (77, 0, 'local', 'x', 'x', '{}')"
    };
    fixture.database.execute(&format!("insert into audit_log {line}")).await;
    fixture.database.make_key(key_request(Scope::Read)).await;
    let after = lines(&*fixture.store).await;
    assert_eq!(after.len(), 5);
    assert!(after[0].contains(r#"subject: "4""#), "{after:?}");
    assert_eq!(after[2..], before);
}

async fn it_is_counted_up_to_a_bound(fixture: &TestStore) {
    for (most, expected) in [(0, 0), (1, 0)] {
        assert_eq!(fixture.store.audit_length(most).await.unwrap(), expected);
    }
    with_three_lines(fixture).await;
    for (most, expected) in [(2, 2), (3, 3), (4, 3), (u32::MAX, 3)] {
        assert_eq!(fixture.store.audit_length(most).await.unwrap(), expected, "{most}");
    }
}
