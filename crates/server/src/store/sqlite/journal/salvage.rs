//! Salvages a damaged journal: it keeps the complete records and marks the missing ones. `journal_commands` calls it.
//! The damaged files must be kept beside it.

use std::{
    fs,
    io::{self, Write as _},
    path::Path,
};

use pisync_core::SyncEvent;
use tempfile::NamedTempFile;

use super::{
    super::paths::{second_name, sync_folder},
    place::{GROWTH_BYTES, JournalState, paths},
    record::{self, Record},
    survey::Survey,
};
use crate::{
    permissions::{self, folder_of},
    store::JournalSalvage,
};

/// The result of a salvage.
#[derive(Debug)]
pub(in super::super) struct Salvaged {
    pub(in super::super) result: JournalSalvage,
    /// Events that can be read in the damaged stretches.
    pub(in super::super) doubtful: Vec<SyncEvent>,
}

/// Makes a new journal from what is left of the journal of the database at `database`. `state` is what the database's
/// tables say. If it is killed at any point, it can be run again.
pub(in super::super) fn salvage(database: &Path, state: JournalState) -> io::Result<Salvaged> {
    let JournalState { identity, applied, .. } = state;
    let survey = Survey::read(database, state)?;
    if let Some(version) = survey.newer_version() {
        return Err(io::Error::other(format!(
            "there are events in format {version}, which this version of PiSync cannot read; use the newer version"
        )));
    }
    let damage = survey.damage();
    let doubtful = damage.iter().flat_map(|damage| survey.doubtful_events(damage)).collect();
    let records = survey.into_unapplied();
    let mut result = JournalSalvage {
        damage: damage.map(|damage| damage.to_string()),
        events: records.iter().map(|record| record.events.len()).sum(),
        ..JournalSalvage::default()
    };
    if result.damage.is_none() {
        return Ok(Salvaged { result, doubtful });
    }
    let [first, second] = paths(database);
    for path in [&first, &second] {
        if path.exists() {
            result.kept.push(second_name(path)?);
        }
    }
    // From here on everything is in the first file. Until the second file is removed, some of it is in both.
    write_all(&first, identity, applied, &records)?;
    match fs::remove_file(&second) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    sync_folder(&first)?;
    Ok(Salvaged { result, doubtful })
}

/// Writes `records` into the file at `path`, with a mark in the place of the missing ones.
fn write_all(path: &Path, identity: i64, applied: u64, records: &[Record]) -> io::Result<()> {
    let mut file = NamedTempFile::new_in(folder_of(path))?;
    permissions::give_to_owner_of(folder_of(path), file.as_file())?;
    let mut buffer = Vec::new();
    let mut expected = applied + 1;
    for Record { number, first_id, received, events } in records {
        if expected < *number {
            record::encode_lost(&mut buffer, identity, expected..*number)?;
            file.write_all(&buffer)?;
        }
        record::encode(&mut buffer, identity, *number, *first_id, *received, events.iter())?;
        file.write_all(&buffer)?;
        expected = number + 1;
    }
    // The length that a file has if it was never cut.
    let length = file.as_file().metadata()?.len();
    file.as_file().set_len(length.next_multiple_of(GROWTH_BYTES))?;
    file.as_file().sync_all()?;
    file.persist(path).map_err(|error| error.error)?;
    sync_folder(path)
}
