//! `pisync serve`: the server itself, from its settings to its orderly end.

use tokio::{
    net::{TcpListener, TcpSocket, lookup_host},
    signal::unix::{SignalKind, signal},
};

use super::EnvFile;
use crate::{app, clock::Clock, config::ServeArgs, logs};

/// Connections that may wait to be taken in: a whole fleet reports at the same second. The kernel
/// bounds it by net.core.somaxconn, 4,096 on Debian.
const BACKLOG: u32 = 4_096;

/// Open files that are no clients': the database's, the logs'.
const OTHER_FILES: usize = 128;

pub(super) async fn run(arguments: &ServeArgs, env_file: &EnvFile) -> Result<(), String> {
    let mut settings = arguments.settings().map_err(|error| error.to_string())?;
    let _guard = logs::init(&arguments.log_settings())?;
    for name in &env_file.unknown {
        tracing::warn!(name, "unknown setting in .env; is it misspelt?");
    }
    bound_connections(&mut settings.http.max_connections, raise_file_limit());
    let shutdown = shutdown_signal()?;
    let listener = listen(arguments).await?;
    let result = app::run(settings, Clock::system(), listener, shutdown).await;
    match &result {
        Ok(()) => tracing::info!("stopped; everything that was accepted is stored"),
        Err(error) => tracing::error!(%error, "stopped"),
    }
    result.map_err(|error| error.to_string())
}

async fn listen(arguments: &ServeArgs) -> Result<TcpListener, String> {
    let (host, port) = arguments.address();
    let cannot = |error: &dyn std::fmt::Display| {
        format!("cannot listen on {host}:{port}: {error}; set HOST and PORT to others")
    };
    let mut addresses = lookup_host((host, port)).await.map_err(|error| cannot(&error))?;
    let address = addresses.next().ok_or_else(|| cannot(&"no such host"))?;
    let open = || {
        let socket = if address.is_ipv6() { TcpSocket::new_v6()? } else { TcpSocket::new_v4()? };
        // A restart must not wait for the last run's connections to be forgotten.
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        socket.listen(BACKLOG)
    };
    open().map_err(|error: std::io::Error| cannot(&error))
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
    let room = files.saturating_sub(OTHER_FILES).max(1);
    if *max_connections == 0 {
        *max_connections = room;
    }
    if *max_connections <= room {
        return;
    }
    tracing::warn!(
        max_connections = room,
        "the system allows {files} open files: fewer connections than MAX_CONNECTIONS are taken in; raise its limit (ulimit -n, LimitNOFILE)"
    );
    *max_connections = room;
}

/// Comes true on SIGTERM or SIGINT (Ctrl-C).
pub(super) fn shutdown_signal() -> Result<impl Future<Output = ()>, String> {
    let cannot = |error: std::io::Error| format!("cannot listen for signals: {error}");
    let mut terminate = signal(SignalKind::terminate()).map_err(cannot)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(cannot)?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("stopping: finishing what was accepted");
    })
}
