//! The production store: PostgreSQL 14 or newer. Ingest owns one connection, and a pool serves everything else. The
//! files of the resources call it to run their SQL. No call may wait for PostgreSQL without a limit, except those that
//! must take any time.

use std::{ops::RangeInclusive, time::Duration};

use async_trait::async_trait;
use deadpool::managed::PoolError;
use tokio::sync::{Mutex, Semaphore};
use tokio_postgres::error::SqlState;

use super::{
    connect::{Connector, Object, Pool},
    connection::Connection,
    errors::{describe, store_error, unavailable},
};
use crate::store::{PoolUsage, PostgresTarget, Store, StoreError, step_size::StepSize};

/// How long a check that the database answers may take.
const PING_TIMEOUT: Duration = Duration::from_secs(2);

/// The maximum time of one read or change on our side. PostgreSQL gives up a little earlier (see `connect`). This limit
/// is for a server that does not answer at all.
const CALL_TIMEOUT: Duration = Duration::from_secs(35);

/// How many pooled connections may run reads whose cost grows with a history. The others are reserved for the rest,
/// such as the dashboard, or the check whether a key may report for a device.
const LONG_READS: usize = 5;

/// How long such a read waits for its turn; the same as for a connection.
const LONG_READ_WAIT: Duration = Duration::from_secs(5);

/// Bounds of the time span whose events are aggregated at once. The largest span skips empty months quickly.
const AGGREGATION_MILLISECONDS: RangeInclusive<i64> = 1_000..=31 * 24 * 60 * 60 * 1000;

/// How long one aggregation should take. It is long enough to be worth a commit, and short for those who wait for it,
/// such as the deletion of a device.
const AGGREGATION_TARGET: Duration = Duration::from_millis(200);

/// Bounds of the number of a device's events that are deleted at once, and how long that should take. Aggregation and
/// late reports wait for it.
const DELETE_EVENTS: RangeInclusive<i64> = 500..=20_000;
const DELETE_TARGET: Duration = Duration::from_millis(100);

const NO_ANSWER: &str = "PostgreSQL does not answer";

/// An open PostgreSQL database.
pub(in crate::store) struct PostgresStore {
    pub(super) connector: Connector,
    pub(super) pool: Pool,
    /// Permits for reads whose cost grows with a history. Some pooled connections are reserved for the rest.
    pub(super) long_reads: Semaphore,
    /// A connection that only checks that the database answers. It must not wait for other reads.
    pub(super) pulse: Mutex<Option<Connection>>,
    /// The time span whose events are aggregated at once, in milliseconds.
    pub(super) aggregation_step: StepSize,
    /// How many events of a device are deleted at a time.
    pub(super) delete_step: StepSize,
}

impl PostgresStore {
    pub(in crate::store) async fn connect(target: &PostgresTarget) -> Result<Self, StoreError> {
        let connector = Connector::new(target)?;
        let pool = connector.pool()?;
        let aggregation_step = StepSize::new(AGGREGATION_MILLISECONDS, AGGREGATION_TARGET);
        let delete_step = StepSize::new(DELETE_EVENTS, DELETE_TARGET);
        let store = Self {
            connector,
            pool,
            long_reads: Semaphore::new(LONG_READS),
            pulse: Mutex::new(None),
            aggregation_step,
            delete_step,
        };
        // Done before the ping, whose time limit is too short: a silent host may come before the one that answers.
        drop(store.connection().await?);
        store.ping().await?;
        Ok(store)
    }

    pub(super) async fn connection(&self) -> Result<Object, StoreError> {
        self.pool.get().await.map_err(|error| match error {
            PoolError::Backend(error) => error,
            other => unavailable(&describe(&other)),
        })
    }

    /// Runs `work` on a pooled connection, for a limited time.
    pub(super) async fn call<T>(
        &self,
        work: impl AsyncFnOnce(&mut Object) -> Result<T, tokio_postgres::Error>,
    ) -> Result<T, StoreError> {
        self.call_within(CALL_TIMEOUT, work).await
    }

    /// Runs `work` whose cost grows with a history. Only some may run at a time, so that others still find a
    /// connection.
    pub(super) async fn call_long<T>(
        &self,
        work: impl AsyncFnOnce(&mut Object) -> Result<T, tokio_postgres::Error>,
    ) -> Result<T, StoreError> {
        let turn = tokio::time::timeout(LONG_READ_WAIT, self.long_reads.acquire()).await;
        let Ok(Ok(_turn)) = turn else {
            return Err(StoreError::Busy("too many long reads are in progress".into()));
        };
        let mut result = None;
        let read = self.call(async |connection| {
            result = Some(match work(connection).await {
                Err(error) if error.code() == Some(&SqlState::QUERY_CANCELED) => {
                    Err(StoreError::TooSlow(describe(&error)))
                }
                other => Ok(other?),
            });
            Ok(())
        });
        read.await?;
        result.unwrap_or_else(|| Err(StoreError::Failed("a read ended without a result".into())))
    }

    pub(super) async fn call_within<T>(
        &self,
        longest: Duration,
        work: impl AsyncFnOnce(&mut Object) -> Result<T, tokio_postgres::Error>,
    ) -> Result<T, StoreError> {
        let work =
            async |connection: &mut Object| match tokio::time::timeout(longest, work(connection))
                .await
            {
                Ok(result) => result.map_err(store_error),
                Err(_) => Err(StoreError::Unavailable(NO_ANSWER.into())),
            };
        self.call_unbounded(work).await
    }

    /// Runs `work` on a pooled connection, without a time limit. Every commit on the pool's connections happens in
    /// here. A change that may not be replicated is therefore never reported as done.
    pub(super) async fn call_unbounded<T>(
        &self,
        work: impl AsyncFnOnce(&mut Object) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let mut connection = self.connection().await?;
        let result = work(&mut connection).await;
        let confirmed = connection.confirm_change();
        if confirmed.is_err() || matches!(&result, Err(StoreError::Unavailable(_))) {
            // The next user would wait for the same silence, or get an error about a change that is not its own.
            drop(Object::take(connection));
        }
        confirmed.and(result)
    }
}

#[async_trait]
impl Store for PostgresStore {
    async fn ping(&self) -> Result<(), StoreError> {
        const SIGN_OF_LIFE: &str = "select exists (select from devices)";
        let ping = async {
            let mut pulse = self.pulse.lock().await;
            // A connection that does not answer is dropped and thereby closed.
            let connection = match pulse.take().filter(|pulse| !pulse.client.is_closed()) {
                Some(connection) => connection,
                None => self.connector.connect().await?,
            };
            connection.client.query_one(SIGN_OF_LIFE, &[]).await.map_err(store_error)?;
            *pulse = Some(connection);
            Ok(())
        };
        match tokio::time::timeout(PING_TIMEOUT, ping).await {
            Ok(result) => result,
            Err(_) => Err(StoreError::Unavailable(NO_ANSWER.into())),
        }
    }

    fn pool_usage(&self) -> PoolUsage {
        let status = self.pool.status();
        PoolUsage {
            max: status.max_size,
            in_use: status.size.saturating_sub(status.available),
            waiting: status.waiting,
        }
    }

    async fn close(&self) -> Result<(), StoreError> {
        self.pool.close();
        Ok(())
    }
}
