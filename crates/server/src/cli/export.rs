//! `pisync export`: writes events into a file or to standard output, compressed if that is asked for. `export` finds and writes
//! them. A file gets its name once all of it is written.

use std::{
    fs::File,
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
};

use clap::Args;
use flate2::{Compression, write::GzEncoder};
use pisync_core::{DeviceId, Timestamp};

use super::{database, exit::Failure, key::group_name, progress::Progress};
use crate::{
    config::{DatabaseArgs, MigrationArgs},
    event_format::Format,
    export::{Export, ExportError},
    store::{self, Store},
    temporary::TemporaryFile,
};

/// How much is gathered before it is written, in bytes.
const BUFFER: usize = 64 << 10;

/// zstd's own default: smaller than gzip at several times its speed.
const ZSTD_LEVEL: i32 = 3;

#[derive(Debug, Args)]
#[command(after_help = "\
Events have the fields of a device's history, created_at included, oldest first
within each device; `pisync import` reads them back. Names and groups of
devices, keys and settings are not part of events.

Works beside a running server; events that arrive meanwhile may be in it or
not. A file gets its name once it is complete; only its owner may read it.

Examples:
  pisync export --output events.ndjson.gz
  pisync export --group school-17 --from 2026-01-01 --format csv | head
  pisync export --device pi-001 --zstd > pi-001.ndjson.zst")]
pub(super) struct ExportCommand {
    /// How events are written [default: csv for FILE.csv, also compressed; else ndjson]
    #[arg(long)]
    format: Option<Format>,
    /// Only this device's events
    #[arg(long, value_name = "ID", conflicts_with = "group")]
    device: Option<String>,
    /// Only those of this group's devices
    #[arg(long, value_name = "NAME")]
    group: Option<String>,
    /// Only events dated then or later; a bare date is its midnight in UTC
    #[arg(long, value_name = "DATE", value_parser = date)]
    from: Option<Timestamp>,
    /// Only events dated then or earlier
    #[arg(long, value_name = "DATE", value_parser = date)]
    until: Option<Timestamp>,
    /// Where to write them; - for standard output
    #[arg(long, value_name = "FILE", default_value = "-")]
    output: PathBuf,
    /// Compress with gzip, as for FILE.gz
    #[arg(long, conflicts_with = "zstd")]
    gzip: bool,
    /// Compress with zstd, as for FILE.zst
    #[arg(long)]
    zstd: bool,
    #[command(flatten)]
    database: DatabaseArgs,
    #[command(flatten)]
    migrations: MigrationArgs,
}

/// A time, as it is typed.
pub(super) fn date(text: &str) -> Result<Timestamp, String> {
    Timestamp::from_iso8601(text)
        .map_err(|error| format!("{error}, such as 2026-01-31 or 2026-01-31T12:00:00Z"))
}

/// How what is written is compressed.
#[derive(Clone, Copy)]
enum Packing {
    Plain,
    Gzip,
    Zstd,
}

impl ExportCommand {
    fn packing(&self) -> Packing {
        let is = |extension| self.output.extension().is_some_and(|found| found == extension);
        match () {
            () if self.gzip => Packing::Gzip,
            () if self.zstd => Packing::Zstd,
            () if is("gz") => Packing::Gzip,
            () if is("zst") => Packing::Zstd,
            () => Packing::Plain,
        }
    }

    fn format(&self) -> Format {
        let name = self.output.file_name().map(|name| name.to_string_lossy());
        let is_csv = name.is_some_and(|name| name.ends_with(".csv") || name.contains(".csv."));
        self.format.unwrap_or(if is_csv { Format::Csv } else { Format::Ndjson })
    }
}

pub(super) async fn run(command: &ExportCommand) -> Result<(), Failure> {
    let device = command.device.as_deref().map(DeviceId::new).transpose();
    let export = Export {
        format: command.format(),
        device: device.map_err(|error| Failure::usage(format!("--device {error}")))?,
        group: command.group.as_deref().map(group_name).transpose()?,
        from: command.from,
        until: command.until,
    };
    let target = database::existing(&command.database)?;
    store::check_output(&target, &command.output)?;
    let store = database::open_current(&target, &command.migrations).await?;
    if command.output.as_os_str() == "-" {
        let written = write(&export, &*store, io::stdout(), command.packing(), |_| {}).await;
        return match written {
            // Whoever reads has seen enough.
            Err(ExportError::Write(error)) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            Err(error) => Err(error.into()),
            Ok(_) => Ok(()),
        };
    }
    let mut progress = Progress::new(None);
    let watch = |events| progress.update(0, events);
    let result = to_file(&export, &*store, &command.output, command.packing(), watch).await;
    progress.finish();
    let events = result?;
    println!("exported {events} events to {}", command.output.display());
    Ok(())
}

/// Writes a file beside `path`, and puts it there once it is whole; to what is there and no file, such as a
/// device, directly.
async fn to_file(
    export: &Export,
    store: &dyn Store,
    path: &Path,
    packing: Packing,
    watch: impl FnMut(u64),
) -> Result<u64, Failure> {
    let failed =
        |error: &dyn std::fmt::Display| format!("cannot write {}: {error}", path.display());
    let explain = |error: ExportError| match error {
        ExportError::Write(error) => failed(&error).into(),
        error => Failure::from(error),
    };
    if path.is_dir() || path.file_name().is_none() {
        return Err(failed(&"it is a directory").into());
    }
    if path.metadata().is_ok_and(|there| !there.is_file()) {
        let device = File::options().write(true).open(path).map_err(|error| failed(&error))?;
        return write(export, store, device, packing, watch).await.map_err(explain);
    }
    let file = TemporaryFile::beside(path).map_err(|error| failed(&error))?;
    let events = async {
        let events = write(export, store, file.as_file(), packing, watch).await?;
        file.as_file().sync_all()?;
        file.persist(path)?;
        Ok(events)
    };
    events.await.map_err(explain)
}

/// Writes to the end of `output`.
async fn write(
    export: &Export,
    store: &dyn Store,
    output: impl Write,
    packing: Packing,
    watch: impl FnMut(u64),
) -> Result<u64, ExportError> {
    let mut output = BufWriter::with_capacity(BUFFER, output);
    let events = match packing {
        Packing::Plain => export.run(store, &mut output, watch).await?,
        Packing::Gzip => {
            let mut encoder = GzEncoder::new(&mut output, Compression::default());
            let events = export.run(store, &mut encoder, watch).await?;
            encoder.finish()?;
            events
        }
        Packing::Zstd => {
            let mut encoder = zstd::stream::write::Encoder::new(&mut output, ZSTD_LEVEL)?;
            let events = export.run(store, &mut encoder, watch).await?;
            encoder.finish()?;
            events
        }
    };
    output.flush()?;
    Ok(events)
}
