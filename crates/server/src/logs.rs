//! Writes log lines: to the console, and as JSON lines to `combined.log` and `error.log`. The current files keep these
//! names and are renamed every day. The command line starts it. A request must never wait for a disk: separate threads
//! write, and lines that come too fast are dropped.

use std::{
    fs::OpenOptions,
    io::{self, IsTerminal},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    str::FromStr,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
};

use file_rotate::{
    ContentLimit, FileRotate, TimeFrequency,
    compression::Compression,
    suffix::{AppendTimestamp, DateFrom, FileLimit},
};
use tracing::{Event, Level, Subscriber, level_filters::LevelFilter};
use tracing_appender::non_blocking::{NonBlocking, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::{
    Layer,
    filter::Targets,
    fmt::{
        self, FmtContext,
        format::{FormatEvent, FormatFields, Writer},
    },
    layer::SubscriberExt,
    registry::LookupSpan,
    util::SubscriberInitExt,
};

use crate::{
    permissions,
    threads::{ThreadMark, Threads},
};

/// How many lines may wait for each output. Beyond it lines are dropped, so that requests do not wait. The default of
/// 128,000 takes 4 MB of memory per output, even without lines.
const WAITING_LINES: usize = 8_192;

/// How many days of rotated files are kept besides the current ones.
const DAYS_KEPT: usize = 14;

/// The threads that write log lines. A process has one log.
static THREADS: OnceLock<Threads> = OnceLock::new();

/// How much to log. The Node service's names are understood as well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogLevel(Level);

impl LogLevel {
    /// The default level of a server.
    pub const INFO: Self = Self(Level::INFO);
    /// The level of all other commands.
    pub const WARN: Self = Self(Level::WARN);
}

impl FromStr for LogLevel {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.trim().to_ascii_lowercase().as_str() {
            "error" => Ok(Self(Level::ERROR)),
            "warn" | "warning" => Ok(Self(Level::WARN)),
            // Winston's `http` level lies between info and verbose. It logs answered requests, which are debug here.
            "info" | "http" => Ok(Self(Level::INFO)),
            "verbose" | "debug" => Ok(Self(Level::DEBUG)),
            "silly" | "trace" => Ok(Self(Level::TRACE)),
            _ => Err("expected error, warn, info, debug or trace (or http, verbose, silly)".into()),
        }
    }
}

/// What to log, and where to.
#[derive(Debug, Clone)]
pub struct LogSettings {
    /// The lowest level that is logged.
    pub level: LogLevel,
    /// The folder of the log files; `None` logs to the console only.
    pub dir: Option<PathBuf>,
    /// True for JSON lines on the console, for log collectors; false for lines that people read.
    pub json_console: bool,
}

/// Writes the waiting lines when it is dropped.
#[must_use = "log lines are lost once this is dropped"]
#[derive(Debug)]
pub struct LogGuard {
    #[expect(dead_code, reason = "held for its drop")]
    guards: Vec<WorkerGuard>,
    openings: Openings,
}

impl LogGuard {
    /// Makes each log file open again at its next line, after logrotate or a person renamed it.
    pub fn reopen(&self) {
        self.openings.0.fetch_add(1, Ordering::Relaxed);
    }
}

/// How often a reopening was requested.
#[derive(Debug, Clone, Default)]
struct Openings(Arc<AtomicU64>);

impl Openings {
    fn count(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A log file that can be reopened.
struct LogFile {
    dir: PathBuf,
    name: &'static str,
    file: FileRotate<AppendTimestamp>,
    openings: Openings,
    /// How many requests to reopen it has handled.
    seen: u64,
}

impl LogFile {
    fn open(dir: &Path, name: &'static str, openings: &Openings) -> Result<Self, String> {
        let (openings, seen) = (openings.clone(), openings.count());
        Ok(Self { dir: dir.to_owned(), name, file: open(dir, name)?, openings, seen })
    }
}

impl io::Write for LogFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.openings.count();
        if count != self.seen {
            self.seen = count;
            // If the file cannot be opened, lines continue to go to the old one. The user may ask again.
            if let Ok(file) = open(&self.dir, self.name) {
                self.file = file;
            }
        }
        self.file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// Starts logging for the entire process.
///
/// # Errors
/// When the folder cannot be written.
pub fn init(settings: &LogSettings) -> Result<LogGuard, String> {
    let (mut guards, openings) = (Vec::new(), Openings::default());
    let threads = THREADS.get_or_init(Threads::new);
    let mut beside = |name, writer: Box<dyn io::Write + Send>| {
        let (writer, guard) = write_beside(threads, name, writer);
        guards.push(guard);
        writer
    };
    let console = beside("log-console", Box::new(io::stdout()));
    let console = if settings.json_console {
        json_lines(console).boxed()
    } else {
        fmt::layer().with_writer(console).with_ansi(wants_colours()).boxed()
    };
    let mut layers = vec![console];
    if let Some(dir) = &settings.dir {
        let combined =
            beside("log-combined", Box::new(LogFile::open(dir, "combined.log", &openings)?));
        let error = beside("log-error", Box::new(LogFile::open(dir, "error.log", &openings)?));
        layers.push(json_lines(combined).boxed());
        layers.push(json_lines(error).with_filter(LevelFilter::ERROR).boxed());
    }
    tracing_subscriber::registry()
        .with(layers)
        .with(targets(settings.level))
        .try_init()
        .map_err(|error| error.to_string())?;
    Ok(LogGuard { guards, openings })
}

/// Starts logging for a command other than the server: short lines for the user, each written with `write`.
///
/// # Errors
/// When logging has already been started.
pub fn init_for_command<W>(level: LogLevel, write: fn() -> W) -> Result<(), String>
where
    W: io::Write + 'static,
{
    let lines = fmt::layer().event_format(ForPeople).with_ansi(false).with_writer(write);
    tracing_subscriber::registry()
        .with(lines)
        .with(targets(level))
        .try_init()
        .map_err(|error| error.to_string())
}

/// Whether the console may have colours: it is a terminal, and nobody has asked for none (<https://no-color.org>).
fn wants_colours() -> bool {
    let is_refused = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    io::stdout().is_terminal() && !is_refused
}

/// The level for each target. Libraries log little that an operator needs.
fn targets(LogLevel(level): LogLevel) -> Targets {
    let libraries = if level == Level::TRACE { Level::TRACE } else { level.min(Level::WARN) };
    Targets::new().with_default(libraries).with_target("pisync", level)
}

/// The format `pisync: warning: what happened field=value`, in which commands report errors.
struct ForPeople;

impl<S, N> FormatEvent<S, N> for ForPeople
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> std::fmt::Result {
        let level = match *event.metadata().level() {
            Level::ERROR => "error",
            Level::WARN => "warning",
            Level::INFO => "info",
            Level::DEBUG => "debug",
            Level::TRACE => "trace",
        };
        write!(writer, "pisync: {level}: ")?;
        context.format_fields(writer.by_ref(), event)?;
        writeln!(writer)
    }
}

/// Waits until a thread that writes log lines has ended, and returns which one and how. Nobody would notice otherwise:
/// lines that no thread writes are dropped.
pub(crate) async fn thread_end() -> String {
    match THREADS.get() {
        Some(threads) => threads.first_end().await,
        None => std::future::pending().await,
    }
}

/// Starts a thread that writes to `writer`.
fn write_beside(
    threads: &Threads,
    name: &'static str,
    writer: Box<dyn io::Write + Send>,
) -> (NonBlocking, WorkerGuard) {
    let builder = NonBlockingBuilder::default().buffered_lines_limit(WAITING_LINES);
    builder.finish(Marked { writer, _mark: threads.mark(name) })
}

/// A writer that reports when its thread ends.
struct Marked {
    writer: Box<dyn io::Write + Send>,
    _mark: ThreadMark,
}

impl io::Write for Marked {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.writer.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.writer.flush()
    }
}

fn json_lines<S>(writer: NonBlocking) -> impl Layer<S>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    fmt::layer()
        .json()
        .flatten_event(true)
        .with_current_span(false)
        .with_span_list(false)
        .with_writer(writer)
}

/// Opens a log file that is renamed to `NAME.YYYY-MM-DD` when the first line of the next day comes.
fn open(dir: &Path, name: &str) -> Result<FileRotate<AppendTimestamp>, String> {
    let path = dir.join(name);
    // The library would panic. This error says what to do.
    permissions::create_folder(dir)
        .and_then(|()| permissions::append(&path, permissions::LOG))
        .and_then(|_| permissions::restrict(&path, permissions::LOG))
        .map_err(|error| {
            format!(
                "cannot write {}: {error}; set LOG_DIR to a folder that the server may write, or to none to log to the console alone",
                path.display()
            )
        })?;
    let mut options = OpenOptions::new();
    options.read(true).append(true).create(true).mode(permissions::LOG);
    Ok(FileRotate::new(
        path,
        AppendTimestamp::with_format(
            "%Y-%m-%d",
            FileLimit::MaxFiles(DAYS_KEPT),
            DateFrom::DateYesterday,
        ),
        ContentLimit::Time(TimeFrequency::Daily),
        Compression::None,
        Some(options),
    ))
}

#[cfg(test)]
mod tests {
    use std::{fs, io::Write as _, os::unix::fs::PermissionsExt, time::Duration};

    use super::*;

    /// Panics, as the library that rotates files does when it cannot create their folder again.
    #[tokio::test]
    async fn a_writer_that_panics_is_noticed() {
        struct Panics;
        impl io::Write for Panics {
            fn write(&mut self, _bytes: &[u8]) -> io::Result<usize> {
                panic!("create dir")
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let threads = Threads::new();
        let (mut writer, _guard) = write_beside(&threads, "log-error", Box::new(Panics));
        writer.write_all(b"line\n").unwrap();
        assert_eq!(threads.first_end().await, "the thread log-error panicked");
    }

    #[test]
    fn the_node_services_levels_are_understood() {
        for (name, level) in [
            ("error", Level::ERROR),
            ("http", Level::INFO),
            ("verbose", Level::DEBUG),
            ("SILLY", Level::TRACE),
        ] {
            assert_eq!(name.parse(), Ok(LogLevel(level)));
        }
        assert!("loud".parse::<LogLevel>().is_err());
    }

    #[test]
    #[expect(clippy::disallowed_methods, reason = "dates the file as of yesterday")]
    fn yesterdays_file_is_renamed_and_old_ones_go() {
        let dir = tempfile::tempdir().unwrap();
        let current = dir.path().join("combined.log");
        for day in 1..=20 {
            fs::write(dir.path().join(format!("combined.log.2026-01-{day:02}")), "old\n").unwrap();
        }
        fs::write(&current, "yesterday\n").unwrap();
        let yesterday = std::time::SystemTime::now() - Duration::from_secs(24 * 60 * 60);
        fs::File::options().append(true).open(&current).unwrap().set_modified(yesterday).unwrap();

        let mut file = open(dir.path(), "combined.log").unwrap();
        file.write_all(b"today\n").unwrap();

        assert_eq!(fs::read_to_string(&current).unwrap(), "today\n");
        assert_eq!(fs::metadata(&current).unwrap().permissions().mode() & 0o777, 0o640);
        let mut others: Vec<_> = fs::read_dir(dir.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| name != "combined.log")
            .collect();
        others.sort();
        assert_eq!(others.len(), DAYS_KEPT);
        let newest = dir.path().join(others.last().unwrap());
        assert_eq!(fs::read_to_string(newest).unwrap(), "yesterday\n");
    }
}
