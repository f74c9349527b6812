//! Databases to test in, on both stores, and the macro that runs one test body on each.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use pisync::{
    keys::{self, KeyRequest},
    random::Randomness,
    store::{
        self, Actor, Batch, EventWriter, JobDifference, Observations, Scope, Store, StoreError,
        Target, Via, Written, migrations::Migrator,
    },
};
use tempfile::TempDir;
use tokio::sync::{Mutex, mpsc};

use super::{
    events::{later, now},
    postgres::{self, PostgresServer},
};

/// Makes `sqlite::name` and `postgres::name` out of each test body that it is given the name of:
///
/// ```ignore
/// both_stores!(a_device_is_found);
///
/// async fn a_device_is_found(fixture: &TestStore) { … }
/// ```
///
/// The argument may be anything that implements [`Fixture`]. The bodies may also stand in the macro
/// (`both_stores! { async fn a_device_is_found(fixture: &TestStore) { … } }`), but rustfmt does not
/// look into it. Once per module, since it makes two modules in it.
macro_rules! both_stores {
    ($($name:ident),+ $(,)?) => {
        mod sqlite {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $name() {
                    $crate::support::store::on_sqlite(super::$name).await;
                }
            )+
        }
        mod postgres {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $name() {
                    $crate::support::store::on_postgres(super::$name).await;
                }
            )+
        }
    };
    ($(async fn $name:ident($fixture:ident: $kind:ty) $body:block)+) => {
        $(async fn $name($fixture: $kind) $body)+
        both_stores!($($name),+);
    };
}

/// Makes four tests out of each body that it is given the name of: on both stores, and there with each of the writers that
/// the program really uses. `sqlite` and `postgres` write as imports do ([`EventStore::event_writer`]), `sqlite_ingest` and
/// `postgres_ingest` as a server does ([`EventStore::ingest_writer`]).
macro_rules! every_writer {
    ($($name:ident),+ $(,)?) => {
        both_stores!($($name),+);

        mod sqlite_ingest {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $name() {
                    let database = $crate::support::store::TestDatabase::sqlite();
                    $crate::support::store::through_ingest(database, super::$name).await;
                }
            )+
        }
        mod postgres_ingest {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $name() {
                    let database = $crate::support::store::TestDatabase::postgres().await;
                    $crate::support::store::through_ingest(database, super::$name).await;
                }
            )+
        }
    };
}

/// What a test body is given, made from an empty database.
pub(crate) trait Fixture: Sized {
    /// Prepares `database` and keeps it for as long as this lives.
    async fn prepare(database: TestDatabase) -> Self;

    /// Gives the database back.
    fn into_database(self) -> TestDatabase;
}

/// Runs a test body on a fresh SQLite file.
pub(crate) async fn on_sqlite<F: Fixture>(body: impl AsyncFnOnce(&F)) {
    run(TestDatabase::sqlite(), body).await;
}

/// Runs a test body on a fresh PostgreSQL database.
pub(crate) async fn on_postgres<F: Fixture>(body: impl AsyncFnOnce(&F)) {
    run(TestDatabase::postgres().await, body).await;
}

async fn run<F: Fixture>(database: TestDatabase, body: impl AsyncFnOnce(&F)) {
    let fixture = F::prepare(database).await;
    body(&fixture).await;
    fixture.into_database().remove().await;
}

/// Runs a test body whose events go the way of a server's.
pub(crate) async fn through_ingest(database: TestDatabase, body: impl AsyncFnOnce(&TestStore)) {
    let mut fixture = TestStore::prepare(database).await;
    fixture.ingest = Some(IngestWriter::start(&*fixture.store).await);
    body(&fixture).await;
    fixture.into_database().remove().await;
}

/// The one ingest writer of a store, for several owners who take turns. A write returns once its events are applied, with
/// what was learnt of their devices.
#[derive(Clone)]
struct IngestWriter(Arc<Mutex<Ingest>>);

struct Ingest {
    writer: Box<dyn EventWriter>,
    observations: mpsc::UnboundedReceiver<Observations>,
}

impl IngestWriter {
    async fn start(store: &dyn Store) -> Self {
        let (tell, observations) = mpsc::unbounded_channel();
        let writer = store.ingest_writer(tell).await.unwrap();
        Self(Arc::new(Mutex::new(Ingest { writer, observations })))
    }
}

#[async_trait]
impl EventWriter for IngestWriter {
    async fn write(&mut self, batch: &Arc<Batch>) -> Result<Written, StoreError> {
        let Ingest { writer, observations } = &mut *self.0.lock().await;
        let mut written = writer.write(batch).await?;
        writer.finish().await?;
        while let Ok(learnt) = observations.try_recv() {
            written.new_devices.extend(learnt.new_devices);
            written.streaks.extend(learnt.streaks);
        }
        Ok(written)
    }

    async fn probe(&mut self) -> Result<(), StoreError> {
        self.0.lock().await.writer.probe().await
    }
}

/// A key for everything that its scope opens.
pub(crate) fn key_request(scope: Scope) -> KeyRequest {
    KeyRequest { name: None, scope, device_id: None, group: None, expires_at: None }
}

/// A database with nothing in it yet.
pub(crate) struct TestDatabase {
    pub(crate) target: Target,
    place: Place,
}

enum Place {
    File(TempDir),
    /// The database's name.
    SharedServer(String),
    /// Whoever made it removes it.
    Elsewhere,
}

impl TestDatabase {
    /// The name of an SQLite file that does not exist yet.
    pub(crate) fn sqlite() -> Self {
        let folder = tempfile::Builder::new().prefix("pisync-sqlite-").tempdir().unwrap();
        Self { target: Target::Sqlite(folder.path().join("pisync.db")), place: Place::File(folder) }
    }

    /// A new database on the shared PostgreSQL server.
    pub(crate) async fn postgres() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(1);
        let name = format!("test_{}", NUMBER.fetch_add(1, Ordering::Relaxed));
        let target = PostgresServer::shared().create_database(&name).await;
        Self { target: Target::Postgres(Box::new(target)), place: Place::SharedServer(name) }
    }

    /// A database that the test has made and sees to, such as one on a server of its own.
    pub(crate) fn elsewhere(target: Target) -> Self {
        Self { target, place: Place::Elsewhere }
    }

    /// Runs the migrations that are part of the program.
    pub(crate) async fn migrate(&self) {
        self.migrator(Path::new("/nonexistent")).await.up(now()).await.unwrap();
    }

    /// Something to run migrations with; `folder` holds the users' own.
    pub(crate) async fn migrator(&self, folder: &Path) -> Migrator {
        Migrator::new(&self.target, folder).await.unwrap()
    }

    /// Makes a key as the command line does, beside a server if there is one: its number and itself.
    pub(crate) async fn make_key(&self, key_request: KeyRequest) -> (i64, String) {
        let store = store::open(&self.target).await.unwrap();
        let by = Actor { via: Via::CommandLine, address: None, at: now() };
        let made = keys::create(&*store, &Randomness::system(), key_request, &by).await.unwrap();
        (made.0, made.1.as_str().to_owned())
    }

    /// Runs SQL behind the store's back, on a connection of its own.
    pub(crate) async fn execute(&self, sql: &str) {
        match &self.target {
            Target::Sqlite(path) => {
                let connection = rusqlite::Connection::open(path).unwrap();
                connection.busy_timeout(Duration::from_secs(60)).unwrap();
                connection.execute_batch(sql).unwrap();
            }
            Target::Postgres(target) => {
                postgres::connect(&target.config).await.batch_execute(sql).await.unwrap();
            }
        }
    }

    /// What an SQL expression comes to.
    pub(crate) async fn number(&self, expression: &str) -> i64 {
        let select = format!("select cast({expression} as bigint)");
        match &self.target {
            Target::Sqlite(path) => {
                let connection = rusqlite::Connection::open(path).unwrap();
                connection.query_row(&select, [], |row| row.get(0)).unwrap()
            }
            Target::Postgres(target) => {
                let client = postgres::connect(&target.config).await;
                client.query_one(&select, &[]).await.unwrap().get(0)
            }
        }
    }

    /// The rows that `select` answers with, each of which it has made one text of.
    pub(crate) async fn texts(&self, select: &str) -> Vec<String> {
        match &self.target {
            Target::Sqlite(path) => {
                let connection = rusqlite::Connection::open(path).unwrap();
                let mut select = connection.prepare(select).unwrap();
                select.query_map([], |row| row.get(0)).unwrap().map(Result::unwrap).collect()
            }
            Target::Postgres(target) => {
                let client = postgres::connect(&target.config).await;
                let rows = client.query(select, &[]).await.unwrap();
                rows.iter().map(|row| row.get(0)).collect()
            }
        }
    }

    /// The names of all tables, but for the databases' own.
    pub(crate) async fn tables(&self) -> Vec<String> {
        match &self.target {
            Target::Sqlite(path) => {
                let connection = rusqlite::Connection::open(path).unwrap();
                let mut select = connection
                    .prepare(
                        r"select name from sqlite_schema
                           where type = 'table' and name not like 'sqlite\_%' escape '\'
                           order by name",
                    )
                    .unwrap();
                select.query_map([], |row| row.get(0)).unwrap().map(Result::unwrap).collect()
            }
            Target::Postgres(target) => {
                const TABLES: &str = "
                    select tablename::text from pg_tables where schemaname = 'public'
                     order by tablename collate \"C\"
                ";
                let client = postgres::connect(&target.config).await;
                client.query(TABLES, &[]).await.unwrap().iter().map(|row| row.get(0)).collect()
            }
        }
    }

    /// The file, on SQLite.
    pub(crate) fn file(&self) -> Option<PathBuf> {
        match &self.target {
            Target::Sqlite(path) => Some(path.clone()),
            Target::Postgres(_) => None,
        }
    }

    /// Removes the database. A test that fails does not come here: a folder goes when it is dropped,
    /// the server's databases go with the server.
    pub(crate) async fn remove(self) {
        match self.place {
            Place::File(folder) => folder.close().unwrap(),
            Place::SharedServer(name) => PostgresServer::shared().drop_database(&name).await,
            Place::Elsewhere => {}
        }
    }
}

impl Fixture for TestDatabase {
    async fn prepare(database: TestDatabase) -> Self {
        database
    }

    fn into_database(self) -> TestDatabase {
        self
    }
}

/// Recounts everything and gives the figures that are not what the events add up to. Sums by day and hour
/// must be.
pub(crate) async fn differences(store: &dyn Store, repair: bool) -> Vec<JobDifference> {
    let (mut found, mut after) = (Vec::new(), None);
    loop {
        let page = store.verify(after.as_deref(), later(), repair).await.unwrap();
        assert_eq!(page.days, []);
        found.extend(page.differences);
        after = page.next;
        if after.is_none() {
            assert_eq!(store.verify_hours().await.unwrap(), []);
            return found;
        }
    }
}

/// All figures must be what the events add up to.
#[track_caller]
pub(crate) fn assert_right(differences: &[JobDifference]) {
    let figures: Vec<_> =
        differences.iter().map(|job| (&job.device_id, &job.job, job.figures())).collect();
    assert!(figures.is_empty(), "{figures:#?}");
}

/// An open store in a database with the current schema.
pub(crate) struct TestStore {
    pub(crate) database: TestDatabase,
    pub(crate) store: Arc<dyn Store>,
    /// The way of events, when it is a server's.
    ingest: Option<IngestWriter>,
}

impl TestStore {
    pub(crate) fn target(&self) -> &Target {
        &self.database.target
    }

    pub(crate) fn is_postgres(&self) -> bool {
        matches!(self.database.target, Target::Postgres(_))
    }

    pub(crate) fn writer(&self) -> Box<dyn EventWriter> {
        match &self.ingest {
            Some(ingest) => Box::new(ingest.clone()),
            None => self.store.event_writer(),
        }
    }
}

impl Fixture for TestStore {
    async fn prepare(database: TestDatabase) -> Self {
        database.migrate().await;
        let store = store::open(&database.target).await.unwrap();
        store.maintain(now()).await.unwrap();
        Self { database, store, ingest: None }
    }

    fn into_database(self) -> TestDatabase {
        self.database
    }
}
