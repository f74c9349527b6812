//! What README.md, `docs/` and `.env.example` say of the program, compared with it: settings, figures, names of commands
//! and metrics, links. Their commands are run by `documented_commands`.

use std::{collections::BTreeSet, path::Path};

use pisync::{cli::reference, config::http::Timeouts};
use pisync_core::{
    DeviceId, EventId, JobName,
    event_stream::MAX_EVENT_BYTES,
    metadata::MAX_METADATA_BYTES,
    sync_event::{MAX_BYTES_SYNCED, MAX_COUNT},
};

use crate::support::{
    documents::{pages, path, text},
    server::TestServer,
    store::TestDatabase,
};

/// `UPDATE_DOCS=1` writes the table instead of comparing it.
#[test]
fn the_table_of_settings_is_current() {
    const PAGE: &str = "docs/configuration.md";
    let page = text(PAGE);
    let (before, rest) = page.split_once("<!-- settings -->\n").unwrap();
    let (table, after) = rest.split_once("<!-- /settings -->").unwrap();
    let made = format!("\n{}\n", reference::settings_table());
    if std::env::var_os("UPDATE_DOCS").is_some() {
        let page = format!("{before}<!-- settings -->\n{made}<!-- /settings -->{after}");
        std::fs::write(path(PAGE), page).unwrap();
        return;
    }
    assert!(
        table == made,
        "the table of {PAGE} is out of date: run `UPDATE_DOCS=1 cargo test --test it documentation::`\n{made}"
    );
}

/// It has every setting of a server, each with its default or an example.
#[test]
fn the_example_of_an_env_file_has_every_setting_of_a_server() {
    let example = text(".env.example");
    let settings = reference::settings();
    let of_server: Vec<_> = settings
        .iter()
        // An older name for APP_ENV.
        .filter(|setting| setting.variable != "NODE_ENV")
        .filter(|setting| setting.commands.iter().any(|command| command == "serve"))
        .collect();
    let lines: Vec<_> = example
        .lines()
        .filter_map(|line| line.strip_prefix('#')?.split_once('='))
        .filter(|(name, _)| !name.contains(' '))
        .map(|(name, value)| (name, value.split_once('#').map_or(value, |(value, _)| value).trim()))
        .collect();
    let expected: BTreeSet<_> = of_server.iter().map(|setting| setting.variable.as_str()).collect();
    assert_eq!(lines.iter().map(|(name, _)| *name).collect::<BTreeSet<_>>(), expected);
    assert_eq!(lines.len(), expected.len(), "a setting is there twice");
    for setting in of_server {
        let (_, value) = lines.iter().find(|(name, _)| *name == setting.variable).unwrap();
        match &setting.default {
            // In words, the value comes first.
            Some(default) => {
                let first = default.split([' ', ',']).next();
                assert_eq!(Some(*value), first, "{}", setting.variable);
            }
            None => {
                let is_example = value.is_empty() || setting.variable == "DATABASE_URL";
                assert!(is_example, "{}={value}: there is no default", setting.variable);
            }
        }
    }
}

/// Every command that a page names exists.
#[test]
fn pages_name_commands_that_exist() {
    let settings = reference::settings();
    let known: BTreeSet<_> = settings.iter().flat_map(|setting| &setting.commands).collect();
    let mut found = 0;
    for page in pages() {
        let text = text(&page);
        for (index, _) in text.match_indices("pisync ") {
            let before = &text[..index];
            // Behind -u it is the service's user.
            let is_command = before.ends_with(['`', '\n', ' ', '(']) && !before.ends_with("-u ");
            let word: String =
                text[index + 7..].chars().take_while(char::is_ascii_lowercase).collect();
            let rest = &text[index + 7 + word.len()..];
            // In code a command is followed by a space, the end of the code or of the line.
            let is_code = before.matches('`').count() % 2 == 1;
            if is_command && is_code && !word.is_empty() && rest.starts_with([' ', '`', '\n']) {
                assert!(known.contains(&word), "{page} names `pisync {word}`, which is no command");
                found += 1;
            }
        }
    }
    assert!(found > 30, "only {found} were found");
}

/// Links between pages lead somewhere, also to a heading.
#[test]
fn links_lead_somewhere() {
    let mut found = 0;
    for page in pages().into_iter().chain(["CONTRIBUTING.md", "SECURITY.md"].map(str::to_owned)) {
        let folder = path(&page).parent().unwrap().to_owned();
        for link in text(&page).split("](").skip(1) {
            let Some((link, _)) = link.split_once(')') else { continue };
            if link.contains("://") {
                continue;
            }
            let (file, heading) = link.split_once('#').unwrap_or((link, ""));
            let target = if file.is_empty() { path(&page) } else { folder.join(file) };
            assert!(target.exists(), "{page} links to {link}, which is not there");
            if !heading.is_empty() {
                let linked = std::fs::read_to_string(target).unwrap();
                let mut headings = linked.lines().filter_map(|line| {
                    let heading = line.trim_start_matches('#');
                    (heading.len() < line.len()).then(|| anchor(heading))
                });
                assert!(
                    headings.any(|one| one == heading),
                    "{page} links to {link}: no such heading"
                );
            }
            found += 1;
        }
    }
    assert!(found > 40, "only {found} were found");
}

/// A heading's name in links, as GitHub makes it.
fn anchor(heading: &str) -> String {
    let kept =
        heading.trim().chars().filter(|letter| letter.is_alphanumeric() || " -_".contains(*letter));
    kept.collect::<String>().to_lowercase().replace(' ', "-")
}

#[test]
fn readme_fits_on_three_screens() {
    let lines = text("README.md").lines().count();
    assert!(lines <= 150, "README.md has {lines} lines: move some of them to docs/");
}

/// Every metric that a server gives is on the page, and the other way round.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_metrics_of_the_page_are_those_of_a_server() {
    let database = TestDatabase::sqlite();
    database.migrate().await;
    let server = TestServer::start(database).await;
    let answer = server.get("/metrics").await;
    let given: BTreeSet<_> = answer
        .text()
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next())
        .filter(|name| !name.starts_with("process_"))
        .map(str::to_owned)
        .collect();
    let page = text("docs/operations.md");
    let named: BTreeSet<_> = page
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split(" | ").next())
        .flat_map(|cell| cell.split(['`', ',', ' ']))
        .filter(|word| word.starts_with("pisync_") || word.starts_with("http_"))
        .map(str::to_owned)
        .collect();
    // A counter by labels comes with its first event.
    let later = ["pisync_sync_events_refused_total".to_owned()];
    let named: BTreeSet<_> = named.into_iter().filter(|name| !later.contains(name)).collect();
    let given: BTreeSet<_> = given.into_iter().filter(|name| !later.contains(name)).collect();
    assert_eq!(named, given);
    server.stop().await;
}

/// A number as the pages write it.
fn figure(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

fn mebibytes(bytes: u64) -> String {
    format!("{} MiB", bytes >> 20)
}

fn kibibytes(bytes: u64) -> String {
    format!("{} KiB", bytes >> 10)
}

/// All lines of the program's source.
fn source() -> String {
    fn read(folder: &Path, text: &mut String) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                read(&path, text);
            } else if path.extension().is_some_and(|kind| kind == "rs") {
                *text += &std::fs::read_to_string(path).unwrap();
            }
        }
    }
    let mut text = String::new();
    read(&path("crates/server/src"), &mut text);
    text
}

/// What private constants of a name are: `65_536`, `32 << 20` or `Duration::from_secs(5)`. Most of those that the pages
/// speak of are nobody else's business, so no module shows them.
fn constants(source: &str, name: &str) -> Vec<u64> {
    let number = |text: &str| text.trim().replace('_', "").parse::<u64>().ok();
    let declaration = format!("const {name}: ");
    let values: Vec<_> = source
        .split(&declaration)
        .skip(1)
        .filter_map(|rest| rest.split_once(" = ")?.1.split_once(';'))
        .filter_map(|(value, _)| {
            let seconds = value.strip_prefix("Duration::from_secs(");
            let seconds = seconds.and_then(|value| value.strip_suffix(')'));
            match (seconds, value.split_once(" << ")) {
                (Some(seconds), _) => number(seconds),
                (None, Some((base, shift))) => Some(number(base)? << number(shift)?),
                (None, None) => number(value),
            }
        })
        .collect();
    assert!(!values.is_empty(), "there is no constant {name} any more: name its successor here");
    values
}

/// A figure in a page is that of the program.
#[test]
fn figures_are_those_of_the_program() {
    let source = source();
    let constant = |name: &str| {
        let values = constants(&source, name);
        assert!(values.windows(2).all(|pair| pair[0] == pair[1]), "several {name}: {values:?}");
        values[0]
    };
    let settings = reference::settings();
    let default = |variable: &str| -> u64 {
        let mut settings = settings.iter();
        let setting = settings.find(|setting| setting.variable == variable).unwrap();
        setting.default.as_ref().unwrap().parse().unwrap()
    };
    let timeouts = Timeouts::default();
    assert_eq!([timeouts.head, timeouts.body, timeouts.write], [timeouts.head; 3]);
    let (seconds, idle) = (timeouts.head.as_secs(), timeouts.idle.as_secs());
    let event = kibibytes(MAX_EVENT_BYTES as u64);
    let (events, queue) = (figure(constant("QUEUE_EVENTS")), mebibytes(constant("QUEUE_BYTES")));
    let journal =
        [figure(constant("MOST_EVENTS")), mebibytes(constant("MOST_BYTES"))].join(", or ");
    let batch = figure(constant("MAX_EVENTS"));
    let batch_bytes = constants(&source, "BODY_LIMIT").into_iter().max().map(mebibytes).unwrap();
    let window = mebibytes(1 << constant("WINDOW_LOG"));
    let [sync, api, key] = ["SYNC", "API", "KEY"]
        .map(|kind| figure(default(&format!("RATE_LIMIT_{kind}_PER_MINUTE"))));
    let skew = default("MAX_CLOCK_SKEW_SECONDS") / 60;
    let count = figure(u64::from(MAX_COUNT));
    for (page, sentences) in [
        (
            "docs/operations.md",
            vec![
                format!("| body of an event | {event}, counted"),
                format!("| a batch | {batch} events and {batch_bytes}, counted"),
                format!("| window of a zstd body | {window}:"),
                format!("| a request's head | {} |", kibibytes(constant("HEAD_LIMIT"))),
                format!("an answer that the client does not take | {seconds} s each |"),
                format!("| an idle connection | {idle} s, "),
                format!("| {sync} a minute from one address to report, {api} to the rest;"),
                format!("| requests with a key | {key} a minute,"),
                format!("| connections | {}, or", figure(default("MAX_CONNECTIONS"))),
                format!(
                    "| requests being answered | {} |",
                    figure(default("MAX_CONCURRENT_REQUESTS"))
                ),
                format!("| events waiting for a commit | {events}, or {queue} |"),
                format!("| {journal}; then ingest waits"),
                format!("| a read of a long history | {} s |", constant("READ_TIMEOUT")),
                format!("and {} days are kept", constant("DAYS_KEPT")),
                format!("streaks that reach {} failures", constant("NOTABLE_STREAK")),
                format!("slow ones (more than {} s)", constant("SLOW")),
                format!("at their defaults one address gets {sync} events a minute"),
            ],
        ),
        (
            "docs/reporting.md",
            vec![
                format!("1–{} characters, no control", DeviceId::MAX_CHARACTERS),
                format!("1–{} characters, no control", EventId::MAX_CHARACTERS),
                format!("1–{} characters, no control", JobName::MAX_CHARACTERS),
                format!("at most {skew} minutes ahead of the server's clock (`MAX"),
                format!("more than {skew} minutes ahead of the server's clock is refused"),
                format!("| 0 to {count} |"),
                format!("| 0 to {} (2⁵³ − 1) |", figure(MAX_BYTES_SYNCED)),
                format!("| {} of text |", kibibytes(MAX_METADATA_BYTES as u64)),
                format!("The body has at most {event}, counted"),
                format!("at most {batch} events and {batch_bytes}, counted"),
                format!("the window may have {window}"),
                format!("for {} days (`EVENT_ID", default("EVENT_ID_RETENTION_DAYS")),
                format!("may send {sync} reports a minute; with a key, {key} requests a minute"),
            ],
        ),
        (
            "docs/api-design.md",
            vec![format!("larger than {} |", kibibytes(constant("HEAD_LIMIT")))],
        ),
        ("docs/keys-and-tls.md", vec![format!("may be idle for {idle} s")]),
        ("docs/postgresql.md", vec![format!("Each host gets {} s", constant("HOST_TIMEOUT"))]),
        (
            "docs/security.md",
            vec![
                format!("| {sync} a minute to report, {api} to the rest |"),
                format!("| {key} a minute (`RATE_LIMIT_KEY_PER_MINUTE`) |"),
                format!("| {} (`MAX_CONNECTIONS`)", figure(default("MAX_CONNECTIONS"))),
                format!(
                    "| {} (`MAX_CONCURRENT_REQUESTS`)",
                    figure(default("MAX_CONCURRENT_REQUESTS"))
                ),
                format!("HTTP/2 connection | {} |", constant("STREAMS")),
                format!(
                    "| {}, {seconds} s from its first byte on |",
                    kibibytes(constant("HEAD_LIMIT"))
                ),
                format!("| {}, of those beyond", mebibytes(constant("INCOMPLETE_HEADS_BYTES"))),
                format!("| a connection without a request | {idle} s; {seconds} s when"),
                format!("| {event}, counted once it is decompressed, {seconds} s |"),
                format!("| {batch} events, {batch_bytes}, counted"),
                format!(
                    "| a window of {window} (RFC 9659), {} frames",
                    figure(constant("MAX_FRAMES"))
                ),
                format!("| a TLS handshake | {} s |", constant("HANDSHAKE_TIMEOUT")),
                format!(
                    "| {events}, of which batches that are still arriving may hold {} |",
                    figure(constant("QUEUE_EVENTS") / 4 * 3)
                ),
                format!("| {queue}, of which bodies that are still arriving may hold 24;"),
            ],
        ),
    ] {
        let text = text(page);
        for sentence in sentences {
            assert!(text.contains(&sentence), "{page} does not say {sentence:?}");
        }
    }
}
