//! Takes over the Node service's tables in one transaction. It renames them, makes ours with our own migrations, fills
//! ours from them, counts, and drops the old ones. `store::take_over` calls it. Every failure must leave the Node
//! service's database unchanged.

use std::time::{Duration, Instant};

use pisync_core::Timestamp;
use tokio_postgres::{Client, Error, Transaction, error::SqlState};

use super::{
    copy,
    report::{Estimate, Progress, Rehearsal, Survey, TakeOverError},
    survey,
};
use crate::store::postgres::{
    errors::{is_connection_lost, store_error},
    migrations::{PostgresMigrations, contents},
};
use crate::store::{PostgresTarget, StoreError, migrations::Contents};

/// How long to wait for others that use the tables. The Node service's own statements are short.
const LOCK_TIMEOUT: &str = "set local lock_timeout = '3s'";

/// How long a service that was just stopped may take to end its sessions: the number of checks, and the pause in
/// between.
const LOOKS: u32 = 12;
const BETWEEN_LOOKS: Duration = Duration::from_millis(250);

/// How many events a rehearsal copies to measure the time.
const SAMPLE_EVENTS: i64 = 50_000;

/// How much longer everything takes than a rehearsal's own work. It was 4 to 6 times with a million events, of hourly
/// and of daily reports.
const WHOLE_TO_SAMPLE: f64 = 5.0;

/// A connection to a database of the Node service.
pub(crate) struct PostgresTakeOver {
    migrations: PostgresMigrations,
    /// The time zone's name, as PostgreSQL spells it.
    time_zone: String,
}

impl PostgresTakeOver {
    pub(crate) async fn open(
        target: &PostgresTarget,
        time_zone: &str,
    ) -> Result<Option<Self>, TakeOverError> {
        // PostgreSQL would also accept an abbreviation such as EST, or an offset, and would read the offset with the
        // opposite sign. Only names of places, and UTC, say clearly which clock was meant.
        const FIND: &str = "select name from pg_timezone_names where lower(name) = lower($1)";
        let migrations = PostgresMigrations::connect(target).await?;
        let client = &migrations.connection.client;
        if !matches!(migrations.look().await?, Contents::NodeService) {
            return Ok(None);
        }
        let Some(found) = client.query_opt(FIND, &[&time_zone]).await.map_err(store_error)? else {
            return Err(TakeOverError::UnknownTimeZone(time_zone.to_owned()));
        };
        let time_zone = found.try_get(0).map_err(store_error)?;
        // If this process is killed, PostgreSQL then notices it within a statement. Some systems do not support it.
        let _ = client.batch_execute("set client_connection_check_interval = '1s'").await;
        Ok(Some(Self { migrations, time_zone }))
    }

    pub(crate) fn time_zone(&self) -> &str {
        &self.time_zone
    }

    pub(crate) async fn rehearse(&mut self, now: Timestamp) -> Result<Rehearsal, TakeOverError> {
        let others = self.others().await?;
        let client = &mut self.migrations.connection.client;
        let rehearsed = rehearse(client, &self.time_zone, now).await;
        let (survey, estimate) = rehearsed.map_err(store_error)?;
        Ok(Rehearsal { survey, estimate, others })
    }

    pub(crate) async fn run(
        &mut self,
        now: Timestamp,
        report: &mut (dyn FnMut(&Progress<'_>) + Send),
    ) -> Result<bool, TakeOverError> {
        let transaction = self.migrations.locked().await.map_err(store_error)?;
        if !matches!(contents(&transaction).await.map_err(store_error)?, Contents::NodeService) {
            return Ok(false);
        }
        let obstacles = survey::obstacles(&transaction).await.map_err(store_error)?;
        if !obstacles.is_empty() {
            return Err(TakeOverError::Obstacles(obstacles));
        }
        let others = lasting_others(transaction.client()).await?;
        if !others.is_empty() {
            return Err(TakeOverError::InUse(others));
        }
        if let Err(error) = lock_tables(&transaction).await {
            let is_locked = error.code() == Some(&SqlState::LOCK_NOT_AVAILABLE);
            transaction.rollback().await.map_err(store_error)?;
            let client = &self.migrations.connection.client;
            return Err(match is_locked {
                true => TakeOverError::Locked(lock_holders(client).await.map_err(store_error)?),
                false => TakeOverError::Failed(store_error(error)),
            });
        }
        take_over(&transaction, &self.time_zone, now, report).await?;
        match transaction.commit().await {
            Ok(()) => {
                let confirmed = self.migrations.connection.confirm_change();
                confirmed.map(|()| true).map_err(TakeOverError::Failed)
            }
            Err(error) if is_connection_lost(&error) => Err(TakeOverError::OutcomeUnknown),
            Err(error) => Err(TakeOverError::Failed(store_error(error))),
        }
    }

    pub(crate) async fn others(&self) -> Result<Vec<String>, TakeOverError> {
        others(&self.migrations.connection.client).await
    }
}

/// Rehearses in a transaction that is rolled back.
async fn rehearse(
    client: &mut Client,
    time_zone: &str,
    now: Timestamp,
) -> Result<(Survey, Option<Estimate>), Error> {
    let transaction = client.transaction().await?;
    let survey = survey::survey(&transaction, time_zone, now).await?;
    let estimate = match survey.obstacles[..] {
        [] => Some(estimate(&transaction, time_zone, survey.events).await?),
        _ => None,
    };
    transaction.rollback().await?;
    Ok((survey, estimate))
}

/// Everything between the locks and the commit.
async fn take_over(
    transaction: &Transaction<'_>,
    time_zone: &str,
    now: Timestamp,
    report: &mut (dyn FnMut(&Progress<'_>) + Send),
) -> Result<(), TakeOverError> {
    let failed = |error| TakeOverError::Failed(store_error(error));
    let survey = survey::survey(transaction, time_zone, now).await.map_err(failed)?;
    report(&Progress::Found(&survey));
    if !survey.obstacles.is_empty() {
        return Err(TakeOverError::Obstacles(survey.obstacles));
    }
    copy::make_tables(transaction, now).await.map_err(failed)?;
    copy::copy(transaction, time_zone, now, report).await.map_err(failed)?;
    copy::count_figures(transaction, now, report).await.map_err(failed)?;
    check(transaction, &survey).await?;
    copy::finish(transaction, time_zone, now).await.map_err(failed)
}

/// Locks everybody out, even readers, because tables are renamed.
async fn lock_tables(transaction: &Transaction<'_>) -> Result<(), Error> {
    const LOCK: &str = "lock table devices, sync_events in access exclusive mode";
    transaction.batch_execute(LOCK_TIMEOUT).await?;
    transaction.batch_execute(LOCK).await?;
    transaction.batch_execute("set local lock_timeout = 0").await
}

/// Checks that nothing is missing, by counting the rows in the new tables.
async fn check(transaction: &Transaction<'_>, survey: &Survey) -> Result<(), TakeOverError> {
    const COUNT: &str = "
        select (select count(*) from devices), (select count(*) from sync_events),
               (select coalesce(sum(total_syncs), 0)::bigint from device_jobs)
    ";
    let failed = |error| TakeOverError::Failed(store_error(error));
    let counts = transaction.query_one(COUNT, &[]).await.map_err(failed)?;
    let count = |column| counts.try_get::<_, i64>(column).map(i64::cast_unsigned).map_err(failed);
    let found = (count(0)?, count(1)?, count(2)?);
    if found == (survey.devices, survey.events, survey.events) {
        return Ok(());
    }
    Err(TakeOverError::Failed(StoreError::Failed(format!(
        "of {} devices and {} events, {} and {} arrived, and {} were counted",
        survey.devices, survey.events, found.0, found.1, found.2
    ))))
}

/// Other sessions in this database that may be the Node service's. They use our role, or have named its tables. Our own
/// sessions are not among them.
async fn others(client: &Client) -> Result<Vec<String>, TakeOverError> {
    const OTHERS: &str = r"
        select format('process %s (%s from %s, %s)', pid,
                      coalesce(nullif(application_name, ''), 'unnamed'),
                      coalesce(host(client_addr), 'this machine'), state)
          from pg_stat_activity
         where datname = current_database()
           and backend_type = 'client backend'
           and pid <> pg_backend_pid()
           and application_name <> 'pisync'
           and (usename = current_user or query ~* '\m(sync_events|devices)\M')
         order by pid
    ";
    let rows = client.query(OTHERS, &[]).await.map_err(store_error)?;
    Ok(survey::column(&rows).map_err(store_error)?)
}

/// The other sessions that remain after the wait.
async fn lasting_others(client: &Client) -> Result<Vec<String>, TakeOverError> {
    /// Within a transaction, the statistics would otherwise be read only once.
    const LOOK_AGAIN: &str = "select pg_stat_clear_snapshot()";
    let mut looks = 0;
    loop {
        client.execute(LOOK_AGAIN, &[]).await.map_err(store_error)?;
        let others = others(client).await?;
        looks += 1;
        if others.is_empty() || looks == LOOKS {
            return Ok(others);
        }
        tokio::time::sleep(BETWEEN_LOOKS).await;
    }
}

/// The sessions that hold locks on the tables.
async fn lock_holders(client: &Client) -> Result<Vec<String>, Error> {
    const HOLDERS: &str = "
        select distinct format('process %s (%s of %s from %s, %s)', pid,
                               coalesce(nullif(application_name, ''), 'unnamed'), usename,
                               coalesce(host(client_addr), 'this machine'), coalesce(state, 'busy'))
          from pg_locks
          join pg_stat_activity using (pid)
         where relation in ('devices'::regclass, 'sync_events'::regclass)
           and granted and pid <> pg_backend_pid()
    ";
    let holders = survey::column(&client.query(HOLDERS, &[]).await?)?;
    Ok(if holders.is_empty() { vec!["a process that has just ended".to_owned()] } else { holders })
}

/// Copies and indexes some events, and estimates the cost of all of them.
async fn estimate(
    transaction: &Transaction<'_>,
    time_zone: &str,
    events: u64,
) -> Result<Estimate, Error> {
    let started = Instant::now();
    let (sampled, bytes) = copy::sample(transaction, time_zone, SAMPLE_EVENTS).await?;
    Ok(Estimate {
        time: started.elapsed().mul_f64(WHOLE_TO_SAMPLE * ratio(events, sampled)),
        bytes: bytes.saturating_mul(events) / sampled.max(1),
    })
}

#[expect(clippy::cast_precision_loss, reason = "an estimate for people to read")]
fn ratio(events: u64, sampled: u64) -> f64 {
    events as f64 / sampled.max(1) as f64
}
