//! Surveys the Node service's tables: what they hold, what is unusual, and what prevents taking them over. `run` calls
//! it. It changes nothing.

use pisync_core::Timestamp;
use tokio_postgres::{Error, GenericClient, Row, types::ToSql};

use super::report::Survey;
use crate::store::migrations::embedded_for_postgres;

/// Records that the database was the Node service's, and in which time zone its times must be restored.
pub(super) const TAKE_OVER_TABLE: &str = "pisync_take_over";

/// Events that the store cannot hold. A time must be valid in every time zone.
const OUT_OF_RANGE: &str = "
    select count(*)
      from sync_events
     where not (timestamp between '0001-01-02' and '9999-12-29')
        or not (coalesce(created_at, timestamp) between '0001-01-02' and '9999-12-29')
        or not (coalesce(updated_at, timestamp) between '0001-01-02' and '9999-12-29')
";

/// Unusual properties of an event, and what becomes of it. $1 is the time zone, $2 the present.
const ODD_EVENTS: [(&str, &str); 9] = [
    ("created_at is null", "events without created_at: their timestamp stands in"),
    ("updated_at is null", "events without updated_at: their created_at stands in"),
    ("internet_speed < 0", "events with a negative speed: kept as they are"),
    ("internet_speed = 'NaN'", "events whose speed is no number: kept without one"),
    (
        "total_files_synced < 0 or total_errors < 0",
        "events with a negative count: kept as they are",
    ),
    ("timestamp at time zone $1 > $2", "events dated in the future: kept as they are"),
    (
        "created_at at time zone $1 > $2",
        "events received in the future: kept as they are; is the time zone right?",
    ),
    (
        "(timestamp at time zone $1) at time zone $1 <> timestamp
            or (created_at at time zone $1) at time zone $1 <> created_at",
        "events in an hour that a clock set forward left out: read as one hour later",
    ),
    (
        "((timestamp at time zone $1) - interval '1 hour') at time zone $1 = timestamp
            or ((created_at at time zone $1) - interval '1 hour') at time zone $1 = created_at",
        "events in an hour that a clock set back had twice: read as the second one",
    ),
];

/// The same about a device.
const ODD_DEVICES: [(&str, &str); 3] = [
    ("created_at is null", "devices without created_at: their first event's stands in"),
    ("updated_at is null", "devices without updated_at: their last event's created_at stands in"),
    (
        r"device_id = '' or device_id ~ '[\u0001-\u001f\u007f-\u009f]'",
        "devices whose id is empty or has control characters: kept, but not found by id in the API",
    ),
];

/// Sentences about obstacles. $1 are the names of tables and sequences to be made, $2 the names of columns and their
/// types. Obstacles that this misses make the take-over fail later, and it is rolled back.
const OBSTACLES: &str = r"
    with node (relation, name, owner, kind) as (
        select oid, relname::text, relowner, relkind
          from pg_class
         where oid in ('devices'::regclass, 'sync_events'::regclass)
    ),
    known (name, attname, type) as (
        select split_part(line, ' ', 1), split_part(line, ' ', 2),
               regexp_replace(line, '^\S+ \S+ ', '')
          from unnest($2::text[]) as line
    ),
    found (name, attname, type) as (
        select node.name, attname::text, format_type(atttypid, atttypmod)
          from node
          join pg_attribute on attrelid = relation
         where attnum > 0 and not attisdropped
    )
    select format('the table %s belongs to %s, so connect as %2$s', name, pg_get_userbyid(owner))
      from node
     where pg_get_userbyid(owner) <> current_user
    union all
    select format('%s may not create tables, until somebody may `grant create on schema %I to %1$I`',
                  current_user, current_schema())
     where not has_schema_privilege(current_schema(), 'create')
    union all
    select format('%s is no ordinary table', name) from node where kind <> 'r'
    union all
    select format('%s.%s is not a column of the Node service''s: drop it, or move it to a table of your own',
                  name, attname)
      from found
     where not exists (
               select from known where (known.name, known.attname) = (found.name, found.attname))
    union all
    select format('%s.%s is %s instead of %s', name, attname, coalesce(found.type, 'missing'), known.type)
      from known
      left join found using (name, attname)
     where found.type is distinct from known.type
    union all
    select distinct format('%s depends on %s: drop it, and make it again afterwards',
                           ev_class::regclass, node.name)
      from node
      join pg_depend on refobjid = relation and classid = 'pg_rewrite'::regclass
      join pg_rewrite on pg_rewrite.oid = objid
     where ev_class <> relation
    union all
    select format('%s of %s refers to %s: drop it, and make it again afterwards',
                  conname, conrelid::regclass, node.name)
      from node
      join pg_constraint on confrelid = relation and contype = 'f'
     where conrelid not in (select relation from node)
    union all
    select format('%s has a trigger %s: drop it, and make it again afterwards', name, tgname)
      from node
      join pg_trigger on tgrelid = relation
     where not tgisinternal and tgname <> format('update_%s_updated_at', name)
    union all
    select format('%s has a constraint %s: drop it, and add it again afterwards', name, conname)
      from node
      join pg_constraint on conrelid = relation
     where contype in ('c', 'f', 'u', 'x')
       and conname not in ('devices_device_id_key', 'sync_events_device_id_fkey')
    union all
    select format('%s has a policy %s: drop it, and make it again afterwards', name, polname)
      from node
      join pg_policy on polrelid = relation
    union all
    select format('somebody has a right to %s.%s alone: revoke it, and grant it again afterwards', name, attname)
      from node
      join pg_attribute on attrelid = relation
     where attacl is not null and not attisdropped
    union all
    select format('%s inherits from %s: detach it', inhrelid::regclass, name)
      from node
      join pg_inherits on inhparent = relation
    union all
    select format('the name %s is taken: rename what has it', name)
      from unnest($1::text[]) as name
     where to_regclass(name) is not null
";

/// The Node service's columns and their types.
const COLUMNS: [&str; 12] = [
    "devices id integer",
    "devices device_id character varying(255)",
    "devices created_at timestamp without time zone",
    "devices updated_at timestamp without time zone",
    "sync_events id integer",
    "sync_events device_id character varying(255)",
    "sync_events timestamp timestamp without time zone",
    "sync_events total_files_synced integer",
    "sync_events total_errors integer",
    "sync_events internet_speed numeric(10,2)",
    "sync_events created_at timestamp without time zone",
    "sync_events updated_at timestamp without time zone",
];

const OWN_INDEXES: &str = "
    select indexrelid::regclass::text
      from pg_index
     where indrelid in ('devices'::regclass, 'sync_events'::regclass)
       and indexrelid::regclass::text <> all (array[
               'devices_pkey', 'devices_device_id_key', 'sync_events_pkey',
               'idx_sync_events_device_id', 'idx_sync_events_timestamp', 'idx_sync_events_created_at'
           ])
     order by 1
";

/// The obstacles, in words, as far as they are visible without reading the tables.
pub(super) async fn obstacles(client: &impl GenericClient) -> Result<Vec<String>, Error> {
    column(&client.query(OBSTACLES, &[&embedded_relations(), &&COLUMNS[..]]).await?)
}

/// Surveys the tables. Obstacles end it early, because the columns of the tables are not known then.
pub(super) async fn survey(
    client: &impl GenericClient,
    time_zone: &str,
    now: Timestamp,
) -> Result<Survey, Error> {
    const SIZES: &str = "
        select (select count(*) from devices),
               pg_total_relation_size('devices') + pg_total_relation_size('sync_events')
    ";
    const EVENTS: &str = "
        select count(*), min(dated), max(dated), min(received), max(received),
               count(distinct date_trunc('month', received, 'UTC'))
          from (
              select timestamp at time zone $1 as dated,
                     coalesce(created_at, timestamp) at time zone $1 as received
                from sync_events
          ) events
    ";
    let obstacles = obstacles(client).await?;
    if !obstacles.is_empty() {
        return Ok(Survey { obstacles, ..Survey::default() });
    }
    let out_of_range: i64 = client.query_one(OUT_OF_RANGE, &[]).await?.try_get(0)?;
    if out_of_range > 0 {
        let obstacle = format!(
            "{out_of_range} rows of sync_events have times before the year 1 or after 9999: correct or delete them"
        );
        return Ok(Survey { obstacles: vec![obstacle], ..Survey::default() });
    }
    let sizes = client.query_one(SIZES, &[]).await?;
    let events = client.query_one(EVENTS, &[&time_zone]).await?;
    let mut odd = Vec::new();
    let parameters: [&(dyn ToSql + Sync); 2] = [&time_zone, &now.to_jiff()];
    count_odd(client, "sync_events", &ODD_EVENTS, &parameters, &mut odd).await?;
    count_odd(client, "devices", &ODD_DEVICES, &[], &mut odd).await?;
    Ok(Survey {
        devices: count(&sizes, 0)?,
        events: count(&events, 0)?,
        dated: range(&events, 1)?,
        received: range(&events, 3)?,
        months: count(&events, 5)?,
        bytes: count(&sizes, 1)?,
        odd,
        own_indexes: column(&client.query(OWN_INDEXES, &[]).await?)?,
        obstacles,
    })
}

/// Adds to `found` the `kinds` that occur in a table.
async fn count_odd(
    client: &impl GenericClient,
    table: &str,
    kinds: &[(&str, &'static str)],
    parameters: &[&(dyn ToSql + Sync)],
    found: &mut Vec<(u64, &'static str)>,
) -> Result<(), Error> {
    let filters = kinds.iter().map(|(filter, _)| format!("count(*) filter (where {filter})"));
    let counts = filters.collect::<Vec<_>>().join(", ");
    let counts = client.query_one(&format!("select {counts} from {table}"), parameters).await?;
    for (position, (_, kind)) in kinds.iter().enumerate() {
        let count = count(&counts, position)?;
        if count > 0 {
            found.push((count, kind));
        }
    }
    Ok(())
}

fn count(row: &Row, column: usize) -> Result<u64, Error> {
    Ok(row.try_get::<_, i64>(column)?.cast_unsigned())
}

fn range(row: &Row, first: usize) -> Result<Option<(Timestamp, Timestamp)>, Error> {
    let time = |column| row.try_get::<_, Option<jiff::Timestamp>>(column);
    Ok(time(first)?
        .zip(time(first + 1)?)
        .map(|(first, last)| (Timestamp::truncate(first), Timestamp::truncate(last))))
}

pub(super) fn column(rows: &[Row]) -> Result<Vec<String>, Error> {
    rows.iter().map(|row| row.try_get(0)).collect()
}

/// The names of the tables and sequences that our migrations make, except those that the Node service has as well.
fn embedded_relations() -> Vec<String> {
    let migrations = embedded_for_postgres();
    let statements = migrations.iter().flat_map(|migration| migration.up.lines());
    let names = statements.filter_map(|line| {
        let made = line.strip_prefix("create table ").or(line.strip_prefix("create sequence "))?;
        made.split([' ', '(']).next().map(str::to_owned)
    });
    let node = ["devices", "sync_events", "devices_id_seq", "sync_events_id_seq"];
    let ours = names.filter(|name| !node.contains(&name.as_str()));
    ours.chain([TAKE_OVER_TABLE.to_owned()]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_found_in_the_migrations() {
        let names = embedded_relations();
        for name in ["device_jobs", "event_keys", "api_keys", "audit_log", "pisync_take_over"] {
            assert!(names.iter().any(|found| found == name), "{name}: {names:?}");
        }
        assert!(!names.iter().any(|name| name == "devices" || name == "sync_events_id_seq"));
    }
}
