//! Incidents in PostgreSQL: how they are listed, looked up and acknowledged. The API and `pisync incident` call it through
//! `Incidents`. Only the sweep makes and resolves them.

use async_trait::async_trait;
use deadpool_postgres::{GenericClient, Transaction};
use pisync_core::{DeviceId, Timestamp};
use tokio_postgres::{Error, Row, types::ToSql};

use super::{
    audit::record,
    connect::Object,
    rows::{optional_time, snapshot, time},
    store::PostgresStore,
};
use crate::store::{
    AcknowledgeOutcome, Acknowledgement, Actor, Count, GroupFilter, HealthCounts, HistoryPosition,
    Incident, IncidentDetail, IncidentEntry, IncidentMember, IncidentPage, IncidentQuery,
    Incidents, NewAcknowledgement, StoreError, Via,
    audit::NewAuditEntry,
    incidents::{
        COUNTED, Dialect, INCIDENT_COLUMNS, Parameter, Standing, Statement, TIMELINE, details_of,
        name_of, stored_json,
    },
};

const DIALECT: Dialect = Dialect { placeholder: '$' };

#[async_trait]
impl Incidents for PostgresStore {
    async fn incidents(&self, query: &IncidentQuery) -> Result<IncidentPage, StoreError> {
        self.call(async |connection| incidents(connection, query).await).await
    }

    async fn incident(
        &self,
        id: i64,
        limit: u32,
        offset: u64,
    ) -> Result<Option<IncidentDetail>, StoreError> {
        self.call(async |connection| incident(connection, id, limit, offset).await).await
    }

    async fn acknowledge_incident(
        &self,
        id: i64,
        acknowledgement: Option<&NewAcknowledgement>,
        by: &Actor,
    ) -> Result<AcknowledgeOutcome, StoreError> {
        self.call(async |connection| acknowledge(connection, id, acknowledgement, by).await).await
    }

    async fn health_counts(&self) -> Result<HealthCounts, StoreError> {
        self.call(async |connection| health_counts(connection).await).await
    }
}

async fn incidents(connection: &mut Object, query: &IncidentQuery) -> Result<IncidentPage, Error> {
    let snapshot = snapshot(connection).await?;
    let page = DIALECT.page(query);
    let mut rows = select(&snapshot, query, &page, i64::from(query.limit) + 1).await?;
    let has_more = rows.len() > query.limit as usize;
    rows.truncate(query.limit as usize);
    let next = rows.last().filter(|_| has_more).map(position).transpose()?;
    let count = DIALECT.count(query);
    let counted = select(&snapshot, query, &count, i64::from(COUNTED) + 1).await?;
    let counted = counted.first().map_or(Ok(0), |row| row.try_get::<_, i64>(0))?;
    Ok(IncidentPage {
        incidents: rows.iter().map(stored_incident).collect::<Result<_, _>>()?,
        total: Count::up_to(COUNTED, counted.cast_unsigned()),
        next,
    })
}

/// Runs a statement with the query's parameters.
async fn select(
    client: &impl GenericClient,
    query: &IncidentQuery,
    statement: &Statement,
    limit: i64,
) -> Result<Vec<Row>, Error> {
    let since = query.since.unwrap_or(Timestamp::MIN).to_jiff();
    let after_time = query.after.map(|HistoryPosition { microsecond, .. }| {
        // PostgreSQL's times begin later than those of the time library.
        let earliest = Timestamp::MIN.to_jiff();
        let latest = if microsecond < 0 { earliest } else { jiff::Timestamp::MAX };
        jiff::Timestamp::from_microsecond(microsecond).unwrap_or(latest).max(earliest)
    });
    let after_id = query.after.map(|after| after.id);
    let group = query.group.as_ref().map(GroupFilter::key);
    let device = query.device_id.as_ref().map(DeviceId::as_str);
    let values: Vec<&(dyn ToSql + Sync)> = statement
        .parameters
        .iter()
        .map(|parameter| match parameter {
            Parameter::Limit => &limit as &(dyn ToSql + Sync),
            Parameter::Since => &since,
            Parameter::AfterTime => &after_time,
            Parameter::AfterId => &after_id,
            Parameter::Group => &group,
            Parameter::Device => &device,
        })
        .collect();
    let select = client.prepare_cached(&statement.sql).await?;
    client.query(&select, &values).await
}

fn position(row: &Row) -> Result<HistoryPosition, Error> {
    let opened_at: jiff::Timestamp = row.try_get(6)?;
    Ok(HistoryPosition { microsecond: opened_at.as_microsecond(), id: row.try_get(0)? })
}

/// Reads [`INCIDENT_COLUMNS`].
pub(super) fn stored_incident(row: &Row) -> Result<Incident, Error> {
    let acknowledgement = match optional_time(row, 9)? {
        Some(at) => Some(Acknowledgement {
            at,
            by: row.try_get::<_, Option<String>>(10)?.unwrap_or_default(),
            until: optional_time(row, 11)?,
            note: row.try_get(12)?,
        }),
        None => None,
    };
    Ok(Incident {
        id: row.try_get(0)?,
        scope: row.try_get(1)?,
        subject: row.try_get(2)?,
        kind: row.try_get(3)?,
        severity: row.try_get(4)?,
        since: time(row, 5)?,
        opened_at: time(row, 6)?,
        resolved_at: optional_time(row, 7)?,
        resolution: row.try_get(8)?,
        acknowledgement,
        reopened: row.try_get(13)?,
        flapping_since: optional_time(row, 14)?,
        summary: stored_json(row.try_get(15)?),
    })
}

async fn one(client: &impl GenericClient, id: i64) -> Result<Option<Incident>, Error> {
    let select = format!("select {INCIDENT_COLUMNS} from incidents i where i.id = $1");
    let select = client.prepare_cached(&select).await?;
    client.query_opt(&select, &[&id]).await?.as_ref().map(stored_incident).transpose()
}

async fn incident(
    connection: &mut Object,
    id: i64,
    limit: u32,
    offset: u64,
) -> Result<Option<IncidentDetail>, Error> {
    const MEMBERS: &str = "
        select device_id, jobs, joined_at, left_at, presumed
          from incident_members
         where incident = $1
         order by device_id
         limit $2 offset $3
    ";
    const COUNT_MEMBERS: &str = "
        select count(*) from (select from incident_members where incident = $1 limit $2) as counted
    ";
    const ENTRIES: &str = r#"
        select at, what, "by", details
          from incident_entries
         where incident = $1
         order by id desc
         limit $2
    "#;
    let snapshot = snapshot(connection).await?;
    let Some(incident) = one(&snapshot, id).await? else { return Ok(None) };
    let members = snapshot.prepare_cached(MEMBERS).await?;
    let members =
        snapshot.query(&members, &[&id, &i64::from(limit), &offset.cast_signed()]).await?;
    let member = |row: &Row| {
        Ok(IncidentMember {
            device_id: row.try_get(0)?,
            jobs: stored_json(row.try_get(1)?),
            joined_at: time(row, 2)?,
            left_at: optional_time(row, 3)?,
            is_presumed: row.try_get(4)?,
        })
    };
    let members = members.iter().map(member).collect::<Result<_, Error>>()?;
    let count = snapshot.prepare_cached(COUNT_MEMBERS).await?;
    let counted: i64 =
        snapshot.query_one(&count, &[&id, &i64::from(COUNTED + 1)]).await?.try_get(0)?;
    let entries = snapshot.prepare_cached(ENTRIES).await?;
    let entries = snapshot.query(&entries, &[&id, &i64::from(TIMELINE)]).await?;
    let entry = |row: &Row| {
        Ok(IncidentEntry {
            at: time(row, 0)?,
            what: row.try_get(1)?,
            by: row.try_get(2)?,
            details: stored_json(row.try_get(3)?),
        })
    };
    let timeline = entries.iter().rev().map(entry).collect::<Result<_, Error>>()?;
    let total_members = Count::up_to(COUNTED, counted.cast_unsigned());
    Ok(Some(IncidentDetail { incident, members, total_members, timeline }))
}

async fn acknowledge(
    connection: &mut Object,
    id: i64,
    acknowledgement: Option<&NewAcknowledgement>,
    by: &Actor,
) -> Result<AcknowledgeOutcome, Error> {
    const ACKNOWLEDGE: &str = "
        update incidents
           set acknowledged_at = $2, acknowledged_by = $3, acknowledged_until = $4, acknowledged_note = $5
         where id = $1
        returning id
    ";
    const ADD_ENTRY: &str = r#"
        insert into incident_entries (incident, id, at, what, "by", details)
        select $1, 1 + coalesce(max(id), 0), $2, 'acknowledged', $3, $4
          from incident_entries
         where incident = $1
        returning id
    "#;
    let transaction = connection.transaction().await?;
    match standing(&transaction, id, by.at).await? {
        Standing::Unknown => return Ok(AcknowledgeOutcome::Unknown),
        Standing::Resolved => return Ok(AcknowledgeOutcome::Resolved),
        Standing::Open { is_acknowledged } if is_acknowledged || acknowledgement.is_some() => {
            let name = actor_name(&transaction, by).await?;
            let now = by.at.to_jiff();
            let at = acknowledgement.map(|_| now);
            let given_by = acknowledgement.map(|_| name.as_str());
            let until = acknowledgement.and_then(|given| given.until).map(Timestamp::to_jiff);
            let note = acknowledgement.and_then(|given| given.note.as_deref());
            // Both fail when a trigger has dropped the change.
            transaction.query_one(ACKNOWLEDGE, &[&id, &at, &given_by, &until, &note]).await?;
            let details = details_of(acknowledgement).to_string();
            transaction.query_one(ADD_ENTRY, &[&id, &now, &name, &details]).await?;
            record(&transaction, by, &NewAuditEntry::acknowledged(id, acknowledgement)).await?;
        }
        Standing::Open { .. } => {}
    }
    let incident = one(&transaction, id).await?;
    transaction.commit().await?;
    Ok(incident.map_or(AcknowledgeOutcome::Unknown, |incident| {
        AcknowledgeOutcome::Done(Box::new(incident))
    }))
}

/// Locks the incident: the sweep must not resolve it meanwhile.
async fn standing(
    transaction: &Transaction<'_>,
    id: i64,
    now: Timestamp,
) -> Result<Standing, Error> {
    const STANDING: &str = "
        select resolved_at is not null,
               acknowledged_at is not null and coalesce(acknowledged_until > $2, true)
          from incidents
         where id = $1
           for update
    ";
    let Some(row) = transaction.query_opt(STANDING, &[&id, &now.to_jiff()]).await? else {
        return Ok(Standing::Unknown);
    };
    Ok(match (row.try_get(0)?, row.try_get(1)?) {
        (true, _) => Standing::Resolved,
        (false, is_acknowledged) => Standing::Open { is_acknowledged },
    })
}

/// The word for an actor in a timeline.
async fn actor_name(transaction: &Transaction<'_>, by: &Actor) -> Result<String, Error> {
    const KEY_NAME: &str = "select name from api_keys where id = $1";
    let Via::Key(id) = by.via else { return Ok(name_of(by, None)) };
    let row = transaction.query_opt(KEY_NAME, &[&id]).await?;
    let name = row.map(|row| row.try_get(0)).transpose()?;
    Ok(name_of(by, name.flatten()))
}

async fn health_counts(connection: &mut Object) -> Result<HealthCounts, Error> {
    const DEVICES: &str = "select state, sum(devices)::bigint from group_states group by state";
    const INCIDENTS: &str = "
        select kind, scope, count(*) from incidents where resolved_at is null group by scope, kind
    ";
    const SWEPT_AT: &str = "select swept_at from fleet_state";
    const WAITING: &str = "select count(*) from notifications where state = 'pending'";
    let snapshot = snapshot(connection).await?;
    let devices = snapshot.prepare_cached(DEVICES).await?;
    let devices = snapshot.query(&devices, &[]).await?;
    let incidents = snapshot.prepare_cached(INCIDENTS).await?;
    let incidents = snapshot.query(&incidents, &[]).await?;
    let swept_at = snapshot.prepare_cached(SWEPT_AT).await?;
    let swept_at = optional_time(&snapshot.query_one(&swept_at, &[]).await?, 0)?;
    let waiting = snapshot.prepare_cached(WAITING).await?;
    let waiting = snapshot.query_one(&waiting, &[]).await?;
    let count = |row: &Row, column: usize| {
        row.try_get::<_, i64>(column).map(|count| count.max(0).cast_unsigned())
    };
    Ok(HealthCounts {
        devices: devices
            .iter()
            .map(|row| Ok((row.try_get(0)?, count(row, 1)?)))
            .collect::<Result<_, Error>>()?,
        incidents: incidents
            .iter()
            .map(|row| Ok((row.try_get(0)?, row.try_get(1)?, count(row, 2)?)))
            .collect::<Result<_, Error>>()?,
        swept_at,
        waiting_notifications: count(&waiting, 0)?,
    })
}
