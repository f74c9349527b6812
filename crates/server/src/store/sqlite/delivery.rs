//! Messages on their way, in SQLite. `notify::dispatch` calls it through `Delivery`. There is one server, so what is leased when
//! it starts was leased by one that was killed.

use std::sync::Arc;

use async_trait::async_trait;
use pisync_core::Timestamp;
use rusqlite::{
    Connection, OptionalExtension, Row, Transaction, TransactionBehavior, params, types::Value,
};

use super::{
    audit::record,
    health::begin_step,
    incident_steps::{channel_incidents, keep_incidents},
    incidents::stored_incident,
    outbox,
    rows::{optional_time, time},
    store::SqliteStore,
    write_connection::WriteConnection,
};
use crate::store::{
    Actor, Attempt, Count, Delivery, FleetSettings, FrozenText, IncidentEvent, ItemFacts, ItemKind,
    Lane, MOST_ITEMS, MOST_MEMBERS, MessageFacts, MessageKind, MessageText, Notification,
    NotificationPage, NotificationQuery, OutgoingMessage, REFUSALS, RetryOutcome, StateCounts,
    StoreError,
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
impl Delivery for SqliteStore {
    async fn forget_leases(&self) -> Result<(), StoreError> {
        const FORGET: &str =
            "update channels set lease = null, leased_until = null where lease is not null";
        self.writer.call(|writer| writer.connection().execute(FORGET, []).map(|_| ())).await
    }

    async fn due_channels(&self, now: Timestamp) -> Result<Vec<i64>, StoreError> {
        const DUE: &str = "
            select c.id
              from channels c
             where c.is_enabled = 1
               and ifnull(c.next_send_at, ?1) <= ?1
               and ifnull(c.leased_until, ?1) <= ?1
               and exists (select 1 from notifications n
                            where n.channel = c.id and n.state = 'pending' and n.due_at <= ?1)
             order by c.id
        ";
        let now = now.as_millisecond();
        self.read(move |connection| {
            connection.prepare_cached(DUE)?.query_map([now], |row| row.get(0))?.collect()
        })
        .await
    }

    async fn lease_channel(
        &self,
        channel: i64,
        holder: &str,
        now: Timestamp,
    ) -> Result<Option<Lane>, StoreError> {
        const LEASE: &str = "
            update channels set lease = ?2, leased_until = ?4
             where id = ?1 and is_enabled = 1
               and (lease = ?2 or (lease is null or leased_until <= ?3) and ifnull(next_send_at, ?3) <= ?3)
            returning name, kind, config, secrets, template, failures
        ";
        let holder = holder.to_owned();
        let leased_until = now.saturating_add_milliseconds(LEASED);
        self.writer
            .call(move |writer| {
                let (now, until) = (now.as_millisecond(), leased_until.as_millisecond());
                let values = params![channel, holder, now, until];
                writer
                    .connection()
                    .prepare_cached(LEASE)?
                    .query_row(values, |row| {
                        let failures: i64 = row.get(5)?;
                        Ok(Lane {
                            channel,
                            name: row.get(0)?,
                            kind: row.get(1)?,
                            config: row.get(2)?,
                            secrets: row.get(3)?,
                            template: row.get(4)?,
                            holder: holder.clone(),
                            leased_until,
                            failures: u64::try_from(failures).unwrap_or(0),
                        })
                    })
                    .optional()
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
            update channels set last_error = ?3, next_send_at = ?4 where id = ?1 and lease = ?2
        ";
        let (channel, holder, why) = (lane.channel, lane.holder.clone(), why.to_owned());
        let next = now.saturating_add_milliseconds(LOCKED_FOR).as_millisecond();
        self.writer
            .call(move |writer| {
                let values = params![channel, holder, why, next];
                writer.connection().execute(POSTPONE, values).map(|_| ())
            })
            .await
    }

    async fn release_channel(&self, lane: &Lane) -> Result<(), StoreError> {
        const RELEASE: &str = "
            update channels set lease = null, leased_until = null where id = ?1 and lease = ?2
        ";
        let (channel, holder) = (lane.channel, lane.holder.clone());
        self.writer
            .call(move |writer| {
                writer.connection().execute(RELEASE, params![channel, holder]).map(|_| ())
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
        let (lane, settings, text) = (lane.clone(), Arc::clone(settings), Arc::clone(text));
        self.writer.call(move |writer| next_message(writer, &lane, &settings, &*text, now)).await
    }

    async fn end_attempt(
        &self,
        lane: &Lane,
        message: &OutgoingMessage,
        outcome: &Attempt,
        now: Timestamp,
    ) -> Result<bool, StoreError> {
        let (lane, id, outcome) = (lane.clone(), message.id, outcome.clone());
        self.writer.call(move |writer| end_attempt(writer, &lane, id, &outcome, now)).await
    }

    async fn add_reminders(
        &self,
        settings: &Arc<FleetSettings>,
        now: Timestamp,
    ) -> Result<(), StoreError> {
        let settings = Arc::clone(settings);
        self.writer
            .call(move |writer| {
                let Some(transaction) = begin_step(writer, now)? else { return Ok(()) };
                add_reminders(&transaction, &settings, now)?;
                add_digests(&transaction, &settings, now)?;
                transaction.commit()
            })
            .await
    }

    async fn reconcile_channels(
        &self,
        settings: &Arc<FleetSettings>,
        now: Timestamp,
    ) -> Result<Option<Vec<IncidentEvent>>, StoreError> {
        let settings = Arc::clone(settings);
        self.writer.call(move |writer| reconcile_channels(writer, &settings, now)).await
    }

    async fn drop_old_notifications(&self, now: Timestamp) -> Result<bool, StoreError> {
        const DROP: &str = "
            delete from notifications
             where id in (select id from notifications where ended_at < ?1 order by ended_at limit ?2)
        ";
        let before = now.saturating_add_milliseconds(-NOTIFICATIONS_KEPT).as_millisecond();
        let dropped = self
            .writer
            .call(move |writer| writer.connection().execute(DROP, params![before, DELETED_AT_ONCE]))
            .await?;
        Ok(i64::try_from(dropped).is_ok_and(|dropped| dropped == DELETED_AT_ONCE))
    }

    async fn notifications(
        &self,
        query: &NotificationQuery,
    ) -> Result<NotificationPage, StoreError> {
        let query = query.clone();
        self.read(move |connection| notifications(connection, &query)).await
    }

    async fn retry_notification(&self, id: i64, by: &Actor) -> Result<RetryOutcome, StoreError> {
        let by = *by;
        self.writer.call(move |writer| retry(writer.connection(), id, &by)).await
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

fn next_message(
    writer: &mut WriteConnection,
    lane: &Lane,
    settings: &FleetSettings,
    text: &dyn MessageText,
    now: Timestamp,
) -> rusqlite::Result<Option<OutgoingMessage>> {
    const DUE: &str = r#"
        select id, kind, "group", created_at, refusals, content_type, body, plain
          from notifications
         where channel = ?1 and state = 'pending' and due_at <= ?2
         order by due_at, id
         limit 1
    "#;
    const FREEZE: &str = "
        update notifications set frozen_at = ?2, content_type = ?3, body = ?4, plain = ?5 where id = ?1
    ";
    let transaction =
        writer.connection().transaction_with_behavior(TransactionBehavior::Immediate)?;
    if !holds(&transaction, lane, now)? {
        return Ok(None);
    }
    loop {
        let found = transaction
            .prepare_cached(DUE)?
            .query_row(params![lane.channel, now.as_millisecond()], |row| {
                let kind: String = row.get(1)?;
                let content_type: Option<String> = row.get(5)?;
                let (body, plain): (Option<Vec<u8>>, _) = (row.get(6)?, row.get(7)?);
                let text = content_type.map(|content_type| FrozenText {
                    content_type,
                    body: body.unwrap_or_default(),
                    plain,
                });
                Ok(Due {
                    id: row.get(0)?,
                    kind: MessageKind::from_word(&kind).unwrap_or(MessageKind::Incidents),
                    group: row.get(2)?,
                    created_at: time(row, 3)?,
                    refusals: row.get(4)?,
                    text,
                })
            })
            .optional()?;
        let Some(mut due) = found else {
            transaction.commit()?;
            return Ok(None);
        };
        if due.text.is_none() {
            let Some(facts) = facts_of(&transaction, lane, settings, &due, now)? else { continue };
            let made = text.text(&facts);
            let values =
                params![due.id, now.as_millisecond(), made.content_type, made.body, made.plain];
            transaction.prepare_cached(FREEZE)?.execute(values)?;
            note_told(&transaction, lane, due.id, now)?;
            due.text = Some(made);
        }
        let items = items_of(&transaction, due.id)?;
        transaction.commit()?;
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

/// Whether the lane is still its holder's, who may send.
fn holds(transaction: &Transaction<'_>, lane: &Lane, now: Timestamp) -> rusqlite::Result<bool> {
    const HOLDS: &str = "
        select exists (select 1 from channels
                        where id = ?1 and lease = ?2 and leased_until > ?3 and is_enabled = 1)
    ";
    let values = params![lane.channel, lane.holder, now.as_millisecond()];
    transaction.prepare_cached(HOLDS)?.query_row(values, |row| row.get(0))
}

/// Whether nobody else has had the lane since, however late it is.
fn is_last_holder(transaction: &Transaction<'_>, lane: &Lane) -> rusqlite::Result<bool> {
    const IS_LAST: &str = "select exists (select 1 from channels where id = ?1 and lease = ?2)";
    let mut is_last = transaction.prepare_cached(IS_LAST)?;
    is_last.query_row(params![lane.channel, lane.holder], |row| row.get(0))
}

fn items_of(
    transaction: &Transaction<'_>,
    notification: i64,
) -> rusqlite::Result<Vec<(i64, ItemKind)>> {
    const ITEMS: &str = "
        select incident, what from notification_items where notification = ?1 order by incident, what
    ";
    let mut items = transaction.prepare_cached(ITEMS)?;
    let items = items.query_map([notification], |row| {
        Ok((row.get(0)?, ItemKind::from_word(&row.get::<_, String>(1)?)))
    })?;
    items
        .filter_map(|item| {
            item.map(|(incident, what)| what.map(|what| (incident, what))).transpose()
        })
        .collect()
}

/// What a message tells; `None` when all of it waits for the end of a quiet time, or nothing is left of it.
fn facts_of(
    transaction: &Transaction<'_>,
    lane: &Lane,
    settings: &FleetSettings,
    due: &Due,
    now: Timestamp,
) -> rusqlite::Result<Option<MessageFacts>> {
    const DROP: &str = "update notifications set state = 'dropped', ended_at = ?2 where id = ?1";
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
        facts.states = Some(states(transaction)?);
        (facts.items, facts.items_total) = open_incidents(transaction)?;
        return Ok(Some(facts));
    }
    let items = outbox::due_items(transaction, due.id)?;
    let sorted = sort_out(items, &lane.kind, settings, now);
    remove(transaction, due.id, &sorted.outdated)?;
    if sorted.told.is_empty() && sorted.held.is_empty() {
        // Its incidents were deleted, or nobody needs its reminders.
        transaction.prepare_cached(DROP)?.execute(params![due.id, now.as_millisecond()])?;
        return Ok(None);
    }
    hold(transaction, lane, settings, due, &sorted, now)?;
    if sorted.told.is_empty() {
        return Ok(None);
    }
    facts.items_total = sorted.told.len() as u64;
    facts.items = sorted.told;
    facts.items.truncate(MOST_ITEMS);
    for item in &mut facts.items {
        (item.members, item.members_total) = members(transaction, item.incident.id)?;
    }
    Ok(Some(facts))
}

/// Has items wait for the end of a quiet time: the whole bundle, or in one of their own.
fn hold(
    transaction: &Transaction<'_>,
    lane: &Lane,
    settings: &FleetSettings,
    due: &Due,
    sorted: &Sorted,
    now: Timestamp,
) -> rusqlite::Result<()> {
    const POSTPONE: &str = "update notifications set due_at = ?2 where id = ?1";
    // The bundle itself is made up at once, and no longer in the way of another one.
    const BEGIN: &str = "update notifications set frozen_at = ?2 where id = ?1";
    let held = &sorted.held;
    let Some(until) = held.iter().map(|(.., until)| *until).min() else { return Ok(()) };
    if sorted.told.is_empty() {
        let values = params![due.id, until.as_millisecond()];
        return transaction.prepare_cached(POSTPONE)?.execute(values).map(|_| ());
    }
    transaction.prepare_cached(BEGIN)?.execute(params![due.id, now.as_millisecond()])?;
    let items: Vec<_> = held.iter().map(|(incident, what, _)| (*incident, *what)).collect();
    remove(transaction, due.id, &items)?;
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
    outbox::keep(transaction, settings, &write, now)
}

/// Takes items out of a message.
fn remove(
    transaction: &Transaction<'_>,
    notification: i64,
    items: &[(i64, ItemKind)],
) -> rusqlite::Result<()> {
    const REMOVE: &str = "
        delete from notification_items where notification = ?1 and incident = ?2 and what = ?3
    ";
    let mut remove = transaction.prepare_cached(REMOVE)?;
    for (incident, what) in items {
        remove.execute(params![notification, incident, what.as_str()])?;
    }
    Ok(())
}

/// Some members of an incident, and how many there are. An incident of a device is about that.
fn members(transaction: &Transaction<'_>, incident: i64) -> rusqlite::Result<(Vec<String>, i64)> {
    const MEMBERS: &str = "
        select device_id from incident_members
         where incident = ?1 and left_at is null
         order by device_id limit ?2
    ";
    const COUNT: &str =
        "select count(*) from incident_members where incident = ?1 and left_at is null";
    let most = i64::try_from(MOST_MEMBERS).unwrap_or(i64::MAX);
    let members = transaction
        .prepare_cached(MEMBERS)?
        .query_map([incident, most], |row| row.get(0))?
        .collect::<rusqlite::Result<Vec<String>>>()?;
    let total = transaction.prepare_cached(COUNT)?.query_row([incident], |row| row.get(0))?;
    Ok((members, total))
}

fn states(transaction: &Transaction<'_>) -> rusqlite::Result<StateCounts> {
    const STATES: &str = "select state, sum(devices) from group_states group by state";
    let mut states = transaction.prepare_cached(STATES)?;
    let states = states
        .query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?
        .collect::<rusqlite::Result<Vec<(String, i64)>>>()?;
    Ok(StateCounts::of(states.iter().map(|(state, devices)| (state.as_str(), *devices))))
}

/// The open incidents of a digest: the oldest ones, and how many there are.
fn open_incidents(transaction: &Transaction<'_>) -> rusqlite::Result<(Vec<ItemFacts>, u64)> {
    const COUNT: &str = "select count(*) from incidents where resolved_at is null";
    let select = format!(
        "select {INCIDENT_COLUMNS} from incidents i
          where i.resolved_at is null order by i.opened_at, i.id limit ?1"
    );
    let most = i64::try_from(MOST_ITEMS).unwrap_or(i64::MAX);
    let mut select = transaction.prepare_cached(&select)?;
    let incidents =
        select.query_map([most], stored_incident)?.collect::<rusqlite::Result<Vec<_>>>()?;
    let mut items = Vec::new();
    for incident in incidents {
        let (members, members_total) = members(transaction, incident.id)?;
        items.push(ItemFacts { what: ItemKind::Reminder, incident, members, members_total });
    }
    let total: i64 = transaction.query_row(COUNT, [], |row| row.get(0))?;
    Ok((items, total.cast_unsigned()))
}

/// Notes in the timelines of incidents that somebody is told.
fn note_told(
    transaction: &Transaction<'_>,
    lane: &Lane,
    notification: i64,
    now: Timestamp,
) -> rusqlite::Result<()> {
    const TOLD: &str = r#"
        insert into incident_entries (incident, id, at, what, "by", details)
        select ?1, 1 + ifnull(max(id), 0), ?2, 'told', null, ?3 from incident_entries where incident = ?1
    "#;
    // What was told is dated by the moment at which it is made up.
    const DATE: &str = "update notification_items set at = ?2 where notification = ?1";
    let at = now.as_millisecond();
    for (incident, what) in items_of(transaction, notification)? {
        let details = told_details(lane, what).to_string();
        transaction.prepare_cached(TOLD)?.execute(params![incident, at, details])?;
    }
    transaction.prepare_cached(DATE)?.execute([notification, at]).map(|_| ())
}

fn end_attempt(
    writer: &mut WriteConnection,
    lane: &Lane,
    notification: i64,
    outcome: &Attempt,
    now: Timestamp,
) -> rusqlite::Result<bool> {
    const SENT: &str = "
        update notifications
           set state = 'sent', attempts = attempts + 1, last_attempt_at = ?2, last_error = null, ended_at = ?2
         where id = ?1 and state = 'pending'
    ";
    const WORKS: &str = "
        update channels set failures = 0, failing_since = null, last_error = null, next_send_at = ?2 where id = ?1
    ";
    const FAILED: &str = "
        update notifications
           set attempts = attempts + 1, last_attempt_at = ?2, last_error = ?3
         where id = ?1 and state = 'pending'
    ";
    const REFUSED: &str = "
        update notifications
           set refusals = refusals + 1,
               state = case when refusals + 1 >= ?3 then 'failed' else state end,
               ended_at = case when refusals + 1 >= ?3 then ?2 end
         where id = ?1 and state = 'pending'
    ";
    const FAILS: &str = "
        update channels
           set failures = failures + 1, failing_since = ifnull(failing_since, ?2), last_error = ?3, next_send_at = ?4
         where id = ?1
    ";
    const WAITS: &str = "update channels set last_error = ?2, next_send_at = ?3 where id = ?1";
    const DISABLE: &str = "
        update channels set is_enabled = 0, last_error = ?2, failing_since = ifnull(failing_since, ?3) where id = ?1
    ";
    const VERSION: &str = "update notify_state set version = version + 1";
    let transaction =
        writer.connection().transaction_with_behavior(TransactionBehavior::Immediate)?;
    if !is_last_holder(&transaction, lane)? {
        return Ok(false);
    }
    let at = now.as_millisecond();
    let after = |pause: std::time::Duration| {
        let milliseconds = i64::try_from(pause.as_millis()).unwrap_or(i64::MAX);
        now.saturating_add_milliseconds(milliseconds).as_millisecond()
    };
    match outcome {
        Attempt::Delivered(pause) => {
            transaction.execute(SENT, [notification, at])?;
            transaction.execute(WORKS, [lane.channel, after(*pause)])?;
        }
        Attempt::ChannelFailed { error, retry_after: asked, spread } => {
            let next = after(retry_after(lane.failures + 1, *asked, *spread));
            transaction.execute(FAILED, params![notification, at, error])?;
            transaction.execute(FAILS, params![lane.channel, at, error, next])?;
        }
        Attempt::Refused(error) => {
            transaction.execute(FAILED, params![notification, at, error])?;
            let most = i64::try_from(REFUSALS).unwrap_or(i64::MAX);
            transaction.execute(REFUSED, [notification, at, most])?;
            let next = after(retry_after(1, None, 1.0));
            transaction.execute(WAITS, params![lane.channel, error, next])?;
        }
        Attempt::Disabled(error) => {
            transaction.execute(FAILED, params![notification, at, error])?;
            transaction.execute(DISABLE, params![lane.channel, error, at])?;
            transaction.execute(VERSION, [])?;
        }
    }
    transaction.commit()?;
    Ok(true)
}

fn add_reminders(
    transaction: &Transaction<'_>,
    settings: &FleetSettings,
    now: Timestamp,
) -> rusqlite::Result<()> {
    let Some(shortest) = settings.routing.shortest_reminder() else { return Ok(()) };
    // The channels that were told of an open incident, and when for the last time.
    let select = format!(
        r#"select {INCIDENT_COLUMNS}, n.channel, max(n.frozen_at), i."group",
                  exists (select 1 from device_health h join devices d on d.id = h.device
                           where i.scope = 'device' and d.device_id = i.subject and h.state = 'silent'),
                  (select json_group_array(g.tag)
                     from devices d join device_tags g on g.device = d.id
                    where i.scope = 'device' and d.device_id = i.subject)
             from incidents i
             join notification_items t on t.incident = i.id
             join notifications n on n.id = t.notification
            where i.resolved_at is null and n.frozen_at is not null
            group by i.id, n.channel
           having max(n.frozen_at) <= ?1
              and not exists (select 1 from notification_items w
                                join notifications o on o.id = w.notification
                               where w.incident = i.id and o.channel = n.channel
                                 and o.state = 'pending' and o.frozen_at is null)"#
    );
    const OPEN: &str = r#"
        select id from notifications
         where channel = ?1 and kind = 'incidents' and "group" = ?2 and state = 'pending' and frozen_at is null
    "#;
    let before = now.saturating_add_milliseconds(-shortest).as_millisecond();
    let mut found = Vec::new();
    {
        let mut select = transaction.prepare_cached(&select)?;
        let rows = select.query_map([before], |row| {
            let channel: i64 = row.get(16)?;
            let (group, is_hidden): (String, bool) = (row.get(18)?, row.get(19)?);
            let tags: String = row.get(20)?;
            Ok((stored_incident(row)?, channel, time(row, 17)?, group, is_hidden, tags))
        })?;
        for row in rows {
            found.push(row?);
        }
    }
    for (incident, channel, told_at, group, is_hidden, tags) in found {
        let tags: Vec<String> = serde_json::from_str(&tags).unwrap_or_default();
        let remind = about(&incident, &group, &tags)
            .and_then(|about| settings.routing.reminder(about, channel));
        let Some(remind) = remind else { continue };
        if !needs_reminder(&incident, told_at, remind, is_hidden, now) {
            continue;
        }
        let id = transaction
            .prepare_cached(OPEN)?
            .query_row(params![channel, group], |row| row.get(0))
            .optional()?;
        let write = BundleWrite {
            id,
            channel,
            group,
            due_at: now,
            due_by: None,
            added: vec![(incident.id, ItemKind::Reminder)],
            removed: Vec::new(),
            is_dropped: false,
        };
        outbox::keep(transaction, settings, &write, now)?;
    }
    Ok(())
}

fn add_digests(
    transaction: &Transaction<'_>,
    settings: &FleetSettings,
    now: Timestamp,
) -> rusqlite::Result<()> {
    const ADD: &str = r#"
        insert into notifications (channel, kind, "group", state, created_at, due_at)
        select ?1, 'digest', '', 'pending', ?2, ?2
         where not exists (select 1 from notifications
                            where channel = ?1 and kind = 'digest' and created_at >= ?3)
            on conflict do nothing
    "#;
    for (channel, last) in settings.routing.digests(now) {
        if now.as_millisecond() - last.as_millisecond() < DIGEST_WITHIN {
            let values = [channel, now.as_millisecond(), last.as_millisecond()];
            transaction.prepare_cached(ADD)?.execute(values)?;
        }
    }
    Ok(())
}

fn reconcile_channels(
    writer: &mut WriteConnection,
    settings: &FleetSettings,
    now: Timestamp,
) -> rusqlite::Result<Option<Vec<IncidentEvent>>> {
    const CHANNELS: &str = "
        select name, case when failures > 0 and failing_since <= ?1 then failing_since end
          from channels where is_enabled = 1
         order by name
    ";
    let Some(transaction) = begin_step(writer, now)? else { return Ok(None) };
    let long_ago = now.saturating_add_milliseconds(-FAILING_FOR_LONG).as_millisecond();
    let channels = transaction
        .prepare_cached(CHANNELS)?
        .query_map([long_ago], |row| Ok((row.get(0)?, optional_time(row, 1)?)))?
        .collect::<rusqlite::Result<Vec<(String, Option<Timestamp>)>>>()?;
    let open = channel_incidents(&transaction)?;
    let writes = channel_writes(&open, &channels, now);
    if writes.is_empty() {
        return Ok(Some(Vec::new()));
    }
    let events = keep_incidents(&transaction, settings, &writes, now)?;
    transaction.commit()?;
    Ok(Some(events))
}

fn notifications(
    connection: &Connection,
    query: &NotificationQuery,
) -> rusqlite::Result<NotificationPage> {
    const ITEMS: &str = "
        select incident, what from notification_items where notification = ?1 order by incident, what limit ?2
    ";
    let snapshot = connection.unchecked_transaction()?;
    let mut filter = "true".to_owned();
    let mut values: Vec<Value> = Vec::new();
    if let Some(channel) = query.channel {
        values.push(channel.into());
        filter += &format!(" and n.channel = ?{}", values.len());
    }
    if let Some(state) = query.state {
        values.push(state.as_str().to_owned().into());
        filter += &format!(" and n.state = ?{}", values.len());
    }
    let count = format!(
        "select count(*) from (select 1 from notifications n where {filter} limit {})",
        COUNTED + 1
    );
    let total: i64 = snapshot
        .prepare_cached(&count)?
        .query_row(rusqlite::params_from_iter(&values), |row| row.get(0))?;
    values.push(query.before.unwrap_or(i64::MAX).into());
    let select = format!(
        r#"select n.id, n.channel, c.name, n.kind, n."group", n.state, n.created_at, n.due_at, n.ended_at,
                  n.attempts, n.last_attempt_at, n.last_error
             from notifications n join channels c on c.id = n.channel
            where {filter} and n.id < ?{} order by n.id desc limit {}"#,
        values.len(),
        i64::from(query.limit) + 1
    );
    let mut notifications = snapshot
        .prepare_cached(&select)?
        .query_map(rusqlite::params_from_iter(values), notification)?
        .collect::<rusqlite::Result<Vec<_>>>()?;
    let has_more = notifications.len() > query.limit as usize;
    notifications.truncate(query.limit as usize);
    let most = i64::try_from(MOST_ITEMS).unwrap_or(i64::MAX);
    for notification in &mut notifications {
        notification.items = snapshot
            .prepare_cached(ITEMS)?
            .query_map([notification.id, most], |row| Ok((row.get(0)?, row.get(1)?)))?
            .collect::<rusqlite::Result<_>>()?;
    }
    let next = notifications.last().filter(|_| has_more).map(|last| last.id);
    let total = Count::up_to(COUNTED, total.cast_unsigned());
    Ok(NotificationPage { notifications, total, next })
}

fn notification(row: &Row<'_>) -> rusqlite::Result<Notification> {
    let (id, created_at) = (row.get(0)?, time(row, 6)?);
    Ok(Notification {
        id,
        message_id: message_id(id, created_at),
        channel: row.get(1)?,
        channel_name: row.get(2)?,
        kind: row.get(3)?,
        group: row.get(4)?,
        state: row.get(5)?,
        created_at,
        due_at: time(row, 7)?,
        ended_at: optional_time(row, 8)?,
        attempts: row.get(9)?,
        last_attempt_at: optional_time(row, 10)?,
        last_error: row.get(11)?,
        items: Vec::new(),
    })
}

fn retry(connection: &mut Connection, id: i64, by: &Actor) -> rusqlite::Result<RetryOutcome> {
    const STATE: &str = "select state from notifications where id = ?1";
    const RETRY: &str = "
        update notifications set state = 'pending', ended_at = null, refusals = 0, due_at = ?2 where id = ?1
    ";
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let state: Option<String> = transaction.query_row(STATE, [id], |row| row.get(0)).optional()?;
    match state.as_deref() {
        None => return Ok(RetryOutcome::Unknown),
        Some("failed") => {}
        Some(_) => return Ok(RetryOutcome::NotFailed),
    }
    transaction.execute(RETRY, [id, by.at.as_millisecond()])?;
    record(&transaction, by, &NewAuditEntry::notification_retried(id))?;
    transaction.commit()?;
    Ok(RetryOutcome::Done)
}
