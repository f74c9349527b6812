//! The only connection that writes events, with what it remembers between transactions. The writer thread owns it.
//! Commands that work without a server open one of their own. A server must never have a second one.

use std::{
    collections::HashMap,
    ops::RangeInclusive,
    path::{Path, PathBuf},
    sync::Arc,
};

use pisync_core::{DeviceId, Timestamp};
use rusqlite::{Connection, TransactionBehavior};

use super::{
    connection::open_for_writing,
    event_rows::{Ids, find_or_add, groups_of, insert_events, move_devices_back, register},
    expiry, ids, import_steps,
    ingest_buffer::IngestBuffer,
    ingest_state::{Through, record_applied},
    job_figures::JobStatements,
};
use crate::store::{Batch, OtherGroup, StoreError, Written};

/// Devices whose numbers are remembered; they take some 10 MiB. Beyond this number, all are forgotten and read again.
pub(super) const REMEMBERED_DEVICES: usize = 100_000;

/// Space that must be available on the disk before events are accepted again: that of a full batch of small events.
const PROBE_BYTES: u32 = 4 << 20;

/// The connection, with what it remembers between transactions.
pub(super) struct WriteConnection {
    pub(super) connection: Connection,
    /// The path of the file.
    path: PathBuf,
    /// The ingest buffer of the server, if the connection belongs to one.
    buffer: Option<Arc<IngestBuffer>>,
    /// The numbers of devices that are committed.
    devices: HashMap<DeviceId, i64>,
    /// SQLite's counter of writes by other processes.
    data_version: Option<i64>,
    /// Events dated before this no longer change streaks.
    pub(super) streaks_since: Timestamp,
}

/// How a batch of events is recorded in the journal.
pub(super) struct Journaled {
    /// The events' ids, in rising order.
    pub(super) ids: Vec<i64>,
    /// How far the journal is applied once these events are stored.
    pub(super) through: Through,
}

impl WriteConnection {
    /// Opens the file at `path`, whose schema must be current.
    pub(super) fn open(path: &Path) -> Result<Self, StoreError> {
        open_for_writing(path).map(|connection| Self::new(connection, path))
    }

    pub(super) fn new(connection: Connection, path: &Path) -> Self {
        Self {
            connection,
            path: path.to_owned(),
            buffer: None,
            devices: HashMap::new(),
            data_version: None,
            streaks_since: Timestamp::MIN,
        }
    }

    /// The path of the file.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The events of this server that are in the journal alone, if the connection belongs to a server.
    pub(super) fn buffer(&self) -> Option<Arc<IngestBuffer>> {
        self.buffer.clone()
    }

    /// Makes events come through `buffer` from now on.
    pub(super) fn use_buffer(&mut self, buffer: &Arc<IngestBuffer>) {
        self.buffer = Some(Arc::clone(buffer));
    }

    /// The highest id of an event in the tables.
    pub(super) fn highest_id(&self) -> rusqlite::Result<i64> {
        self.connection
            .prepare_cached("select ifnull(max(id), 0) from sync_events")?
            .query_row([], |row| row.get(0))
    }

    /// Reserves `count` ids above `at_least`, and above all that were ever assigned or reserved by any program. Rows
    /// that other programs insert without an id get higher ones from then on.
    pub(super) fn reserve_ids(
        &mut self,
        count: i64,
        at_least: i64,
    ) -> rusqlite::Result<RangeInclusive<i64>> {
        let transaction =
            self.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let reserved = ids::reserve(&transaction, count, at_least)?;
        transaction.commit()?;
        Ok(reserved)
    }

    /// Returns the ids that were reserved last and never assigned, so that a proper stop leaves no gap. Everything must
    /// be in the tables, and nobody may take ids any more.
    pub(super) fn return_unused_ids(&mut self) -> rusqlite::Result<()> {
        const RETURN: &str =
            "update sqlite_sequence set seq = ?1 - 1 where name = 'sync_events' and seq = ?2";
        let Some(unused) = self.buffer.as_ref().map(|buffer| buffer.unused_ids()) else {
            return Ok(());
        };
        if !unused.is_empty() {
            self.connection.execute(RETURN, [unused.start(), unused.end()])?;
        }
        Ok(())
    }

    /// Stores a batch without claims, such as one from the journal, with its figures in one transaction.
    pub(super) fn store(
        &mut self,
        batch: &Batch,
        journaled: Option<&Journaled>,
    ) -> rusqlite::Result<Written> {
        let written = self.store_claimed(batch, journaled)?;
        written.map_err(|error| rusqlite::Error::ToSqlConversionFailure(error.into()))
    }

    /// Stores a batch with its figures in one transaction, if its claims hold.
    pub(super) fn store_claimed(
        &mut self,
        batch: &Batch,
        journaled: Option<&Journaled>,
    ) -> rusqlite::Result<Result<Written, OtherGroup>> {
        let order = batch.order();
        let mut written = Written::new(Vec::with_capacity(batch.events.len()));
        let buffer = self.buffer.as_deref();

        let transaction =
            self.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let version = transaction.query_row("pragma data_version", [], |row| row.get(0))?;
        if self.data_version.replace(version) != Some(version)
            || self.devices.len() > REMEMBERED_DEVICES
        {
            self.devices.clear();
            self.streaks_since = expiry::streaks_since(&transaction)?;
            if let Some(buffer) = buffer {
                buffer.forget_devices();
            }
        }

        if !batch.claims.is_empty() {
            match batch.check_claims(&groups_of(&transaction, batch)?) {
                Ok(new) => {
                    register(&transaction, &new, batch.received)?;
                    written.new_devices.extend(new.into_keys().cloned());
                }
                // The transaction is rolled back; it has changed nothing yet.
                Err(refused) => return Ok(Err(refused)),
            }
        }

        // The number of each event's device, by position in the batch.
        let mut numbers = vec![0; batch.events.len()];
        let mut found: Vec<(&DeviceId, i64)> = Vec::new();
        for positions in batch.by_device(&order) {
            let device_id = &batch.events[positions[0]].device_id;
            let number = match self.devices.get(device_id) {
                Some(number) => *number,
                None => {
                    let (received, _) = batch.received_within(positions);
                    let (number, is_new) = find_or_add(&transaction, device_id, received)?;
                    found.push((device_id, number));
                    if is_new {
                        written.new_devices.push(device_id.clone());
                    }
                    number
                }
            };
            for position in positions {
                numbers[*position] = number;
            }
        }

        match journaled {
            Some(Journaled { ids, through }) => {
                record_applied(&transaction, *through)?;
                insert_events(&transaction, batch, &numbers, Ids::Given(ids), &mut written)?;
            }
            None => {
                if !batch.received_at.is_empty() {
                    move_devices_back(&transaction, batch, &order, &numbers)?;
                }
                let first = match buffer.and_then(|buffer| buffer.take_ids(batch.events.len())) {
                    Some(first) => first,
                    None => {
                        let count = i64::try_from(batch.events.len()).unwrap_or(i64::MAX);
                        ids::first_of(&transaction, count, 0)?
                    }
                };
                insert_events(&transaction, batch, &numbers, Ids::From(first), &mut written)?;
            }
        }

        let mut counting = order;
        if !written.duplicates.is_empty() {
            counting.retain(|position| !written.is_duplicate(*position));
        }
        let mut jobs = JobStatements::prepare(&transaction)?;
        for delta in &batch.job_deltas(&counting, self.streaks_since) {
            let number = numbers[delta.position];
            let figures = jobs.add(number, delta.job_key(), &delta.figures, self.streaks_since)?;
            written.streaks.extend(delta.streak(figures.consecutive_failures));
        }

        drop(jobs);
        if let Some(step) = &batch.import {
            import_steps::advance(&transaction, step, !batch.events.is_empty())?;
        }
        transaction.commit()?;
        self.devices
            .extend(found.into_iter().map(|(device_id, number)| (device_id.clone(), number)));
        Ok(Ok(written))
    }

    /// For changes that do not concern events.
    pub(super) fn connection(&mut self) -> &mut Connection {
        &mut self.connection
    }

    /// Forgets a deleted device, whose number is not valid any more.
    pub(super) fn forget_device(&mut self, device_id: &DeviceId) {
        self.devices.remove(device_id);
        if let Some(buffer) = &self.buffer {
            buffer.forget_devices();
        }
    }

    /// Takes the write lock and allocates some disk space. On a full disk, a small transaction may still succeed where
    /// events would not.
    pub(super) fn probe(&mut self) -> rusqlite::Result<()> {
        const RESERVE_SPACE: &str = "
            drop table if exists pisync_probe;
            create table pisync_probe (space blob);
        ";
        let transaction =
            self.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        transaction.execute_batch(RESERVE_SPACE)?;
        transaction.execute("insert into pisync_probe values (zeroblob(?1))", [PROBE_BYTES])?;
        // Committed, because otherwise it would never be written.
        transaction.commit()?;
        self.connection.execute_batch("drop table pisync_probe")
    }

    /// Copies the log into the file and empties it.
    pub(super) fn checkpoint(&mut self) -> rusqlite::Result<()> {
        self.connection.query_row("pragma wal_checkpoint(truncate)", [], |_| Ok(()))
    }
}
