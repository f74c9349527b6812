//! A pgbouncer of the test's own before a PostgreSQL server. It ends with its owner.

use std::{
    fmt::Write as _,
    net::{Ipv4Addr, TcpListener, TcpStream},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use tempfile::TempDir;

use super::postgres::is_root;

/// How long it may take to listen.
const PATIENCE: Duration = Duration::from_secs(20);

/// See the module.
pub(crate) struct PgBouncer {
    pub(crate) port: u16,
    process: Child,
    _folder: TempDir,
}

impl PgBouncer {
    /// Starts one in front of the server at `port`. `settings` are lines for its configuration, for instance
    /// `pool_mode = transaction`.
    pub(crate) fn before(server: u16, settings: &[&str]) -> Self {
        let folder = tempfile::Builder::new().prefix("pisync-pgbouncer-").tempdir().unwrap();
        let port =
            TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port();
        let mut text = format!(
            "[databases]\n* = host=127.0.0.1 port={server}\n[pgbouncer]\nlisten_addr = 127.0.0.1\n\
             listen_port = {port}\nauth_type = trust\nauth_file = {}\nunix_socket_dir =\n",
            folder.path().join("users").display()
        );
        for setting in settings {
            writeln!(text, "{setting}").unwrap();
        }
        let config = folder.path().join("pgbouncer.ini");
        std::fs::write(&config, text).unwrap();
        std::fs::write(folder.path().join("users"), "\"pisync\" \"\"\n").unwrap();
        let mut command = Command::new("pgbouncer");
        if is_root() {
            // It does not run as root.
            let status = Command::new("chown").args(["-R", "postgres"]).arg(folder.path()).status();
            assert!(status.unwrap().success());
            command = Command::new("setpriv");
            command.args(["--reuid=postgres", "--clear-groups", "pgbouncer"]);
        }
        let process = command
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("the tests need pgbouncer: run ./scripts/test, which sees to it");
        let bouncer = Self { port, process, _folder: folder };
        let until = Instant::now() + PATIENCE;
        while TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_err() {
            assert!(Instant::now() < until, "pgbouncer does not listen");
            thread::sleep(Duration::from_millis(20));
        }
        bouncer
    }
}

impl Drop for PgBouncer {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
