//! Checks that SQLite's write-ahead log is complete, before SQLite opens the database. SQLite takes the first frame
//! with a wrong checksum for the end of the log. That is right after a power cut. If the disk has damaged a frame,
//! SQLite would silently drop the transactions behind it. `claim::find` refuses such a database; `pisync journal
//! salvage` goes on without the lost transactions.
//!
//! The format: <https://www.sqlite.org/fileformat2.html#the_write_ahead_log>.

use std::{
    fs::File,
    io::{self, BufReader, Read},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    thread,
    time::Duration,
};

use tempfile::NamedTempFile;

use super::paths::{Identity, WRITE_AHEAD_LOG, beside, second_name, sync_folder};
use crate::{
    permissions::{self, folder_of},
    store::StoreError,
};

const HEADER_BYTES: usize = 32;
const FRAME_HEADER_BYTES: usize = 24;

/// The header begins with this number. Its lowest bit says that checksums add up big-endian words.
const MAGIC: u32 = 0x377f_0682;

/// Another process may write the log between two reads, so damage is checked again.
const ATTEMPTS: usize = 3;
const ATTEMPT_INTERVAL: Duration = Duration::from_millis(50);

/// What a damaged log has lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct LogDamage {
    /// The position of the first damaged frame, or of the header, in bytes.
    at: u64,
    /// The end of the last transaction before the damage, in bytes.
    whole: u64,
    /// How many transactions behind the damage still show their last frame.
    lost: u64,
}

/// The numbers that distinguish one generation of frames from the next. They stand in the header and in each frame.
type Salts = [u8; 8];

/// SQLite's checksum: two sums, of the even and the odd words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Checksum {
    sums: [u32; 2],
    is_big_endian: bool,
}

impl Checksum {
    fn add(&mut self, bytes: &[u8]) {
        let word = |bytes: &[u8]| -> u32 {
            let word = word_at(bytes, 0);
            if self.is_big_endian { word } else { word.swap_bytes() }
        };
        let [mut first, mut second] = self.sums;
        for pair in bytes.chunks_exact(8) {
            first = first.wrapping_add(word(&pair[..4])).wrapping_add(second);
            second = second.wrapping_add(word(&pair[4..])).wrapping_add(first);
        }
        self.sums = [first, second];
    }

    /// Whether this checksum is stored at `place` in `bytes`.
    fn stands_at(&self, bytes: &[u8], place: usize) -> bool {
        self.sums == [word_at(bytes, place), word_at(bytes, place + 4)]
    }
}

/// The big-endian word at `place`; 0 behind the end.
fn word_at(bytes: &[u8], place: usize) -> u32 {
    let word = bytes.get(place..place + 4).and_then(|word| word.try_into().ok());
    word.map_or(0, u32::from_be_bytes)
}

fn salts_at(bytes: &[u8], place: usize) -> Salts {
    bytes.get(place..place + 8).and_then(|salts| salts.try_into().ok()).unwrap_or_default()
}

/// The header of the log at `path`; `None` when there is no log, or it is empty.
fn read_header(path: &Path) -> io::Result<Option<[u8; HEADER_BYTES]>> {
    let mut header = [0; HEADER_BYTES];
    let read = File::open(path).and_then(|mut log| log.read_exact(&mut header));
    match read {
        // A power cut leaves zeros in a log that was just begun.
        Ok(()) => Ok((header != [0; HEADER_BYTES]).then_some(header)),
        Err(error)
            if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::UnexpectedEof) =>
        {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// Searches for damage in the log of the database at `database`. A transaction that a power cut has interrupted is no
/// damage. It is the last one, and nobody was told that it is committed.
fn find_damage(database: &Path) -> io::Result<Option<LogDamage>> {
    let path = beside(database, WRITE_AHEAD_LOG);
    let mut found = None;
    for attempt in 0..ATTEMPTS {
        if attempt > 0 {
            thread::sleep(ATTEMPT_INTERVAL);
        }
        let Some(header) = read_header(&path)? else { return Ok(None) };
        // If the header changes meanwhile, the log has started again: another process uses it.
        found = survey(&path, &header)?
            .filter(|_| matches!(read_header(&path), Ok(Some(now)) if now == header));
        if found.is_none() {
            break;
        }
    }
    Ok(found)
}

/// Reads a log that begins with `header`. The last process that used the database may have removed the log since its
/// header was read.
fn survey(path: &Path, header: &[u8; HEADER_BYTES]) -> io::Result<Option<LogDamage>> {
    let log = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        log => log?,
    };
    let mut log = BufReader::with_capacity(1 << 20, log);
    log.seek_relative(HEADER_BYTES as i64)?;
    let is_big_endian = word_at(header, 0) & 1 == 1;
    let mut checksum = Checksum { sums: [0, 0], is_big_endian };
    checksum.add(&header[..24]);
    let page_bytes = word_at(header, 8) as usize;
    let is_header = word_at(header, 0) & !1 == MAGIC
        && checksum.stands_at(header, 24)
        && page_bytes.is_power_of_two()
        && (512..=65_536).contains(&page_bytes);
    if !is_header {
        // The frames themselves tell which generation they belong to.
        let mut first = [0; FRAME_HEADER_BYTES];
        if let Err(error) = log.read_exact(&mut first) {
            let is_short = error.kind() == io::ErrorKind::UnexpectedEof;
            return if is_short { Ok(None) } else { Err(error) };
        }
        let frames = Frames::behind(&first, salts_at(&first, 8), &mut log)?;
        return Ok(frames.is_damage().then_some(LogDamage { at: 0, whole: 0, lost: frames.ends }));
    }
    let salts = salts_at(header, 16);
    let mut frame = vec![0; FRAME_HEADER_BYTES + page_bytes];
    let (mut at, mut whole) = (HEADER_BYTES as u64, 0);
    loop {
        let read = read_up_to(&mut log, &mut frame)?;
        if read < frame.len() {
            return Ok(None);
        }
        checksum.add(&frame[..8]);
        checksum.add(&frame[FRAME_HEADER_BYTES..]);
        if salts_at(&frame, 8) != salts || !checksum.stands_at(&frame, 16) {
            break;
        }
        at += frame.len() as u64;
        if ends_transaction(&frame) {
            whole = at;
        }
    }
    let frames = Frames::behind(&frame, salts, &mut log)?;
    Ok(frames.is_damage().then_some(LogDamage { at, whole, lost: frames.ends }))
}

/// Whether a frame is the last of a transaction. Such a frame holds the size of the database after it.
fn ends_transaction(frame: &[u8]) -> bool {
    word_at(frame, 4) != 0
}

/// Fills `buffer` as far as the log goes.
fn read_up_to(log: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut read = 0;
    while read < buffer.len() {
        match log.read(&mut buffer[read..]) {
            Ok(0) => break,
            Ok(more) => read += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(read)
}

/// The frames of one generation behind a position, wherever they begin.
#[derive(Debug, Default)]
struct Frames {
    /// The number of transactions whose last frame was found.
    ends: u64,
    /// Whether another frame was found behind the end of a transaction.
    goes_on: bool,
}

impl Frames {
    /// Searches for frames with these `salts`, first in `begin` and then in the rest of the log.
    fn behind(begin: &[u8], salts: Salts, log: &mut impl Read) -> io::Result<Self> {
        /// Bytes of a frame before its salts.
        const BEFORE: usize = 8;
        const CHUNK_BYTES: usize = 1 << 20;
        let mut frames = Self::default();
        let mut bytes = begin.to_vec();
        loop {
            for (place, window) in bytes.windows(BEFORE + salts.len()).enumerate() {
                if window[BEFORE..] != salts {
                    continue;
                }
                frames.goes_on |= frames.ends > 0;
                frames.ends += u64::from(ends_transaction(&bytes[place..]));
            }
            // The end of the chunk may be the beginning of a window.
            let kept = bytes.len().min(BEFORE + salts.len() - 1);
            bytes.drain(..bytes.len() - kept);
            bytes.resize(kept + CHUNK_BYTES, 0);
            let read = read_up_to(log, &mut bytes[kept..])?;
            bytes.truncate(kept + read);
            if read == 0 {
                return Ok(frames);
            }
        }
    }

    /// A transaction is on the disk before the next one begins, so only the last can have been interrupted.
    fn is_damage(&self) -> bool {
        self.goes_on
    }
}

/// Refuses a database whose log is damaged. It checks once in the life of the process, because after that SQLite has
/// the log open.
///
/// # Errors
/// When the log is damaged or cannot be read; nothing is changed.
pub(super) fn check(database: &Path) -> Result<(), StoreError> {
    static WHOLE: Mutex<Vec<Identity>> = Mutex::new(Vec::new());
    let Ok(identity) = Identity::at(database) else { return Ok(()) };
    let mut known = WHOLE.lock().unwrap_or_else(PoisonError::into_inner);
    if known.contains(&identity) {
        return Ok(());
    }
    let path = beside(database, WRITE_AHEAD_LOG);
    let damage = find_damage(database)
        .map_err(|error| StoreError::Failed(format!("cannot read {}: {error}", path.display())))?;
    match damage {
        None => {
            known.push(identity);
            Ok(())
        }
        Some(damage) => Err(StoreError::Failed(format!(
            "{}, and SQLite would drop them in silence; nothing was changed. Bring back a backup with `pisync restore`, or go on without them with `pisync journal salvage`, which keeps the damaged file",
            damage.describe(&path)
        ))),
    }
}

impl LogDamage {
    fn describe(&self, path: &Path) -> String {
        format!(
            "the write-ahead log {} is damaged at byte {}: transactions that were committed behind that place are lost ({} of them can still be seen)",
            path.display(),
            self.at,
            self.lost
        )
    }
}

/// Cuts a damaged log off behind the last transaction before the damage, and keeps the damaged log beside it. Answers
/// what is lost, and where the damaged log is. `None`, and nothing is changed, when the log is complete. If it is
/// killed at any point, it can be run again.
pub(in crate::store) fn salvage(database: &Path) -> io::Result<Option<(String, PathBuf)>> {
    let Some(damage) = find_damage(database)? else { return Ok(None) };
    let path = beside(database, WRITE_AHEAD_LOG);
    let folder = folder_of(&path);
    let mut whole = NamedTempFile::new_in(folder)?;
    permissions::give_to_owner_of(folder, whole.as_file())?;
    io::copy(&mut File::open(&path)?.take(damage.whole), &mut whole)?;
    whole.as_file().sync_all()?;
    let kept = second_name(&path)?;
    whole.persist(&path).map_err(|error| error.error)?;
    sync_folder(&path)?;
    Ok(Some((damage.describe(&path), kept)))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use rusqlite::Connection;
    use tempfile::TempDir;

    use super::*;

    const PAGE: usize = 4_096;
    const FRAME: usize = FRAME_HEADER_BYTES + PAGE;

    /// A database as a killed process has left it, with a log of these commits.
    struct Killed {
        folder: TempDir,
        log: Vec<u8>,
    }

    impl Killed {
        /// A database of a killed process that did `work`.
        fn after(work: impl FnOnce(&Connection)) -> Self {
            let origin = tempfile::tempdir().unwrap();
            let path = origin.path().join("test.db");
            let connection = Connection::open(&path).unwrap();
            connection
                .execute_batch(
                    "pragma journal_mode = wal; pragma wal_autocheckpoint = 0; create table t (a);",
                )
                .unwrap();
            work(&connection);
            let folder = tempfile::tempdir().unwrap();
            for file in ["test.db", "test.db-wal"] {
                fs::copy(origin.path().join(file), folder.path().join(file)).unwrap();
            }
            let log = fs::read(folder.path().join("test.db-wal")).unwrap();
            Self { folder, log }
        }

        fn database(&self) -> PathBuf {
            self.folder.path().join("test.db")
        }

        /// What is found in its log, if the log consists of `bytes`.
        fn damage_of(&self, bytes: &[u8]) -> Option<LogDamage> {
            fs::write(self.folder.path().join("test.db-wal"), bytes).unwrap();
            find_damage(&self.database()).unwrap()
        }

        fn rows(&self) -> i64 {
            let connection = Connection::open(self.database()).unwrap();
            connection.query_row("select count(*) from t", [], |row| row.get(0)).unwrap()
        }
    }

    /// Makes this many commits of one row each.
    fn insert(connection: &Connection, commits: u32) {
        for number in 0..commits {
            connection.execute("insert into t values (?1)", [number]).unwrap();
        }
    }

    fn frames(log: &[u8]) -> usize {
        (log.len() - HEADER_BYTES) / FRAME
    }

    #[test]
    fn a_log_that_is_removed_while_it_is_read_is_no_damage() {
        let folder = tempfile::tempdir().unwrap();
        let removed = folder.path().join("test.db-wal");
        assert!(matches!(survey(&removed, &[1; HEADER_BYTES]), Ok(None)));
    }

    #[test]
    fn what_a_power_cut_leaves_is_no_damage() {
        let killed = Killed::after(|connection| {
            insert(connection, 20);
            // Frames of the earlier generation stand behind those of the next.
            connection.query_row("pragma wal_checkpoint(restart)", [], |_| Ok(())).unwrap();
            insert(connection, 6);
        });
        assert!(frames(&killed.log) > 20);
        assert_eq!(killed.damage_of(&killed.log), None);
        let whole = HEADER_BYTES + 6 * FRAME;
        for length in (0..=whole).step_by(97) {
            assert_eq!(killed.damage_of(&killed.log[..length]), None, "cut at {length}");
        }
        // Only a part of the last transaction is on the disk.
        for place in [4, 9, 17, 30, FRAME - 1] {
            let mut log = killed.log.clone();
            log[whole - FRAME + place] ^= 1;
            assert_eq!(killed.damage_of(&log), None, "at {place}");
        }
        assert_eq!(killed.damage_of(&vec![0; killed.log.len()]), None);
    }

    /// A transaction that is larger than the cache writes frames before its end, and may be rolled back.
    #[test]
    fn what_was_rolled_back_is_no_damage() {
        let killed = Killed::after(|connection| {
            insert(connection, 3);
            connection
                .execute_batch(
                    "pragma cache_size = 10; begin;
                     insert into t with recursive n (a) as (values (1) union all select a + 1 from n limit 9999)
                     select randomblob(100) from n;
                     rollback;",
                )
                .unwrap();
            insert(connection, 1);
        });
        assert!(frames(&killed.log) > 50, "{}", frames(&killed.log));
        assert_eq!(killed.damage_of(&killed.log), None);
    }

    #[test]
    fn damage_before_the_last_transaction_is_found_wherever_it_is() {
        let killed = Killed::after(|connection| insert(connection, 6));
        let frames = frames(&killed.log);
        // Damages the header, and each part of each frame except the last. A frame with damaged salts looks like one of
        // an older generation. Two frames must then follow it.
        let parts = [0, 5, 17, 24, FRAME - 1].map(|place| (place, frames - 1));
        let places = (0..HEADER_BYTES).chain(parts.into_iter().chain([(9, frames - 2)]).flat_map(
            |(place, frames)| (0..frames).map(move |frame| HEADER_BYTES + frame * FRAME + place),
        ));
        for place in places {
            let mut log = killed.log.clone();
            log[place] ^= 1;
            let damage = killed.damage_of(&log).unwrap_or_else(|| panic!("nothing at {place}"));
            let frame = place.saturating_sub(HEADER_BYTES) / FRAME;
            let is_header = place < HEADER_BYTES;
            let at = if is_header { 0 } else { HEADER_BYTES + frame * FRAME };
            assert_eq!(damage.at, at as u64, "{place}");
        }
        // Removes a stretch of any length.
        for gone in [1, 100, FRAME, FRAME + 1] {
            let mut log = killed.log.clone();
            log.drain(HEADER_BYTES + FRAME..HEADER_BYTES + FRAME + gone);
            assert!(killed.damage_of(&log).is_some(), "{gone} bytes");
        }
    }

    #[test]
    fn salvage_keeps_what_stands_before_the_damage_and_the_damaged_log() {
        let killed = Killed::after(|connection| insert(connection, 6));
        let mut log = killed.log.clone();
        let damaged = HEADER_BYTES + (frames(&log) - 3) * FRAME;
        log[damaged + 100] ^= 1;
        fs::write(killed.folder.path().join("test.db-wal"), &log).unwrap();
        let error = check(&killed.database()).unwrap_err().to_string();
        assert!(error.contains(&format!("is damaged at byte {damaged}: ")), "{error}");

        let (lost, kept) = salvage(&killed.database()).unwrap().unwrap();
        assert!(lost.contains("(3 of them can still be seen)"), "{lost}");
        assert_eq!(fs::read(kept).unwrap(), log);
        assert_eq!(salvage(&killed.database()).unwrap(), None);
        check(&killed.database()).unwrap();
        assert_eq!(killed.rows(), 3);
    }
}
