//! Exit statuses are those that `--help` promises: 2 for what makes no sense, wherever it was typed or set, and for
//! commands that answer a question another one for "no" than for "could not find out".

use std::path::Path;

use pisync::cli::reference;

use crate::support::{
    http::event,
    program::{Installed, Program},
};

both_stores!(verify_tells_what_differs_from_what_it_could_not_find_out);

/// What a variable cannot be set to.
fn bad_value(variable: &str) -> &'static str {
    match variable {
        "PORT" => "http",
        "HOST" => "no such host",
        "APP_ENV" => "test",
        "AUTH" => "maybe",
        // Without the other one.
        "TLS_CERT" | "TLS_KEY" => "file.pem",
        "MAX_CLOCK_SKEW_SECONDS" => "86401",
        "EVENT_ID_RETENTION_DAYS" => "0",
        "RETENTION_DAYS" => "1",
        "TRUSTED_PROXIES" => "10.0.0.0/8,proxy",
        "CORS_ORIGINS" => "*",
        "LOG_LEVEL" => "loud",
        "AUTO_MIGRATE" => "perhaps",
        "FLEET" => "maybe",
        "DATABASE_URL" | "COPY_FROM" | "COPY_TO" => "mysql://localhost/pisync",
        "DB_HOST" => "a,,b",
        "DB_PORT" => "65536",
        // Any text is a value of these, apart from what is certain to be meant for another setting.
        "LOG_DIR" | "DB_NAME" | "DB_USER" | "DATA_DIR" | "MIGRATIONS_DIR" | "NODE_ENV" => {
            "postgres://localhost/pisync"
        }
        "PISYNC_KEY" => "psk_mistyped",
        "PUBLIC_URL" => "ftp://fleet.example",
        "SECRETS_KEY" => "no-key-at-all",
        "SMTP_URL" | "HEARTBEAT_URL" => "ftp://mail.example",
        // Without the other one.
        "SMTP_FROM" => "pisync@example.com",
        "NOTIFY_ALLOW" => "10.0.0.0/8,here",
        "NOTIFY_PROXY" => "ftp://proxy.example",
        // Any text at all; but several lines are no text of a file's line.
        "DB_PASSWORD" => "",
        limit if limit.starts_with("RATE_LIMIT_") || limit.starts_with("MAX_") => "-1",
        other => panic!("{other} is new: say here what it cannot be set to"),
    }
}

/// The words of a command that reads a setting, but for that setting.
fn words(command: &str, flag: &str) -> Vec<&'static str> {
    match (command, flag) {
        ("serve", _) => vec!["serve"],
        ("copy", "--from") => vec!["copy", "--to", "sqlite:new.db"],
        ("copy", _) => vec!["copy", "--from", "sqlite:old.db"],
        ("simulate", _) => vec!["simulate", "--url", "http://localhost:1"],
        other => panic!("{other:?} is new: say here how it is run"),
    }
}

/// Of a number it is said which are expected, and not what Rust's reader missed.
#[test]
fn a_bad_number_is_told_what_is_expected() {
    let settings = reference::settings();
    // Several hosts may have several ports.
    let number = |setting: &&reference::Setting| {
        setting.variable != "DB_PORT"
            && setting.default.as_ref().is_some_and(|default| default.parse::<u64>().is_ok())
    };
    let numbers: Vec<_> = settings.iter().filter(number).collect();
    assert!(numbers.len() >= 9, "{numbers:?}");
    let check = |program: &Program, words: &[&str]| {
        let ended = program.run(words);
        assert_eq!(ended.code(), 2, "{ended:?}");
        assert!(ended.stderr.contains(": expected a whole number from "), "{ended:?}");
    };
    for setting in numbers {
        for bad in ["x", "1.5", "-1", "", "99999999999999999999"] {
            let typed = format!("{}={bad}", setting.flag);
            check(&Program::new(), &["serve", &typed]);
        }
    }
    check(&Program::new(), &["migrate", "down", "two"]);
    check(&Program::new(), &["migrate", "down", "0"]);
    check(&Program::new(), &["key", "revoke", "first"]);
}

/// What is wrong with an option is said of the option, not of the API's field.
#[test]
fn a_message_names_the_option_that_was_typed() {
    for (option, value) in [("--device", "pi"), ("--group", "school")] {
        let words = ["key", "create", "--scope", "read", option, value];
        let ended = Program::new().run(&words);
        let expected = format!("{option} is only for keys of the scope ingest");
        assert_eq!(ended.wrong_usage(), expected);
    }
    let past = ["key", "create", "--scope", "read", "--expires", "2020-01-01"];
    let ended = Program::new().run(&past);
    assert!(ended.wrong_usage().starts_with("--expires "), "{ended:?}");
}

#[test]
fn a_bad_value_of_any_setting_ends_with_2() {
    for setting in reference::settings() {
        let (name, bad) = (setting.variable.as_str(), bad_value(&setting.variable));
        let words = words(&setting.commands[0], &setting.flag);
        if !bad.is_empty() {
            let typed = format!("{}={bad}", setting.flag);
            let typed = Program::new().run(&[&words[..], &[&typed]].concat());
            let set = Program::new().with(name, bad).run(&words);
            let in_file = Program::new().with_file(".env", &format!("{name}={bad}\n")).run(&words);
            for ended in [typed, set, in_file] {
                assert_eq!((ended.code(), ended.stdout.as_str()), (2, ""), "{name}: {ended:?}");
                assert!(ended.stderr.contains(&setting.flag) || ended.stderr.contains(name));
            }
        }
        // Of a path any bytes are a value.
        if !["DATA_DIR", "MIGRATIONS_DIR"].contains(&name) {
            let ended = Program::new().with_bytes(name, b"\xff").run(&words);
            let expected = format!("the environment variable {name} is not valid UTF-8 text");
            assert_eq!(ended.wrong_usage(), expected);
        }
        let ended = Program::new().with_file(".env", &format!("{name}=a\0b\n")).run(&words);
        let expected = format!("the value of {name} in line 1 of .env contains a NUL byte");
        assert!(ended.wrong_usage().starts_with(&expected), "{ended:?}");
    }
}

/// What an option, behind the words of its command, cannot be.
fn bad_option(words: &[&str]) -> (&'static str, &'static [&'static str]) {
    match words {
        // PostgreSQL knows which time zones there are: see `take_over`.
        ["migrate", "up", "--source-timezone"] => ("", &[]),
        [_, "--format"] => ("xml", &["events"]),
        ["import", "--rejected"] => ("postgres://localhost/pisync", &["events"]),
        ["export", "--output"] => ("postgres://localhost/pisync", &[]),
        ["export", "--from" | "--until"] => ("yesterday", &[]),
        ["export", "--device" | "--group"] => ("", &[]),
        ["key", "create", "--scope"] => ("everything", &[]),
        ["key", "create", "--expires"] => ("soon", &["--scope", "read"]),
        ["key", "create", "--device" | "--group" | "--name"] => {
            ("two\nlines", &["--scope", "ingest"])
        }
        // No group is a group, too.
        ["device" | "incident", "list", "--group"] | ["fleet", "status", "--group"] => {
            ("two\nlines", &[])
        }
        ["policy", "show", "--group" | "--device"] | ["incident", "list", "--device"] => ("", &[]),
        ["policy", "set", "--group" | "--device"] => ("", &["events"]),
        ["device", "pause", "--for" | "--until"] => ("soon", &["pi"]),
        ["fleet", "backtest", "--scenario"] => ("postgres://localhost/pisync", &[]),
        ["fleet", "backtest", "--from" | "--until"] => ("yesterday", &[]),
        ["fleet", "backtest", "--group" | "--policy"] => ("", &[]),
        ["incident", "list", "--state" | "--kind" | "--scope"] => ("other", &[]),
        ["incident", "list", "--since"] => ("yesterday", &[]),
        ["incident", "list", "--limit"] => ("0", &[]),
        ["incident", "ack", "--note"] => ("two\nlines", &["1"]),
        ["incident", "ack", "--for" | "--until"] => ("soon", &["1"]),
        ["window", "add", option] => bad_option_of_window(option),
        // There is nothing in it.
        ["secrets", "rekey", "--new-key"] => ("events", &[]),
        ["simulate", option] => bad_option_of_simulate(option),
        other => panic!("{other:?} is new: say here what it cannot be"),
    }
}

/// The other options are right.
fn bad_option_of_window(option: &str) -> (&'static str, &'static [&'static str]) {
    const DAY: [&str; 9] = [
        "w",
        "--effect",
        "closed",
        "--timezone",
        "UTC",
        "--from",
        "2026-01-01",
        "--until",
        "2026-01-02",
    ];
    match option {
        "--group" | "--device" | "--tag" => ("", &DAY),
        "--effect" => {
            ("shut", &["w", "--timezone", "UTC", "--from", "2026-01-01", "--until", "2026-01-02"])
        }
        "--timezone" => {
            ("Mars", &["w", "--effect", "closed", "--from", "2026-01-01", "--until", "2026-01-02"])
        }
        "--from" => {
            ("soon", &["w", "--effect", "closed", "--timezone", "UTC", "--until", "2026-01-02"])
        }
        "--until" => {
            ("soon", &["w", "--effect", "closed", "--timezone", "UTC", "--from", "2026-01-01"])
        }
        "--days" => (
            "mo",
            &["w", "--effect", "closed", "--timezone", "UTC", "--start", "07:00", "--end", "08:00"],
        ),
        "--start" => (
            "7",
            &["w", "--effect", "closed", "--timezone", "UTC", "--days", "mon", "--end", "08:00"],
        ),
        "--end" => (
            "8",
            &["w", "--effect", "closed", "--timezone", "UTC", "--days", "mon", "--start", "07:00"],
        ),
        other => panic!("{other} is new: say here what it cannot be"),
    }
}

fn bad_option_of_simulate(option: &str) -> (&'static str, &'static [&'static str]) {
    match option {
        "--url" => ("ftp://localhost", &[]),
        "--ca-cert" => ("nowhere.pem", &["--url", "https://localhost:1"]),
        "--devices" | "--every" | "--patience" | "--speed" | "--connections" | "--batch" => {
            ("0", &["--url", "http://localhost:1"])
        }
        "--groups" => ("501", &["--url", "http://localhost:1"]),
        "--jobs" => ("17", &["--url", "http://localhost:1"]),
        "--days" => ("3651", &["--url", "http://localhost:1"]),
        "--until" => ("9999-01-01", &["--url", "http://localhost:1"]),
        "--patterns" => ("none,disk", &["--url", "http://localhost:1"]),
        // Without --live.
        "--rate" => ("5", &["--url", "http://localhost:1"]),
        "--seed" | "--sample" | "--live" | "--clocks" => ("x", &["--url", "http://localhost:1"]),
        other => panic!("{other} is new: say here what it cannot be"),
    }
}

#[test]
fn a_bad_value_of_any_option_ends_with_2() {
    let program = Program::new().with_file("events", "");
    program.run(&["db", "setup"]).success();
    let is_refused = |words: &[&str]| {
        let ended = program.run(words);
        assert_eq!((ended.code(), ended.stdout.as_str()), (2, ""), "{words:?}: {ended:?}");
    };
    for option in reference::options() {
        let words: Vec<_> = option.iter().map(String::as_str).collect();
        if words[1] == "up" {
            continue;
        }
        let (bad, others) = bad_option(&words);
        let others: Vec<_> = if words[0] == "import" { vec!["events"] } else { others.to_vec() };
        is_refused(&[&words[..], &[bad], &others].concat());
    }
    for operand in [
        &["migrate", "down", "-1"][..],
        &["migrate", "down", "0"],
        &["migrate", "new", "two words"],
        &["key", "revoke", "first"],
        &["backup", "postgres://localhost/pisync"],
        &["restore", "postgres://localhost/pisync"],
    ] {
        is_refused(operand);
    }
    assert_eq!(program.names_in("."), ["data", "events"]);
}

/// A flag that nobody has typed is traced to where it was set.
#[test]
fn a_bad_value_is_traced_to_where_it_was_set() {
    for (name, value) in [("PORT", "http"), ("AUTH", "maybe"), ("RETENTION_DAYS", "1")] {
        let ended = Program::new().with_file(".env", &format!("# ours\n{name}={value}\n")).run(&[]);
        assert_eq!(ended.code(), 2, "{ended:?}");
        let origin = format!("{name} is set in line 2 of .env\n");
        assert!(ended.stderr.ends_with(&origin), "{ended:?}");
        let ended = Program::new().with(name, value).run(&[]);
        assert!(ended.stderr.ends_with(&format!("{name} is set in the environment\n")));
        let flag = format!("--{}", name.to_lowercase().replace('_', "-"));
        let ended = Program::new().with(name, "7").run(&["serve", &flag, value]);
        assert!(ended.code() == 2 && !ended.stderr.contains("is set in"), "{ended:?}");
    }
}

/// Every command that has exit statuses of its own says so.
#[test]
fn help_promises_them() {
    let program = Program::new();
    let help = |words: &[&str]| program.run(words).success().to_owned();
    for text in ["2 wrong usage", "3 done in part (import)", "4 could not find out (verify"] {
        assert!(help(&["--help"]).contains(text), "{text}");
    }
    assert!(help(&["import", "--help"]).contains(", 3\nwhen some records were rejected"));
    for words in [&["verify", "--help"][..], &["journal", "inspect", "--help"]] {
        assert!(help(words).contains("4 when that could not be found out."), "{words:?}");
    }
}

async fn verify_tells_what_differs_from_what_it_could_not_find_out(installed: &Installed) {
    let Installed { program, database } = installed;
    let serving = program.serve(&[]);
    serving.client.store(&event("pi")).await;
    serving.stop();
    program.run(&["verify"]).success();
    database.execute("update device_jobs set total_syncs = 7").await;
    let differs = program.run(&["verify"]);
    assert!(differs.failure().starts_with("some figures are wrong"), "{differs:?}");
    program.run(&["verify", "--repair"]).success();
    database.execute("alter table device_jobs rename to elsewhere").await;
    let failed = program.run(&["verify"]);
    assert!(failed.unanswered().contains("device_jobs"), "{failed:?}");
    database.execute("alter table elsewhere rename to device_jobs").await;
    program.run(&["verify"]).success();
    assert_eq!(program.run(&["verify", "--database-url", "mysql://x"]).code(), 2);
}

/// Commands that make no database say that there is none, and make nothing.
#[test]
fn commands_on_a_database_that_is_not_there_create_nothing() {
    for (words, code) in [
        (&["migrate", "status"][..], 1),
        (&["migrate", "down", "--yes"], 1),
        (&["migrate", "rollback", "--yes"], 1),
        (&["verify"], 4),
        (&["verify", "--repair"], 4),
        (&["import", "events"], 1),
        (&["export"], 1),
        (&["export", "--output", "out"], 1),
        (&["backup", "copy.db"], 1),
        (&["journal", "inspect"], 4),
        (&["journal", "salvage"], 1),
        (&["key", "create", "--scope", "read"], 1),
        (&["key", "list"], 1),
        (&["key", "revoke", "1"], 1),
    ] {
        let program = Program::new().with_file("events", "");
        let check = |arguments: &[&str], file: &str| {
            let ended = program.run(&[words, arguments].concat());
            let said = format!(
                "pisync: no database at {file}; name another with DATA_DIR or DATABASE_URL, or run `pisync serve` once\n"
            );
            assert_eq!((ended.code(), ended.stderr.as_str()), (code, said.as_str()), "{words:?}");
            assert_eq!(ended.stdout, "");
        };
        check(&[], "data/pisync.db");
        check(&["--database-url", "sqlite:new.db"], "new.db");
        check(&["--data-dir", "a/b"], "a/b/pisync.db");
        assert_eq!(program.names_in("."), ["events"], "{words:?}");
        // A start that was killed at once leaves an empty file.
        std::fs::write(program.path("new.db"), "").unwrap();
        check(&["--database-url", "sqlite:new.db"], "new.db");
        assert_eq!(program.names_in("."), ["events", "new.db"], "{words:?}");
    }
    let program = Program::new();
    let ended = program.run(&["copy", "--from", "sqlite:old.db", "--to", "sqlite:new.db"]);
    let expected = "no database at old.db; name the file of one behind --from";
    assert_eq!(ended.failure(), expected);
    assert_eq!(program.names_in("."), Vec::<String>::new());
    // These make one.
    for words in [&["migrate", "up"][..], &["db", "setup"]] {
        let program = Program::new();
        program.run(words).success();
        assert!(Path::exists(&program.path("data/pisync.db")), "{words:?}");
    }
}

/// Wherever a database is named, it goes before what the environment says.
#[test]
fn a_database_is_named_before_and_after_the_names_of_commands() {
    let program = Program::new().with("DATABASE_URL", "sqlite:other.db");
    program.run(&["db", "setup", "--database-url", "sqlite:here.db"]).success();
    for words in [
        &["--database-url", "sqlite:here.db", "key", "list"][..],
        &["key", "--database-url", "sqlite:here.db", "list"],
        &["key", "list", "--database-url", "sqlite:here.db"],
        &["--database-url=sqlite:here.db", "migrate", "status"],
        &["migrate", "--database-url=sqlite:here.db", "status"],
        &["--log-level", "info", "--database-url", "sqlite:here.db", "verify"],
    ] {
        program.run(words).success();
    }
    assert!(!program.path("other.db").exists());
}
