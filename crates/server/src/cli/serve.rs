//! `pisync serve`: starts the log, listens, runs `app` until a signal comes, and says how it ended. It makes nothing before the
//! settings make sense.

use std::{convert::Infallible, io::ErrorKind, net::SocketAddr};

use tokio::{
    net::{TcpListener, TcpSocket, lookup_host},
    signal::unix::{Signal, SignalKind, signal},
};

use super::{exit::Failure, settings::SettingsFile};
use crate::{
    app,
    clock::Clock,
    config::{LogLevelArgs, ServeArgs},
    logs::{self, LogGuard},
    net::Listeners,
};

/// Connections that may wait to be taken in: a whole fleet reports at the same second. The kernel
/// bounds it by net.core.somaxconn, 4,096 on Debian.
const BACKLOG: u32 = 4_096;

/// How often to look for a port that is free for every address, where `PORT=0` lets the system choose.
const FREE_PORT_ATTEMPTS: usize = 20;

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
    let listeners = listen(arguments).await?;
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

/// Listens on every address that the host name stands for, at one port.
async fn listen(arguments: &ServeArgs) -> Result<Listeners, String> {
    let (host, port) = arguments.listen().address();
    let cannot = |error: &dyn std::fmt::Display| {
        format!("cannot listen on {host}:{port}: {error}; set HOST and PORT to others")
    };
    let found = lookup_host((host, port)).await.map_err(|error| cannot(&error))?;
    // IPv4's first: the log names that one, and most people know it better.
    let mut addresses: Vec<SocketAddr> = found.collect();
    addresses.sort_by_key(|address| (address.is_ipv6(), *address));
    addresses.dedup();
    for _ in 0..FREE_PORT_ATTEMPTS {
        match bind_all(&addresses) {
            Ok(sockets) if sockets.is_empty() => return Err(cannot(&"no such host")),
            Ok(sockets) => return Ok(Listeners::new(sockets)),
            // The port that is free for one address is taken for another.
            Err(error) if port == 0 && error.kind() == ErrorKind::AddrInUse => {}
            Err(error) => return Err(cannot(&error)),
        }
    }
    Err(cannot(&"no port is free for all of its addresses"))
}

/// A socket for each address. Addresses of a kind that this machine does not have are skipped, unless there is no
/// other.
fn bind_all(addresses: &[SocketAddr]) -> std::io::Result<Vec<TcpListener>> {
    let mut sockets: Vec<TcpListener> = Vec::new();
    let mut missing = None;
    for address in addresses {
        let mut address = *address;
        if let Some(first) = sockets.first() {
            address.set_port(first.local_addr()?.port());
        }
        match bind(address) {
            Ok(socket) => sockets.push(socket),
            Err(error) if is_missing(&error) => missing = Some((address, error)),
            Err(error) => return Err(error),
        }
    }
    match missing {
        Some((_, error)) if sockets.is_empty() => Err(error),
        Some((address, error)) => {
            tracing::info!(%error, "not listening on {address}, which this machine does not have");
            Ok(sockets)
        }
        None => Ok(sockets),
    }
}

/// Whether a machine has no such address, for instance none of IPv6 at all.
fn is_missing(error: &std::io::Error) -> bool {
    error.kind() == ErrorKind::AddrNotAvailable || error.raw_os_error() == Some(libc::EAFNOSUPPORT)
}

fn bind(address: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = if address.is_ipv6() { TcpSocket::new_v6()? } else { TcpSocket::new_v4()? };
    // A restart must not wait for the last run's connections to be forgotten.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
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

#[cfg(test)]
mod tests {
    use super::*;

    fn ports(sockets: &[TcpListener]) -> Vec<u16> {
        sockets.iter().map(|socket| socket.local_addr().unwrap().port()).collect()
    }

    #[tokio::test]
    async fn one_port_at_every_address() {
        let all = ["127.0.0.1:0", "127.0.0.2:0", "127.0.0.3:0"].map(|text| text.parse().unwrap());
        let sockets = bind_all(&all).unwrap();
        let found = ports(&sockets);
        assert!(found.len() == 3 && found.iter().all(|port| *port == found[0] && *port > 0));
        // A port that is taken is no address that is missing.
        let taken =
            [SocketAddr::from(([127, 0, 0, 4], found[0])), sockets[1].local_addr().unwrap()];
        assert_eq!(bind_all(&taken).unwrap_err().kind(), ErrorKind::AddrInUse);
    }

    #[tokio::test]
    async fn addresses_that_the_machine_does_not_have_are_skipped() {
        // Reserved for documentation, and IPv6's own machine, which not every machine has.
        let [v4, v6, missing] =
            ["127.0.0.1:0", "[::1]:0", "192.0.2.1:0"].map(|text| text.parse().unwrap());
        assert_eq!(bind_all(&[v4, missing]).unwrap().len(), 1);
        assert_eq!(bind_all(&[missing, v4]).unwrap().len(), 1);
        assert!(is_missing(&bind_all(&[missing]).unwrap_err()));
        let has_v6 = std::net::TcpListener::bind(v6).is_ok();
        let found = ports(&bind_all(&[v4, v6]).unwrap());
        assert_eq!(found.len(), if has_v6 { 2 } else { 1 });
        assert_eq!(found.first(), found.last());
    }
}
