//! `pisync doctor`: it finds what would keep a server from working, says what to do, changes nothing, and shows no password.

use std::{
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::Path,
};

use serde_json::{Value, json};
use tokio::net::TcpSocket;

use crate::{
    json_output::documented,
    support::{
        http::event,
        node_service::SCHEMA,
        postgres::is_root,
        program::{Ended, Installed, Program, url},
        server::unused_address,
        store::TestDatabase,
    },
};

both_stores!(
    a_server_that_is_well,
    what_is_looked_at_stays_as_it_is,
    a_schema_that_is_not_current,
    a_database_that_is_not_to_be_used,
    access_is_judged_as_the_server_judges_it,
);

/// The state and the message of a check.
#[track_caller]
fn found<'a>(ended: &'a Ended, check: &str) -> (&'a str, &'a str) {
    let lines = ended.stdout.lines().filter_map(|line| {
        let (state, rest) = line.split_at_checked(9)?;
        let (name, message) = rest.split_at_checked(15)?;
        (name.trim_end() == check).then_some((state.trim_end(), message))
    });
    let found: Vec<_> = lines.collect();
    assert_eq!(found.len(), 1, "{check}: {ended:?}");
    found[0]
}

async fn a_server_that_is_well(installed: &Installed) {
    let Installed { program, database } = installed;
    let serving = program.serve(&[]);
    serving.client.store(&event("pi")).await;
    let port = serving.address().port().to_string();
    let ended = program.run(&["doctor", "--port", &port]);
    assert_eq!((ended.code(), ended.stderr.as_str()), (0, ""), "{ended:?}");
    let server = format!("http://127.0.0.1:{port}");
    let configuration = format!("{} at {server}", database.target);
    assert_eq!(found(&ended, "configuration"), ("ok", configuration.as_str()));
    assert_eq!(found(&ended, "database"), ("ok", format!("{} answers", database.target).as_str()));
    assert_eq!(found(&ended, "server"), ("ok", format!("{server} is ready").as_str()));
    for check in ["schema", "clock", "log folder"] {
        assert_eq!(found(&ended, check).0, "ok", "{check}: {ended:?}");
    }
    assert!(ended.stdout.contains(" MiB are free on the disk of "), "{ended:?}");
    // The same for programs.
    let ended = program.run(&["doctor", "--json", "--port", &port]);
    let document = documented("doctor", &ended);
    let checks = document["checks"].as_array().unwrap();
    assert!(checks.len() > 5 && document["state"] != "failed", "{document}");
    let expected =
        json!({"check": "server", "state": "ok", "message": format!("{server} is ready")});
    assert_eq!(checks.last(), Some(&expected));
    assert_eq!(ended.stderr.lines().count(), checks.len(), "{ended:?}");
    serving.stop();
    // One that does not run is no fault; but a server that uses the database must answer.
    let ended = program.run(&["doctor", "--port", &port]);
    assert_eq!(ended.code(), 0, "{ended:?}");
    let (state, message) = found(&ended, "server");
    assert!(state == "warning" && message.contains("start it with `pisync serve`"), "{ended:?}");
    if !installed.is_postgres() {
        assert_eq!(
            found(&ended, "ingest journal"),
            ("ok", "events that the next start applies: 0")
        );
        let serving = program.serve(&[]);
        let ended = program.run(&["doctor", "--port", &unused_address().port().to_string()]);
        assert_eq!((ended.code(), found(&ended, "server").0), (1, "failed"), "{ended:?}");
        assert_eq!(ended.stderr, "pisync: failed checks: 1; see above what to do\n");
        serving.stop();
    }
}

/// Everything in a folder and what it holds.
fn contents(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(contents(&path));
        } else if !["-wal", "-shm"].iter().any(|ending| path.to_string_lossy().ends_with(ending)) {
            // SQLite's log is there while somebody looks; what was in it is in the tables.
            let mut bytes = fs::read(&path).unwrap();
            if path.extension().is_some_and(|ending| ending == "db") && bytes.len() > 100 {
                // Two places in its header count how often the log was begun anew.
                bytes[24..28].fill(0);
                bytes[92..96].fill(0);
            }
            found.push((path.display().to_string(), bytes));
        }
    }
    found.sort();
    found
}

async fn what_is_looked_at_stays_as_it_is(installed: &Installed) {
    let Installed { program, database } = installed;
    let places = || {
        let beside = database.file().and_then(|file| file.parent().map(Path::to_owned));
        let mut all = contents(&program.path(""));
        all.extend(
            beside.filter(|folder| folder.exists()).into_iter().flat_map(|one| contents(&one)),
        );
        all
    };
    // Where nothing is yet, an older schema, and a database that was closed.
    let check = async |at: &str| {
        let (before, tables) = (places(), database.tables().await);
        let ended = program.run(&["doctor"]);
        assert!(ended.stdout.contains("configuration"), "{at}: {ended:?}");
        assert_eq!(database.tables().await, tables, "{at}");
        assert!(places() == before, "{at}: {ended:?}");
    };
    if installed.is_postgres() {
        check("nothing").await;
    } else {
        let before = places();
        let ended = program.run(&["doctor"]);
        let (state, message) = found(&ended, "database");
        assert!(state == "warning" && message.starts_with("no database at "), "{ended:?}");
        assert_eq!(ended.code(), 0, "{ended:?}");
        assert!(places() == before, "{ended:?}");
    }
    program.run(&["migrate", "up"]).success();
    program.run(&["migrate", "down", "--yes"]).success();
    check("an older schema").await;
    let serving = program.serve(&["--log-dir", "none"]);
    serving.client.store(&event("pi")).await;
    serving.stop();
    check("a database").await;
}

async fn a_schema_that_is_not_current(installed: &Installed) {
    let Installed { program, .. } = installed;
    program.run(&["migrate", "up"]).success();
    program.run(&["migrate", "down", "--yes"]).success();
    let ended = program.run(&["doctor"]);
    let (state, message) = found(&ended, "schema");
    assert!(
        state == "warning" && message.contains("which the next start applies: 20"),
        "{ended:?}"
    );
    assert_eq!(ended.code(), 0, "{ended:?}");
    let ended = program.run(&["doctor", "--auto-migrate", "false"]);
    let (state, message) = found(&ended, "schema");
    // SQLite's is brought up to date in any case.
    let expected = if installed.is_postgres() {
        assert!(message.ends_with("; run `pisync migrate up`"), "{ended:?}");
        ("failed", 1)
    } else {
        ("warning", 0)
    };
    assert_eq!((state, ended.code()), expected, "{ended:?}");
}

async fn a_database_that_is_not_to_be_used(installed: &Installed) {
    let Installed { program, database } = installed;
    program.run(&["migrate", "up"]).success();
    database.execute("update pisync_migrations set checksum = 'other'").await;
    let ended = program.run(&["doctor"]);
    let (state, message) = found(&ended, "schema");
    assert!(state == "failed" && message.contains("(edited since)"), "{ended:?}");
    assert_eq!(ended.code(), 1, "{ended:?}");
    if installed.is_postgres() {
        let theirs = TestDatabase::postgres().await;
        theirs.execute(SCHEMA).await;
        let ended = program.run(&["doctor", "--database-url", &url(&theirs.target)]);
        let (state, message) = found(&ended, "database");
        assert!(state == "failed" && message.contains("made by the Node PiSync"), "{ended:?}");
        theirs.remove().await;
    }
}

/// A setting that makes no sense is what it is there to find, wherever it stands, and without showing a password.
#[test]
fn settings_that_make_no_sense_are_a_finding() {
    for (name, value, expected) in [
        ("PORT", "http", "invalid value 'http' for '--port <PORT>'"),
        ("AUTH", "maybe", "AUTH=maybe: expected auto, off or required"),
        ("DATABASE_URL", "mysql://u:s3cret-word@h", "DATABASE_URL must begin with"),
        ("DB_NAME", "postgres://u:s3cret-word@h", "--db-name <DB_NAME> is not for the URL"),
        ("TLS_CERT", "cert.pem", "TLS_CERT is set, but TLS_KEY is not"),
        ("RETENTION_DAYS", "1", "RETENTION_DAYS=1: must be 0"),
        ("HOST", "no such host", "HOST is neither"),
    ] {
        let set = Program::new().with(name, value).run(&["doctor"]);
        let in_file =
            Program::new().with_file(".env", &format!("{name}={value}\n")).run(&["doctor"]);
        for (ended, origin) in
            [(set, "is set in the environment"), (in_file, "is set in line 1 of .env")]
        {
            assert_eq!(ended.code(), 1, "{ended:?}");
            let (state, message) = found(&ended, "configuration");
            assert!(state == "failed" && message.contains(expected), "{ended:?}");
            assert!(message.ends_with(&format!("; {name} {origin}")), "{ended:?}");
            assert!(!format!("{ended:?}").contains("s3cret-word"), "{ended:?}");
        }
    }
    // All of them are named.
    let several = "AUTH=maybe\nTLS_KEY=key.pem\nRETENTION_DAYS=1\nCORS_ORIGINS=*\n";
    let ended = Program::new().with_file(".env", several).run(&["doctor"]);
    let (_, message) = found(&ended, "configuration");
    for name in ["AUTH=maybe", "TLS_KEY is set, but TLS_CERT", "RETENTION_DAYS=1", "CORS_ORIGINS:"]
    {
        assert!(message.contains(name), "{ended:?}");
    }
    let pem = [("TLS_CERT", "absent.pem"), ("TLS_KEY", "absent.pem")];
    let program =
        pem.into_iter().fold(Program::new(), |program, (name, file)| program.with(name, file));
    let ended = program.run(&["doctor"]);
    assert!(ended.stdout.contains("; set TLS_CERT to a PEM file that the server may read\n"));
    // What is typed is wrong usage.
    assert_eq!(Program::new().run(&["doctor", "--port", "http"]).code(), 2);
    let broken = Program::new().with_file(".env", "DB_PASSWORD=s3cret-word\0\n").run(&["doctor"]);
    let (state, message) = found(&broken, "configuration");
    assert!(state == "failed" && message.contains("contains a NUL byte"), "{broken:?}");
    let document = Program::new().with("PORT", "x").run(&["doctor", "--json"]).document();
    assert_eq!(
        (&document["state"], &document["checks"][0]["state"]),
        (&json!("failed"), &json!("failed"))
    );
}

#[test]
fn folders_files_and_passwords() {
    let closed = unused_address();
    let secret = format!("postgres://u:s3cret-word@{closed}/pisync");
    let ended = Program::new().with("DATABASE_URL", &secret).run(&["doctor"]);
    let (state, message) = found(&ended, "database");
    assert_eq!((ended.code(), state), (1, "failed"), "{ended:?}");
    let advice = "; start PostgreSQL there, or set DB_HOST and DB_PORT, or DATABASE_URL, to where it listens";
    assert!(message.ends_with(advice), "{ended:?}");
    assert!(!format!("{ended:?}").contains("s3cret-word"), "{ended:?}");

    let program = Program::new()
        .with_file("file", "")
        .with_file(".env", "DB_PASSWORD=s3cret-word\nMISSPELT=1\nodd line\n");
    fs::set_permissions(program.path(".env"), fs::Permissions::from_mode(0o644)).unwrap();
    let sqlite = ["--database-url", "sqlite:data/pisync.db"];
    program.run(&[&["db", "setup"][..], &sqlite].concat());
    fs::set_permissions(program.path("data/pisync.db"), fs::Permissions::from_mode(0o644)).unwrap();
    let ended =
        program.run(&[&["doctor", "--json", "--log-dir", "file/logs"][..], &sqlite].concat());
    assert_eq!(ended.code(), 1, "{ended:?}");
    let document = ended.document();
    let findings: Vec<(&str, &str, &str)> = document["checks"]
        .as_array()
        .unwrap()
        .iter()
        .map(|one| {
            let text = |name: &str| one[name].as_str().unwrap();
            (text("check"), text("state"), text("message"))
        })
        .collect();
    for (check, state, message) in [
        ("configuration", "warning", "line 3 of .env is no setting"),
        (
            "configuration",
            "warning",
            "no command reads the setting MISSPELT of .env; is it misspelt?",
        ),
        (
            "configuration",
            "warning",
            "others may read .env, which holds a password: chmod 600 .env",
        ),
        ("database file", "warning", "everybody may read data/pisync.db"),
        ("data folder", "ok", "data can be written to"),
        ("log folder", "failed", "file is not a folder; set LOG_DIR to another folder"),
    ] {
        let is_it = |one: &&(&str, &str, &str)| {
            one.0 == check && one.1 == state && one.2.starts_with(message)
        };
        assert!(findings.iter().any(|one| is_it(&one)), "{check} {message}: {document:#}");
    }
    assert!(!format!("{ended:?}").contains("s3cret-word"), "{ended:?}");
    assert_ne!(document["state"], Value::Null);
}

/// Where other machines can reach it, a server wants an admin key. `doctor` says so beforehand.
async fn access_is_judged_as_the_server_judges_it(installed: &Installed) {
    let Installed { program, .. } = installed;
    let needs_key = " needs a key, and there is none yet: make one with `pisync key create";
    let refuses = |host: &str, auth: &str| {
        let words = ["--host", host, "--auth", auth, "--log-dir", "none"];
        let ended = program.run(&[&["doctor"][..], &words].concat());
        let served = program.run(&[&["serve"][..], &words].concat());
        assert!(served.failure().contains(needs_key), "{served:?}");
        let (state, message) = found(&ended, "API keys");
        assert!(state == "failed" && message.contains(needs_key), "{ended:?}");
        assert_eq!(ended.code(), 1, "{ended:?}");
    };
    let accepts = |host: &str, auth: &str| {
        let words = ["--host", host, "--auth", auth, "--log-dir", "none"];
        let ended = program.run(&[&["doctor"][..], &words].concat());
        assert_eq!(ended.code(), 0, "{ended:?}");
        assert!(!ended.stdout.contains("API keys"), "{ended:?}");
        program.serve(&[&["serve"][..], &words].concat()).stop();
    };
    // With nothing there yet, and with all tables.
    refuses("0.0.0.0", "auto");
    program.run(&["db", "setup"]).success();
    refuses("0.0.0.0", "auto");
    program.run(&["key", "create", "--scope", "read"]).made_key();
    refuses("0.0.0.0", "auto");
    accepts("127.0.0.1", "auto");
    accepts("0.0.0.0", "off");
    program.run(&["key", "create", "--scope", "admin"]).made_key();
    accepts("0.0.0.0", "auto");
    program.run(&["key", "revoke", "2"]).success();
    refuses("0.0.0.0", "auto");
}

#[tokio::test]
async fn an_address_that_cannot_be_listened_on_is_a_finding() {
    // Bound and not listened on: nobody answers there, and nobody else can have it.
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind(([127, 0, 0, 1], 0).into()).unwrap();
    let taken = socket.local_addr().unwrap().port().to_string();
    for (host, port) in [("nonexistent.invalid", "0"), ("127.0.0.1", taken.as_str())] {
        let program = Program::new();
        let words = [&format!("--host={host}"), "--port", port, "--log-dir", "none"];
        let ended = program.run(&[&["doctor"][..], &words].concat());
        let (state, message) = found(&ended, "address");
        assert_eq!((ended.code(), state), (1, "failed"), "{ended:?}");
        assert_eq!(program.run(&[&["serve"][..], &words].concat()).failure(), message);
        assert!(message.ends_with("; set HOST and PORT to others"), "{ended:?}");
    }
    drop(socket);
    let ended = Program::new().run(&["doctor", "--port", &taken]);
    assert_eq!((ended.code(), found(&ended, "address").0), (0, "ok"), "{ended:?}");
}

/// What is in the way of the database is said by every command, and none makes anything.
#[test]
fn what_is_in_the_way_of_a_database_is_said() {
    type Prepare = fn(&Program);
    let link: Prepare = |program| symlink("/nonexistent/disk", program.path("data")).unwrap();
    let file: Prepare = |program| fs::write(program.path("data"), "").unwrap();
    let closed: Prepare = |program| {
        fs::create_dir(program.path("data")).unwrap();
        fs::write(program.path("data/pisync.db"), "x").unwrap();
        fs::set_permissions(program.path("data"), fs::Permissions::from_mode(0o000)).unwrap();
    };
    let cases = [
        (link, "data is a symbolic link that leads to no folder; is the disk mounted?"),
        (
            file,
            "data/pisync.db: Not a directory (os error 20); set DATA_DIR or DATABASE_URL to a place",
        ),
        (
            closed,
            "data/pisync.db: Permission denied (os error 13); set DATA_DIR or DATABASE_URL to a place",
        ),
    ];
    for (prepare, expected) in cases {
        let mut program = Program::new();
        prepare(&program);
        if is_root() {
            // Root may search any folder.
            fs::set_permissions(program.path(""), fs::Permissions::from_mode(0o777)).unwrap();
            let nobody = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"];
            program = program.run_by(&nobody);
        }
        let before = program.names_in(".");
        for words in [
            &["migrate", "status"][..],
            &["migrate", "down", "--yes"],
            &["key", "list"],
            &["verify"],
            &["export"],
            &["backup", "copy.db"],
            &["journal", "inspect"],
        ] {
            let ended = program.run(words);
            assert!(ended.refusal().contains(expected), "{words:?}: {ended:?}");
            assert_eq!(ended.stdout, "", "{words:?}");
        }
        let ended = program.run(&["doctor", "--port", "0", "--log-dir", "none"]);
        assert_eq!(ended.code(), 1, "{ended:?}");
        let (state, message) = found(&ended, "database");
        assert!(state == "failed" && message.contains(expected), "{ended:?}");
        assert_eq!(found(&ended, "data folder").0, "failed", "{ended:?}");
        assert!(
            !ended.stdout.contains("pending")
                && !ended.stdout.contains("SQLite data/pisync.db answers")
        );
        assert_eq!(program.names_in("."), before);
        if program.path("data").is_dir() {
            let open = fs::Permissions::from_mode(0o755);
            fs::set_permissions(program.path("data"), open).unwrap();
            assert_eq!(program.names_in("data"), ["pisync.db"]);
        }
    }
}
