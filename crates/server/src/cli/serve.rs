//! `pisync serve`: starts the log, listens, runs `app` until a signal comes, and says how it ended. It makes nothing before the
//! settings make sense.

use std::convert::Infallible;

use tokio::signal::unix::{Signal, SignalKind, signal};

use super::{exit::Failure, listen::listen, settings::SettingsFile};
use crate::{
    app,
    clock::Clock,
    config::{LogLevelArgs, ServeArgs},
    logs::{self, LogGuard},
};

/// Open files that are no clients': the database's, the logs'.
const OTHER_FILES: usize = 128;

pub(super) async fn run(
    arguments: &ServeArgs,
    level: &LogLevelArgs,
    settings_file: &SettingsFile,
) -> Result<(), Failure> {
    let mut settings = arguments.settings()?;
    let log = logs::init(&arguments.log_settings(level))?;
    let mut hang_ups = listen_for(SignalKind::hangup())?;
    for warning in &settings_file.warnings {
        tracing::warn!("{warning}");
    }
    for name in &settings_file.unknown {
        tracing::warn!(name, "unknown setting in .env; is it misspelt?");
    }
    bound_connections(&mut settings.http.max_connections, raise_file_limit());
    let shutdown = shutdown_signal()?;
    let listeners = listen(arguments.listen()).await?;
    let result = tokio::select! {
        result = app::run(settings, Clock::system(), listeners, shutdown) => result,
        never = reopen_logs(&log, &mut hang_ups) => match never {},
    };
    match &result {
        Ok(()) => tracing::info!("stopped; everything that was accepted is stored"),
        Err(error) => tracing::error!(%error, "stopped"),
    }
    result.map_err(|error| error.to_string().into())
}

/// Raises the limit of open files, each connection being one, as far as the system lets the process; gives
/// what it is then, if that is known.
fn raise_file_limit() -> Option<u64> {
    match rlimit::increase_nofile_limit(rlimit::INFINITY) {
        Ok(limit) => Some(limit),
        Err(error) => {
            tracing::warn!(%error, "cannot raise the limit of open files");
            None
        }
    }
}

/// Keeps connections below what the system allows in open files: those that cannot be taken in would only
/// be refused one by one.
fn bound_connections(max_connections: &mut usize, file_limit: Option<u64>) {
    let Some(files) = file_limit.and_then(|limit| usize::try_from(limit).ok()) else { return };
    let most = files.saturating_sub(OTHER_FILES).max(1);
    if *max_connections == 0 {
        *max_connections = most;
    }
    if *max_connections <= most {
        return;
    }
    tracing::warn!(
        max_connections = most,
        "the system allows {files} open files: fewer connections than MAX_CONNECTIONS are taken in; raise its limit (ulimit -n, LimitNOFILE)"
    );
    *max_connections = most;
}

/// Comes true on SIGTERM or SIGINT (Ctrl-C).
fn shutdown_signal() -> Result<impl Future<Output = ()>, String> {
    let mut terminate = listen_for(SignalKind::terminate())?;
    let mut interrupt = listen_for(SignalKind::interrupt())?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("stopping: finishing what was accepted");
    })
}

/// Opens the log files anew on each SIGHUP, as logrotate asks for it. TLS files need no signal: they are looked at
/// every second.
async fn reopen_logs(log: &LogGuard, hang_ups: &mut Signal) -> Infallible {
    loop {
        if hang_ups.recv().await.is_none() {
            // No signal can come any more.
            std::future::pending::<()>().await;
        }
        log.reopen();
        tracing::info!("SIGHUP: the log files are opened anew");
    }
}

fn listen_for(kind: SignalKind) -> Result<Signal, String> {
    signal(kind).map_err(|error| format!("cannot listen for signals: {error}"))
}
