//! The outbox in PostgreSQL: adds items to bundles in the transaction that changes incidents. `incident_steps` and `delivery`
//! call it.

use deadpool_postgres::{GenericClient, Transaction};
use pisync_core::Timestamp;
use tokio_postgres::{Error, Row};

use super::{incidents::stored_incident, rows::time};
use crate::store::{
    FleetSettings, IncidentChange, IncidentEvent, ItemFacts, ItemKind,
    delivery::{DueItem, sort_out},
    incidents::INCIDENT_COLUMNS,
    outbox::{BundleWrite, OpenBundle, OutboxFacts, bundle_writes, by_group},
    routing::{Routing, Timing},
};

/// Adds what has become of incidents to the bundles of their groups.
pub(super) async fn tell(
    transaction: &Transaction<'_>,
    settings: &FleetSettings,
    events: &[(String, IncidentEvent)],
    now: Timestamp,
) -> Result<(), Error> {
    for (group, events) in by_group(events) {
        let facts = facts(transaction, &settings.routing, &group, &events).await?;
        for write in bundle_writes(&facts, &settings.routing, &group, &events, now) {
            keep(transaction, settings, &write, now).await?;
        }
    }
    Ok(())
}

/// The channels and routes as they are set.
pub(super) async fn routing(snapshot: &impl GenericClient) -> Result<Routing, Error> {
    const CHANNELS: &str = "select id, name, is_default from channels where is_enabled order by id";
    const ROUTES: &str = "select route from routes order by position";
    let channels = snapshot.prepare_cached(CHANNELS).await?;
    let channels = snapshot.query(&channels, &[]).await?;
    let channels = channels
        .iter()
        .map(|row| Ok((row.try_get(0)?, row.try_get(1)?, row.try_get(2)?)))
        .collect::<Result<_, Error>>()?;
    let routes = snapshot.prepare_cached(ROUTES).await?;
    let routes = snapshot.query(&routes, &[]).await?;
    let routes = routes.iter().map(|row| row.try_get(0)).collect::<Result<Vec<String>, Error>>()?;
    Ok(Routing::stored(channels, &routes))
}

async fn facts(
    transaction: &Transaction<'_>,
    routing: &Routing,
    group: &str,
    events: &[IncidentEvent],
) -> Result<OutboxFacts, Error> {
    // A message that is being made up is waited for: afterwards it takes up nothing more. Some items may be in bundles of
    // another group, in which the device was before.
    const OPEN: &str = r#"
        select id, channel, "group"
          from notifications n
         where state = 'pending' and frozen_at is null and kind = 'incidents'
           and ("group" = $1
                or exists (select 1 from notification_items i
                            where i.notification = n.id and i.incident = any($2)))
         order by id
           for update
    "#;
    const ITEMS: &str =
        "select notification, incident, what from notification_items where notification = any($1)";
    // What was told last decides: an end, or something else.
    const TOLD: &str = "
        select i.incident, n.channel
          from notification_items i
          join notifications n on n.id = i.notification
         where i.incident = any($1) and n.frozen_at is not null
         group by i.incident, n.channel
        having max(i.at) filter (where i.what <> 'resolved')
               > coalesce(max(i.at) filter (where i.what = 'resolved'), '-infinity')
    ";
    const LAST: &str = r#"
        select channel, max(frozen_at) from notifications
         where kind = 'incidents' and "group" = $1 and frozen_at is not null
         group by channel
    "#;
    const OTHERS: &str = r#"
        select distinct n.channel
          from incidents i
          join notification_items t on t.incident = i.id
          join notifications n on n.id = t.notification
         where i.resolved_at is null and i."group" = $1 and n.frozen_at is not null and i.id <> all($2)
    "#;
    const TAGS: &str = "
        select device_id, array_agg(tag) from device_tags where device_id = any($1) group by device_id
    ";
    let ids: Vec<i64> = events.iter().map(|event| event.id).collect();
    let open = transaction.prepare_cached(OPEN).await?;
    let open = transaction.query(&open, &[&group, &ids]).await?;
    let bundle = |row: &Row| {
        Ok(OpenBundle {
            id: row.try_get(0)?,
            channel: row.try_get(1)?,
            group: row.try_get(2)?,
            items: Vec::new(),
        })
    };
    let mut open = open.iter().map(bundle).collect::<Result<Vec<_>, Error>>()?;
    let bundles: Vec<i64> = open.iter().map(|bundle| bundle.id).collect();
    let items = transaction.prepare_cached(ITEMS).await?;
    for row in transaction.query(&items, &[&bundles]).await? {
        let (notification, incident): (i64, i64) = (row.try_get(0)?, row.try_get(1)?);
        let what = ItemKind::from_word(row.try_get(2)?);
        if let (Some(what), Some(bundle)) =
            (what, open.iter_mut().find(|bundle| bundle.id == notification))
        {
            bundle.items.push((incident, what));
        }
    }
    let told = transaction.prepare_cached(TOLD).await?;
    let told = transaction.query(&told, &[&ids]).await?;
    let told = told.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?)));
    let last = transaction.prepare_cached(LAST).await?;
    let last = transaction.query(&last, &[&group]).await?;
    let last = last.iter().map(|row| Ok((row.try_get(0)?, time(row, 1)?)));
    let mut facts = OutboxFacts {
        open,
        told: told.collect::<Result<_, Error>>()?,
        last: last.collect::<Result<_, Error>>()?,
        ..OutboxFacts::default()
    };
    if events.iter().any(|event| event.what == IncidentChange::Resolved) {
        let others = transaction.prepare_cached(OTHERS).await?;
        let others = transaction.query(&others, &[&group, &ids]).await?;
        facts.others = others.iter().map(|row| row.try_get(0)).collect::<Result<_, Error>>()?;
    }
    if routing.asks_for_tags() {
        let subjects: Vec<&str> = events.iter().map(|event| event.subject.as_str()).collect();
        let tags = transaction.prepare_cached(TAGS).await?;
        let tags = transaction.query(&tags, &[&subjects]).await?;
        facts.tags = tags
            .iter()
            .map(|row| Ok((row.try_get(0)?, row.try_get(1)?)))
            .collect::<Result<_, Error>>()?;
    }
    Ok(facts)
}

/// Writes a change of a bundle.
pub(super) async fn keep(
    transaction: &Transaction<'_>,
    settings: &FleetSettings,
    write: &BundleWrite,
    now: Timestamp,
) -> Result<(), Error> {
    // Another server may have begun the same bundle at this moment.
    const ADD: &str = r#"
        insert into notifications (channel, kind, "group", state, created_at, due_at)
        values ($1, 'incidents', $2, 'pending', $3, $4)
            on conflict (channel, kind, "group") where state = 'pending' and frozen_at is null
            do update set due_at = least(notifications.due_at, excluded.due_at)
        returning id
    "#;
    const SOONER: &str = "update notifications set due_at = least(due_at, $2) where id = $1";
    const ADD_ITEMS: &str = "
        insert into notification_items (notification, incident, what, at)
        select $1, incident, what, $4 from unnest($2::bigint[], $3::text[]) as given (incident, what)
            on conflict do nothing
    ";
    const REMOVE_ITEM: &str = "
        delete from notification_items where notification = $1 and incident = $2 and what = $3
    ";
    const DROP: &str = "update notifications set state = 'dropped', ended_at = $2 where id = $1";
    const NOTE_DROPPED: &str = r#"
        insert into incident_entries (incident, id, at, what, "by", details)
        select $1, 1 + coalesce(max(id), 0), $2, 'dropped', null,
               jsonb_build_object('channel', (select name from channels where id = $3), 'event', $4::text)::text
          from incident_entries
         where incident = $1
    "#;
    let (at, due_at) = (now.to_jiff(), write.due_at.to_jiff());
    let id: i64 = match write.id {
        Some(id) => {
            // What is added may not wait for the end of a quiet time.
            if !write.added.is_empty() && is_held(transaction, settings, id, now).await? {
                let sooner = transaction.prepare_cached(SOONER).await?;
                transaction.execute(&sooner, &[&id, &due_at]).await?;
            }
            id
        }
        None => {
            let add = transaction.prepare_cached(ADD).await?;
            transaction
                .query_one(&add, &[&write.channel, &write.group, &at, &due_at])
                .await?
                .try_get(0)?
        }
    };
    if !write.added.is_empty() {
        let incidents: Vec<i64> = write.added.iter().map(|(incident, _)| *incident).collect();
        let words: Vec<&str> = write.added.iter().map(|(_, what)| what.as_str()).collect();
        let add = transaction.prepare_cached(ADD_ITEMS).await?;
        transaction.execute(&add, &[&id, &incidents, &words, &at]).await?;
    }
    for (incident, what) in &write.removed {
        let remove = transaction.prepare_cached(REMOVE_ITEM).await?;
        transaction.execute(&remove, &[&id, incident, &what.as_str()]).await?;
        let note = transaction.prepare_cached(NOTE_DROPPED).await?;
        transaction.execute(&note, &[incident, &at, &write.channel, &what.as_str()]).await?;
    }
    if let Some(due_by) = write.due_by {
        let sooner = transaction.prepare_cached(SOONER).await?;
        transaction.execute(&sooner, &[&id, &due_by.to_jiff()]).await?;
    }
    if write.is_dropped {
        let drop = transaction.prepare_cached(DROP).await?;
        transaction.execute(&drop, &[&id, &at]).await?;
    }
    Ok(())
}

/// Whether all that a bundle would tell waits for the end of a quiet time.
async fn is_held(
    transaction: &Transaction<'_>,
    settings: &FleetSettings,
    notification: i64,
    now: Timestamp,
) -> Result<bool, Error> {
    const KIND: &str =
        "select c.kind from notifications n join channels c on c.id = n.channel where n.id = $1";
    if !settings.has_quiet_windows() {
        return Ok(false);
    }
    let kind = transaction.prepare_cached(KIND).await?;
    let kind: String = transaction.query_one(&kind, &[&notification]).await?.try_get(0)?;
    let items = due_items(transaction, notification).await?;
    Ok(sort_out(items, &kind, settings, now).told.is_empty())
}

/// Has bundles looked at again within a minute that may wait for the end of a quiet time: its window is about to change.
pub(super) async fn look_again(transaction: &Transaction<'_>, now: Timestamp) -> Result<(), Error> {
    const LOOK_AGAIN: &str = "
        update notifications set due_at = $1
         where kind = 'incidents' and state = 'pending' and frozen_at is null and due_at > $1
           and exists (select 1 from windows where effect = 'quiet')
    ";
    let due_at = now.saturating_add_milliseconds(Timing::BUILT_IN.wait).to_jiff();
    transaction.execute(LOOK_AGAIN, &[&due_at]).await.map(|_| ())
}

/// What a message that is due would tell.
pub(super) async fn due_items(
    transaction: &Transaction<'_>,
    notification: i64,
) -> Result<Vec<DueItem>, Error> {
    let select = format!(
        r#"select {INCIDENT_COLUMNS}, t.what, i."group",
                  array(select g.tag from device_tags g where i.scope = 'device' and g.device_id = i.subject),
                  exists (select 1 from device_health h
                           where i.scope = 'device' and h.device_id = i.subject and h.state = 'silent')
             from notification_items t
             join incidents i on i.id = t.incident
            where t.notification = $1"#
    );
    let select = transaction.prepare_cached(&select).await?;
    let mut items = Vec::new();
    for row in transaction.query(&select, &[&notification]).await? {
        let Some(what) = ItemKind::from_word(row.try_get(16)?) else { continue };
        let incident = stored_incident(&row)?;
        let facts = ItemFacts { what, incident, members: Vec::new(), members_total: 0 };
        let (group, tags, is_silent) = (row.try_get(17)?, row.try_get(18)?, row.try_get(19)?);
        items.push(DueItem { facts, group, tags, is_silent });
    }
    Ok(items)
}
