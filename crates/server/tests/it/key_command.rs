//! `pisync key`: keys made, listed and revoked on the command line, and a server that wants one before it starts.

use pisync::store::Target;

use crate::support::http::event;
use crate::support::locked_server::{forbidden, unauthorized, until};
use crate::support::program::Program;
use crate::support::store::{Fixture, TestDatabase};

both_stores!(
    the_command_line_makes_lists_and_revokes,
    no_start_before_the_network_without_an_admin,
);

/// A database, and a program that is told of it.
struct Installed {
    program: Program,
    database: TestDatabase,
}

impl Fixture for Installed {
    async fn prepare(database: TestDatabase) -> Self {
        let program = Program::new()
            .with("DATABASE_URL", crate::support::program::url(&database.target))
            .with("PORT", 0);
        Self { program, database }
    }

    fn into_database(self) -> TestDatabase {
        self.database
    }
}

async fn the_command_line_makes_lists_and_revokes(installed: &Installed) {
    let Installed { program, database } = installed;
    if matches!(database.target, Target::Postgres(_)) {
        let refused = program.run(&["key", "create", "--scope", "admin"]);
        assert!(refused.failure().contains("run `pisync migrate up` first"), "{refused:?}");
    }
    program.run(&["migrate", "up"]).success();
    let none = program.run(&["key", "list"]);
    assert_eq!(none.success(), "there are no keys yet; make one with `pisync key create`\n");
    let create = |arguments: &[&str]| {
        let ended = program.run(&[&["key", "create", "--scope"], arguments].concat());
        ended.made_key().to_owned()
    };
    let admin = create(&["admin", "--name", "the boss", "--expires", "90d"]);
    let serving = program.serve(&["--auth", "required"]);
    // Beside the running server.
    let device = create(&["ingest", "--device", "pi-1"]);
    let group = create(&["ingest", "--group", "school 17"]);
    let client = |key: &str| serving.client.with_key(key);
    until(async || client(&group).get("/api/stats").await.status == 403).await;
    client(&admin).get("/api/stats").await.data(200);
    client(&device).report(&event("pi-1")).await.data(201);
    forbidden(&client(&device).report(&event("pi-2")).await, "for other devices");
    client(&group).report(&event("pi-2")).await.data(201);

    let listed = program.run(&["key", "list"]);
    let lines: Vec<_> = listed.success().lines().collect();
    assert_eq!(lines.len(), 4, "{listed:?}");
    assert!(lines[0].starts_with("NUMBER  KEY        SCOPE   FOR"), "{listed:?}");
    for (line, words) in lines[1..].iter().zip([
        ["1 ", &admin[..8], "admin", "all", "until 20", "the boss"],
        ["2 ", &device[..8], "ingest", "device pi-1", "valid", ""],
        ["3 ", &group[..8], "ingest", "group school 17", "valid", ""],
    ]) {
        assert!(words.iter().all(|word| line.contains(word)), "{words:?} in {line}");
    }
    for key in [&admin, &device, &group] {
        assert!(!listed.stdout.contains(key.as_str()));
    }

    let revoked = program.run(&["key", "revoke", "2", "3"]);
    assert_eq!(revoked.success(), "revoked key 2\nrevoked key 3\n");
    until(async || client(&device).report(&event("pi-1")).await.status == 401).await;
    let again = program.run(&["key", "revoke", "2"]);
    assert_eq!(again.success(), "key 2 was revoked before\n");
    let unknown = program.run(&["key", "revoke", "7", "8"]);
    assert_eq!(unknown.failure(), "no such key: 7, 8; `pisync key list` lists them");
    let listed = program.run(&["key", "list"]);
    assert_eq!(listed.success().matches("revoked 20").count(), 2, "{listed:?}");
    let ended = serving.stop();
    let said = format!("{ended:?}{:?}", program.log("combined.log"));
    for key in [&admin, &device, &group] {
        assert!(!said.contains(key.as_str()), "{said}");
    }
}

#[test]
fn requests_for_keys_that_make_no_sense() {
    let program = Program::new();
    for (arguments, code, expected) in [
        (&["--scope", "all"][..], 2, "[possible values: ingest, read, operate, admin]"),
        (&[], 2, "--scope <SCOPE>"),
        (&["--scope", "ingest", "--device", "a", "--group", "b"], 2, "cannot be used with"),
        (
            &["--scope", "read", "--device", "pi"],
            2,
            "--device is only for keys of the scope ingest",
        ),
        (
            &["--scope", "admin", "--group", "g", "--expires", "2020-01-01"],
            2,
            "--group is only for keys of the scope ingest; --expires must be in the future",
        ),
        (&["--scope", "ingest", "--device", ""], 2, "--device is not allowed to be empty"),
        (&["--scope", "read", "--name", "two\nlines"], 2, "--name must not contain control"),
        (&["--scope", "read", "--expires", "soon"], 2, "--expires soon: expected so many hours"),
        (&["--scope", "read", "--expires", "2020-01-01"], 2, "--expires must be in the future"),
    ] {
        let ended = program.run(&[&["key", "create"], arguments].concat());
        assert_eq!(ended.code(), code, "{ended:?}");
        assert!(ended.stderr.contains(expected), "{ended:?}");
    }
    assert!(program.names_in(".").is_empty(), "nothing was made");
}

async fn no_start_before_the_network_without_an_admin(installed: &Installed) {
    let Installed { program, .. } = installed;
    let setup = program.run(&["db", "setup"]);
    setup.success();
    program.run(&["key", "create", "--scope", "ingest"]).made_key();
    let refused = program.run(&["serve", "--host", "0.0.0.0"]);
    let expected = "listening on 0.0.0.0:";
    assert!(refused.failure().starts_with(expected), "{refused:?}");
    assert!(
        refused.failure().ends_with(
            "needs a key, and there is none yet: make one with `pisync key create --scope admin`, or let everybody in with AUTH=off"
        ),
        "{refused:?}"
    );
    // Expressly.
    let open = program.serve(&["--host", "0.0.0.0", "--auth", "off"]);
    open.client.get("/api/stats").await.data(200);
    let log = open.stop().stdout;
    assert!(log.contains("whoever reaches the server can read and write everything"), "{log}");
    // With a key: also who comes from this machine is asked for it.
    let made = program.run(&["key", "create", "--scope", "admin"]);
    let key = made.made_key();
    let guarded = program.serve(&["--host", "0.0.0.0"]);
    unauthorized(&guarded.client.get("/api/stats").await, "A key is needed");
    guarded.client.with_key(key).get("/api/stats").await.data(200);
    guarded.stop();
    // Revoked, it is as if there were none.
    program.run(&["key", "revoke", "2"]).success();
    program.run(&["serve", "--host", "0.0.0.0"]).failure();
}
