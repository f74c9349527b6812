//! Who may do what on a PostgreSQL server: `pisync db setup` with few rights, messages that say which right is
//! missing, and the commands that `pisync backup` and `restore` print.

use tokio_postgres::{Client, Config};

use crate::support::{
    http::event,
    postgres::{PostgresServer, connect},
    program::Program,
};

/// A server of its own would cost seconds: names keep the tests apart.
struct Place {
    admin: Client,
    name: &'static str,
    port: u16,
}

impl Place {
    /// Makes a role of this name, and nothing else.
    async fn with_role(name: &'static str, rights: &str) -> Self {
        let config = PostgresServer::shared().config("postgres");
        let admin = connect(&config).await;
        admin.batch_execute(&format!("create role {name} login {rights}")).await.unwrap();
        Self { admin, name, port: config.get_ports()[0] }
    }

    async fn execute(&self, sql: &str) {
        self.admin.batch_execute(sql).await.unwrap();
    }

    fn url(&self) -> String {
        let Self { name, port, .. } = self;
        format!("postgres://{name}@127.0.0.1:{port}/{name}")
    }

    fn program(&self) -> Program {
        Program::new().with("DATABASE_URL", self.url()).with("PORT", 0)
    }

    /// As an administrator, in the role's database.
    async fn inside(&self) -> Client {
        connect(&PostgresServer::shared().config(self.name)).await
    }

    /// As the role, in its database.
    async fn as_role(&self) -> Client {
        let mut config = Config::new();
        config.host("127.0.0.1").port(self.port).user(self.name).dbname(self.name);
        connect(&config).await
    }

    async fn remove(self) {
        PostgresServer::shared().drop_database(self.name).await;
        self.execute(&format!("drop role {}", self.name)).await;
    }
}

/// The text between the first two backticks behind `before`.
fn quoted<'a>(text: &'a str, before: &str) -> &'a str {
    let rest = &text[text.find(before).unwrap_or_else(|| panic!("{before}: {text}"))..];
    rest.split('`').nth(1).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn db_setup_takes_the_roles_own_database_as_it_is() {
    let place = Place::with_role("setup_own", "").await;
    place.execute("create database setup_own owner setup_own").await;
    let program = place.program();
    for _ in 0..2 {
        assert!(program.run(&["db", "setup"]).success().contains("is ready"));
    }
    // Also where the database from which others are created is closed to it.
    place.execute("revoke connect on database postgres from public").await;
    let again = program.run(&["db", "setup"]);
    place.execute("grant connect on database postgres to public").await;
    assert!(again.success().contains("is ready"));
    place.remove().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn db_setup_makes_a_database_in_utf8_or_says_which_right_is_missing() {
    let place = Place::with_role("setup_new", "").await;
    let program = place.program();
    let refused = program.run(&["db", "setup"]);
    assert!(refused.failure().contains("grant this user CREATEDB"), "{refused:?}");
    assert!(quoted(refused.failure(), "or run").starts_with("create database \"setup_new\""));
    place.execute("alter role setup_new createdb").await;
    assert!(program.run(&["db", "setup"]).success().starts_with("created PostgreSQL"));
    let encoding =
        "select pg_encoding_to_char(encoding) from pg_database where datname = 'setup_new'";
    let encoding: String = place.admin.query_one(encoding, &[]).await.unwrap().get(0);
    assert_eq!(encoding, "UTF8");
    place.remove().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_missing_right_is_named_with_what_grants_it() {
    let place = Place::with_role("few_rights", "").await;
    place.execute("create database few_rights").await;
    let inside = place.inside().await;
    // As PostgreSQL 15 has it, whatever runs here.
    inside.batch_execute("revoke create on schema public from public").await.unwrap();
    let program = place.program();
    for command in [&["migrate", "up"][..], &["db", "setup"], &["serve"]] {
        let refused = program.run(command);
        let message = refused.failure();
        assert!(message.contains("permission denied for schema public"), "{message}");
        assert!(message.contains("few_rights may not make tables there"), "{message}");
    }
    // What it says helps.
    let refused = program.run(&["migrate", "up"]);
    inside.batch_execute(quoted(refused.failure(), "as an administrator")).await.unwrap();
    program.run(&["migrate", "up"]).success();
    program.run(&["migrate", "down", "100", "--yes"]).success();

    // Tables of somebody else.
    let others = "create table others (like pisync_migrations);
                  drop table pisync_migrations;
                  alter table others rename to pisync_migrations";
    inside.batch_execute(others).await.unwrap();
    let refused = program.run(&["migrate", "up"]);
    assert!(refused.failure().contains("owner to few_rights"), "{refused:?}");

    // A schema that there is not.
    let program = Program::new()
        .with("DATABASE_URL", format!("{}?options=-c%20search_path%3Dapp", place.url()));
    let refused = program.run(&["migrate", "up"]);
    inside
        .batch_execute(
            quoted(refused.failure(), "create the schema").replace("NAME", "app").as_str(),
        )
        .await
        .unwrap();
    program.run(&["migrate", "up"]).success();
    assert!(program.run(&["verify"]).success().contains("devices: 0"));
    drop(inside);
    place.remove().await;
}

/// The command behind the first colon of a message.
fn command(message: &str) -> &str {
    message.split_once(": ").unwrap().1
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_restore_prints_brings_everything_back_and_loses_nothing() {
    let place = Place::with_role("backed_up", "createdb").await;
    place.execute("create role reader_of_backup").await;
    let program = place.program();
    program.run(&["db", "setup"]).success();
    // What a database in use has besides: an extension that is not the role's, with its comment, tables and
    // rights of its own.
    let inside = place.inside().await;
    inside.batch_execute("create extension pg_trgm").await.unwrap();
    let own = place.as_role().await;
    own.batch_execute(
        "create table notes (device_id varchar(255) collate \"C\" references devices, note text);
         create view worst as select device_id from device_jobs;
         create table \"Zweite Liste\" (id int);
         comment on table notes is 'ours';
         grant select on sync_events, notes, worst to reader_of_backup",
    )
    .await
    .unwrap();
    let server = program.serve(&[]);
    server.client.store(&event("before")).await;
    server.stop();
    own.batch_execute("insert into notes values ('before', 'Łódź')").await.unwrap();

    let backup = program.run(&["backup", "my backup.dump"]);
    program.shell(command(backup.failure())).success();

    // Everything goes on, and more comes to depend on it.
    let server = program.serve(&[]);
    server.client.store(&event("after")).await;
    server.stop();
    own.batch_execute(
        "create table sync_events_2031_01 partition of sync_events
             for values from ('2031-01-01') to ('2031-02-01');
         create table later (device_id varchar(255) collate \"C\" references devices);
         insert into later values ('after'); insert into notes values ('after', 'x')",
    )
    .await
    .unwrap();
    drop((own, inside));

    let restore = program.run(&["restore", "my backup.dump"]);
    let restore = command(restore.failure());
    program.shell(restore).success();
    let own = place.as_role().await;
    let text = async |client: &Client, sql: &str| -> String {
        client.query_one(sql, &[]).await.unwrap().get::<_, Option<String>>(0).unwrap_or_default()
    };
    for (sql, expected) in [
        ("select string_agg(device_id, ' ') from sync_events", "before"),
        ("select string_agg(note, ' ') from notes", "Łódź"),
        ("select string_agg(device_id, ' ') from worst", "before"),
        ("select obj_description('notes'::regclass, 'pg_class')", "ours"),
        ("select obj_description('device_jobs'::regclass, 'pg_class')", ""),
        ("select to_regclass('later')::text", ""),
        ("select to_regclass('sync_events_2031_01')::text", ""),
        ("select to_regclass('\"Zweite Liste\"')::text", "\"Zweite Liste\""),
        ("select extname::text from pg_extension where extname = 'pg_trgm'", "pg_trgm"),
        (
            "select string_agg(distinct tableowner::text, ' ') from pg_tables where schemaname = 'public'",
            "backed_up",
        ),
        ("select has_table_privilege('reader_of_backup', 'sync_events', 'select')::text", "true"),
        (
            "select string_agg(distinct pg_get_userbyid(datdba)::text, ' ') from pg_database
              where datname like 'backed_up%'",
            "backed_up",
        ),
        (
            "select col_description('device_jobs'::regclass, attnum) from pg_attribute
           where attrelid = 'device_jobs'::regclass and attname = 'speed_sum'",
            "sum of internet_speed in hundredths of Mbps",
        ),
    ] {
        assert_eq!(text(&own, sql).await, expected, "{sql}");
    }
    // What was there before is kept whole.
    let mut config = PostgresServer::shared().config("backed_up_replaced");
    config.user("backed_up");
    let replaced = connect(&config).await;
    assert_eq!(
        text(&replaced, "select string_agg(device_id, ' ' order by id) from sync_events").await,
        "before after"
    );
    assert_eq!(text(&replaced, "select string_agg(device_id, ' ') from later").await, "after");
    drop((own, replaced));
    assert!(program.run(&["verify"]).success().contains("differing jobs: 0"));
    let server = program.serve(&[]);
    server.client.store(&event("anew")).await;

    // A second time changes nothing: the server is running, and the name for what is replaced is taken.
    let again = program.shell(restore);
    assert_ne!(again.code(), 0, "{again:?}");
    assert!(server.client.get("/api/device/anew").await.json(200)["success"].as_bool().unwrap());
    server.stop();
    assert!(program.run(&["verify"]).success().contains("devices: 2"));

    for name in ["backed_up_replaced", "backed_up_restored"] {
        PostgresServer::shared().drop_database(name).await;
    }
    PostgresServer::shared().drop_database("backed_up").await;
    place.execute("drop role backed_up; drop role reader_of_backup").await;
}
