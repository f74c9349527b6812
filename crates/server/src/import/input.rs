//! Reads the input of an import as a stream of bytes: a file or standard input. Compressed input is decompressed.
//! `records` calls it. Memory must stay constant however long the input is.

use std::{
    fs::{File, TryLockError},
    io::{self, BufReader, Cursor, Read},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use flate2::bufread::MultiGzDecoder;

use super::ImportError;

/// How many bytes are read from the input at a time.
const BUFFER: usize = 64 << 10;

const GZIP: &[u8] = &[0x1f, 0x8b];
const ZSTD: &[u8] = &[0x28, 0xb5, 0x2f, 0xfd];

/// Where records come from.
#[derive(Debug, Clone)]
pub enum Source {
    /// A file.
    File(PathBuf),
    /// Standard input.
    Stdin,
}

impl Source {
    /// The name that messages show.
    #[must_use]
    pub fn name(&self) -> String {
        match self {
            Self::File(path) => path.display().to_string(),
            Self::Stdin => "standard input".to_owned(),
        }
    }

    /// Its length in bytes, where that is known beforehand.
    #[must_use]
    pub fn bytes(&self) -> Option<u64> {
        match self {
            Self::File(path) => {
                path.metadata().ok().filter(std::fs::Metadata::is_file).map(|file| file.len())
            }
            Self::Stdin => None,
        }
    }

    /// Whether it can be read again from its beginning.
    pub(super) fn can_be_reopened(&self) -> bool {
        self.bytes().is_some()
    }

    pub(super) fn open(&self, taken: &Arc<AtomicU64>) -> Result<Input, ImportError> {
        let raw: Box<dyn Read + Send> = match self {
            Self::File(path) => Box::new(self.open_file(path)?),
            Self::Stdin => Box::new(io::stdin()),
        };
        taken.store(0, Ordering::Relaxed);
        let mut raw = Counted { raw, taken: Arc::clone(taken) };
        let mut start = Vec::with_capacity(ZSTD.len());
        let failed = |error: io::Error| self.unreadable(&error);
        raw.by_ref().take(ZSTD.len() as u64).read_to_end(&mut start).map_err(failed)?;
        let is = |magic: &[u8]| start.starts_with(magic);
        let (gzip, zstd) = (is(GZIP), is(ZSTD));
        let whole = BufReader::with_capacity(BUFFER, Cursor::new(start).chain(raw));
        let reader: Box<dyn Read + Send> = if gzip {
            Box::new(MultiGzDecoder::new(whole))
        } else if zstd {
            Box::new(zstd::stream::read::Decoder::with_buffer(whole).map_err(failed)?)
        } else {
            Box::new(whole)
        };
        Ok(Input { reader, source: self.clone() })
    }

    fn open_file(&self, path: &PathBuf) -> Result<File, ImportError> {
        let file = File::open(path).map_err(|error| self.unreadable(&error))?;
        if file.metadata().is_ok_and(|metadata| metadata.is_dir()) {
            let name = self.name();
            return Err(ImportError(format!(
                "{name} is a directory: name a file, or - for standard input"
            )));
        }
        // A file system without locks must not prevent an import.
        if matches!(file.try_lock(), Err(TryLockError::WouldBlock)) {
            return Err(ImportError(format!("{} is being imported already", self.name())));
        }
        Ok(file)
    }

    fn unreadable(&self, error: &io::Error) -> ImportError {
        let name = self.name();
        ImportError(match error.kind() {
            io::ErrorKind::NotFound => format!("{name} does not exist"),
            io::ErrorKind::PermissionDenied => {
                format!("cannot read {name}: permission denied")
            }
            io::ErrorKind::UnexpectedEof => {
                format!("{name} is cut off: its compressed data ends early")
            }
            _ => format!("cannot read {name}: {error}"),
        })
    }
}

/// A source that is being read.
pub(super) struct Input {
    reader: Box<dyn Read + Send>,
    pub(super) source: Source,
}

impl Input {
    /// Reads some bytes; 0 at the end.
    pub(super) fn read(&mut self, buffer: &mut [u8]) -> Result<usize, ImportError> {
        loop {
            match self.reader.read(buffer) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => return result.map_err(|error| self.source.unreadable(&error)),
            }
        }
    }
}

/// Counts the bytes that are read.
struct Counted {
    raw: Box<dyn Read + Send>,
    taken: Arc<AtomicU64>,
}

impl Read for Counted {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.raw.read(buffer)?;
        self.taken.fetch_add(count as u64, Ordering::Relaxed);
        Ok(count)
    }
}
