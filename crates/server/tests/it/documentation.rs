//! What README.md, `docs/` and `.env.example` say of the program, compared with it: settings, figures, names of commands
//! and metrics, links. Their commands are run by `documented_commands`.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use pisync::{
    cli::reference,
    config::http::{ANSWER_BYTES, Timeouts},
};
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
    let later =
        ["pisync_sync_events_refused_total", "pisync_notifications_total"].map(str::to_owned);
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

/// The program's source, by the path of each file below `crates/server/src`.
fn source() -> BTreeMap<String, String> {
    fn read(root: &Path, folder: &Path, files: &mut BTreeMap<String, String>) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                read(root, &path, files);
            } else if path.extension().is_some_and(|kind| kind == "rs") {
                let name = path.strip_prefix(root).unwrap().to_str().unwrap().to_owned();
                files.insert(name, std::fs::read_to_string(path).unwrap());
            }
        }
    }
    let (root, mut files) = (path("crates/server/src"), BTreeMap::new());
    read(&root, &root, &mut files);
    files
}

/// What a file's constant is: `65_536`, `32 << 20`, `4 * DAY` or `Duration::from_secs(5)`, which is 5. Most of those that
/// the pages speak of are nobody else's business, so no module shows them.
fn value(file: &str, name: &str) -> Option<u64> {
    let (_, rest) = file.split_once(&format!("const {name}: "))?;
    let (mut text, _) = rest.split_once(" = ")?.1.split_once(';')?;
    for unit in ["Duration::from_secs(", "Duration::from_millis("] {
        text = text.strip_prefix(unit).and_then(|text| text.strip_suffix(')')).unwrap_or(text);
    }
    let factor = |text: &str| text.replace('_', "").parse().ok().or_else(|| value(file, text));
    let mut words = text.split(' ');
    let mut value = factor(words.next()?)?;
    while let Some(operator) = words.next() {
        let right = factor(words.next()?)?;
        value = match operator {
            "*" => value.checked_mul(right)?,
            "/" => value.checked_div(right)?,
            "<<" => value << right,
            _ => return None,
        };
    }
    Some(value)
}

/// What the constants of a name are, wherever they stand.
fn constants(source: &BTreeMap<String, String>, name: &str) -> Vec<u64> {
    let values: Vec<_> = source.values().filter_map(|file| value(file, name)).collect();
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
    let in_file = |file: &str, name: &str| {
        let value = value(&source[file], name);
        value.unwrap_or_else(|| panic!("there is no {name} in {file}: name its successor here"))
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
    let large = kibibytes(constant("LARGE"));
    let refresh = format!("every {} ms", constant("REFRESH_INTERVAL"));
    let look_up = constant("LOOK_UP_INTERVAL");
    let host = constant("HOST_TIMEOUT");
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
                format!("open files, less {} |", constant("OTHER_FILES")),
                format!(
                    "30 s for each {} and {seconds} s more, {} min |",
                    kibibytes(constant("STRETCH_BYTES")),
                    timeouts.body.as_secs() * constant("TIMES_AS_LONG") / 60
                ),
                format!("at most {} plus twice", kibibytes(constant("ALLOWANCE"))),
                format!("is given up after {}.", kibibytes(constant("ALLOWANCE"))),
                format!(
                    "| {} at a time on SQLite, {} on PostgreSQL; {} s each | wait {} s,",
                    in_file("store/sqlite/connection.rs", "LONG_READS"),
                    in_file("store/postgres/store.rs", "LONG_READS"),
                    constant("READ_TIMEOUT"),
                    constant("READER_WAIT")
                ),
                format!(
                    "| {} all together; each connection has {} in any case |",
                    figure(constant("MAX_UNREAD")),
                    constant("ALWAYS")
                ),
                format!(
                    "larger than {large} that clients have not taken | {}, all together | 503, for a batch before it is stored; a streamed history waits {} s",
                    mebibytes(ANSWER_BYTES as u64),
                    in_file("api/devices/history_stream.rs", "PATIENCE")
                ),
                format!(
                    "the first of each event, and {} more |",
                    figure(constant("FURTHER_VIOLATIONS"))
                ),
                format!("check {refresh} whether a key"),
                format!("look-ups are {look_up} ms apart"),
                format!("{} reads of one row a second", 1000 / look_up),
            ],
        ),
        (
            "docs/architecture.md",
            vec![
                format!("or with 503 after {} s |", constant("RESOLVE_TIMEOUT")),
                format!("After {} s without success", constant("RESOLVE_TIMEOUT")),
                format!("up to {} waiting events", figure(constant("BATCH_EVENTS"))),
                format!("at most {}.", constant("WAKE_EVENTS")),
                format!("The writer applies {} events", figure(constant("APPLY_BATCH_EVENTS"))),
                format!(
                    "At most {} may be in the journal alone",
                    journal.replace(", or", " events or")
                ),
                format!("events wait up to {} s", constant("FULL_TIMEOUT")),
                format!("reserves {} ids", figure(constant("RESERVED_IDS"))),
                format!("so are the {} batches after it", constant("DEDUPLICATING_BATCHES")),
                format!("holds the writer for some {} ms", constant("STEP_TARGET")),
                format!(
                    "Each step takes some {} ms, and the pause after it is {} times as long.",
                    constant("STEP_TARGET"),
                    constant("STEP_YIELD")
                ),
                format!("returned, {} at a time", constant("VACUUM_PAGES")),
                format!("is at least {} s ago", constant("FINAL_AFTER_MILLISECONDS") / 1000),
                format!(
                    "read the watermark every {} s, and are at least {} s ahead of it",
                    constant("WATERMARKS_MILLISECONDS") / 1000,
                    constant("SAFE_AFTER_MILLISECONDS") / 1000
                ),
                format!("Aggregation runs every {} s.", constant("AGGREGATION_INTERVAL")),
                format!(
                    "announced {} minutes before a month is dropped",
                    constant("NOTICE_MILLISECONDS") / 60_000
                ),
                format!("A step is {} records", figure(constant("STEP_RECORDS"))),
                format!("the first {} records", constant("HEAD_RECORDS")),
                format!("`Retry-After: {}`", constant("RETRY_WHEN_CLOCK_NOT_SET")),
                format!(
                    "a clock that is up to {} days ahead",
                    constant("LONGEST_PAUSE") / 86_400_000
                ),
                format!("judged again every {} minutes", constant("DOUBT_INTERVAL") / 60),
                format!("the probe first writes {}.", mebibytes(constant("PROBE_BYTES"))),
                format!(
                    "for {}.{} s (the writer's `lock_timeout`)",
                    constant("LOCK_TIMEOUT") / 1000,
                    constant("LOCK_TIMEOUT") % 1000 / 100
                ),
                format!("five times, for at most {} s altogether", constant("WRITE_TIMEOUT")),
                format!("When the log holds {},", mebibytes(constant("CHECKPOINT_PAGES") * 4096)),
                format!("pages of {}.", kibibytes(constant("PAGE_BYTES"))),
                format!("in batches of {}, so memory", figure(constant("BATCH_ROWS"))),
                format!("asks the database {refresh}"),
                format!("copies {} events into", figure(constant("SAMPLE_EVENTS"))),
                format!("Beyond {} addresses", figure(constant("MAX_ADDRESSES"))),
                format!("are kept for {idle} s,"),
                format!("The head's {seconds} s begin"),
                format!("may have {}, as in Node", kibibytes(constant("HEAD_LIMIT"))),
                format!("beyond {} each", kibibytes(constant("SMALL_HEAD"))),
                format!("as its window, {window} by RFC 9659"),
                format!(
                    "are read in pages of {}.",
                    in_file("api/devices/history_stream.rs", "PAGE")
                ),
                format!("addresses for {host} s (or `connect_timeout`)"),
            ],
        ),
    ] {
        // A sentence may go on in the next line.
        let text = text(page).split_whitespace().collect::<Vec<_>>().join(" ");
        for sentence in sentences {
            assert!(text.contains(&sentence), "{page} does not say {sentence:?}");
        }
    }
}
