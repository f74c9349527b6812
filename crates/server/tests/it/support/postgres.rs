//! Real PostgreSQL servers in folders of their own: one that all tests share, and others that a test
//! may break. They end with the test process, however it ends.

use std::{
    io::{BufRead, BufReader, Write},
    net::{Ipv4Addr, TcpListener},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    sync::{Mutex, MutexGuard, OnceLock, PoisonError},
};

use pisync::store::{PostgresTarget, SslMode};
use tokio_postgres::{Client, Config, NoTls};

use super::small_disk::SmallDisk;

/// For the shared server, whose data nobody misses. A deadlock is noticed at once instead of after a
/// second; the time zone is one where a server that forgot to set its own is found out.
const SHARED_SETTINGS: &str = "-c fsync=off -c synchronous_commit=off -c full_page_writes=off \
     -c max_connections=200 -c shared_buffers=64MB -c deadlock_timeout=50ms \
     -c timezone=Pacific/Chatham";

/// For a server that a test kills and starts again: what was committed must be there.
const DEDICATED_SETTINGS: &str =
    "-c fsync=on -c max_connections=100 -c shared_buffers=32MB -c deadlock_timeout=50ms";

/// Ports to try: another process may take one between its being found free and its being used.
const PORTS_TO_TRY: u32 = 5;

/// How a server is stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stop {
    /// Ends connections, writes everything down and goes.
    Orderly,
    /// Goes at once, as in a power cut: the next start recovers from the log.
    Immediate,
}

/// A PostgreSQL server of ours.
pub(crate) struct PostgresServer {
    port: u16,
    settings: &'static str,
    watchdog: Mutex<Watchdog>,
}

/// The process that keeps the server. Closing `orders` makes it end the server and itself.
struct Watchdog {
    orders: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
    process: Child,
    folder: PathBuf,
}

impl PostgresServer {
    /// The server that all tests of this process share, started on first use.
    pub(crate) fn shared() -> &'static Self {
        // A failure is kept, too: each test would try again and wait for the next.
        static SHARED: OnceLock<Result<PostgresServer, String>> = OnceLock::new();
        match SHARED.get_or_init(|| Self::create(SHARED_SETTINGS)) {
            Ok(server) => server,
            Err(problem) => panic!("{problem}"),
        }
    }

    /// A server of the test's own, which it may stop and start. It goes when this is dropped.
    pub(crate) fn dedicated() -> Self {
        Self::create(DEDICATED_SETTINGS).unwrap_or_else(|problem| panic!("{problem}"))
    }

    /// A server that sees a small disk.
    pub(crate) fn with_small_disk(disk: &SmallDisk) -> Self {
        Self::create_inside(DEDICATED_SETTINGS, &disk.entrance_of_user())
            .unwrap_or_else(|problem| panic!("{problem}"))
    }

    fn create(settings: &'static str) -> Result<Self, String> {
        Self::create_inside(settings, &[])
    }

    /// A standby of this server, which follows it from now on.
    pub(crate) fn standby(&self) -> Self {
        let follow = format!("follow {}", self.port);
        Self::make(DEDICATED_SETTINGS, &[], &follow).unwrap_or_else(|problem| panic!("{problem}"))
    }

    fn create_inside(settings: &'static str, entrance: &[String]) -> Result<Self, String> {
        Self::make(settings, entrance, "create")
    }

    /// A server whose folder comes from this order.
    fn make(settings: &'static str, entrance: &[String], order: &str) -> Result<Self, String> {
        let mut watchdog = Watchdog::start(&binaries()?, entrance);
        if !watchdog.order(order) {
            return Err(format!("`{order}` failed:\n{}", watchdog.log()));
        }
        for _ in 0..PORTS_TO_TRY {
            let port = free_port();
            if watchdog.order(&format!("start {port} {settings}")) {
                return Ok(Self { port, settings, watchdog: Mutex::new(watchdog) });
            }
        }
        Err(format!("PostgreSQL does not start:\n{}", watchdog.log()))
    }

    /// Stops the server and returns when it has stopped.
    pub(crate) fn stop(&self, how: Stop) {
        let mode = match how {
            Stop::Orderly => "fast",
            Stop::Immediate => "immediate",
        };
        let mut watchdog = self.watchdog();
        assert!(watchdog.order(&format!("stop {mode}")), "{}", watchdog.log());
    }

    /// Starts the server again, on the same port, and returns when it takes connections.
    pub(crate) fn start(&self) {
        let mut watchdog = self.watchdog();
        let order = format!("start {} {}", self.port, self.settings);
        assert!(watchdog.order(&order), "{}", watchdog.log());
    }

    /// Stops the server's processes where they are: connections stay open, and nobody answers.
    pub(crate) fn pause(&self) {
        assert!(self.watchdog().order("pause"));
    }

    /// Lets a paused server go on.
    pub(crate) fn resume(&self) {
        assert!(self.watchdog().order("resume"));
    }

    /// The lines of the server's log that are about errors.
    pub(crate) fn errors(&self) -> Vec<String> {
        let log = self.watchdog().log();
        log.lines().filter(|line| line.contains("ERROR:")).map(str::to_owned).collect()
    }

    fn watchdog(&self) -> MutexGuard<'_, Watchdog> {
        self.watchdog.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How to reach a database on this server.
    pub(crate) fn config(&self, database: &str) -> Config {
        let mut config = Config::new();
        config.host("127.0.0.1").port(self.port).user("pisync").dbname(database);
        config
    }

    /// Creates an empty database.
    pub(crate) async fn create_database(&self, name: &str) -> PostgresTarget {
        let statement = format!("create database {name}");
        connect(&self.config("postgres")).await.batch_execute(&statement).await.unwrap();
        postgres_target(self.config(name))
    }

    /// Creates an empty database on a small disk, which the server must see.
    pub(crate) async fn create_database_on(&self, disk: &SmallDisk, name: &str) -> PostgresTarget {
        let client = connect(&self.config("postgres")).await;
        let folder = disk.folder_for_postgres();
        let tablespace = format!("create tablespace small location '{}'", folder.display());
        client.batch_execute(&tablespace).await.unwrap();
        let create = format!("create database {name} tablespace small");
        client.batch_execute(&create).await.unwrap();
        postgres_target(self.config(name))
    }

    /// Drops a database, whoever is connected to it.
    pub(crate) async fn drop_database(&self, name: &str) {
        let statement = format!("drop database {name} with (force)");
        connect(&self.config("postgres")).await.batch_execute(&statement).await.unwrap();
    }
}

impl Watchdog {
    fn start(binaries: &Path, entrance: &[String]) -> Self {
        let folder = tempfile::Builder::new().prefix("pisync-postgres-").tempdir().unwrap().keep();
        let mut words = entrance.iter().map(String::as_str).chain(["sh"]);
        let mut process = Command::new(words.next().unwrap_or("sh"))
            .args(words)
            .args(["-c", include_str!("watchdog.sh"), "watchdog"])
            .arg(&folder)
            .arg(binaries)
            .arg(if is_root() { "postgres" } else { "" })
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            // Not the tests' own: whoever reads their output would wait for the watchdog, too.
            .stderr(Stdio::null())
            // Out of reach of Ctrl-C at the terminal.
            .process_group(0)
            .spawn()
            .unwrap();
        Self {
            orders: process.stdin.take(),
            answers: BufReader::new(process.stdout.take().unwrap()),
            process,
            folder,
        }
    }

    /// Whether the order was carried out.
    fn order(&mut self, order: &str) -> bool {
        writeln!(self.orders.as_mut().unwrap(), "{order}").unwrap();
        let mut answer = String::new();
        self.answers.read_line(&mut answer).unwrap();
        answer.trim() == "0"
    }

    fn log(&self) -> String {
        ["orders.log", "server.log"]
            .map(|file| std::fs::read_to_string(self.folder.join(file)).unwrap_or_default())
            .concat()
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.orders = None;
        // It has nothing left to do but to end.
        let _ = self.process.wait();
    }
}

/// The folder with `initdb` and the rest: Debian's newest, else what `pg_config` names.
fn binaries() -> Result<PathBuf, String> {
    let has_initdb = |folder: &Path| folder.join("initdb").exists();
    let debian = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let newest = debian
        .filter(|entry| has_initdb(&entry.path().join("bin")))
        .filter_map(|entry| Some((entry.file_name().to_str()?.parse::<u32>().ok()?, entry.path())))
        .max();
    if let Some((_, path)) = newest {
        return Ok(path.join("bin"));
    }
    let named = Command::new("pg_config").arg("--bindir").output().ok();
    named
        .map(|output| PathBuf::from(String::from_utf8_lossy(&output.stdout).trim()))
        .filter(|folder| has_initdb(folder))
        .ok_or_else(|| {
            "the tests need PostgreSQL's server programs: run ./scripts/test, which sees to them"
                .to_owned()
        })
}

pub(crate) fn is_root() -> bool {
    Command::new("id").arg("-u").output().unwrap().stdout == b"0\n"
}

fn free_port() -> u16 {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port()
}

/// A connection of the test's own, for SQL that goes behind the store's back.
pub(crate) async fn connect(config: &Config) -> Client {
    let (client, connection) = config.connect(NoTls).await.unwrap();
    // Its end is the client's end, or the server's: nothing that a test would want to hear of.
    tokio::spawn(connection);
    client
}

/// What the store is told about the database that `config` names.
pub(crate) fn postgres_target(config: Config) -> PostgresTarget {
    PostgresTarget { config, ssl_mode: SslMode::Disable, ssl_root_cert: None }
}
