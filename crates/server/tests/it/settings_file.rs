//! Settings that are not typed: the environment and a `.env` file, read as the Node service read them, and told of
//! without a password ever being shown.

use std::net::SocketAddr;

use crate::{
    server_log::lines,
    support::{
        program::{Program, settings_of_a_server},
        server::unused_address,
    },
};

#[test]
fn settings_come_from_arguments_then_the_environment_then_the_file() {
    let [file, environment, argument] = [(); 3].map(|()| unused_address().port());
    let at = |serving: crate::support::program::Serving| -> SocketAddr {
        let address = serving.address();
        serving.stop();
        address
    };
    let program =
        Program::new().with_file(".env", &format!("# ours\nPORT={file}\n\nHOST='127.0.0.1'\n"));
    assert_eq!(at(program.serve(&[])).port(), file);
    let program = program.with("PORT", environment);
    assert_eq!(at(program.serve(&["serve"])).port(), environment);
    assert_eq!(at(program.serve(&["--port", &argument.to_string()])).port(), argument);
    assert!(
        lines(&program.log("combined.log"), "unknown setting in .env; is it misspelt?").is_empty()
    );
}

#[test]
fn a_misspelt_setting_is_warned_about() {
    let text = "PORT=0\nRATE_LIMT_API_PER_MINUTE=5\nexport LOG_LEVEL=warn\n";
    let program = Program::new().with_file(".env", text);
    // The level is what the test cannot see the start at.
    let serving = program.serve(&["--log-level", "info"]);
    serving.stop();
    let log = program.log("combined.log");
    let warnings = lines(&log, "unknown setting in .env; is it misspelt?");
    assert_eq!(warnings.len(), 1, "{log:?}");
    assert_eq!(warnings[0]["level"], "WARN");
    assert_eq!(warnings[0]["name"], "RATE_LIMT_API_PER_MINUTE");
}

#[test]
fn the_file_means_what_it_meant_to_the_node_service() {
    // What each line means is compared with dotenv itself, in src/config/env_file.rs.
    for (text, folder) in [
        ("\u{feff}DATA_DIR=here", "here"),
        ("export DATA_DIR: first\r\nDATA_DIR = 'second' # the last one counts\r\n", "second"),
        ("DATA_DIR=\"a'b\" # c", "a'b"),
        ("DATA_DIR=a#b", "a"),
        ("DATA_DIR=a\\b", "a\\b"),
        ("DATA_DIR=da$PORT", "da$PORT"),
        ("DATA_DIR=\"da${PORT}\"", "da${PORT}"),
        ("DATA_DIR='two words'", "two words"),
        ("DATA_DIR=two words", "two words"),
        ("DATA_DIR='it's'", "it's"),
    ] {
        let program =
            Program::new().with_file(".env", &format!("# whose server isn't ours\n{text}"));
        program.run(&["db", "setup"]).success();
        let mut expected = [".env", folder];
        expected.sort_unstable();
        assert_eq!(program.names_in("."), expected, "{text}");
    }
}

#[test]
fn an_odd_line_is_warned_about_and_ends_nothing() {
    let text = "DATA_DIR=here\nDB_PASSWORD s3cret-word\n\n<<<<<<< HEAD\n# fine\nPORT=0\n\0\0\0\0";
    let program = Program::new().with_file(".env", text);
    let ended = program.run(&["db", "setup"]);
    assert_eq!(ended.code(), 0, "{ended:?}");
    let warning = |line| format!("line {line} of .env is no setting (NAME=value); it is ignored");
    let expected = [2, 4, 7].map(|line| format!("pisync: {}\n", warning(line))).concat();
    assert_eq!(ended.stderr, expected);
    assert_eq!(program.names_in("."), [".env", "here"]);
    let ended = program.serve(&[]).stop();
    let log = program.log("combined.log");
    for line in [2, 4, 7] {
        let found = lines(&log, &warning(line)).into_iter().map(|line| line["level"].clone());
        assert_eq!(found.collect::<Vec<_>>(), ["WARN"], "{log:?}");
    }
    assert!(!format!("{ended:?}{log:?}").contains("s3cret-word"));
    // Help is not the place for it.
    program.run(&["--help"]).success();
    // Nor is a folder of that name, as Docker makes it for a file that is not there, the end.
    let program = Program::new();
    std::fs::create_dir(program.path(".env")).unwrap();
    let ended = program.run(&["db", "setup"]);
    assert_eq!(ended.code(), 0, "{ended:?}");
    assert!(ended.stderr.starts_with("pisync: .env is a folder"), "{ended:?}");
}

/// Nothing waits for one that writes into a pipe.
#[test]
fn a_pipe_is_no_settings_file() {
    let program = Program::new();
    program.shell("mkfifo .env").success();
    let ended = program.run(&["db", "setup"]);
    assert_eq!(ended.code(), 1, "{ended:?}");
    assert!(ended.stderr.contains("cannot read .env: it is a pipe, not a file"), "{ended:?}");
}

/// What cannot be a value is told by its name and line, and never shown: it may be a password, or have one in it.
#[test]
fn values_that_no_setting_can_have() {
    for (text, expected) in [
        (
            &b"PORT=0\nDB_PASSWORD=s3cret-word\0\n"[..],
            "the value of DB_PASSWORD in line 2 of .env contains a NUL byte",
        ),
        (
            b"DATABASE_URL=postgres://pi:s3cret-word\0@db/pisync\n",
            "the value of DATABASE_URL in line 1 of .env contains a NUL byte",
        ),
        (b"DATA_DIR=s3cret-word\0", "the value of DATA_DIR in line 1 of .env contains a NUL byte"),
        (
            b"DB_PASSWORD=s3cret-word\xff\n",
            "the value of DB_PASSWORD in line 1 of .env is not valid UTF-8",
        ),
        (
            b"\nPORT='0\nDB_PASSWORD=s3cret-word\nHOST='\n",
            "the value of PORT in line 2 of .env has several lines; is a quotation mark not closed?",
        ),
        (
            b"LOG_LEVEL=\"info\\ns3cret-word\"",
            "the value of LOG_LEVEL in line 1 of .env has several lines",
        ),
    ] {
        let program = Program::new();
        std::fs::write(program.path(".env"), text).unwrap();
        let ended = program.run(&[]);
        assert!(ended.wrong_usage().starts_with(expected), "{ended:?}");
        assert!(!format!("{ended:?}").contains("s3cret-word"), "{ended:?}");
        assert_eq!(program.names_in("."), [".env"]);
    }
    for name in ["DB_PASSWORD", "DATABASE_URL", "PORT", "HOST", "AUTH"] {
        let ended = Program::new().with_bytes(name, b"s3cret-word\xff").run(&[]);
        let expected = format!("the environment variable {name} is not valid UTF-8 text");
        assert_eq!(ended.wrong_usage(), expected);
    }
    // A path is whatever the file system takes.
    let program = Program::new().with_bytes("MIGRATIONS_DIR", b"dir-\xff");
    program.run(&["db", "setup"]).success();
}

#[test]
fn an_unclosed_quotation_mark_that_takes_a_setting_in_is_named() {
    let text = "DB_PASSWORD='s3cret-word\nDB_HOST=db\nDB_USER='\n";
    let ended = Program::new().with_file(".env", text).run(&["openapi"]);
    assert_eq!(ended.code(), 0, "{ended:?}");
    let expected = "pisync: the value of DB_PASSWORD in line 1 of .env takes the setting DB_HOST in; is a quotation mark not closed?\n";
    assert_eq!(ended.stderr, expected);
}

#[test]
fn an_unclosed_quotation_mark_is_warned_about() {
    for (text, expected) in [
        (
            "# ours\nDB_PASSWORD='s3cret-word\nPORT=0\n",
            "DB_PASSWORD in line 2 of .env begins with a quotation mark",
        ),
        (
            "DB_PASSWORD=\"s3cret-word # 1",
            "DB_PASSWORD in line 1 of .env begins with a quotation mark",
        ),
        ("OTHER=`s3cret-word", "OTHER in line 1 of .env begins with a quotation mark"),
        ("DB_PASSWORD='s3cret-word\nmore\n'\n", "DB_PASSWORD in line 1 of .env goes on to line 3"),
    ] {
        let ended = Program::new().with_file(".env", text).run(&["openapi"]);
        assert_eq!((ended.code(), ended.stderr.lines().count()), (0, 1), "{ended:?}");
        assert!(ended.stderr.starts_with(&format!("pisync: the value of {expected}")), "{ended:?}");
        assert!(!ended.stderr.contains("s3cret-word"), "{ended:?}");
    }
    // Other programs' certificates are nobody's mistake.
    let text = "TEXT='it's'\nCERTIFICATE=\"-----BEGIN\nMIIB==\n-----END\"\nDATA_DIR='d' # it's\n";
    Program::new().with_file(".env", text).run(&["openapi"]).success();
}

/// Values that nothing can be made of end the commands that read them, and no other.
#[test]
fn settings_that_a_command_does_not_read_end_nothing() {
    let program = Program::new().with("DATABASE_URL", "sqlite:here.db");
    program.run(&["db", "setup"]).success();
    for name in ["DB_PASSWORD", "DB_HOST", "DB_PORT", "PORT", "TLS_KEY", "COPY_TO", "OTHER"] {
        std::fs::write(program.path(".env"), format!("{name}=s3cret-word\0\n")).unwrap();
        program.run(&["verify"]).success();
        std::fs::write(program.path(".env"), [name.as_bytes(), b"=s3cret-word\xff\n"].concat())
            .unwrap();
        program.run(&["verify"]).success();
        program.run(&["verify", "--database-url", "sqlite:here.db"]).success();
        std::fs::remove_file(program.path(".env")).unwrap();
        let program = Program::new().with_bytes(name, b"s3cret-word\xff");
        let url = format!("sqlite:{}", program.path("there.db").display());
        program.run(&["db", "setup", "--database-url", &url]).success();
        program.with("DATABASE_URL", url).run(&["verify"]).success();
    }
    // The one that is read is named.
    let program = Program::new().with_bytes("DATABASE_URL", b"postgres://u:s3cret-word\xff@h/db");
    assert_eq!(
        program.run(&["verify"]).wrong_usage(),
        "the environment variable DATABASE_URL is not valid UTF-8 text"
    );
}

#[test]
fn an_empty_value_is_none() {
    let variables = settings_of_a_server();
    let empty: String = variables.iter().map(|name| format!("{name}=\n")).collect();
    let empty = empty + "NODE_ENV=\n";
    let in_file = Program::new().with_file(".env", &empty);
    let in_environment = variables
        .iter()
        .map(String::as_str)
        .chain(["NODE_ENV"])
        .fold(Program::new(), |program, name| program.with(name, ""));
    for program in [in_file, in_environment] {
        // The default would be in the way of other tests.
        let serving = program.serve(&["--port", "0"]);
        assert!(serving.address().ip().is_loopback());
        serving.stop();
        let names = program.names_in(".");
        assert!(
            names.iter().map(String::as_str).filter(|name| *name != ".env").eq(["data", "logs"]),
            "{names:?}"
        );
    }
    let ended = Program::new().with("COPY_FROM", "").with("COPY_TO", "sqlite:x").run(&["copy"]);
    assert_eq!(ended.code(), 2, "{ended:?}");
    assert!(ended.stderr.contains("--from <URL>"), "{ended:?}");
}

/// As it was for the Node service: dotenv leaves a variable alone that is there, whatever its value.
#[test]
fn an_empty_variable_hides_the_files() {
    let program = Program::new().with_file(".env", "DATA_DIR=elsewhere\n").with("DATA_DIR", "");
    program.run(&["db", "setup"]).success();
    assert_eq!(program.names_in("."), [".env", "data"]);
}

/// Wherever a URL with a password is typed or set by mistake, nothing that is said or made shows the password.
#[test]
fn a_url_in_the_wrong_place_keeps_its_password() {
    const URL: &str = "postgres://u:s3cret-word@h.invalid/db";
    let typed = |words: &[&str]| {
        (Program::new(), words.iter().map(ToString::to_string).collect::<Vec<_>>())
    };
    let set =
        |name: &str, value: &str| (Program::new().with(name, value), vec!["serve".to_owned()]);
    let in_file = |text: &str| (Program::new().with_file(".env", text), vec!["serve".to_owned()]);
    for ((program, words), expected) in [
        (typed(&["serve", URL]), "unexpected argument 'postgres://[hidden]' found"),
        (typed(&[URL]), "unrecognized subcommand 'postgres://[hidden]'"),
        (typed(&["verify", "u:s3cret-word@h/db"]), "unexpected argument '[hidden]' found"),
        (
            typed(&["serve", "DB_PASSWORD=s3cret-word"]),
            "unexpected argument 'DB_PASSWORD=[hidden]' found",
        ),
        (
            typed(&["serve", "--port", URL]),
            "invalid value 'postgres://[hidden]' for '--port <PORT>'",
        ),
        (typed(&["serve", "--postgres://u:s3cret-word=x@h"]), "'--postgres://[hidden]'"),
        (typed(&["migrate", "status", URL]), "unexpected argument 'postgres://[hidden]' found"),
        (typed(&["import", URL]), "<FILE> is not for the URL of a database"),
        (typed(&["import", "-", "--rejected", URL]), "--rejected <FILE> is not for"),
        (typed(&["backup", URL]), "is not for the URL of a database"),
        (typed(&["restore", URL]), "is not for the URL of a database"),
        (typed(&["export", "--output", URL]), "is not for the URL of a database"),
        (
            typed(&["verify", "--database-url", "postgres://u:s3cret-word"]),
            "a user and a password must be followed by @HOST",
        ),
        (set("LOG_DIR", URL), "is not for the URL of a database"),
        (set("DB_USER", URL), "is not for the URL of a database"),
        (set("DB_NAME", URL), "is not for the URL of a database"),
        (set("TLS_CERT", URL), "is not for the URL of a database"),
        (set("DATA_DIR", URL), "--data-dir <DATA_DIR> is not for"),
        (set("PORT", URL), "invalid value 'postgres://[hidden]'"),
        (set("AUTH", URL), "is not for the URL of a database"),
        (set("HOST", URL), "is not for the URL of a database"),
        (set("DB_HOST", URL), "is not for the URL of a database"),
        (set("DB_PORT", "postgres://u:s3cret-word,x@h"), "is not for the URL of a database"),
        (set("DB_HOST", "mysql://u:s3cret-word@h"), "DB_HOST: a host is neither a name"),
        (set("DATABASE_URL", "sqlite:postgres://u:s3cret-word@h"), "stands a path"),
        (
            set("DATABASE_URL", "postgres://u:s3cret-word"),
            "DATABASE_URL: there is no @: a user and a password must be followed by @HOST",
        ),
        (in_file(&format!("PORT={URL}\n")), "invalid value 'postgres://[hidden]'"),
        (in_file(&format!("TRUSTED_PROXIES={URL}\n")), "is not for the URL of a database"),
    ] {
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let ended = program.run(&words);
        assert_eq!(ended.code(), 2, "{ended:?}");
        assert!(ended.stderr.contains(expected), "{expected}: {ended:?}");
        assert!(!format!("{ended:?}").contains("s3cret-word"), "{ended:?}");
        let made =
            program.names_in(".").into_iter().filter(|name| name != ".env" && name != "logs");
        assert_eq!(made.collect::<Vec<_>>(), Vec::<String>::new(), "{ended:?}");
        if program.path("logs").exists() {
            for log in program.names_in("logs") {
                let text = std::fs::read_to_string(program.path("logs").join(&log)).unwrap();
                assert!(!text.contains("s3cret-word"), "{text}");
            }
        }
    }
}

/// A file that cannot be read ends whatever would read it, and nothing else.
#[test]
fn a_broken_file_keeps_nobody_from_help() {
    const PROBLEM: &str = "cannot read .env: it is UTF-16 text; save it as UTF-8";
    let broken = [&b"\xff\xfeP\0=\x000\0"[..], b"\xff\xfeP\0=\0s3cret-word"];
    for text in broken {
        let program = Program::new();
        std::fs::write(program.path(".env"), text).unwrap();
        for words in [&["--help"][..], &["serve", "--help"], &["help", "key"], &["--version"]] {
            program.run(words).success();
        }
        // These read no setting.
        for words in [&["openapi"][..], &["completions", "bash"], &["man", "pages"]] {
            let ended = program.run(words);
            assert_eq!(ended.code(), 0, "{ended:?}");
            assert_eq!(ended.stderr, format!("pisync: {PROBLEM}; it is ignored\n"));
        }
        for words in [&["serve"][..], &["verify"], &["key", "list"], &["db", "setup"]] {
            assert_eq!(program.run(words).failure(), PROBLEM);
        }
        assert_eq!(program.names_in("."), [".env", "pages"]);
    }
    // Nor does a value that nothing can be made of.
    let program = Program::new().with_file(".env", "LOG_LEVEL=loud\nDATABASE_URL=mysql://x\n");
    for words in [&["--help"][..], &["migrate", "--help"], &["--version"], &["openapi"]] {
        program.run(words).success();
    }
}
