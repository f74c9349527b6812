//! Ends a command at a signal: it removes what the command was making, and says what stays. `cli::main` starts it for all
//! commands but `serve`, which stops in its own way.

use std::fs;

use tokio::{
    runtime::Handle,
    signal::unix::{SignalKind, signal},
};

use crate::temporary;

/// The signals that end a command: a terminal that is closed, Ctrl-C, and what a supervisor sends.
const SIGNALS: [(&str, i32); 3] =
    [("SIGHUP", libc::SIGHUP), ("SIGINT", libc::SIGINT), ("SIGTERM", libc::SIGTERM)];

/// Shells say of a command that a signal has ended that this plus its number was the exit status.
const SIGNALLED: i32 = 128;

/// Ends the process when a signal comes, and says `remains`. Whoever has started it may have it go on all the same:
/// `nohup` ignores SIGHUP, and shells ignore SIGINT for what runs in the background.
///
/// It must not wait for the command, which may be busy in a library for a long time.
pub(super) fn end_at_signals(runtime: &Handle, remains: &'static str) -> Result<(), String> {
    let ignored = fs::read_to_string("/proc/self/status").map_or(0, |status| ignored(&status));
    let _entered = runtime.enter();
    for (name, number) in SIGNALS {
        if ignored & (1 << (number - 1)) != 0 {
            continue;
        }
        let mut signals = signal(SignalKind::from_raw(number))
            .map_err(|error| format!("cannot listen for signals: {error}"))?;
        runtime.spawn(async move {
            if signals.recv().await.is_none() {
                return;
            }
            temporary::remove_all();
            eprintln!("pisync: ended by {name}; {remains}");
            std::process::exit(SIGNALLED + number);
        });
    }
    Ok(())
}

/// The signals that a process ignores from its start, one bit each, as Linux tells of it.
fn ignored(status: &str) -> u64 {
    let line = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    line.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_process_ignores() {
        let status = "Name:\tpisync\nSigBlk:\t0000000000000002\nSigIgn:\t0000000000001003\n";
        assert_eq!(ignored(status), 0x1003);
        assert_eq!(ignored("Name:\tpisync\n"), 0);
    }
}
