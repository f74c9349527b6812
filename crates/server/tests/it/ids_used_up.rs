//! Rows of other programs that leave no ids for ours, on SQLite: what is acknowledged is stored all the same, nothing
//! more is acknowledged than could be, and the message names the row and a way on. PostgreSQL takes ids from sequences,
//! which other programs' rows do not move.

use rusqlite::Connection;
use serde_json::json;

use crate::support::{http::event, program::Program};

const DATABASE: &str = "data/pisync.db";

fn program() -> Program {
    Program::new()
        .with("PORT", 0)
        .with("RATE_LIMIT_SYNC_PER_MINUTE", 0)
        .with("RATE_LIMIT_API_PER_MINUTE", 0)
        .with_file("event.ndjson", &(event("imported").to_string() + "\n"))
}

fn execute(program: &Program, sql: &str) {
    let connection = Connection::open(program.path(DATABASE)).unwrap();
    connection.busy_timeout(std::time::Duration::from_secs(60)).unwrap();
    connection.execute_batch(sql).unwrap();
}

fn number(program: &Program, query: &str) -> i64 {
    let connection = Connection::open(program.path(DATABASE)).unwrap();
    connection.query_row(query, [], |row| row.get(0)).unwrap()
}

/// Somebody's event of `pi` with this id.
fn foreign(id: i64) -> String {
    format!(
        "insert into sync_events (id, device, timestamp, total_files_synced, total_errors, created_at)
         select {id}, id, 1750156200000, 99, 0, 1750156200000 from devices where device_id = 'pi';"
    )
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_event_with_the_last_id_there_is() {
    // The last one, the one before it, and one that leaves some, but fewer than a server reserves.
    for (highest, leaves_some) in
        [(i64::MAX, false), (i64::MAX - 1, false), (i64::MAX - 200_000, true)]
    {
        let program = program();
        let serving = program.serve(&[]);
        serving.client.store(&event("pi")).await;
        serving.client.get("/api/stats").await.data(200);
        // It also has taken the id that the next event is going to get.
        execute(&program, &(foreign(2) + &foreign(highest)));
        for id in 2..=5 {
            let stored = serving.client.store(&event("pi")).await;
            assert_eq!(stored["id"], id, "what was reserved is given");
        }
        // It comes after what the server has acknowledged, of which one event needs another id than its own.
        let imported = program.run(&["import", "event.ndjson"]);
        if leaves_some {
            imported.success();
        } else {
            let said =
                "no ids are left in sync_events: a row has the id 9223372036854775807; stop PiSync";
            assert!(imported.failure().contains(said), "{imported:?}");
        }
        let highest = number(&program, "select max(id) from sync_events");
        let said =
            format!("no ids are left in sync_events: a row has the id {highest}; stop PiSync");
        serving.signal("KILL");
        serving.wait();
        let all = 1 + 4 + 2 + i64::from(leaves_some);
        program.run(&["export", "--format", "ndjson", "--output", "all.ndjson"]).success();
        assert_eq!(number(&program, "select count(*) from sync_events"), all);

        let refused = program.run(&["serve"]);
        assert_eq!(refused.code(), 1, "{refused:?}");
        assert!(refused.stderr.contains(&said), "{refused:?}");
        // As it says.
        execute(
            &program,
            "update sync_events
                set id = id - 9223372036854575806 + (select max(id) from sync_events where id < 1000000)
              where id > 1000000;
             update sqlite_sequence set seq = (select max(id) from sync_events) where name = 'sync_events'",
        );
        let serving = program.serve(&[]);
        serving.client.store(&event("pi")).await;
        program.run(&["import", "--again", "event.ndjson"]).success();
        assert_eq!(number(&program, "select count(*) from sync_events"), all + 2);
        serving.stop();
        program.run(&["verify", "--repair"]).success();
        program.run(&["verify"]).success();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_device_and_a_line_of_the_audit_log_with_the_last_id_there_is() {
    let program = program();
    let serving = program.serve(&[]);
    serving.client.store(&event("pi")).await;
    serving.client.get("/api/stats").await.data(200);
    execute(
        &program,
        "insert into devices (id, device_id, created_at) values (9223372036854775807, 'last', 0)",
    );
    // Known devices go on.
    serving.client.store(&event("pi")).await;
    let imported = program.run(&["import", "event.ndjson"]);
    let said = "no ids are left in devices: a row has the id 9223372036854775807";
    assert!(imported.failure().contains(said), "{imported:?}");
    execute(
        &program,
        "update devices set id = 2 where device_id = 'last';
         update sqlite_sequence set seq = 2 where name = 'devices'",
    );
    program.run(&["import", "event.ndjson"]).success();

    execute(
        &program,
        "insert into audit_log (id, at, via, action, subject, details)
         values (9223372036854775807, 0, 'local', 'x', 'y', '{}')",
    );
    serving.client.patch("/api/device/pi", &json!({"name": "Pi"})).await.error(500);
    let made = program.run(&["key", "create", "--scope", "read"]);
    let said = "no ids are left in audit_log: a row has the id 9223372036854775807";
    assert!(made.failure().contains(said), "{made:?}");
    let documented = include_str!("../../../../docs/security.md");
    let documented = documented.split("```sql\n").nth(1).unwrap();
    execute(&program, documented.split("```").next().unwrap());
    let triggers =
        "select count(*) from sqlite_schema where type = 'trigger' and tbl_name = 'audit_log'";
    assert_eq!(number(&program, triggers), 4);
    serving.client.patch("/api/device/pi", &json!({"name": "Pi"})).await.data(200);
    program.run(&["key", "create", "--scope", "read"]).made_key();
    serving.stop();
    program.run(&["verify"]).success();
}
