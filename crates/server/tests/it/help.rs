//! What can be asked without a database: help, the version, completions and manual pages; and colours, which nobody gets
//! who wants none.

use std::process::Command;

use crate::support::{
    program::{Program, settings_of_a_server},
    server::TestServer,
};

#[test]
fn help() {
    let names = settings_of_a_server();
    assert!(names.len() > 20, "{names:?}");
    let program = names
        .iter()
        .fold(Program::new(), |program, name| program.with(name, "postgres://u:s3cret-word@h"));
    let general = program.run(&["--help"]);
    for text in ["serve", "migrate", "db", "openapi", ".env", "Examples:", "Exit status:"] {
        assert!(general.success().contains(text), "{text}: {general:?}");
    }
    let serve = program.run(&["serve", "--help"]);
    for name in &names {
        assert!(serve.success().contains(&format!("[env: {name}]")), "{name}: {serve:?}");
    }
    assert!(!serve.stdout.contains("s3cret-word"));
    assert!(!general.stdout.contains("s3cret-word"));
    for command in [
        &["migrate", "--help"][..],
        &["db", "setup", "--help"],
        &["import", "--help"],
        &["export", "--help"],
    ] {
        let help = program.run(command);
        assert!(help.success().contains("[env: DATABASE_URL]"), "{help:?}");
    }
    let copy =
        Program::new().with("COPY_TO", "postgres://pi:s3cret-word@db").run(&["copy", "--help"]);
    assert!(copy.success().contains("[env: COPY_TO]"), "{copy:?}");
    assert!(!copy.stdout.contains("s3cret-word"));
    let document = Program::new().run(&["openapi"]);
    assert_eq!(document.success(), pisync::api::openapi_json().unwrap());
    assert!(program.names_in(".").is_empty(), "asking for help leaves nothing behind");
}

/// Every command shows how it is used, and what it shows can be typed.
#[test]
fn help_has_examples_that_can_be_typed() {
    let program = Program::new();
    program.run(&["man", "pages"]).success();
    let pages = program.names_in("pages");
    assert!(pages.len() > 20, "{pages:?}");
    let mut typed = 0;
    for page in pages {
        let page = page.strip_suffix(".1").unwrap();
        let words: Vec<_> = page.split('-').skip(1).chain(["--help"]).collect();
        let help =
            program.run(&words).success().replace("\\\n", " ").replace("$(date +%F)", "2025-06-17");
        let examples = help.split("\n\n").filter(|text| text.starts_with("Example"));
        let examples: Vec<_> = examples.flat_map(|text| text.lines().skip(1)).collect();
        assert!(!examples.is_empty(), "{words:?}: {help}");
        for (at, _) in help.match_indices("pisync ") {
            let line = help[at..].lines().next().unwrap();
            let is_example = examples.iter().any(|example| example.ends_with(line));
            let is_path = help[..at].ends_with(['/', '`']) || help[..at].ends_with("-u ");
            if !is_example || is_path {
                continue;
            }
            // What it is for stands behind it, two spaces away.
            let line = line.split([')', '|', '>', '&']).next().unwrap();
            let line = &line["pisync ".len()..];
            let words: Vec<_> = line.split("  ").next().unwrap().split(' ').collect();
            let words: Vec<_> = words.into_iter().filter(|word| !word.is_empty()).collect();
            let ended = program.run(&[&words[..], &["--help"]].concat());
            assert_eq!(ended.code(), 0, "{words:?}: {ended:?}");
            typed += 1;
        }
    }
    assert!(typed > 40, "only {typed} examples were found");
}

/// The version names the commit that the program was built from, where there was a repository; a metric says the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_version_names_the_commit() {
    let version = Program::new().run(&["--version"]);
    let package = concat!("pisync ", env!("CARGO_PKG_VERSION"));
    let rest = version.success().trim_end().strip_prefix(package).expect("the package's version");
    let git = |words: &[&str]| {
        let output =
            Command::new("git").args(words).current_dir(env!("CARGO_MANIFEST_DIR")).output();
        output.is_ok_and(|output| output.status.success())
    };
    let commit = rest.strip_prefix(" (").and_then(|rest| rest.strip_suffix(')'));
    if git(&["rev-parse", "HEAD"]) {
        let commit = commit.expect("a commit");
        // Not HEAD: somebody may commit between the build and the test.
        assert!(git(&["cat-file", "-e", &format!("{commit}^{{commit}}")]), "{commit}");
    } else {
        assert!(commit.is_some() || rest.is_empty(), "{version:?}");
    }
    let server = TestServer::on_sqlite(|_| {}).await;
    let metrics = server.get("/metrics").await;
    let line = metrics.text().lines().find(|line| line.starts_with("pisync_build_info{")).unwrap();
    let labels = format!(
        "commit=\"{}\",rustc=\"{}\",version=\"{}\"}} 1",
        commit.unwrap_or("unknown"),
        env!("PISYNC_RUSTC"),
        env!("CARGO_PKG_VERSION")
    );
    assert_eq!(line.strip_prefix("pisync_build_info{"), Some(labels.as_str()));
    assert!(env!("PISYNC_RUSTC").starts_with("1."), "{labels}");
    server.stop().await;
}

#[test]
fn shells_complete_every_command() {
    let program = Program::new();
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = program.run(&["completions", shell]);
        for word in ["key", "create", "--database-url", "--scope", "doctor"] {
            // fish writes options without their hyphens.
            let word = if shell == "fish" { word.trim_start_matches("--") } else { word };
            assert!(script.success().contains(word), "{shell}: {word}");
        }
    }
    let program = program.run_by(&["bash", "-c", "\"$@\" > script && bash -n script", "bash"]);
    program.run(&["completions", "bash"]).success();
    assert_eq!(Program::new().run(&["completions", "cmd"]).code(), 2);
}

#[test]
fn manual_pages_of_every_command() {
    let program = Program::new();
    let ended = program.run(&["man", "share/man1"]);
    assert_eq!(ended.success(), "wrote manual pages to share/man1\n");
    let pages = program.names_in("share/man1");
    for page in ["pisync.1", "pisync-serve.1", "pisync-key.1", "pisync-key-create.1"] {
        assert!(pages.iter().any(|name| name == page), "{page}: {pages:?}");
    }
    let text = |name: &str| std::fs::read(program.path("share/man1").join(name)).unwrap();
    let create = String::from_utf8(text("pisync-key-create.1")).unwrap();
    for part in [".TH pisync-key-create 1", ".SH OPTIONS", "scope", "DATABASE_URL"] {
        assert!(create.contains(part), "{part}: {create}");
    }
    // Examples stand as they were written, so that somebody can copy them.
    let copy = String::from_utf8(text("pisync-copy.1")).unwrap();
    let example = "pisync copy \\-\\-from sqlite:data/pisync.db \\e\n";
    let (_, examples) = copy.split_once(".SH \"EXAMPLES\"\n.PP\n.nf\n").expect(&copy);
    let (examples, _) = examples.split_once("\n.fi\n").expect(&copy);
    assert!(examples.contains(example), "{copy}");
    for page in &pages {
        let page = String::from_utf8(text(page)).unwrap();
        assert!(!page.contains(".SH EXTRA"), "{page}");
    }
    for part in [".SH \"EXIT STATUS\"\n", ".SH \"EXAMPLES\"\n", ".SH VERSION\n"] {
        let page = String::from_utf8(text("pisync.1")).unwrap();
        assert!(page.contains(part), "{part}: {page}");
    }
    // The same again, byte for byte.
    let before: Vec<_> = pages.iter().map(|name| text(name)).collect();
    program.run(&["man", "share/man1"]).success();
    assert_eq!(pages.iter().map(|name| text(name)).collect::<Vec<_>>(), before);
    let program = program.with_file("file", "");
    let refused = program.run(&["man", "file/man1"]);
    assert!(refused.failure().starts_with("cannot write manual pages to file/man1: "));
    let expected =
        "cannot write manual pages to file: it is a file; name a folder that you may write to";
    assert_eq!(program.run(&["man", "file"]).failure(), expected);
}

/// <https://no-color.org>: of help, errors, a server's log and the bar of a long command.
#[test]
fn nobody_gets_colours_who_wants_none() {
    let records: String = (0..20_000)
        .map(|number| {
            format!("{{\"device_id\":\"pi\",\"timestamp\":\"2025-06-17\",\"total_files_synced\":{number},\"total_errors\":0}}\n")
        })
        .collect();
    let on_terminal = |line: &str, no_color: Option<&str>| {
        let program = Program::new()
            .with("TERM", "xterm-256color")
            .with_file("records", &records)
            .with_file(".env", "MISSPELT=1\n")
            .with("LOG_DIR", "none")
            .with("PROGRAM", env!("CARGO_BIN_EXE_pisync"));
        program.run(&["db", "setup"]);
        let program = match no_color {
            Some(value) => program.with("NO_COLOR", value),
            None => program,
        };
        program.shell(&format!("script -qec '{line}' /dev/null")).stdout
    };
    // What selects a colour, among what moves the cursor.
    let has_colours = |said: &str| {
        said.split("\u{1b}[").skip(1).any(|rest| {
            rest.trim_start_matches(|letter: char| letter.is_ascii_digit() || letter == ';')
                .starts_with('m')
        })
    };
    for line in ["$PROGRAM --help", "$PROGRAM --nonsense", "$PROGRAM serve --host nowhere.invalid"]
    {
        // An empty variable asks for nothing.
        for no_color in [None, Some("")] {
            let said = on_terminal(line, no_color);
            assert!(has_colours(&said), "{line} {no_color:?}: {said:?}");
        }
        let said = on_terminal(line, Some("1"));
        assert!(said.contains("pisync") && !has_colours(&said), "{line}: {said:?}");
    }
    let said = on_terminal("$PROGRAM import records", Some("1"));
    assert!(said.contains("imported 20000 events") && !has_colours(&said), "{said:?}");
}
