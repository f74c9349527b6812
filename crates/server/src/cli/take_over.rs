//! What `pisync migrate up` says while it takes over a database made by the Node service, or rehearses it. `migrate` calls it,
//! and `store::take_over` does the work.

use std::time::{Duration, Instant};

use super::exit::Failure;
use crate::{
    clock::Clock,
    store::{
        Target,
        take_over::{Estimate, Progress, Survey, TakeOver},
    },
};

/// Says what is there and what to expect, and changes nothing.
pub(super) async fn rehearse(target: &Target, take_over: &mut TakeOver) -> Result<(), Failure> {
    let now = Clock::system().check()?;
    let rehearsal = take_over.rehearse(now).await;
    let rehearsal = rehearsal?;
    println!("{target} was made by the Node PiSync; this is a rehearsal, nothing is changed");
    let Some(estimate) = rehearsal.estimate else {
        let obstacles = rehearsal.survey.obstacles.join("; ");
        let message =
            format!("the Node service's database cannot be taken over as it is: {obstacles}");
        return Err(message.into());
    };
    print_survey(&rehearsal.survey);
    print_plan(&rehearsal.survey, estimate, take_over.time_zone());
    for other in &rehearsal.others {
        println!("  connected now, to be stopped before: {other}");
    }
    println!(
        "to go on: stop the Node service, make a backup with pg_dump, and run the command without --dry-run"
    );
    Ok(())
}

/// Takes the database over and tells how far it is; false when another process has done it meanwhile.
pub(super) async fn run(target: &Target, take_over: &mut TakeOver) -> Result<bool, Failure> {
    println!(
        "{target} was made by the Node PiSync; taking it over, with times read as {}",
        take_over.time_zone()
    );
    let started = Instant::now();
    let mut all = 0;
    let mut report = |progress: &Progress<'_>| match progress {
        Progress::Found(survey) => {
            all = survey.events;
            print_survey(survey);
        }
        Progress::Copied { month, events, so_far } => println!(
            "copied    {}: {} events, {} % of all",
            month.strftime("%Y-%m"),
            grouped(*events),
            so_far.saturating_mul(100) / all.max(1)
        ),
        Progress::Counting => println!("counting  the figures of each device"),
        Progress::Aggregating => println!("summing   by day and hour"),
    };
    // Whatever is dated after it counts in no streak.
    let now = Clock::system().check()?;
    let done = take_over.run(now, &mut report).await;
    if !done? {
        return Ok(false);
    }
    println!("taken over in {}; `pisync verify` recounts it", time(started.elapsed()));
    let others = take_over.others().await?;
    if !others.is_empty() {
        // They came too late to be refused.
        eprintln!(
            "pisync: somebody else is connected meanwhile: {}; if it is the Node service, stop it, and run `pisync verify --repair` for the events that it wrote",
            others.join(", ")
        );
    }
    Ok(true)
}

fn print_survey(survey: &Survey) {
    let span = |range: Option<(_, _)>| {
        range.map_or_else(String::new, |(first, last)| format!(", {first} to {last}"))
    };
    println!("found     {} devices", grouped(survey.devices));
    println!("found     {} events{}", grouped(survey.events), span(survey.dated));
    println!("received  in {} months{}", survey.months, span(survey.received));
    for (count, what) in &survey.odd {
        println!("odd       {} {what}", grouped(*count));
    }
    for index in &survey.own_indexes {
        println!("odd       the index {index} is your own: it goes with the old table");
    }
}

fn print_plan(survey: &Survey, estimate: Estimate, time_zone: &str) {
    println!("will      read times as {time_zone}, where they have no time zone of their own");
    println!(
        "will      copy all of it into PiSync's tables, keep every id, and count every figure"
    );
    println!("will      drop the old tables ({}) at the end", size(survey.bytes));
    println!("will      do all this in one transaction: all of it happens, or nothing");
    println!(
        "expected  {}, as far as trying a part of it tells; the tables are locked meanwhile",
        time(estimate.time)
    );
    println!(
        "expected  {} of disk for the new tables, and up to twice as much for PostgreSQL's log",
        size(estimate.bytes)
    );
}

/// `1234567` as `1,234,567`.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (position, digit) in digits.chars().enumerate() {
        if position > 0 && (digits.len() - position).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

fn size(bytes: u64) -> String {
    match bytes {
        0..1_000_000 => "less than 1 MB".to_owned(),
        1_000_000..10_000_000_000 => format!("{} MB", grouped(bytes / 1_000_000)),
        more => format!("{} GB", grouped(more / 1_000_000_000)),
    }
}

fn time(duration: Duration) -> String {
    match duration.as_secs() {
        0 => "less than 1 s".to_owned(),
        seconds @ 1..120 => format!("{seconds} s"),
        more => format!("{} min", grouped(more / 60)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_for_people() {
        for (number, expected) in
            [(0, "0"), (999, "999"), (1_000, "1,000"), (1_234_567, "1,234,567")]
        {
            assert_eq!(grouped(number), expected);
        }
        assert_eq!(size(999_999), "less than 1 MB");
        assert_eq!(size(1_234_567_890), "1,234 MB");
        assert_eq!(size(12_345_678_901), "12 GB");
        assert_eq!(time(Duration::from_millis(900)), "less than 1 s");
        assert_eq!(time(Duration::from_secs(119)), "119 s");
        assert_eq!(time(Duration::from_secs(3600)), "60 min");
    }
}
