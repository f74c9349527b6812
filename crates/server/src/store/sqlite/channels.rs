//! Channels and routes in SQLite. The API and the command line call it through `Channels`. Secrets come encrypted, also where
//! that happens within a transaction.

use std::collections::BTreeSet;

use async_trait::async_trait;
use rusqlite::{Connection, Row, Transaction, TransactionBehavior, params};

use super::{
    audit::record,
    connection::expect_row,
    rows::{optional_time, time},
    store::SqliteStore,
};
use crate::store::{
    Actor, Channel, ChannelCreation, ChannelList, ChannelOutcome, ChannelUpdate, Channels,
    MOST_CHANNELS, NewChannel, NewConfig, Reseal, Resealed, Route, RouteList, RoutesOutcome,
    StoreError, UpdateReason,
    audit::NewAuditEntry,
    channels::{CHANNEL_COLUMNS, stored_config, stored_route, unknown_channels},
    routes::without_channel,
};

#[async_trait]
impl Channels for SqliteStore {
    async fn channels(&self) -> Result<ChannelList, StoreError> {
        self.read(|connection| {
            let snapshot = connection.unchecked_transaction()?;
            let select = format!("select {CHANNEL_COLUMNS} from channels c order by c.id");
            let mut select = snapshot.prepare_cached(&select)?;
            let channels = select.query_map([], channel)?.collect::<Result<_, _>>()?;
            Ok(ChannelList { version: version(&snapshot)?, channels })
        })
        .await
    }

    async fn create_channel(
        &self,
        channel: &NewChannel,
        by: &Actor,
    ) -> Result<ChannelCreation, StoreError> {
        let (channel, by) = (channel.clone(), *by);
        self.writer.call(move |writer| create_channel(writer.connection(), &channel, &by)).await
    }

    async fn update_channel(
        &self,
        id: i64,
        version: i64,
        update: &ChannelUpdate,
        by: &Actor,
    ) -> Result<ChannelOutcome, StoreError> {
        let (update, by) = (update.clone(), *by);
        self.writer
            .call(move |writer| update_channel(writer.connection(), id, version, &update, &by))
            .await
    }

    async fn delete_channel(&self, id: i64, by: &Actor) -> Result<Option<u64>, StoreError> {
        let by = *by;
        self.writer.call(move |writer| delete_channel(writer.connection(), id, &by)).await
    }

    async fn routes(&self) -> Result<RouteList, StoreError> {
        self.read(|connection| {
            let snapshot = connection.unchecked_transaction()?;
            Ok(RouteList { version: version(&snapshot)?, routes: routes(&snapshot)? })
        })
        .await
    }

    async fn replace_routes(
        &self,
        version: i64,
        routes: &[Route],
        by: &Actor,
    ) -> Result<RoutesOutcome, StoreError> {
        let (routes, by) = (routes.to_vec(), *by);
        self.writer
            .call(move |writer| replace_routes(writer.connection(), version, &routes, &by))
            .await
    }

    async fn reseal_channels(&self, reseal: &Reseal, by: &Actor) -> Result<Resealed, StoreError> {
        let (reseal, by) = (reseal.clone(), *by);
        self.writer.call(move |writer| reseal_channels(writer.connection(), &reseal, &by)).await
    }
}

/// Reads [`CHANNEL_COLUMNS`].
fn channel(row: &Row<'_>) -> rusqlite::Result<Channel> {
    Ok(Channel {
        id: row.get(0)?,
        name: row.get(1)?,
        kind: row.get(2)?,
        config: stored_config(&row.get::<_, String>(3)?),
        secrets: row.get(4)?,
        is_enabled: row.get(5)?,
        is_default: row.get(6)?,
        template: row.get(7)?,
        created_at: time(row, 8)?,
        failures: row.get(9)?,
        failing_since: optional_time(row, 10)?,
        last_error: row.get(11)?,
        waiting: row.get::<_, i64>(12)?.cast_unsigned(),
    })
}

fn version(connection: &Connection) -> rusqlite::Result<i64> {
    const VERSION: &str = "select version from notify_state";
    connection.prepare_cached(VERSION)?.query_row([], |row| row.get(0))
}

/// Counts a change, and answers the version that it leads to.
fn count_change(transaction: &Transaction<'_>) -> rusqlite::Result<i64> {
    const COUNT: &str = "update notify_state set version = version + 1 returning version";
    transaction.query_row(COUNT, [], |row| row.get(0))
}

fn routes(connection: &Connection) -> rusqlite::Result<Vec<Route>> {
    const ROUTES: &str = "select route from routes order by position";
    let mut select = connection.prepare_cached(ROUTES)?;
    let stored = select.query_map([], |row| row.get::<_, String>(0))?;
    let routes = stored.map(|text| Ok(stored_route(&text?)));
    Ok(routes.collect::<rusqlite::Result<Vec<_>>>()?.into_iter().flatten().collect())
}

fn begin(connection: &mut Connection) -> rusqlite::Result<Transaction<'_>> {
    connection.transaction_with_behavior(TransactionBehavior::Immediate)
}

/// Whether another channel than `id` has this name.
fn is_name_taken(transaction: &Transaction<'_>, name: &str, id: i64) -> rusqlite::Result<bool> {
    const TAKEN: &str = "select exists (select 1 from channels where name = ?1 and id <> ?2)";
    transaction.query_row(TAKEN, params![name, id], |row| row.get(0))
}

/// Writes what a channel is told. The error within says why its secrets cannot be encrypted.
fn write_config(
    transaction: &Transaction<'_>,
    id: i64,
    config: &NewConfig,
) -> rusqlite::Result<Result<(), String>> {
    const WRITE: &str = "update channels set config = ?2, secrets = ?3 where id = ?1";
    let secrets = match config.secrets.as_ref().map(|seal| seal(id)).transpose() {
        Ok(secrets) => secrets,
        Err(why) => return Ok(Err(why)),
    };
    let values = params![id, config.public.to_string(), secrets];
    expect_row("channels", transaction.execute(WRITE, values)?)?;
    Ok(Ok(()))
}

fn create_channel(
    connection: &mut Connection,
    channel: &NewChannel,
    by: &Actor,
) -> rusqlite::Result<ChannelCreation> {
    const COUNT: &str = "select count(*) from channels";
    const INSERT: &str = "
        insert into channels (name, kind, config, is_enabled, is_default, template, created_at)
        values (?1, ?2, '{}', ?3, ?4, ?5, ?6)
    ";
    let transaction = begin(connection)?;
    let number: i64 = transaction.query_row(COUNT, [], |row| row.get(0))?;
    if number >= i64::from(MOST_CHANNELS) {
        return Ok(ChannelCreation::TooMany);
    }
    if is_name_taken(&transaction, &channel.name, 0)? {
        return Ok(ChannelCreation::NameTaken);
    }
    let is_default = channel.is_default.unwrap_or(number == 0);
    let values = params![
        channel.name,
        channel.kind,
        channel.is_enabled,
        is_default,
        channel.template,
        by.at.as_millisecond(),
    ];
    expect_row("channels", transaction.execute(INSERT, values)?)?;
    let id = transaction.last_insert_rowid();
    if let Err(why) = write_config(&transaction, id, &channel.config)? {
        return Ok(ChannelCreation::NotSealed(why));
    }
    count_change(&transaction)?;
    record(&transaction, by, &NewAuditEntry::channel_created(id, channel, is_default))?;
    transaction.commit()?;
    Ok(ChannelCreation::Created(id))
}

fn update_channel(
    connection: &mut Connection,
    id: i64,
    known_version: i64,
    update: &ChannelUpdate,
    by: &Actor,
) -> rusqlite::Result<ChannelOutcome> {
    const EXISTS: &str = "select exists (select 1 from channels where id = ?1)";
    const UPDATE: &str = "
        update channels
           set name = ?2, is_enabled = ?3, is_default = ?4, template = ?5
         where id = ?1
    ";
    const FORGET_FAILURES: &str = "
        update channels
           set failures = 0, failing_since = null, last_error = null, next_send_at = null
         where id = ?1
    ";
    let transaction = begin(connection)?;
    if !transaction.query_row(EXISTS, [id], |row| row.get::<_, bool>(0))? {
        return Ok(ChannelOutcome::Unknown);
    }
    if version(&transaction)? != known_version {
        return Ok(ChannelOutcome::Stale);
    }
    if is_name_taken(&transaction, &update.name, id)? {
        return Ok(ChannelOutcome::NameTaken);
    }
    let values = params![id, update.name, update.is_enabled, update.is_default, update.template];
    expect_row("channels", transaction.execute(UPDATE, values)?)?;
    if let Some(config) = &update.config
        && let Err(why) = write_config(&transaction, id, config)?
    {
        return Ok(ChannelOutcome::NotSealed(why));
    }
    if update.reason == UpdateReason::Repair {
        expect_row("channels", transaction.execute(FORGET_FAILURES, [id])?)?;
    }
    count_change(&transaction)?;
    record(&transaction, by, &NewAuditEntry::channel_updated(id, update))?;
    transaction.commit()?;
    Ok(ChannelOutcome::Changed)
}

fn delete_channel(
    connection: &mut Connection,
    id: i64,
    by: &Actor,
) -> rusqlite::Result<Option<u64>> {
    let transaction = begin(connection)?;
    let select = format!("select {CHANNEL_COLUMNS} from channels c where c.id = ?1");
    let found: Vec<_> =
        transaction.prepare(&select)?.query_map([id], channel)?.collect::<Result<_, _>>()?;
    let Some(Channel { name, waiting, .. }) = found.into_iter().next() else { return Ok(None) };
    let before = routes(&transaction)?;
    let after = without_channel(before.clone(), id);
    if before != after {
        write_routes(&transaction, &after)?;
    }
    expect_row("channels", transaction.execute("delete from channels where id = ?1", [id])?)?;
    count_change(&transaction)?;
    record(&transaction, by, &NewAuditEntry::channel_deleted(id, &name, waiting))?;
    transaction.commit()?;
    Ok(Some(waiting))
}

fn write_routes(transaction: &Transaction<'_>, routes: &[Route]) -> rusqlite::Result<()> {
    const INSERT: &str = "insert into routes (position, route) values (?1, ?2)";
    transaction.execute("delete from routes", [])?;
    let mut insert = transaction.prepare(INSERT)?;
    for (position, route) in (1_i64..).zip(routes) {
        let values = params![position, route.to_json().to_string()];
        expect_row("routes", insert.execute(values)?)?;
    }
    Ok(())
}

fn replace_routes(
    connection: &mut Connection,
    known_version: i64,
    routes: &[Route],
    by: &Actor,
) -> rusqlite::Result<RoutesOutcome> {
    const IDS: &str = "select id from channels";
    let transaction = begin(connection)?;
    if version(&transaction)? != known_version {
        return Ok(RoutesOutcome::Stale);
    }
    let known: BTreeSet<i64> =
        transaction.prepare(IDS)?.query_map([], |row| row.get(0))?.collect::<Result<_, _>>()?;
    let unknown = unknown_channels(routes, &known);
    if !unknown.is_empty() {
        return Ok(RoutesOutcome::UnknownChannels(unknown));
    }
    write_routes(&transaction, routes)?;
    let version = count_change(&transaction)?;
    record(&transaction, by, &NewAuditEntry::routes_replaced(routes))?;
    transaction.commit()?;
    Ok(RoutesOutcome::Replaced(version))
}

fn reseal_channels(
    connection: &mut Connection,
    reseal: &Reseal,
    by: &Actor,
) -> rusqlite::Result<Resealed> {
    const SEALED: &str = "select id, secrets from channels where secrets is not null order by id";
    const WRITE: &str = "update channels set secrets = ?2 where id = ?1";
    let transaction = begin(connection)?;
    let sealed: Vec<(i64, Vec<u8>)> = transaction
        .prepare(SEALED)?
        .query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?
        .collect::<Result<_, _>>()?;
    for (channel, secrets) in &sealed {
        let secrets = match reseal(*channel, secrets) {
            Ok(secrets) => secrets,
            Err(why) => return Ok(Resealed::Refused { channel: *channel, why }),
        };
        expect_row("channels", transaction.execute(WRITE, params![channel, secrets])?)?;
    }
    let channels = sealed.len() as u64;
    count_change(&transaction)?;
    record(&transaction, by, &NewAuditEntry::secrets_resealed(channels))?;
    transaction.commit()?;
    Ok(Resealed::All(channels))
}
