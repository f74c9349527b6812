//! Channels and routes in PostgreSQL. The API and the command line call it through `Channels`. Secrets come encrypted, also
//! where that happens within a transaction.
//!
//! Each transaction that changes something first locks the row of `notify_state`, so changes follow one another.

use std::collections::BTreeSet;

use async_trait::async_trait;
use deadpool_postgres::{GenericClient, Transaction};
use tokio_postgres::{Error, Row};

use super::{
    audit::record,
    connect::Object,
    rows::{optional_time, snapshot, time},
    store::PostgresStore,
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
impl Channels for PostgresStore {
    async fn channels(&self) -> Result<ChannelList, StoreError> {
        self.call(async |connection| {
            let snapshot = snapshot(connection).await?;
            let select = format!("select {CHANNEL_COLUMNS} from channels c order by c.id");
            let select = snapshot.prepare_cached(&select).await?;
            let rows = snapshot.query(&select, &[]).await?;
            let channels = rows.iter().map(channel).collect::<Result<_, _>>()?;
            Ok(ChannelList { version: version(&snapshot).await?, channels })
        })
        .await
    }

    async fn create_channel(
        &self,
        channel: &NewChannel,
        by: &Actor,
    ) -> Result<ChannelCreation, StoreError> {
        self.call(async |connection| create_channel(connection, channel, by).await).await
    }

    async fn update_channel(
        &self,
        id: i64,
        version: i64,
        update: &ChannelUpdate,
        by: &Actor,
    ) -> Result<ChannelOutcome, StoreError> {
        self.call(async |connection| update_channel(connection, id, version, update, by).await)
            .await
    }

    async fn delete_channel(&self, id: i64, by: &Actor) -> Result<Option<u64>, StoreError> {
        self.call(async |connection| delete_channel(connection, id, by).await).await
    }

    async fn routes(&self) -> Result<RouteList, StoreError> {
        self.call(async |connection| {
            let snapshot = snapshot(connection).await?;
            Ok(RouteList { version: version(&snapshot).await?, routes: routes(&snapshot).await? })
        })
        .await
    }

    async fn replace_routes(
        &self,
        version: i64,
        routes: &[Route],
        by: &Actor,
    ) -> Result<RoutesOutcome, StoreError> {
        self.call(async |connection| replace_routes(connection, version, routes, by).await).await
    }

    async fn reseal_channels(&self, reseal: &Reseal, by: &Actor) -> Result<Resealed, StoreError> {
        self.call(async |connection| reseal_channels(connection, reseal, by).await).await
    }
}

/// Reads [`CHANNEL_COLUMNS`].
fn channel(row: &Row) -> Result<Channel, Error> {
    Ok(Channel {
        id: row.try_get(0)?,
        name: row.try_get(1)?,
        kind: row.try_get(2)?,
        config: stored_config(row.try_get(3)?),
        secrets: row.try_get(4)?,
        is_enabled: row.try_get(5)?,
        is_default: row.try_get(6)?,
        template: row.try_get(7)?,
        created_at: time(row, 8)?,
        failures: row.try_get(9)?,
        failing_since: optional_time(row, 10)?,
        last_error: row.try_get(11)?,
        waiting: row.try_get::<_, i64>(12)?.cast_unsigned(),
    })
}

async fn version(client: &impl GenericClient) -> Result<i64, Error> {
    client.query_one("select version from notify_state", &[]).await?.try_get(0)
}

async fn routes(client: &impl GenericClient) -> Result<Vec<Route>, Error> {
    const ROUTES: &str = "select route from routes order by position";
    let rows = client.query(ROUTES, &[]).await?;
    let routes = rows.iter().map(|row| row.try_get(0).map(stored_route));
    Ok(routes.collect::<Result<Vec<_>, Error>>()?.into_iter().flatten().collect())
}

/// Begins a change, and answers the version: others wait until it has ended.
async fn begin(connection: &mut Object) -> Result<(Transaction<'_>, i64), Error> {
    const LOCK: &str = "select version from notify_state for no key update";
    let transaction = connection.transaction().await?;
    let version = transaction.query_one(LOCK, &[]).await?.try_get(0)?;
    Ok((transaction, version))
}

/// Counts a change, and answers the version that it leads to.
async fn count_change(transaction: &Transaction<'_>) -> Result<i64, Error> {
    const COUNT: &str = "update notify_state set version = version + 1 returning version";
    transaction.query_one(COUNT, &[]).await?.try_get(0)
}

/// Whether another channel than `id` has this name.
async fn is_name_taken(transaction: &Transaction<'_>, name: &str, id: i64) -> Result<bool, Error> {
    const TAKEN: &str = "select exists (select from channels where name = $1 and id <> $2)";
    transaction.query_one(TAKEN, &[&name, &id]).await?.try_get(0)
}

/// Writes what a channel is told. The error within says why its secrets cannot be encrypted.
async fn write_config(
    transaction: &Transaction<'_>,
    id: i64,
    config: &NewConfig,
) -> Result<Result<(), String>, Error> {
    // Fails when a trigger has dropped the change.
    const WRITE: &str = "update channels set config = $2, secrets = $3 where id = $1 returning id";
    let secrets = match config.secrets.as_ref().map(|seal| seal(id)).transpose() {
        Ok(secrets) => secrets,
        Err(why) => return Ok(Err(why)),
    };
    transaction.query_one(WRITE, &[&id, &config.public.to_string(), &secrets]).await?;
    Ok(Ok(()))
}

async fn create_channel(
    connection: &mut Object,
    channel: &NewChannel,
    by: &Actor,
) -> Result<ChannelCreation, Error> {
    const COUNT: &str = "select count(*) from channels";
    const INSERT: &str = "
        insert into channels (name, kind, config, is_enabled, is_default, template, created_at)
        values ($1, $2, '{}', $3, $4, $5, $6)
        returning id
    ";
    let (transaction, _) = begin(connection).await?;
    let number: i64 = transaction.query_one(COUNT, &[]).await?.try_get(0)?;
    if number >= i64::from(MOST_CHANNELS) {
        return Ok(ChannelCreation::TooMany);
    }
    if is_name_taken(&transaction, &channel.name, 0).await? {
        return Ok(ChannelCreation::NameTaken);
    }
    let is_default = channel.is_default.unwrap_or(number == 0);
    let row = transaction
        .query_one(
            INSERT,
            &[
                &channel.name,
                &channel.kind,
                &channel.is_enabled,
                &is_default,
                &channel.template,
                &by.at.to_jiff(),
            ],
        )
        .await?;
    let id = row.try_get(0)?;
    if let Err(why) = write_config(&transaction, id, &channel.config).await? {
        return Ok(ChannelCreation::NotSealed(why));
    }
    count_change(&transaction).await?;
    record(&transaction, by, &NewAuditEntry::channel_created(id, channel, is_default)).await?;
    transaction.commit().await?;
    Ok(ChannelCreation::Created(id))
}

async fn update_channel(
    connection: &mut Object,
    id: i64,
    known_version: i64,
    update: &ChannelUpdate,
    by: &Actor,
) -> Result<ChannelOutcome, Error> {
    const EXISTS: &str = "select exists (select from channels where id = $1)";
    const UPDATE: &str = "
        update channels
           set name = $2, is_enabled = $3, is_default = $4, template = $5
         where id = $1
        returning id
    ";
    const FORGET_FAILURES: &str = "
        update channels
           set failures = 0, failing_since = null, last_error = null, next_send_at = null
         where id = $1
        returning id
    ";
    let (transaction, version) = begin(connection).await?;
    if !transaction.query_one(EXISTS, &[&id]).await?.try_get::<_, bool>(0)? {
        return Ok(ChannelOutcome::Unknown);
    }
    if version != known_version {
        return Ok(ChannelOutcome::Stale);
    }
    if is_name_taken(&transaction, &update.name, id).await? {
        return Ok(ChannelOutcome::NameTaken);
    }
    transaction
        .query_one(
            UPDATE,
            &[&id, &update.name, &update.is_enabled, &update.is_default, &update.template],
        )
        .await?;
    if let Some(config) = &update.config
        && let Err(why) = write_config(&transaction, id, config).await?
    {
        return Ok(ChannelOutcome::NotSealed(why));
    }
    if update.reason == UpdateReason::Repair {
        transaction.query_one(FORGET_FAILURES, &[&id]).await?;
    }
    count_change(&transaction).await?;
    record(&transaction, by, &NewAuditEntry::channel_updated(id, update)).await?;
    transaction.commit().await?;
    Ok(ChannelOutcome::Changed)
}

async fn delete_channel(
    connection: &mut Object,
    id: i64,
    by: &Actor,
) -> Result<Option<u64>, Error> {
    // Fails when a trigger has kept the row.
    const DELETE: &str = "delete from channels where id = $1 returning id";
    let (transaction, _) = begin(connection).await?;
    let select = format!("select {CHANNEL_COLUMNS} from channels c where c.id = $1");
    let Some(row) = transaction.query_opt(&select, &[&id]).await? else { return Ok(None) };
    let Channel { name, waiting, .. } = channel(&row)?;
    let before = routes(&transaction).await?;
    let after = without_channel(before.clone(), id);
    if before != after {
        write_routes(&transaction, &after).await?;
    }
    transaction.query_one(DELETE, &[&id]).await?;
    count_change(&transaction).await?;
    record(&transaction, by, &NewAuditEntry::channel_deleted(id, &name, waiting)).await?;
    transaction.commit().await?;
    Ok(Some(waiting))
}

async fn write_routes(transaction: &Transaction<'_>, routes: &[Route]) -> Result<(), Error> {
    const INSERT: &str = "insert into routes (position, route) values ($1, $2) returning position";
    transaction.execute("delete from routes", &[]).await?;
    for (position, route) in (1_i32..).zip(routes) {
        transaction.query_one(INSERT, &[&position, &route.to_json().to_string()]).await?;
    }
    Ok(())
}

async fn replace_routes(
    connection: &mut Object,
    known_version: i64,
    routes: &[Route],
    by: &Actor,
) -> Result<RoutesOutcome, Error> {
    let (transaction, version) = begin(connection).await?;
    if version != known_version {
        return Ok(RoutesOutcome::Stale);
    }
    let rows = transaction.query("select id from channels", &[]).await?;
    let known = rows.iter().map(|row| row.try_get(0)).collect::<Result<BTreeSet<i64>, _>>()?;
    let unknown = unknown_channels(routes, &known);
    if !unknown.is_empty() {
        return Ok(RoutesOutcome::UnknownChannels(unknown));
    }
    write_routes(&transaction, routes).await?;
    let version = count_change(&transaction).await?;
    record(&transaction, by, &NewAuditEntry::routes_replaced(routes)).await?;
    transaction.commit().await?;
    Ok(RoutesOutcome::Replaced(version))
}

async fn reseal_channels(
    connection: &mut Object,
    reseal: &Reseal,
    by: &Actor,
) -> Result<Resealed, Error> {
    const SEALED: &str = "select id, secrets from channels where secrets is not null order by id";
    // Fails when a trigger has dropped the change.
    const WRITE: &str = "update channels set secrets = $2 where id = $1 returning id";
    let (transaction, _) = begin(connection).await?;
    let sealed = transaction.query(SEALED, &[]).await?;
    for row in &sealed {
        let channel: i64 = row.try_get(0)?;
        let secrets = match reseal(channel, row.try_get(1)?) {
            Ok(secrets) => secrets,
            Err(why) => return Ok(Resealed::Refused { channel, why }),
        };
        transaction.query_one(WRITE, &[&channel, &secrets]).await?;
    }
    let channels = sealed.len() as u64;
    count_change(&transaction).await?;
    record(&transaction, by, &NewAuditEntry::secrets_resealed(channels)).await?;
    transaction.commit().await?;
    Ok(Resealed::All(channels))
}
