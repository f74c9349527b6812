//! `pisync channel` and `pisync secrets`, with and without a server beside them, and where secrets must not show: in nothing
//! that a process says, logs or writes.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use serde_json::{Value, json};

use crate::{
    json_output::documented,
    support::{
        http::{Client, column, send, with},
        program::{Ended, Installed, Program},
        receiver::{Receiver, Reply},
        store::{Fixture, TestDatabase},
    },
};

both_stores!(
    channels_are_made_listed_and_deleted,
    what_is_wrong_with_a_file_is_said_without_its_values,
    a_test_message_is_sent,
    a_webhook_gets_a_new_secret,
    secrets_are_stored_under_a_new_key,
    secrets_show_nowhere,
);

const KEY: &str = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=";
const NEW_KEY: &str = "ICEiIyQlJicoKSorLC0uLzAxMjM0NTY3ODk6Ozw9Pj8=";

/// A program that can store secrets: PostgreSQL needs a key for it.
struct WithKey(Installed);

impl Fixture for WithKey {
    async fn prepare(database: TestDatabase) -> Self {
        let Installed { program, database } = Installed::prepare(database).await;
        let needs_key = database.file().is_none();
        let program = if needs_key { program.with("SECRETS_KEY", KEY) } else { program };
        program.run(&["db", "setup"]).success();
        Self(Installed { program, database })
    }

    fn into_database(self) -> TestDatabase {
        self.0.into_database()
    }
}

impl WithKey {
    fn program(&self) -> &Program {
        &self.0.program
    }

    /// The file of the key, on SQLite.
    fn key_file(&self) -> Option<PathBuf> {
        self.0.database.file().map(|file| file.with_file_name("secrets.key"))
    }

    fn write(&self, name: &str, value: &Value) {
        fs::write(self.program().path(name), value.to_string()).unwrap();
    }
}

fn webhook() -> Value {
    json!({
        "name": "hook", "kind": "webhook", "url": "https://hooks.example/hook-path-s3cret",
        "headers": {"X-Token": "header-v4lue-s3cret"},
    })
}

fn ntfy() -> Value {
    json!({
        "name": "on call", "kind": "ntfy", "server": "https://ntfy.example/", "topic": "topic-s3cret-of-ours",
        "token": "tk_access-s3cret",
    })
}

/// The signing secret that stands alone on standard output.
#[track_caller]
fn signing_secret(ended: &Ended) -> String {
    assert_eq!(ended.code(), 0, "{ended:?}");
    let secret = ended.stdout.strip_suffix('\n').expect("a line");
    assert!(secret.starts_with("whsec_") && !secret.contains('\n'), "{ended:?}");
    secret.to_owned()
}

async fn channels_are_made_listed_and_deleted(installed: &WithKey) {
    let program = installed.program();
    let empty = program.run(&["channel", "list"]);
    assert!(empty.success().starts_with("there are no channels yet"), "{empty:?}");
    installed.write("hook.json", &webhook());
    let secret = signing_secret(&program.run(&["channel", "create", "hook.json"]));
    // From standard input, and as a document.
    installed.write("ntfy.json", &ntfy());
    let mut feeding = program.run_fed(&["channel", "create", "-", "--json"]);
    feeding.feed(&ntfy().to_string());
    let made = documented("channel create", &feeding.finish());
    assert_eq!((&made["id"], &made["signing_secret"]), (&json!(2), &Value::Null));
    let list = program.run(&["channel", "list"]);
    for text in ["hook", "on call", "https://ntfy.example/ …ours", "ok"] {
        assert!(list.success().contains(text), "{text}: {list:?}");
    }
    let listed = documented("channel list", &program.run(&["channel", "list", "--json"]));
    let serving = program.serve(&[]);
    let served = serving.client.get("/api/channels").await.data(200);
    assert_eq!(listed["channels"], served["channels"]);
    let shown = served["channels"][0]["signing_secret"].as_str().unwrap();
    assert_eq!(shown.trim_start_matches('…'), &secret[secret.len() - 4..]);
    // Beside the server, which sees it at once.
    let taken = program.run(&["channel", "create", "ntfy.json"]);
    assert_eq!(taken.failure(), "there is another channel with this name");
    let deleted = program.run(&["channel", "delete", "1", "9", "--json"]);
    assert_eq!(deleted.code(), 1);
    let document = deleted.document();
    assert_eq!((&document["deleted"], &document["unknown"]), (&json!([1]), &json!([9])));
    let left = serving.client.get("/api/channels").await.data(200)["channels"].take();
    assert_eq!(column(&left, "id"), [2]);
    serving.stop();
    let deleted = documented("channel delete", &program.run(&["channel", "delete", "2", "--json"]));
    assert_eq!((&deleted["deleted"], &deleted["dropped_notifications"]), (&json!([2]), &json!(0)));
}

async fn what_is_wrong_with_a_file_is_said_without_its_values(installed: &WithKey) {
    let program = installed.program();
    let wrong = json!({"name": "a", "kind": "slack", "url": "ftp://s3cret", "tokne": "s3cret"});
    installed.write("wrong.json", &wrong);
    fs::write(program.path("cut.json"), &wrong.to_string()[..40]).unwrap();
    for (file, complaints) in [
        (
            "wrong.json",
            &[
                "wrong.json is no channel:",
                "\"url\" must begin with https://",
                "\"tokne\" is not allowed",
            ][..],
        ),
        ("cut.json", &["cut.json is not JSON: "]),
        ("none.json", &["cannot read none.json"]),
    ] {
        let ended = program.run(&["channel", "create", file]);
        assert_eq!((ended.code(), ended.stdout.as_str()), (1, ""), "{ended:?}");
        for complaint in complaints {
            assert!(ended.stderr.contains(complaint), "{ended:?}");
        }
        assert!(!ended.stderr.contains("s3cret"), "{ended:?}");
    }
    let unknown = program.run(&["channel", "rotate", "9"]);
    assert_eq!(unknown.failure(), "no such channel; `pisync channel list` lists them");
}

async fn a_test_message_is_sent(installed: &WithKey) {
    let taking = Receiver::start(|_| Reply::status("200 OK")).await;
    let failing = Receiver::start(|_| Reply::status("503 Service Unavailable")).await;
    let program = installed.program();
    for (name, receiver) in [("taking", &taking), ("failing", &failing)] {
        let server = receiver.url("/");
        installed.write("ntfy.json", &with(ntfy(), &json!({"name": name, "server": server})));
        let refused = program.run(&["channel", "create", "ntfy.json"]);
        let expected =
            "\"server\" leads to 127.0.0.1, a loopback address; allow it with NOTIFY_ALLOW=";
        assert!(refused.code() == 1 && refused.stderr.contains(expected), "{refused:?}");
        let allow = ["channel", "create", "ntfy.json", "--notify-allow", "127.0.0.0/8"];
        program.run(&allow).success();
    }
    let test = |number, more: &[&str]| {
        program.run(
            &[&["channel", "test", number, "--notify-allow", "127.0.0.0/8"][..], more].concat(),
        )
    };
    let sent = test("1", &["--public-url", "https://fleet.example"]);
    assert!(sent.success().starts_with("channel 1 has taken a test message, in "), "{sent:?}");
    let received = taking.only();
    let message = received.json();
    assert_eq!(message["title"], "Test message from PiSync");
    assert!(message["click"].as_str().unwrap().starts_with("https://fleet.example"), "{message}");
    assert_eq!(received.header("authorization"), "Bearer tk_access-s3cret");
    let document = documented("channel test", &test("1", &["--json"]));
    assert_eq!((&document["delivered"], &document["status"]), (&json!(true), &json!(200)));
    let failed = test("2", &["--json"]);
    assert_eq!(failed.code(), 1);
    assert_eq!(failed.document()["status"], json!(503));
    let failure = test("2", &[]).failure().to_owned();
    assert!(failure.starts_with("channel 2 has not taken a test message: "), "{failure}");
    // Not by the settings of somebody who may not.
    let refused = program.run(&["channel", "test", "1"]);
    assert!(refused.failure().contains("NOTIFY_ALLOW"), "{refused:?}");
    assert_eq!(taking.received().len(), 2);
    let unknown = test("9", &[]);
    assert_eq!(unknown.failure(), "no such channel; `pisync channel list` lists them");
    // Mail needs a server for it.
    installed.write("mail.json", &json!({"name": "m", "kind": "email", "to": "ada@example.com"}));
    let refused = program.run(&["channel", "create", "mail.json"]);
    let expected = "there is no server for it; set SMTP_URL and SMTP_FROM";
    assert!(refused.code() == 1 && refused.stderr.contains(expected), "{refused:?}");
}

async fn a_webhook_gets_a_new_secret(installed: &WithKey) {
    let program = installed.program();
    installed.write("hook.json", &webhook());
    installed.write("ntfy.json", &ntfy());
    let first = signing_secret(&program.run(&["channel", "create", "hook.json"]));
    program.run(&["channel", "create", "ntfy.json"]).success();
    let second = signing_secret(&program.run(&["channel", "rotate", "1"]));
    let third = documented("channel rotate", &program.run(&["channel", "rotate", "1", "--json"]));
    let third = third["signing_secret"].as_str().unwrap();
    assert!(first != second && second != third, "{first} {second} {third}");
    let listed = program.run(&["channel", "list", "--json"]).document();
    let shown = listed["channels"][0]["signing_secret"].as_str().unwrap().to_owned();
    assert_eq!(shown.trim_start_matches('…'), &third[third.len() - 4..]);
    let refused = program.run(&["channel", "rotate", "2"]);
    assert_eq!(refused.failure(), "Channel has no signing secret: only webhooks have one");
}

async fn states(client: &Client) -> Vec<Value> {
    column(&client.get("/api/channels").await.data(200)["channels"], "state")
}

fn listed_states(program: &Program) -> Vec<Value> {
    column(&program.run(&["channel", "list", "--json"]).document()["channels"], "state")
}

async fn secrets_are_stored_under_a_new_key(installed: &WithKey) {
    let program = installed.program();
    installed.write("hook.json", &webhook());
    installed.write("ntfy.json", &ntfy());
    signing_secret(&program.run(&["channel", "create", "hook.json"]));
    program.run(&["channel", "create", "ntfy.json"]).success();
    let before = program.run(&["channel", "list"]).success().to_owned();
    let serving = program.serve(&[]);
    fs::write(program.path("new.key"), NEW_KEY).unwrap();
    if let Some(file) = installed.key_file() {
        rekey_in_its_file(installed, &file, &serving.client).await;
    } else {
        let usage = program.run(&["secrets", "rekey"]);
        let expected =
            "no file holds the present key: name a file with the new key behind --new-key";
        assert_eq!(usage.wrong_usage(), expected);
    }
    // From either to a key that is given.
    let rekeyed = program.run(&["secrets", "rekey", "--new-key", "new.key", "--json"]);
    let rekeyed = documented("secrets rekey", &rekeyed);
    assert_eq!((&rekeyed["channels"], &rekeyed["key_file"]), (&json!(2), &Value::Null));
    assert_eq!(states(&serving.client).await, ["locked", "locked"]);
    serving.stop();
    let again = program.run(&["secrets", "rekey", "--new-key", "new.key"]);
    assert!(again.success().starts_with("the secrets of 2 channels"), "{again:?}");
    // The others are locked until they have it.
    assert_eq!(listed_states(program), ["locked", "locked"]);
    fs::write(program.path("other.key"), "a".repeat(64)).unwrap();
    let locked = program.run(&["secrets", "rekey", "--new-key", "other.key"]);
    let said = locked.failure();
    assert!(
        said.contains("1 (hook), 2 (on call)") && said.contains("nothing was changed"),
        "{said}"
    );
    let url = crate::support::program::url(&installed.0.database.target);
    let knowing =
        Program::new().with("DATABASE_URL", url).with("SECRETS_KEY", NEW_KEY).with("PORT", 0);
    assert_eq!(knowing.run(&["channel", "list"]).success(), before);
    fs::write(program.path("bad.key"), "s3cret").unwrap();
    let bad = program.run(&["secrets", "rekey", "--new-key", "bad.key"]);
    assert!(bad.wrong_usage().starts_with("--new-key bad.key: must be 32 bytes"), "{bad:?}");
    assert!(!bad.stderr.contains("s3cret"), "{bad:?}");
    let audit = "select action || ' ' || details from audit_log where action = 'secrets.rekey'";
    let audited = installed.0.database.texts(audit).await;
    assert!(audited.contains(&"secrets.rekey {\"channels\":2}".to_owned()), "{audited:?}");
}

/// A server that runs takes the new key up by itself, also when a rekey was interrupted at any place.
async fn rekey_in_its_file(installed: &WithKey, file: &Path, server: &Client) {
    let program = installed.program();
    let text = || fs::read_to_string(file).unwrap();
    let next = file.with_file_name("secrets.key.new");
    let first = text();
    let rekeyed = documented("secrets rekey", &program.run(&["secrets", "rekey", "--json"]));
    assert_eq!(rekeyed["channels"], 2);
    let told = Path::new(rekeyed["key_file"].as_str().unwrap());
    assert_eq!(told.canonicalize().unwrap(), file.canonicalize().unwrap());
    let second = text();
    assert_ne!(first, second);
    assert_eq!(fs::metadata(file).unwrap().permissions().mode() & 0o777, 0o600);
    assert!(!next.exists());
    assert_eq!(states(server).await, ["ok", "ok"]);
    // Killed before the file was replaced.
    fs::write(file, &first).unwrap();
    fs::write(&next, &second).unwrap();
    assert_eq!(states(server).await, ["ok", "ok"]);
    let third = json!({"name": "third", "kind": "slack", "url": "https://hooks.slack.com/a"});
    let made = server.post("/api/channels", &third).await.data(201);
    program.run(&["secrets", "rekey"]).success();
    assert_eq!((text(), next.exists()), (second.clone(), false));
    assert_eq!(states(server).await, ["ok", "ok", "ok"]);
    // Killed before the transaction.
    fs::write(&next, KEY).unwrap();
    assert_eq!(states(server).await, ["ok", "ok", "ok"]);
    program.run(&["secrets", "rekey"]).success();
    assert_eq!((text(), next.exists()), (KEY.to_owned(), false));
    assert_eq!(states(server).await, ["ok", "ok", "ok"]);
    // What cannot be opened keeps everything as it is.
    let damage = "update channels set secrets = zeroblob(60) where name = 'third'";
    installed.0.database.execute(damage).await;
    let refused = program.run(&["secrets", "rekey"]);
    assert!(refused.failure().contains("3 (third)"), "{refused:?}");
    assert_eq!((text(), next.exists()), (KEY.to_owned(), false));
    assert_eq!(states(server).await, ["ok", "ok", "locked"]);
    server.delete(&format!("/api/channel/{}", made["id"])).await.data(200);
}

/// All bytes of the files in a folder, by their paths.
fn files(folder: &Path, found: &mut Vec<(PathBuf, Vec<u8>)>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files(&path, found);
        } else {
            // SQLite removes its files when it likes.
            let Ok(bytes) = fs::read(&path) else { continue };
            found.push((path, bytes));
        }
    }
}

/// A server that logs everything, and commands beside it: no secret is in what they say, in a log, in the database, or in a
/// backup of it.
async fn secrets_show_nowhere(installed: &WithKey) {
    let program = installed.program();
    let serving = program.serve(&["--log-level", "trace"]);
    let client = serving.client.clone();
    let mut secrets = vec![
        "hook-path-s3cret".to_owned(),
        "header-v4lue-s3cret".to_owned(),
        "topic-s3cret".to_owned(),
        "tk_access-s3cret".to_owned(),
        "misspelt-s3cret".to_owned(),
    ];
    let made = client.post("/api/channels", &webhook()).await.data(201);
    secrets.push(made["signing_secret"].as_str().unwrap().trim_start_matches("whsec_").to_owned());
    client.post("/api/channels", &ntfy()).await.data(201);
    client.post("/api/channels", &ntfy()).await.error(409);
    let misspelt = json!({"kind": "ntfy", "tokne": "misspelt-s3cret", "topic": ["topic-s3cret"]});
    client.post("/api/channels", &misspelt).await.complaints();
    client.patch("/api/channel/2", &json!({"topic": "topic-s3cret-topic-s3cret"})).await.data(200);
    let rotate = client.request(reqwest::Method::POST, "/api/channel/1/rotate-secret");
    let rotated = send(rotate).await.data(200);
    secrets
        .push(rotated["signing_secret"].as_str().unwrap().trim_start_matches("whsec_").to_owned());
    let metrics = client.get("/metrics").await.text().to_owned();

    let mut said = vec![metrics];
    let mut note = |ended: Ended| {
        said.push(ended.stdout.clone());
        said.push(ended.stderr.clone());
        ended
    };
    installed.write("wrong.json", &misspelt);
    note(program.run(&["channel", "create", "wrong.json", "--log-level", "trace"]));
    note(program.run(&["channel", "list", "--log-level", "trace"]));
    note(program.run(&["channel", "list", "--json"]));
    note(program.run(&["doctor", "--log-level", "trace"]));
    fs::remove_file(program.path("wrong.json")).unwrap();
    if let Some(file) = installed.key_file() {
        secrets.push(fs::read_to_string(&file).unwrap().trim().to_owned());
        note(program.run(&["backup", "copy.db"])).success();
        note(program.run(&["secrets", "rekey"]));
        secrets.push(fs::read_to_string(&file).unwrap().trim().to_owned());
    } else {
        secrets.push(KEY.to_owned());
    }
    note(serving.stop());

    let mut found = Vec::new();
    files(&program.path("."), &mut found);
    if let Some(database) = installed.0.database.file() {
        files(database.parent().unwrap(), &mut found);
        let copy = program.path("copy.db");
        assert!(found.iter().any(|(path, _)| path.ends_with(copy.file_name().unwrap())));
        // The key stands in its own file, and nowhere else.
        found.retain(|(path, _)| !path.ends_with("secrets.key"));
    } else {
        for table in ["channels", "audit_log", "notifications", "routes"] {
            let rows = format!("select row_to_json(t)::text from {table} t");
            let rows = installed.0.database.texts(&rows).await;
            found.push((table.into(), rows.join("\n").into_bytes()));
        }
        let bytes = "select encode(secrets, 'escape') from channels where secrets is not null";
        let bytes = installed.0.database.texts(bytes).await;
        assert_eq!(bytes.len(), 2);
        found.push(("secrets".into(), bytes.join("\n").into_bytes()));
    }
    let logs = found.iter().filter(|(path, _)| path.extension().is_some_and(|kind| kind == "log"));
    let logged: usize = logs.map(|(_, bytes)| bytes.len()).sum();
    assert!(logged > 2_000, "{logged} bytes were logged");
    found.extend(said.into_iter().map(|said| ("a process".into(), said.into_bytes())));
    for (path, bytes) in &found {
        for secret in &secrets {
            let shows = bytes.windows(secret.len()).any(|window| window == secret.as_bytes());
            assert!(!shows, "{} holds {secret}", path.display());
        }
    }
}

/// A key is hidden wherever it was typed or set, also by mistake.
#[test]
fn keys_are_not_shown_by_messages() {
    let typed = format!("--secrets-key={KEY}x");
    for (program, words) in [
        (Program::new(), vec!["serve", &*typed]),
        (Program::new(), vec!["serve", "--secrets-key", "mistyped-s3cret"]),
        (Program::new(), vec!["serve", "--port", KEY]),
        (Program::new(), vec!["channel", "list", "--data-dri", KEY]),
        (Program::new().with("SECRETS_KEY", "mistyped-s3cret"), vec!["serve"]),
        (Program::new().with("SECRETS_KEY", "mistyped-s3cret"), vec!["doctor"]),
        (Program::new().with("SECRETS_KEY", KEY), vec!["serve", "--help"]),
        (Program::new().with("LOG_LEVEL", KEY), vec!["serve"]),
        (
            Program::new().with_file(".env", "SECRETS_KEY=mistyped-s3cret\n"),
            vec!["channel", "list"],
        ),
    ] {
        let ended = program.run(&words);
        let said = format!("{}{}", ended.stdout, ended.stderr);
        assert!(!said.is_empty(), "{words:?}");
        for secret in [KEY, &KEY[..20], "mistyped-s3cret"] {
            assert!(!said.contains(secret), "{words:?}: {said}");
        }
    }
}

/// On PostgreSQL there is no file for a key.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn postgresql_needs_a_key_to_store_secrets() {
    let Installed { program, database } = Installed::prepare(TestDatabase::postgres().await).await;
    program.run(&["db", "setup"]).success();
    fs::write(program.path("ntfy.json"), ntfy().to_string()).unwrap();
    let refused = program.run(&["channel", "create", "ntfy.json"]);
    let expected = "secrets cannot be stored: set SECRETS_KEY, the same as that of the servers";
    assert_eq!(refused.failure(), expected);
    let usage = program.run(&["secrets", "rekey"]);
    let expected =
        "on PostgreSQL no file holds the key: name a file with the new key behind --new-key";
    assert_eq!(usage.wrong_usage(), expected);
    database.remove().await;
}
