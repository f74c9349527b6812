//! Which sessions of PostgreSQL are taken: of several hosts the first that answers and takes writes, whatever the
//! others do; none by way of a pooler that shares sessions; none in a database that cannot hold every letter.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use pisync::store::{
    self, Freshness, PostgresTarget, SslMode, StoreError, Target, migrations::Migrator,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
    task::JoinHandle,
};
use tokio_postgres::Config;

use crate::support::{
    events::{at, success, write},
    http::event,
    pgbouncer::PgBouncer,
    postgres::{PostgresServer, connect, postgres_target},
    program::{Program, url},
    proxy::{Fault, Proxy},
    store::{Fixture, TestDatabase, TestStore},
};

/// Where a host falls silent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Silence {
    /// It does not take the connection.
    Connection,
    /// It takes the connection and says nothing.
    Hello,
    /// It agrees to TLS.
    Handshake,
    /// It has been told who connects.
    Authentication,
    /// It has let us in.
    FirstQuery,
}

/// A host that falls silent, for as long as this lives.
struct SilentHost {
    address: SocketAddr,
    /// Connections that it has taken.
    taken: Arc<AtomicUsize>,
    task: JoinHandle<()>,
}

impl SilentHost {
    fn new(silence: Silence) -> Self {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = socket.local_addr().unwrap();
        let listener = socket.listen(if silence == Silence::Connection { 1 } else { 128 }).unwrap();
        let mut waiting = Vec::new();
        if silence == Silence::Connection {
            // Once so many wait to be taken that there is no room for another, nobody gets an answer.
            let little = Duration::from_millis(100);
            while let Ok(stream) = std::net::TcpStream::connect_timeout(&address, little) {
                waiting.push(stream);
            }
        }
        let taken = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&taken);
        let task = tokio::spawn(async move {
            let mut streams = Vec::new();
            loop {
                if silence == Silence::Connection {
                    let _kept = (&listener, &waiting);
                    std::future::pending::<()>().await;
                }
                let (mut stream, _) = listener.accept().await.unwrap();
                count.fetch_add(1, Ordering::Relaxed);
                // Whoever has given up has hung up.
                let _ = talk(&mut stream, silence).await;
                streams.push(stream);
            }
        });
        Self { address, taken, task }
    }
}

impl Drop for SilentHost {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Talks as PostgreSQL does, up to the silence.
async fn talk(stream: &mut TcpStream, silence: Silence) -> std::io::Result<()> {
    const LET_IN: &[u8] = b"R\0\0\0\x08\0\0\0\0K\0\0\0\x0c\0\0\0\x01\0\0\0\x02Z\0\0\0\x05I";
    if silence == Silence::Hello {
        return Ok(());
    }
    // Whether TLS is wanted: a length and a number.
    stream.read_exact(&mut [0; 8]).await?;
    stream.write_all(if silence == Silence::Handshake { b"S" } else { b"N" }).await?;
    if silence == Silence::FirstQuery {
        let length = stream.read_u32().await? as usize;
        stream.read_exact(&mut vec![0; length - 4]).await?;
        stream.write_all(LET_IN).await?;
    }
    Ok(())
}

/// A database at several places, asked in this order, each for a second.
fn through(places: &[u16], direct: &Config) -> PostgresTarget {
    let mut config = Config::new();
    for port in places {
        config.host("127.0.0.1").port(*port);
    }
    config
        .user(direct.get_user().unwrap())
        .dbname(direct.get_dbname().unwrap())
        .connect_timeout(Duration::from_secs(1));
    PostgresTarget { config, ssl_mode: SslMode::Prefer, ssl_root_cert: None }
}

fn direct(fixture: &TestStore) -> (u16, Config) {
    let Target::Postgres(target) = fixture.target() else { unreachable!() };
    (target.config.get_ports()[0], target.config.clone())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_host_does_not_keep_the_next_from_being_asked() {
    let fixture = TestStore::prepare(TestDatabase::postgres().await).await;
    let (port, config) = direct(&fixture);
    for silence in [
        Silence::Connection,
        Silence::Hello,
        Silence::Handshake,
        Silence::Authentication,
        Silence::FirstQuery,
    ] {
        let silent = SilentHost::new(silence);
        let place = silent.address.port();
        // More than one of them, too: each has a time of its own.
        let target = Target::Postgres(Box::new(through(&[place, place, port], &config)));
        let began = Instant::now();
        let mut migrator = Migrator::new(&target, "/nonexistent".as_ref()).await.unwrap();
        assert_eq!(migrator.check().await.unwrap(), Vec::<String>::new());
        assert!(began.elapsed() >= Duration::from_secs(2), "{silence:?}");
        // Whoever connects later in this process asks the host that has answered first.
        let began = Instant::now();
        let store = store::open(&target).await.unwrap();
        let mut writer = store.event_writer();
        write(&mut *writer, vec![success("pi", at(0))]).await;
        store.ping().await.unwrap();
        assert!(began.elapsed() < Duration::from_secs(1), "{silence:?}");

        let alone = Target::Postgres(Box::new(through(&[place], &config)));
        let error = store::open(&alone).await.err().unwrap().to_string();
        let expected = format!("127.0.0.1:{place}: does not answer within 1 s");
        assert!(error.contains(&expected), "{silence:?}: {error}");
    }
    fixture.into_database().remove().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_reaches_the_second_host_within_the_urls_time() {
    let fixture = TestStore::prepare(TestDatabase::postgres().await).await;
    let silent = SilentHost::new(Silence::Hello);
    let address = url(fixture.target()).replace("@", &format!("@{},", silent.address));
    let program = Program::new().with("DATABASE_URL", format!("{address}?connect_timeout=1"));
    assert!(program.run(&["verify"]).success().contains("devices: 0"));
    fixture.into_database().remove().await;
}

/// Each of these connects several times.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_asks_a_silent_host_once() {
    let database = TestDatabase::postgres().await;
    let silent = SilentHost::new(Silence::Hello);
    let address = url(&database.target).replace("@", &format!("@{},", silent.address));
    let address = format!("{address}?connect_timeout=1");
    let program = Program::new().with("DATABASE_URL", &address).with("PORT", 0);
    let asked = || silent.taken.swap(0, Ordering::Relaxed);
    for command in [&["db", "setup"][..], &["migrate", "up"], &["verify"], &["key", "list"]] {
        program.run(command).success();
        assert_eq!(asked(), 1, "{command:?}");
    }
    let source = TestStore::prepare(TestDatabase::sqlite()).await;
    program.run(&["copy", "--from", &url(source.target()), "--to", &address]).success();
    assert_eq!(asked(), 1, "copy");
    let server = program.serve(&[]);
    server.client.report(&event("pi")).await.data(201);
    server.client.get("/api/stats").await.data(200);
    assert_eq!(asked(), 1, "serve");
    server.stop();
    source.into_database().remove().await;
    database.remove().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_several_hosts_one_that_takes_writes_is_used() {
    let fixture = TestStore::prepare(TestDatabase::postgres().await).await;
    let (port, config) = direct(&fixture);
    let name = config.get_dbname().unwrap();
    let standby = PostgresServer::dedicated();
    let read_only = standby.create_database(name).await.config;
    let set = format!("alter database {name} set default_transaction_read_only = on");
    connect(&standby.config("postgres")).await.batch_execute(&set).await.unwrap();
    let standby_port = read_only.get_ports()[0];
    let target = through(&[standby_port, port], &config);
    let store = store::open(&Target::Postgres(Box::new(target))).await.unwrap();
    write(&mut *store.event_writer(), vec![success("pi", at(0))]).await;

    // Of a single one that is asked for, too.
    let mut single = through(&[standby_port], &read_only);
    single.config.target_session_attrs(tokio_postgres::config::TargetSessionAttrs::ReadWrite);
    let error = store::open(&Target::Postgres(Box::new(single))).await.err().unwrap().to_string();
    assert!(error.contains("takes no writes"), "{error}");
    fixture.into_database().remove().await;
}

/// What each new session goes through, as a server and the commands do it.
async fn open(target: &PostgresTarget) -> Result<(), String> {
    let target = Target::Postgres(Box::new(target.clone()));
    let migrator = Migrator::new(&target, "/nonexistent".as_ref()).await;
    let store = store::open(&target).await;
    match (migrator, store) {
        (Ok(mut migrator), Ok(store)) => {
            migrator.check().await.map_err(|error| error.to_string())?;
            let written = write(&mut *store.event_writer(), vec![success("pi", at(0))]).await;
            assert_eq!(written.ids.len(), 1);
            Ok(())
        }
        (Err(error), Err(_)) => Err(error.to_string()),
        (migrator, store) => panic!("{:?} {:?}", migrator.err(), store.err()),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pooler_is_refused_unless_each_connection_has_its_own_session() {
    let fixture = TestStore::prepare(TestDatabase::postgres().await).await;
    let (port, config) = direct(&fixture);
    for settings in [
        // As it comes, and with what is usually set so that programs can connect at all.
        &["pool_mode = transaction"][..],
        &["pool_mode = transaction", "ignore_startup_parameters = options"],
        &["pool_mode = statement", "ignore_startup_parameters = options"],
        &[
            "pool_mode = transaction",
            "ignore_startup_parameters = options",
            "server_round_robin = 1",
            "server_reset_query_always = 1",
            "min_pool_size = 5",
        ],
        &["pool_mode = transaction", "default_pool_size = 1"],
    ] {
        let bouncer = PgBouncer::before(port, settings);
        let target = through(&[bouncer.port], &config);
        let refused = open(&target).await.unwrap_err();
        assert!(refused.contains("pool_mode=session"), "{settings:?}: {refused}");
        assert!(refused.contains("connect to PostgreSQL directly"), "{settings:?}: {refused}");
        // The database works: that is not what is wrong.
        assert!(refused.starts_with("a connection pooler"), "{settings:?}: {refused}");
        let target = Target::Postgres(Box::new(target));
        let program = Program::new().with("DATABASE_URL", url(&target)).with("PORT", 0);
        for command in [&["serve"][..], &["migrate", "up"], &["verify"], &["key", "list"]] {
            let refused = program.run(command);
            assert!(refused.refusal().contains("pool_mode=session"), "{command:?}: {refused:?}");
        }
    }
    fixture.into_database().remove().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pooler_in_session_mode_is_as_good_as_none() {
    let fixture = TestStore::prepare(TestDatabase::postgres().await).await;
    let (port, config) = direct(&fixture);
    for settings in [
        &["pool_mode = session"][..],
        &["pool_mode = session", "ignore_startup_parameters = options"],
    ] {
        let bouncer = PgBouncer::before(port, settings);
        let mut target = through(&[bouncer.port], &config);
        open(&target).await.unwrap();
        // The settings, which do not come through as options, hold all the same: a day is a day of UTC.
        let through = Target::Postgres(Box::new(target.clone()));
        let store = store::open(&through).await.unwrap();
        store.fleet_stats(at(0), 10, Freshness::Everything).await.unwrap();
        let settings = "select count(*) from pg_stat_activity
             where datname = current_database() and application_name = 'pisync'";
        let sessions = fixture.database.number(&format!("({settings})")).await;
        assert!(sessions > 0);
        // The user's own options would be lost.
        target.config.options("-c search_path=public");
        let refused = open(&target).await.unwrap_err();
        assert!(refused.contains("`options`"), "{refused}");
    }
    fixture.into_database().remove().await;
}

/// A failover may lead to a pooler that nobody has thought of.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pooler_that_appears_later_gets_no_events() {
    let fixture = TestStore::prepare(TestDatabase::postgres().await).await;
    let (port, config) = direct(&fixture);
    let bouncer = PgBouncer::before(
        port,
        &["pool_mode = transaction", "ignore_startup_parameters = options"],
    );
    let proxy = Proxy::before(port).await;
    let first = proxy.config(&config).get_ports()[0];
    let target = Target::Postgres(Box::new(through(&[first, bouncer.port], &config)));
    let store = store::open(&target).await.unwrap();
    let mut writer = store.event_writer();
    write(&mut *writer, vec![success("pi", at(0))]).await;

    proxy.set(Fault::Refuse);
    let end = "select pg_terminate_backend(pid, 5000) from pg_stat_activity
                where datname = current_database() and application_name = 'pisync'";
    connect(&config).await.batch_execute(end).await.unwrap();
    let batch = crate::support::events::batch_at(at(1), vec![success("pi", at(1))]);
    let error = writer.write(&batch).await.unwrap_err();
    assert!(matches!(error, StoreError::Unavailable(_)), "{error:?}");
    assert!(error.to_string().contains("pool_mode=session"), "{error}");
    let error = store.fleet_stats(at(0), 10, Freshness::Everything).await.unwrap_err().to_string();
    assert!(error.contains("pool_mode=session"), "{error}");
    assert_eq!(fixture.database.number("(select count(*) from sync_events)").await, 1);

    proxy.set(Fault::None);
    writer.write(&batch).await.unwrap();
    store.fleet_stats(at(0), 10, Freshness::Everything).await.unwrap();
    fixture.into_database().remove().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_that_cannot_hold_every_letter_is_refused() {
    let server = PostgresServer::shared();
    let admin = connect(&server.config("postgres")).await;
    let source = TestStore::prepare(TestDatabase::sqlite()).await;
    for encoding in ["LATIN1", "WIN1250", "EUC_JP", "SQL_ASCII"] {
        let name = format!("in_{}", encoding.to_lowercase());
        let create = format!(
            "create database {name} encoding '{encoding}' template template0 lc_collate 'C' lc_ctype 'C'
             locale_provider libc"
        );
        admin.batch_execute(&create).await.unwrap();
        let target = postgres_target(server.config(&name));
        let refused = open(&target).await.unwrap_err();
        for part in [&name, encoding, "UTF8", "pisync db setup", "template0", "pg_restore"] {
            assert!(refused.contains(part), "{part}: {refused}");
        }
        assert!(refused.starts_with(&format!("the database {name} is encoded in")), "{refused}");
        let target = Target::Postgres(Box::new(target));
        let program = Program::new().with("DATABASE_URL", url(&target)).with("PORT", 0);
        for command in
            [&["serve"][..], &["db", "setup"], &["migrate", "up"], &["migrate", "up", "--dry-run"]]
        {
            let refused = program.run(command);
            assert!(refused.failure().contains(encoding), "{command:?}: {refused:?}");
        }
        let from = url(source.target());
        let refused = program.run(&["copy", "--from", &from, "--to", &url(&target)]);
        assert!(refused.failure().contains(encoding), "{refused:?}");
        server.drop_database(&name).await;
    }
    source.into_database().remove().await;
}

/// Whatever keeps the program from PostgreSQL: the message names it, says what to do, and never the password.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_wrong_with_the_way_to_postgresql_is_named() {
    let port = PostgresServer::shared().config("postgres").get_ports()[0];
    let unused = crate::support::server::unused_address().port();
    for (rest, expected) in [
        ("postgres?schema=app".to_owned(), "DATABASE_URL: schema is no parameter of PostgreSQL"),
        ("postgres?ssl=true".to_owned(), "DATABASE_URL: write sslmode=require"),
        ("postgres?sslmode=require".to_owned(), "server does not support TLS"),
        (
            "postgres?sslmode=verify-ca&sslrootcert=absent.pem".to_owned(),
            "cannot read sslrootcert absent.pem: ",
        ),
        (
            "postgres?sslmode=verify-full&sslrootcert=empty.pem".to_owned(),
            "cannot read sslrootcert empty.pem: there is no PEM certificate in it",
        ),
        ("there_is_none".to_owned(), "create it with `pisync db setup`"),
        ("postgres?user=nobody_here".to_owned(), "check DB_USER and DB_PASSWORD"),
        ("postgres?options=-c%20nonsense%3D1".to_owned(), "nonsense"),
    ] {
        let url = format!("postgres://pisync:hunter@127.0.0.1:{port}/{rest}");
        let program = Program::new().with_file("empty.pem", "").with("DATABASE_URL", url);
        let refused = program.run(&["key", "list"]);
        // What makes no sense is told from what PostgreSQL refuses.
        let is_wrong = expected.starts_with("DATABASE_URL");
        let said = if is_wrong { refused.wrong_usage() } else { refused.failure() };
        assert!(said.contains(expected) && !said.contains("hunter"), "{expected}: {refused:?}");
        // PostgreSQL works: something that it was asked for is wrong.
        assert!(!said.contains("unavailable"), "{refused:?}");
    }
    let url = format!("postgres://pisync:hunter@127.0.0.1:{unused},host.invalid:5433/db");
    let refused = Program::new().with("DATABASE_URL", url).run(&["key", "list"]);
    let message = refused.failure();
    assert!(message.contains(&format!("127.0.0.1:{unused}: ")), "{message}");
    assert!(message.contains("host.invalid:5433: the name cannot be looked up"), "{message}");
    assert!(message.contains("the database is unavailable: 127.0.0.1:"), "{message}");
    assert!(!message.contains("hunter"), "{message}");
}
