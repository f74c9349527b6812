//! Upkeep of SQLite: it aggregates and drops events in small steps. `maintenance` and `app` call it through the traits
//! of `store`. Each step runs on the writer's thread, so it must be short: ingest waits for it.

use std::time::Instant;

use async_trait::async_trait;
use pisync_core::Timestamp;
use rusqlite::{TransactionBehavior, params};

use super::{
    apply::last_aggregatable_id, digests, expiry, groups, roll_ups, store::SqliteStore, summaries,
    write_connection::WriteConnection,
};
use crate::store::{
    Maintenance, Retention, RollUps, StoreError, summaries::DEVICES_AT_ONCE, verify::start_of_day,
};

/// How long ingest has the writer between two steps of bringing summaries up to date, compared with a step. After the
/// entire fleet has reported, reads are slow until all of it is done.
const REFRESH_YIELD: u32 = 4;

/// Event ids that are forgotten in one transaction, some 10 ms of work.
const FORGOTTEN_AT_ONCE: u16 = 1_000;

#[async_trait]
impl RollUps for SqliteStore {
    async fn aggregate_events(&self, _now: Timestamp) -> Result<bool, StoreError> {
        let most = self.aggregation_step.get();
        let aggregate = move |connection: &mut WriteConnection| {
            let started = Instant::now();
            let last = last_aggregatable_id(connection)?;
            let more = roll_ups::aggregate(&mut connection.connection, most, last)?;
            Ok((more, started.elapsed()))
        };
        let (more, took) = self.writer.call(aggregate).await?;
        if more {
            self.aggregation_step.learn(took);
        }
        Ok(more)
    }

    async fn make_digests(&self, now: Timestamp) -> Result<bool, StoreError> {
        let today = start_of_day(now);
        let make_some =
            move |writer: &mut WriteConnection| digests::make_some(writer, today.as_millisecond());
        self.writer.call(make_some).await
    }

    async fn drop_group_hours(&self, now: Timestamp) -> Result<(), StoreError> {
        self.writer.call(move |writer| groups::drop_old_hours(writer, now)).await
    }

    async fn refresh_summaries(&self) -> Result<(), StoreError> {
        // All events that are stored later have higher ids.
        let last = self.writer.call(last_aggregatable_id).await?;
        let outdated = self.read(move |connection| summaries::outdated(connection, last)).await?;
        let Some(outdated) = outdated else { return Ok(()) };
        for devices in outdated.devices.chunks(DEVICES_AT_ONCE) {
            let devices = devices.to_vec();
            let refresh = move |writer: &mut WriteConnection| {
                let started = Instant::now();
                summaries::refresh(writer, &devices)?;
                Ok(started.elapsed())
            };
            let took = self.writer.call(refresh).await?;
            tokio::time::sleep(took * REFRESH_YIELD).await;
        }
        self.writer.call(move |writer| summaries::finish(writer, &outdated)).await
    }
}

#[async_trait]
impl Maintenance for SqliteStore {
    async fn maintain(&self, _now: Timestamp) -> Result<(), StoreError> {
        self.writer.call(optimize).await
    }

    async fn forget_event_ids(&self, before: Timestamp) -> Result<bool, StoreError> {
        self.writer.call(move |connection| forget_event_ids(connection, before)).await
    }

    async fn drop_old_events(
        &self,
        now: Timestamp,
        retention: &Retention,
    ) -> Result<bool, StoreError> {
        let (before, lead) = (retention.oldest(now), retention.longest_lead());
        let most = self.drop_step.get();
        let drop_some = move |connection: &mut WriteConnection| {
            let started = Instant::now();
            let more = expiry::drop_events(&mut connection.connection, now, before, lead, most)?;
            connection.streaks_since = expiry::streaks_since(&connection.connection)?;
            let took = started.elapsed();
            Ok((more, took, !more && expiry::shrink(&connection.connection)?))
        };
        let (more, took, shrinks) = self.writer.call(drop_some).await?;
        if more {
            self.drop_step.learn(took);
        }
        Ok(more || shrinks)
    }
}

/// Forgets some of the event ids received before `before`. True when there may be more.
fn forget_event_ids(writer: &mut WriteConnection, before: Timestamp) -> rusqlite::Result<bool> {
    const FORGET: &str = "
        delete from event_keys
         where (device, event_id) in (
                   select device, event_id
                     from event_keys
                    where created_at < ?1
                    order by created_at
                    limit ?2
               )
    ";
    let forgotten =
        writer.connection.execute(FORGET, params![before.as_millisecond(), FORGOTTEN_AT_ONCE])?;
    Ok(forgotten == usize::from(FORGOTTEN_AT_ONCE))
}

/// Lets SQLite refresh its statistics where they are out of date.
fn optimize(writer: &mut WriteConnection) -> rusqlite::Result<()> {
    // By default it begins with a read and then writes. That fails at once while another process is writing.
    let transaction =
        writer.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    transaction.execute_batch("pragma optimize")?;
    transaction.commit()
}

#[cfg(test)]
mod tests {
    use std::{sync::mpsc::channel, time::Duration};

    use rusqlite::Connection;

    use super::*;
    use crate::store::sqlite::connection::open_for_writing;

    /// Another process may be writing while there are statistics to refresh.
    #[test]
    fn optimizing_waits_for_another_writer() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("test.db");
        let mut writer = WriteConnection::open(&path).unwrap();
        let grow = "
            create table t (a); create index i on t (a); insert into t values (0); analyze;
            insert into t with recursive n (a) as (values (1) union all select a + 1 from n limit 10000) select a from n;
        ";
        writer.connection.execute_batch(grow).unwrap();
        let rows = |connection: &Connection| -> i64 {
            let count = "select count(*) from t where a > 5";
            connection.query_row(count, [], |row| row.get(0)).unwrap()
        };
        assert_eq!(rows(&writer.connection), 9_995);
        let other = open_for_writing(&path).unwrap();
        other.execute_batch("begin immediate").unwrap();
        let (done, result) = channel();
        #[expect(clippy::disallowed_methods, reason = "stands for another process")]
        std::thread::spawn(move || drop(done.send((optimize(&mut writer), writer))));
        assert!(result.recv_timeout(Duration::from_millis(300)).is_err(), "it did not wait");
        other.execute_batch("commit").unwrap();
        let (optimized, writer) = result.recv().unwrap();
        optimized.unwrap();
        let known = "select stat from sqlite_stat1 where idx = 'i'";
        let known: String = writer.connection.query_row(known, [], |row| row.get(0)).unwrap();
        assert!(known.starts_with("100"), "{known}");
    }
}
