//! The outbox in SQLite: adds items to bundles in the transaction that changes incidents. `incident_steps` and `delivery` call
//! it.

use pisync_core::Timestamp;
use rusqlite::{Connection, Transaction, params, params_from_iter};

use super::{incidents::stored_incident, rows::time};
use crate::store::{
    FleetSettings, IncidentChange, IncidentEvent, ItemFacts, ItemKind,
    delivery::{DueItem, sort_out},
    incidents::INCIDENT_COLUMNS,
    outbox::{BundleWrite, OpenBundle, OutboxFacts, bundle_writes, by_group},
    routing::{Routing, Timing},
};

/// Adds what has become of incidents to the bundles of their groups.
pub(super) fn tell(
    transaction: &Transaction<'_>,
    settings: &FleetSettings,
    events: &[(String, IncidentEvent)],
    now: Timestamp,
) -> rusqlite::Result<()> {
    if events.is_empty() {
        return Ok(());
    }
    for (group, events) in by_group(events) {
        let facts = facts(transaction, &settings.routing, &group, &events)?;
        for write in bundle_writes(&facts, &settings.routing, &group, &events, now) {
            keep(transaction, settings, &write, now)?;
        }
    }
    Ok(())
}

/// The channels and routes as they are set.
pub(super) fn routing(snapshot: &Connection) -> rusqlite::Result<Routing> {
    const CHANNELS: &str =
        "select id, name, is_default from channels where is_enabled = 1 order by id";
    const ROUTES: &str = "select route from routes order by position";
    let channels = snapshot
        .prepare_cached(CHANNELS)?
        .query_map([], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?
        .collect::<rusqlite::Result<_>>()?;
    let routes = snapshot
        .prepare_cached(ROUTES)?
        .query_map([], |row| row.get(0))?
        .collect::<rusqlite::Result<Vec<String>>>()?;
    Ok(Routing::stored(channels, &routes))
}

fn facts(
    transaction: &Transaction<'_>,
    routing: &Routing,
    group: &str,
    events: &[IncidentEvent],
) -> rusqlite::Result<OutboxFacts> {
    const OPEN_OF_GROUP: &str = r#"
        select id, channel, "group" from notifications
         where state = 'pending' and frozen_at is null and kind = 'incidents' and "group" = ?1
    "#;
    // Of an incident that was told of in another group's bundles.
    const OPEN_OF_INCIDENT: &str = r#"
        select n.id, n.channel, n."group"
          from notification_items i
          join notifications n on n.id = i.notification
         where i.incident = ?1 and n.state = 'pending' and n.frozen_at is null and n."group" <> ?2
    "#;
    const ITEMS: &str = "select incident, what from notification_items where notification = ?1";
    // What was told last decides: an end, or something else.
    const TOLD: &str = "
        select n.channel, max(i.at) filter (where i.what <> 'resolved'), max(i.at) filter (where i.what = 'resolved')
          from notification_items i
          join notifications n on n.id = i.notification
         where i.incident = ?1 and n.frozen_at is not null
         group by n.channel
    ";
    const LAST: &str = r#"
        select channel, max(frozen_at) from notifications
         where kind = 'incidents' and "group" = ?1 and frozen_at is not null
         group by channel
    "#;
    const TAGS: &str = "
        select t.tag from devices d join device_tags t on t.device = d.id where d.device_id = ?1
    ";
    let mut open: Vec<OpenBundle> = Vec::new();
    let bundle = |row: &rusqlite::Row<'_>| {
        Ok(OpenBundle {
            id: row.get(0)?,
            channel: row.get(1)?,
            group: row.get(2)?,
            items: Vec::new(),
        })
    };
    for found in transaction.prepare_cached(OPEN_OF_GROUP)?.query_map([group], bundle)? {
        open.push(found?);
    }
    let mut facts = OutboxFacts::default();
    for event in events {
        let mut elsewhere = transaction.prepare_cached(OPEN_OF_INCIDENT)?;
        for found in elsewhere.query_map(params![event.id, group], bundle)? {
            let found = found?;
            if !open.iter().any(|known| known.id == found.id) {
                open.push(found);
            }
        }
        if event.what != IncidentChange::Opened {
            let mut told = transaction.prepare_cached(TOLD)?;
            let told = told.query_map([event.id], |row| {
                let (begun, ended): (Option<i64>, Option<i64>) = (row.get(1)?, row.get(2)?);
                Ok((row.get(0)?, begun > ended))
            })?;
            for found in told {
                let (channel, is_told): (i64, bool) = found?;
                if is_told {
                    facts.told.push((event.id, channel));
                }
            }
        }
        if routing.asks_for_tags() {
            let tags = transaction
                .prepare_cached(TAGS)?
                .query_map([&event.subject], |row| row.get(0))?
                .collect::<rusqlite::Result<Vec<String>>>()?;
            facts.tags.push((event.subject.clone(), tags));
        }
    }
    for bundle in &mut open {
        let mut items = transaction.prepare_cached(ITEMS)?;
        let items = items.query_map([bundle.id], |row| Ok((row.get(0)?, row.get(1)?)))?;
        for item in items {
            let (incident, what): (i64, String) = item?;
            bundle.items.extend(ItemKind::from_word(&what).map(|what| (incident, what)));
        }
    }
    facts.open = open;
    facts.last = transaction
        .prepare_cached(LAST)?
        .query_map([group], |row| Ok((row.get(0)?, time(row, 1)?)))?
        .collect::<rusqlite::Result<_>>()?;
    facts.others = others(transaction, group, events)?;
    Ok(facts)
}

/// The channels that were told of incidents of a group that are still open, besides those of the events.
fn others(
    transaction: &Transaction<'_>,
    group: &str,
    events: &[IncidentEvent],
) -> rusqlite::Result<Vec<i64>> {
    if !events.iter().any(|event| event.what == IncidentChange::Resolved) {
        return Ok(Vec::new());
    }
    let places = vec!["?"; events.len()].join(", ");
    let select = format!(
        r#"select distinct n.channel
             from incidents i
             join notification_items t on t.incident = i.id
             join notifications n on n.id = t.notification
            where i.resolved_at is null and i."group" = ? and n.frozen_at is not null
              and i.id not in ({places})"#
    );
    let mut values: Vec<rusqlite::types::Value> = vec![group.to_owned().into()];
    values.extend(events.iter().map(|event| event.id.into()));
    let mut select = transaction.prepare(&select)?;
    select.query_map(params_from_iter(values), |row| row.get(0))?.collect()
}

/// Writes a change of a bundle.
pub(super) fn keep(
    transaction: &Transaction<'_>,
    settings: &FleetSettings,
    write: &BundleWrite,
    now: Timestamp,
) -> rusqlite::Result<()> {
    const ADD: &str = r#"
        insert into notifications (channel, kind, "group", state, created_at, due_at)
        values (?1, 'incidents', ?2, 'pending', ?3, ?4)
            on conflict (channel, kind, "group") where state = 'pending' and frozen_at is null
            do update set due_at = min(due_at, excluded.due_at)
        returning id
    "#;
    const SOONER: &str = "update notifications set due_at = min(due_at, ?2) where id = ?1";
    const ADD_ITEM: &str = "
        insert into notification_items (notification, incident, what, at) values (?1, ?2, ?3, ?4) on conflict do nothing
    ";
    const REMOVE_ITEM: &str = "
        delete from notification_items where notification = ?1 and incident = ?2 and what = ?3
    ";
    const DROP: &str = "update notifications set state = 'dropped', ended_at = ?2 where id = ?1";
    const NOTE_DROPPED: &str = r#"
        insert into incident_entries (incident, id, at, what, "by", details)
        select ?1, 1 + ifnull(max(id), 0), ?2, 'dropped', null,
               json_object('channel', (select name from channels where id = ?3), 'event', ?4)
          from incident_entries
         where incident = ?1
    "#;
    let at = now.as_millisecond();
    let due_at = write.due_at.as_millisecond();
    let id = match write.id {
        Some(id) => {
            // What is added may not wait for the end of a quiet time.
            if !write.added.is_empty() && is_held(transaction, settings, id, now)? {
                transaction.prepare_cached(SOONER)?.execute([id, due_at])?;
            }
            id
        }
        None => {
            let values = params![write.channel, write.group, at, due_at];
            transaction.prepare_cached(ADD)?.query_row(values, |row| row.get(0))?
        }
    };
    for (incident, what) in &write.added {
        let item = params![id, incident, what.as_str(), at];
        transaction.prepare_cached(ADD_ITEM)?.execute(item)?;
    }
    for (incident, what) in &write.removed {
        transaction.prepare_cached(REMOVE_ITEM)?.execute(params![id, incident, what.as_str()])?;
        let entry = params![incident, at, write.channel, what.as_str()];
        transaction.prepare_cached(NOTE_DROPPED)?.execute(entry)?;
    }
    if let Some(due_by) = write.due_by {
        transaction.prepare_cached(SOONER)?.execute([id, due_by.as_millisecond()])?;
    }
    if write.is_dropped {
        transaction.prepare_cached(DROP)?.execute(params![id, at])?;
    }
    Ok(())
}

/// Whether all that a bundle would tell waits for the end of a quiet time.
fn is_held(
    transaction: &Transaction<'_>,
    settings: &FleetSettings,
    notification: i64,
    now: Timestamp,
) -> rusqlite::Result<bool> {
    const KIND: &str =
        "select c.kind from notifications n join channels c on c.id = n.channel where n.id = ?1";
    if !settings.has_quiet_windows() {
        return Ok(false);
    }
    let kind: String =
        transaction.prepare_cached(KIND)?.query_row([notification], |row| row.get(0))?;
    let sorted = sort_out(due_items(transaction, notification)?, &kind, settings, now);
    Ok(sorted.told.is_empty())
}

/// Has bundles looked at again within a minute that may wait for the end of a quiet time: its window is about to change.
pub(super) fn look_again(transaction: &Transaction<'_>, now: Timestamp) -> rusqlite::Result<()> {
    const LOOK_AGAIN: &str = "
        update notifications set due_at = ?1
         where kind = 'incidents' and state = 'pending' and frozen_at is null and due_at > ?1
           and exists (select 1 from windows where effect = 'quiet')
    ";
    let due_at = now.saturating_add_milliseconds(Timing::BUILT_IN.wait).as_millisecond();
    transaction.execute(LOOK_AGAIN, [due_at]).map(|_| ())
}

/// What a message that is due would tell.
pub(super) fn due_items(
    transaction: &Transaction<'_>,
    notification: i64,
) -> rusqlite::Result<Vec<DueItem>> {
    let select = format!(
        r#"select {INCIDENT_COLUMNS}, t.what, i."group",
                  (select json_group_array(g.tag)
                     from devices d join device_tags g on g.device = d.id
                    where i.scope = 'device' and d.device_id = i.subject),
                  exists (select 1 from device_health h join devices d on d.id = h.device
                           where i.scope = 'device' and d.device_id = i.subject and h.state = 'silent')
             from notification_items t
             join incidents i on i.id = t.incident
            where t.notification = ?1"#
    );
    let mut items = Vec::new();
    let mut select = transaction.prepare_cached(&select)?;
    let rows = select.query_map([notification], |row| {
        let what: String = row.get(16)?;
        let tags: String = row.get(18)?;
        let (group, is_silent) = (row.get(17)?, row.get(19)?);
        Ok((ItemKind::from_word(&what), stored_incident(row)?, group, tags, is_silent))
    })?;
    for row in rows {
        let (what, incident, group, tags, is_silent) = row?;
        let Some(what) = what else { continue };
        let tags = serde_json::from_str(&tags).unwrap_or_default();
        let facts = ItemFacts { what, incident, members: Vec::new(), members_total: 0 };
        items.push(DueItem { facts, group, tags, is_silent });
    }
    Ok(items)
}
