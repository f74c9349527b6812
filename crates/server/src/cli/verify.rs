//! `pisync verify`: are the figures what the raw events add up to?

use clap::Args;

use super::database;
use crate::{
    config::{DatabaseArgs, MigrationArgs},
    store::{JobDifference, Verified},
};

#[derive(Debug, Args)]
#[command(after_help = "\
Works beside running servers. Events that other programs wrote into the
database count after --repair.

Exit status: 0 when all figures are right or were repaired, 1 when some are
not.")]
pub(super) struct VerifyCommand {
    /// Write what the events add up to wherever figures differ
    #[arg(long)]
    repair: bool,
    #[command(flatten)]
    database: DatabaseArgs,
    #[command(flatten)]
    migrations: MigrationArgs,
}

pub(super) async fn run(command: &VerifyCommand) -> Result<(), String> {
    let target = command.database.target().map_err(|error| error.to_string())?;
    let store = database::open_current(&target, &command.migrations).await?;

    let mut sum = Verified::default();
    let (mut differing_jobs, mut after) = (0_u64, None);
    loop {
        let page = store.verify(after.as_deref(), command.repair).await;
        let page = page.map_err(|error| error.to_string())?;
        sum.devices += page.devices;
        sum.events += page.events;
        sum.nameless_devices += page.nameless_devices;
        sum.raw_since = page.raw_since;
        differing_jobs += page.differences.len() as u64;
        page.differences.iter().for_each(print);
        after = page.next;
        if after.is_none() {
            break;
        }
    }
    let repairs = command.repair && sum.raw_since.is_none();
    let repaired = if differing_jobs > 0 && repairs { " (repaired)" } else { "" };
    println!(
        "devices: {}, events: {}, jobs that differ: {differing_jobs}{repaired}",
        sum.devices, sum.events
    );
    if sum.nameless_devices > 0 {
        return Err(format!(
            "there are events or figures of {} devices that are not registered; delete those rows, or insert the devices",
            sum.nameless_devices
        ));
    }
    if let (Some(raw_since), true) = (sum.raw_since, differing_jobs > 0) {
        return Err(format!(
            "some figures are too small, and cannot be counted again: events received before {raw_since} are no longer kept"
        ));
    }
    if differing_jobs > 0 && !command.repair {
        return Err("some figures are wrong; repair them with `pisync verify --repair`".to_owned());
    }
    Ok(())
}

/// A line for each figure that differs.
fn print(difference: &JobDifference) {
    let job = difference.job.as_ref().map_or(String::new(), |job| format!(", job {job}"));
    for figure in difference.figures() {
        println!(
            "{}{job}: {} is {}, recounted {}",
            difference.device_id, figure.figure, figure.stored, figure.recounted
        );
    }
}
