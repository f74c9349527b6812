//! The file of rejected records, with one JSON line for each record and its reasons. `import` calls it. Lines are
//! written before the step of the import is committed. The next run must remove the lines of an interrupted step.

use std::{
    fs::{File, OpenOptions},
    io::{self, BufRead, BufReader, Seek, SeekFrom, Write},
    os::unix::fs::OpenOptionsExt,
    path::PathBuf,
};

use pisync_core::Violation;
use serde::{Deserialize, Serialize};

use super::ImportError;
use crate::permissions::{self, PRIVATE};

/// The longest line that is read from an existing file, in bytes. A record has at most 64 KiB, each byte may be escaped
/// as six, and the reasons follow.
const LONGEST_LINE: u64 = 1 << 20;

/// A record that is not a valid event.
#[derive(Serialize)]
pub(super) struct Rejected {
    /// Its number among all records, from 1.
    pub(super) record: u64,
    /// Every wrong field.
    pub(super) details: Vec<Violation>,
    /// The text that was read.
    pub(super) text: String,
    /// Whether the text is only the beginning.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub(super) text_is_truncated: bool,
}

/// The file. It is created when the first record is rejected.
pub(super) struct RejectedFile {
    path: PathBuf,
    file: Option<File>,
    /// How many records it holds.
    records: u64,
}

impl RejectedFile {
    /// Opens the file at `path` for an import that has already taken `taken` records. Lines of later records are
    /// removed.
    pub(super) fn open(path: PathBuf, taken: u64) -> Result<Self, ImportError> {
        let mut rejected = Self { path, file: None, records: 0 };
        // A symbolic link may lead to a file that another person chose.
        let mut options = OpenOptions::new();
        options.read(true).write(true).custom_flags(libc::O_NOFOLLOW);
        match options.open(&rejected.path) {
            Ok(file) => rejected.go_on(file, taken)?,
            Err(error) if error.raw_os_error() == Some(libc::ELOOP) => {
                let path = rejected.path.display();
                return Err(ImportError(format!(
                    "{path} is a symbolic link: remove it, or name another file with --rejected"
                )));
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(rejected.failed(&error)),
        }
        Ok(rejected)
    }

    /// Continues an existing file.
    fn go_on(&mut self, mut file: File, taken: u64) -> Result<(), ImportError> {
        #[derive(Deserialize)]
        struct Line {
            record: u64,
        }
        let mut reader = BufReader::new(&file);
        let (mut line, mut whole, mut records) = (Vec::new(), 0, 0);
        loop {
            line.clear();
            let read = io::Read::take(&mut reader, LONGEST_LINE).read_until(b'\n', &mut line);
            if read.map_err(|error| self.failed(&error))? == 0 {
                break;
            }
            match serde_json::from_slice::<Line>(&line) {
                Ok(known) if known.record <= taken && line.ends_with(b"\n") => {
                    whole += line.len() as u64;
                    records += 1;
                }
                // The lines that follow were not committed.
                Ok(_) if taken > 0 => break,
                Err(_) if whole > 0 => break,
                _ => {
                    let path = self.path.display();
                    return Err(ImportError(format!(
                        "{path} is there already: move it away, or name another file with --rejected"
                    )));
                }
            }
        }
        let shortened = file.set_len(whole).and_then(|()| file.seek(SeekFrom::End(0)));
        shortened.map_err(|error| self.failed(&error))?;
        (self.file, self.records) = (Some(file), records);
        Ok(())
    }

    /// Adds records and returns when they are on the disk.
    pub(super) fn add(&mut self, records: &[Rejected]) -> Result<(), ImportError> {
        if records.is_empty() {
            return Ok(());
        }
        self.write(records).map_err(|error| self.failed(&error))?;
        self.records += records.len() as u64;
        Ok(())
    }

    /// How many records it holds. Those of an earlier run are missing when its file was removed or has another name.
    pub(super) fn records(&self) -> u64 {
        self.records
    }

    fn write(&mut self, records: &[Rejected]) -> io::Result<()> {
        let file = match &mut self.file {
            Some(file) => file,
            None => self.file.insert(permissions::create_new(&self.path, PRIVATE)?),
        };
        let mut lines = Vec::new();
        for record in records {
            serde_json::to_writer(&mut lines, record)?;
            lines.push(b'\n');
        }
        file.write_all(&lines)?;
        file.sync_data()
    }

    fn failed(&self, error: &io::Error) -> ImportError {
        let path = self.path.display();
        ImportError(format!(
            "cannot write rejected records to {path}: {error}; name another file with --rejected"
        ))
    }
}
