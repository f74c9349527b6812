//! Messages on their way, in PostgreSQL. `notify::dispatch` calls it through `Delivery`. A channel is leased: whoever holds it
//! sends, and what others write of it later is refused.

use std::sync::Arc;

use async_trait::async_trait;
use deadpool_postgres::Transaction;
use pisync_core::Timestamp;
use tokio_postgres::{
    Error, Row,
    types::{ToSql, Type},
};

use super::{
    audit::record,
    connect::Object,
    health::begin_step,
    incident_steps::{channel_incidents, keep_incidents},
    incidents::stored_incident,
    outbox,
    rows::{optional_time, snapshot, time},
    store::PostgresStore,
};
use crate::store::{
    Actor, Attempt, Count, Delivery, FleetSettings, FrozenText, IncidentEvent, ItemFacts, ItemKind,
    Lane, MOST_ITEMS, MOST_MEMBERS, MessageFacts, MessageKind, MessageText, Notification,
    NotificationPage, NotificationQuery, NotificationState, OutgoingMessage, REFUSALS,
    RetryOutcome, StateCounts, StoreError,
    audit::NewAuditEntry,
    delivery::{
        DELETED_AT_ONCE, DIGEST_WITHIN, FAILING_FOR_LONG, LEASED, LOCKED_FOR, NOTIFICATIONS_KEPT,
        Sorted, about, needs_reminder, retry_after, sort_out, told_details,
    },
    incident_steps::channel_writes,
    incidents::{COUNTED, INCIDENT_COLUMNS},
    outbox::{BundleWrite, message_id},
};

#[async_trait]
impl Delivery for PostgresStore {
    async fn forget_leases(&self) -> Result<(), StoreError> {
        // Other servers may be sending.
        Ok(())
    }

    async fn due_channels(&self, now: Timestamp) -> Result<Vec<i64>, StoreError> {
        const DUE: &str = "
            select c.id
              from channels c
             where c.is_enabled
               and coalesce(c.next_send_at, $1) <= $1
               and coalesce(c.leased_until, $1) <= $1
               and exists (select 1 from notifications n
                            where n.channel = c.id and n.state = 'pending' and n.due_at <= $1)
             order by c.id
        ";
        self.call(async |connection| {
            let due = connection.prepare_cached(DUE).await?;
            let rows = connection.query(&due, &[&now.to_jiff()]).await?;
            rows.iter().map(|row| row.try_get(0)).collect()
        })
        .await
    }

    async fn lease_channel(
        &self,
        channel: i64,
        holder: &str,
        now: Timestamp,
    ) -> Result<Option<Lane>, StoreError> {
        // Whoever is at it at this moment has it. Sweeps that add messages to it do not keep it from anybody: they lock its key.
        const LEASE: &str = "
            update channels set lease = $2, leased_until = $4
             where id = (select id from channels
                          where id = $1 and is_enabled
                            and (lease = $2 or (lease is null or leased_until <= $3) and coalesce(next_send_at, $3) <= $3)
                            for no key update skip locked)
            returning name, kind, config, secrets, template, failures
        ";
        let leased_until = now.saturating_add_milliseconds(LEASED);
        self.call(async |connection| {
            let lease = connection.prepare_cached(LEASE).await?;
            let (now, until) = (now.to_jiff(), leased_until.to_jiff());
            let row = connection.query_opt(&lease, &[&channel, &holder, &now, &until]).await?;
            let lane = |row: Row| {
                let failures: i64 = row.try_get(5)?;
                Ok::<_, Error>(Lane {
                    channel,
                    name: row.try_get(0)?,
                    kind: row.try_get(1)?,
                    config: row.try_get(2)?,
                    secrets: row.try_get(3)?,
                    template: row.try_get(4)?,
                    holder: holder.to_owned(),
                    leased_until,
                    failures: u64::try_from(failures).unwrap_or(0),
                })
            };
            row.map(lane).transpose()
        })
        .await
    }

    async fn postpone_channel(
        &self,
        lane: &Lane,
        why: &str,
        now: Timestamp,
    ) -> Result<(), StoreError> {
        const POSTPONE: &str = "
            update channels set last_error = $3, next_send_at = $4 where id = $1 and lease = $2
        ";
        let next = now.saturating_add_milliseconds(LOCKED_FOR).to_jiff();
        self.call(async |connection| {
            let postpone = connection.prepare_cached(POSTPONE).await?;
            let values: [&(dyn ToSql + Sync); 4] = [&lane.channel, &lane.holder, &why, &next];
            connection.execute(&postpone, &values).await.map(|_| ())
        })
        .await
    }

    async fn release_channel(&self, lane: &Lane) -> Result<(), StoreError> {
        const RELEASE: &str = "
            update channels set lease = null, leased_until = null where id = $1 and lease = $2
        ";
        self.call(async |connection| {
            let release = connection.prepare_cached(RELEASE).await?;
            connection.execute(&release, &[&lane.channel, &lane.holder]).await.map(|_| ())
        })
        .await
    }

    async fn next_message(
        &self,
        lane: &Lane,
        settings: &Arc<FleetSettings>,
        text: &Arc<dyn MessageText>,
        now: Timestamp,
    ) -> Result<Option<OutgoingMessage>, StoreError> {
        self.call(async |connection| next_message(connection, lane, settings, &**text, now).await)
            .await
    }

    async fn end_attempt(
        &self,
        lane: &Lane,
        message: &OutgoingMessage,
        outcome: &Attempt,
        now: Timestamp,
    ) -> Result<bool, StoreError> {
        self.call(async |connection| end_attempt(connection, lane, message.id, outcome, now).await)
            .await
    }

    async fn add_reminders(
        &self,
        settings: &Arc<FleetSettings>,
        now: Timestamp,
    ) -> Result<(), StoreError> {
        self.call(async |connection| {
            let Some(transaction) = begin_step(connection, now).await? else { return Ok(()) };
            add_reminders(&transaction, settings, now).await?;
            add_digests(&transaction, settings, now).await?;
            transaction.commit().await
        })
        .await
    }

    async fn reconcile_channels(
        &self,
        settings: &Arc<FleetSettings>,
        now: Timestamp,
    ) -> Result<Option<Vec<IncidentEvent>>, StoreError> {
        self.call(async |connection| reconcile_channels(connection, settings, now).await).await
    }

    async fn drop_old_notifications(&self, now: Timestamp) -> Result<bool, StoreError> {
        const DROP: &str = "
            delete from notifications
             where id in (select id from notifications where ended_at < $1 order by ended_at limit $2)
        ";
        let before = now.saturating_add_milliseconds(-NOTIFICATIONS_KEPT).to_jiff();
        self.call(async |connection| {
            let dropped = connection.execute(DROP, &[&before, &DELETED_AT_ONCE]).await?;
            Ok(i64::try_from(dropped).is_ok_and(|dropped| dropped == DELETED_AT_ONCE))
        })
        .await
    }

    async fn notifications(
        &self,
        query: &NotificationQuery,
    ) -> Result<NotificationPage, StoreError> {
        self.call(async |connection| notifications(connection, query).await).await
    }

    async fn retry_notification(&self, id: i64, by: &Actor) -> Result<RetryOutcome, StoreError> {
        self.call(async |connection| retry(connection, id, by).await).await
    }
}

/// A message that is due.
struct Due {
    id: i64,
    kind: MessageKind,
    group: String,
    created_at: Timestamp,
    refusals: i64,
    text: Option<FrozenText>,
}

async fn next_message(
    connection: &mut Object,
    lane: &Lane,
    settings: &FleetSettings,
    text: &dyn MessageText,
    now: Timestamp,
) -> Result<Option<OutgoingMessage>, Error> {
    const DUE: &str = r#"
        select id, kind, "group", created_at, refusals, content_type, body, plain
          from notifications
         where channel = $1 and state = 'pending' and due_at <= $2
         order by due_at, id
         limit 1
           for update
    "#;
    const FREEZE: &str = "
        update notifications set frozen_at = $2, content_type = $3, body = $4, plain = $5 where id = $1
    ";
    let transaction = begin(connection).await?;
    if !holds(&transaction, lane, now).await? {
        return Ok(None);
    }
    let select = transaction.prepare_cached(DUE).await?;
    loop {
        let found = transaction.query_opt(&select, &[&lane.channel, &now.to_jiff()]).await?;
        let Some(row) = found else {
            transaction.commit().await?;
            return Ok(None);
        };
        let mut due = due(&row)?;
        if due.text.is_none() {
            if !lock_incidents(&transaction, due.id).await? {
                return Ok(None);
            }
            let Some(facts) = facts_of(&transaction, lane, settings, &due, now).await? else {
                continue;
            };
            let made = text.text(&facts);
            let freeze = transaction.prepare_cached(FREEZE).await?;
            let values: [&(dyn ToSql + Sync); 5] =
                [&due.id, &now.to_jiff(), &made.content_type, &made.body, &made.plain];
            transaction.execute(&freeze, &values).await?;
            note_told(&transaction, lane, due.id, now).await?;
            due.text = Some(made);
        }
        let items = items_of(&transaction, due.id).await?;
        transaction.commit().await?;
        let Some(text) = due.text else { return Ok(None) };
        return Ok(Some(OutgoingMessage {
            id: due.id,
            message_id: message_id(due.id, due.created_at),
            bundle: format!("{}/{}", due.kind.as_str(), due.group),
            text,
            refusals: due.refusals.cast_unsigned(),
            items,
        }));
    }
}

/// Begins a transaction that does not hold its locks for ever when the server is stopped in the middle of it.
async fn begin(connection: &mut Object) -> Result<Transaction<'_>, Error> {
    const TIMEOUT: &str = "set local idle_in_transaction_session_timeout = '10s'";
    let transaction = connection.transaction().await?;
    transaction.batch_execute(TIMEOUT).await?;
    Ok(transaction)
}

fn due(row: &Row) -> Result<Due, Error> {
    let content_type: Option<String> = row.try_get(5)?;
    let (body, plain): (Option<Vec<u8>>, _) = (row.try_get(6)?, row.try_get(7)?);
    let text = content_type.map(|content_type| FrozenText {
        content_type,
        body: body.unwrap_or_default(),
        plain,
    });
    Ok(Due {
        id: row.try_get(0)?,
        kind: MessageKind::from_word(row.try_get(1)?).unwrap_or(MessageKind::Incidents),
        group: row.try_get(2)?,
        created_at: time(row, 3)?,
        refusals: row.try_get(4)?,
        text,
    })
}

/// Whether the lane is still its holder's, who may send. It stays so until the end of the transaction. A sweep that adds messages
/// to it does not wait for that: it locks the key, and waiting for one another could go round in a circle.
async fn holds(transaction: &Transaction<'_>, lane: &Lane, now: Timestamp) -> Result<bool, Error> {
    const HOLDS: &str = "
        select 1 from channels
         where id = $1 and lease = $2 and leased_until > $3 and is_enabled
           for no key update
    ";
    let holds = transaction.prepare_cached(HOLDS).await?;
    let values: [&(dyn ToSql + Sync); 3] = [&lane.channel, &lane.holder, &now.to_jiff()];
    Ok(transaction.query_opt(&holds, &values).await?.is_some())
}

/// Whether nobody else has had the lane since, however late it is. It stays so until the end of the transaction.
async fn is_last_holder(transaction: &Transaction<'_>, lane: &Lane) -> Result<bool, Error> {
    const IS_LAST: &str = "select 1 from channels where id = $1 and lease = $2 for no key update";
    let is_last = transaction.prepare_cached(IS_LAST).await?;
    Ok(transaction.query_opt(&is_last, &[&lane.channel, &lane.holder]).await?.is_some())
}

/// Locks the incidents that a message tells of, because entries are added to their timelines; false when a step of a sweep is
/// changing one of them. Then the message, which is locked already, must wait until later: the step is about to lock it, too,
/// and neither would go on.
async fn lock_incidents(transaction: &Transaction<'_>, notification: i64) -> Result<bool, Error> {
    const LOCK: &str = "
        with told as (select distinct incident from notification_items where notification = $1),
             locked as (select id from incidents
                         where id in (select incident from told)
                         order by id
                           for no key update skip locked)
        select (select count(*) from locked) = (select count(*) from told)
    ";
    let lock = transaction.prepare_cached(LOCK).await?;
    transaction.query_one(&lock, &[&notification]).await?.try_get(0)
}

async fn items_of(
    transaction: &Transaction<'_>,
    notification: i64,
) -> Result<Vec<(i64, ItemKind)>, Error> {
    const ITEMS: &str = "
        select incident, what from notification_items where notification = $1 order by incident, what
    ";
    let items = transaction.prepare_cached(ITEMS).await?;
    let rows = transaction.query(&items, &[&notification]).await?;
    let item = |row: &Row| {
        let what = ItemKind::from_word(row.try_get(1)?);
        Ok(what.map(|what| row.try_get(0).map(|incident| (incident, what))))
    };
    rows.iter().filter_map(|row| item(row).transpose()).map(|item| item?).collect()
}

/// What a message tells; `None` when all of it waits for the end of a quiet time, or nothing is left of it.
async fn facts_of(
    transaction: &Transaction<'_>,
    lane: &Lane,
    settings: &FleetSettings,
    due: &Due,
    now: Timestamp,
) -> Result<Option<MessageFacts>, Error> {
    const DROP: &str = "update notifications set state = 'dropped', ended_at = $2 where id = $1";
    let mut facts = MessageFacts {
        message_id: message_id(due.id, due.created_at),
        kind: due.kind,
        group: due.group.clone(),
        at: now,
        items: Vec::new(),
        items_total: 0,
        states: None,
    };
    if due.kind == MessageKind::Digest {
        facts.states = Some(states(transaction).await?);
        (facts.items, facts.items_total) = open_incidents(transaction).await?;
        return Ok(Some(facts));
    }
    let items = outbox::due_items(transaction, due.id).await?;
    let sorted = sort_out(items, &lane.kind, settings, now);
    remove(transaction, due.id, &sorted.outdated).await?;
    if sorted.told.is_empty() && sorted.held.is_empty() {
        // Its incidents were deleted, or nobody needs its reminders.
        let drop = transaction.prepare_cached(DROP).await?;
        transaction.execute(&drop, &[&due.id, &now.to_jiff()]).await?;
        return Ok(None);
    }
    hold(transaction, lane, settings, due, &sorted, now).await?;
    if sorted.told.is_empty() {
        return Ok(None);
    }
    facts.items_total = sorted.told.len() as u64;
    facts.items = sorted.told;
    facts.items.truncate(MOST_ITEMS);
    for item in &mut facts.items {
        (item.members, item.members_total) = members(transaction, item.incident.id).await?;
    }
    Ok(Some(facts))
}

/// Has items wait for the end of a quiet time: the whole bundle, or in one of their own.
async fn hold(
    transaction: &Transaction<'_>,
    lane: &Lane,
    settings: &FleetSettings,
    due: &Due,
    sorted: &Sorted,
    now: Timestamp,
) -> Result<(), Error> {
    const POSTPONE: &str = "update notifications set due_at = $2 where id = $1";
    // The bundle itself is made up at once, and no longer in the way of another one.
    const BEGIN: &str = "update notifications set frozen_at = $2 where id = $1";
    let held = &sorted.held;
    let Some(until) = held.iter().map(|(.., until)| *until).min() else { return Ok(()) };
    if sorted.told.is_empty() {
        let postpone = transaction.prepare_cached(POSTPONE).await?;
        return transaction.execute(&postpone, &[&due.id, &until.to_jiff()]).await.map(|_| ());
    }
    let begin = transaction.prepare_cached(BEGIN).await?;
    transaction.execute(&begin, &[&due.id, &now.to_jiff()]).await?;
    let items: Vec<_> = held.iter().map(|(incident, what, _)| (*incident, *what)).collect();
    remove(transaction, due.id, &items).await?;
    let write = BundleWrite {
        id: None,
        channel: lane.channel,
        group: due.group.clone(),
        due_at: until,
        due_by: None,
        added: items,
        removed: Vec::new(),
        is_dropped: false,
    };
    outbox::keep(transaction, settings, &write, now).await
}

/// Takes items out of a message.
async fn remove(
    transaction: &Transaction<'_>,
    notification: i64,
    items: &[(i64, ItemKind)],
) -> Result<(), Error> {
    const REMOVE: &str = "
        delete from notification_items where notification = $1 and incident = $2 and what = $3
    ";
    if items.is_empty() {
        return Ok(());
    }
    let remove = transaction.prepare_cached(REMOVE).await?;
    for (incident, what) in items {
        transaction.execute(&remove, &[&notification, incident, &what.as_str()]).await?;
    }
    Ok(())
}

/// Some members of an incident, and how many there are. An incident of a device is about that.
async fn members(
    transaction: &Transaction<'_>,
    incident: i64,
) -> Result<(Vec<String>, i64), Error> {
    const MEMBERS: &str = "
        select device_id from incident_members
         where incident = $1 and left_at is null
         order by device_id limit $2
    ";
    const COUNT: &str =
        "select count(*) from incident_members where incident = $1 and left_at is null";
    let most = i64::try_from(MOST_MEMBERS).unwrap_or(i64::MAX);
    let members = transaction.prepare_cached(MEMBERS).await?;
    let members = transaction.query(&members, &[&incident, &most]).await?;
    let members = members.iter().map(|row| row.try_get(0)).collect::<Result<_, Error>>()?;
    let count = transaction.prepare_cached(COUNT).await?;
    Ok((members, transaction.query_one(&count, &[&incident]).await?.try_get(0)?))
}

async fn states(transaction: &Transaction<'_>) -> Result<StateCounts, Error> {
    const STATES: &str =
        "select state, sum(devices)::bigint from group_states group by state order by state";
    let states = transaction.prepare_cached(STATES).await?;
    let rows = transaction.query(&states, &[]).await?;
    let states = rows
        .iter()
        .map(|row| Ok((row.try_get(0)?, row.try_get(1)?)))
        .collect::<Result<Vec<(&str, i64)>, Error>>()?;
    Ok(StateCounts::of(states))
}

/// The open incidents of a digest: the oldest ones, and how many there are.
async fn open_incidents(transaction: &Transaction<'_>) -> Result<(Vec<ItemFacts>, u64), Error> {
    const COUNT: &str = "select count(*) from incidents where resolved_at is null";
    let select = format!(
        "select {INCIDENT_COLUMNS} from incidents i
          where i.resolved_at is null order by i.opened_at, i.id limit $1"
    );
    let most = i64::try_from(MOST_ITEMS).unwrap_or(i64::MAX);
    let select = transaction.prepare_cached(&select).await?;
    let mut items = Vec::new();
    for row in transaction.query(&select, &[&most]).await? {
        let incident = stored_incident(&row)?;
        let (members, members_total) = members(transaction, incident.id).await?;
        items.push(ItemFacts { what: ItemKind::Reminder, incident, members, members_total });
    }
    let total: i64 = transaction.query_one(COUNT, &[]).await?.try_get(0)?;
    Ok((items, total.cast_unsigned()))
}

/// Notes in the timelines of incidents, which are locked, that somebody is told.
async fn note_told(
    transaction: &Transaction<'_>,
    lane: &Lane,
    notification: i64,
    now: Timestamp,
) -> Result<(), Error> {
    const TOLD: &str = r#"
        insert into incident_entries (incident, id, at, what, "by", details)
        select $1, 1 + coalesce(max(id), 0), $2, 'told', null, $3 from incident_entries where incident = $1
    "#;
    // What was told is dated by the moment at which it is made up.
    const DATE: &str = "update notification_items set at = $2 where notification = $1";
    let at = now.to_jiff();
    let told = transaction.prepare_cached(TOLD).await?;
    for (incident, what) in items_of(transaction, notification).await? {
        let details = told_details(lane, what).to_string();
        transaction.execute(&told, &[&incident, &at, &details]).await?;
    }
    let date = transaction.prepare_cached(DATE).await?;
    transaction.execute(&date, &[&notification, &at]).await.map(|_| ())
}

async fn end_attempt(
    connection: &mut Object,
    lane: &Lane,
    notification: i64,
    outcome: &Attempt,
    now: Timestamp,
) -> Result<bool, Error> {
    const SENT: &str = "
        update notifications
           set state = 'sent', attempts = attempts + 1, last_attempt_at = $2, last_error = null, ended_at = $2
         where id = $1 and state = 'pending'
    ";
    const WORKS: &str = "
        update channels set failures = 0, failing_since = null, last_error = null, next_send_at = $2 where id = $1
    ";
    const FAILED: &str = "
        update notifications
           set attempts = attempts + 1, last_attempt_at = $2, last_error = $3
         where id = $1 and state = 'pending'
    ";
    const REFUSED: &str = "
        update notifications
           set refusals = refusals + 1,
               state = case when refusals + 1 >= $3 then 'failed' else state end,
               ended_at = case when refusals + 1 >= $3 then $2 end
         where id = $1 and state = 'pending'
    ";
    const FAILS: &str = "
        update channels
           set failures = failures + 1, failing_since = coalesce(failing_since, $2), last_error = $3, next_send_at = $4
         where id = $1
    ";
    const WAITS: &str = "update channels set last_error = $2, next_send_at = $3 where id = $1";
    const DISABLE: &str = "
        update channels set is_enabled = false, last_error = $2, failing_since = coalesce(failing_since, $3) where id = $1
    ";
    const VERSION: &str = "update notify_state set version = version + 1";
    let transaction = begin(connection).await?;
    if matches!(outcome, Attempt::Disabled(_)) {
        // Changes of channels lock this first, too.
        transaction.execute(VERSION, &[]).await?;
    }
    if !is_last_holder(&transaction, lane).await? {
        return Ok(false);
    }
    let at = now.to_jiff();
    let after = |pause: std::time::Duration| {
        let milliseconds = i64::try_from(pause.as_millis()).unwrap_or(i64::MAX);
        now.saturating_add_milliseconds(milliseconds).to_jiff()
    };
    match outcome {
        Attempt::Delivered(pause) => {
            transaction.execute(SENT, &[&notification, &at]).await?;
            transaction.execute(WORKS, &[&lane.channel, &after(*pause)]).await?;
        }
        Attempt::ChannelFailed { error, retry_after: asked, spread } => {
            let next = after(retry_after(lane.failures + 1, *asked, *spread));
            transaction.execute(FAILED, &[&notification, &at, error]).await?;
            transaction.execute(FAILS, &[&lane.channel, &at, error, &next]).await?;
        }
        Attempt::Refused(error) => {
            transaction.execute(FAILED, &[&notification, &at, error]).await?;
            let most = i64::try_from(REFUSALS).unwrap_or(i64::MAX);
            let refused: &[(&(dyn ToSql + Sync), Type)] =
                &[(&notification, Type::INT8), (&at, Type::TIMESTAMPTZ), (&most, Type::INT8)];
            transaction.query_typed(REFUSED, refused).await?;
            let next = after(retry_after(1, None, 1.0));
            transaction.execute(WAITS, &[&lane.channel, error, &next]).await?;
        }
        Attempt::Disabled(error) => {
            transaction.execute(FAILED, &[&notification, &at, error]).await?;
            transaction.execute(DISABLE, &[&lane.channel, error, &at]).await?;
        }
    }
    transaction.commit().await?;
    Ok(true)
}

async fn add_reminders(
    transaction: &Transaction<'_>,
    settings: &FleetSettings,
    now: Timestamp,
) -> Result<(), Error> {
    let Some(shortest) = settings.routing.shortest_reminder() else { return Ok(()) };
    // The channels that were told of an open incident, and when for the last time.
    let select = format!(
        r#"select {INCIDENT_COLUMNS}, told.channel, told.at, i."group",
                  exists (select 1 from device_health h
                           where i.scope = 'device' and h.device_id = i.subject and h.state = 'silent'),
                  array(select g.tag from device_tags g where i.scope = 'device' and g.device_id = i.subject),
                  open.id
             from incidents i
             join lateral (select n.channel, max(n.frozen_at) as at
                             from notification_items t
                             join notifications n on n.id = t.notification
                            where t.incident = i.id and n.frozen_at is not null
                            group by n.channel) told on told.at <= $1
             left join notifications open
                    on open.channel = told.channel and open.kind = 'incidents' and open."group" = i."group"
                       and open.state = 'pending' and open.frozen_at is null
            where i.resolved_at is null
              and not exists (select 1 from notification_items w
                               where w.incident = i.id and w.notification = open.id)"#
    );
    let before = now.saturating_add_milliseconds(-shortest).to_jiff();
    let select = transaction.prepare_cached(&select).await?;
    for row in transaction.query(&select, &[&before]).await? {
        let (incident, channel) = (stored_incident(&row)?, row.try_get(16)?);
        let (told_at, group): (_, String) = (time(&row, 17)?, row.try_get(18)?);
        let (is_hidden, tags): (bool, Vec<String>) = (row.try_get(19)?, row.try_get(20)?);
        let remind = about(&incident, &group, &tags)
            .and_then(|about| settings.routing.reminder(about, channel));
        let Some(remind) = remind else { continue };
        if !needs_reminder(&incident, told_at, remind, is_hidden, now) {
            continue;
        }
        let write = BundleWrite {
            id: row.try_get(21)?,
            channel,
            group,
            due_at: now,
            due_by: None,
            added: vec![(incident.id, ItemKind::Reminder)],
            removed: Vec::new(),
            is_dropped: false,
        };
        outbox::keep(transaction, settings, &write, now).await?;
    }
    Ok(())
}

async fn add_digests(
    transaction: &Transaction<'_>,
    settings: &FleetSettings,
    now: Timestamp,
) -> Result<(), Error> {
    const ADD: &str = r#"
        insert into notifications (channel, kind, "group", state, created_at, due_at)
        select $1, 'digest', '', 'pending', $2, $2
         where not exists (select 1 from notifications
                            where channel = $1 and kind = 'digest' and created_at >= $3)
            on conflict do nothing
    "#;
    for (channel, last) in settings.routing.digests(now) {
        if now.as_millisecond() - last.as_millisecond() < DIGEST_WITHIN {
            transaction
                .query_typed(
                    ADD,
                    &[
                        (&channel, Type::INT8),
                        (&now.to_jiff(), Type::TIMESTAMPTZ),
                        (&last.to_jiff(), Type::TIMESTAMPTZ),
                    ],
                )
                .await?;
        }
    }
    Ok(())
}

async fn reconcile_channels(
    connection: &mut Object,
    settings: &FleetSettings,
    now: Timestamp,
) -> Result<Option<Vec<IncidentEvent>>, Error> {
    const CHANNELS: &str = "
        select name, case when failures > 0 and failing_since <= $1 then failing_since end
          from channels where is_enabled
         order by name
    ";
    let Some(transaction) = begin_step(connection, now).await? else { return Ok(None) };
    let long_ago = now.saturating_add_milliseconds(-FAILING_FOR_LONG).to_jiff();
    let channels = transaction.prepare_cached(CHANNELS).await?;
    let channels = transaction.query(&channels, &[&long_ago]).await?;
    let channels = channels
        .iter()
        .map(|row| Ok((row.try_get(0)?, optional_time(row, 1)?)))
        .collect::<Result<Vec<(String, Option<Timestamp>)>, Error>>()?;
    let open = channel_incidents(&transaction).await?;
    let writes = channel_writes(&open, &channels, now);
    if writes.is_empty() {
        return Ok(Some(Vec::new()));
    }
    let events = keep_incidents(&transaction, settings, &writes, now).await?;
    transaction.commit().await?;
    Ok(Some(events))
}

async fn notifications(
    connection: &mut Object,
    query: &NotificationQuery,
) -> Result<NotificationPage, Error> {
    const SELECT: &str = r#"
        select n.id, n.channel, c.name, n.kind, n."group", n.state, n.created_at, n.due_at, n.ended_at,
               n.attempts, n.last_attempt_at, n.last_error
          from notifications n join channels c on c.id = n.channel
         where n.id < $1
           and ($2::bigint is null or n.channel = $2)
           and ($3::text is null or n.state = $3)
         order by n.id desc
         limit $4
    "#;
    const COUNT: &str = "
        select count(*)
          from (select 1 from notifications n
                 where ($1::bigint is null or n.channel = $1) and ($2::text is null or n.state = $2)
                 limit $3) counted
    ";
    const ITEMS: &str = "
        select notification, incident, what
          from (select notification, incident, what,
                       row_number() over (partition by notification order by incident, what) as place
                  from notification_items
                 where notification = any($1)) items
         where place <= $2
         order by notification, place
    ";
    let state = query.state.map(NotificationState::as_str);
    let before = query.before.unwrap_or(i64::MAX);
    let limit = i64::from(query.limit) + 1;
    let snapshot = snapshot(connection).await?;
    // Planned for what is asked for: a channel or a state leads to an index of its own.
    let rows = snapshot
        .query_typed(
            SELECT,
            &[
                (&before, Type::INT8),
                (&query.channel, Type::INT8),
                (&state, Type::TEXT),
                (&limit, Type::INT8),
            ],
        )
        .await?;
    let mut notifications = rows.iter().map(notification).collect::<Result<Vec<_>, Error>>()?;
    let has_more = notifications.len() > query.limit as usize;
    notifications.truncate(query.limit as usize);
    let ids: Vec<i64> = notifications.iter().map(|one| one.id).collect();
    let most = i64::try_from(MOST_ITEMS).unwrap_or(i64::MAX);
    let items = snapshot.prepare_cached(ITEMS).await?;
    for row in snapshot.query(&items, &[&ids, &most]).await? {
        let id: i64 = row.try_get(0)?;
        if let Some(one) = notifications.iter_mut().find(|one| one.id == id) {
            one.items.push((row.try_get(1)?, row.try_get(2)?));
        }
    }
    let most = i64::from(COUNTED) + 1;
    let count = snapshot
        .query_typed(
            COUNT,
            &[(&query.channel, Type::INT8), (&state, Type::TEXT), (&most, Type::INT8)],
        )
        .await?;
    let total = count.first().map_or(Ok(0), |row| row.try_get::<_, i64>(0))?;
    let next = notifications.last().filter(|_| has_more).map(|last| last.id);
    Ok(NotificationPage {
        notifications,
        total: Count::up_to(COUNTED, total.cast_unsigned()),
        next,
    })
}

fn notification(row: &Row) -> Result<Notification, Error> {
    let (id, created_at) = (row.try_get(0)?, time(row, 6)?);
    Ok(Notification {
        id,
        message_id: message_id(id, created_at),
        channel: row.try_get(1)?,
        channel_name: row.try_get(2)?,
        kind: row.try_get(3)?,
        group: row.try_get(4)?,
        state: row.try_get(5)?,
        created_at,
        due_at: time(row, 7)?,
        ended_at: optional_time(row, 8)?,
        attempts: row.try_get(9)?,
        last_attempt_at: optional_time(row, 10)?,
        last_error: row.try_get(11)?,
        items: Vec::new(),
    })
}

async fn retry(connection: &mut Object, id: i64, by: &Actor) -> Result<RetryOutcome, Error> {
    const STATE: &str = "select state from notifications where id = $1 for update";
    const RETRY: &str = "
        update notifications set state = 'pending', ended_at = null, refusals = 0, due_at = $2 where id = $1
    ";
    let transaction = connection.transaction().await?;
    let Some(row) = transaction.query_opt(STATE, &[&id]).await? else {
        return Ok(RetryOutcome::Unknown);
    };
    if row.try_get::<_, &str>(0)? != "failed" {
        return Ok(RetryOutcome::NotFailed);
    }
    transaction.execute(RETRY, &[&id, &by.at.to_jiff()]).await?;
    record(&transaction, by, &NewAuditEntry::notification_retried(id)).await?;
    transaction.commit().await?;
    Ok(RetryOutcome::Done)
}
