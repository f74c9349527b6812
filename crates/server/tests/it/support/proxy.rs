//! A way to PostgreSQL that breaks at the worst moment: while a transaction is being committed.

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    task::JoinHandle,
    time::Instant,
};
use tokio_postgres::Config;

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Nothing.
    None,
    /// The next commit does not reach the server: both connections are dropped instead.
    LoseCommit,
    /// The next commit is carried out, but its answer does not come back: both connections are
    /// dropped once the server has answered.
    LoseAnswer,
    /// The next commit reaches the server, and so does what comes behind it for a moment. Then the client's
    /// connection is dropped, of which the server hears nothing: it goes on with what it has.
    Strand,
    /// No new connection is passed on.
    Refuse,
}

/// The simple query `commit`, as it goes over the wire: a type, its length, the text, a NUL.
const COMMIT: &[u8] = b"Q\0\0\0\x0bcommit\0";

/// `ReadyForQuery`, outside of a transaction.
const READY: &[u8] = b"Z\0\0\0\x05I";

/// How long what comes behind a commit that is stranded is still passed on.
const STRANDED_AFTER: Duration = Duration::from_millis(200);

/// Parameters of the statement that stores a whole batch and commits it, at least; no other has as many.
const BATCH_PARAMETERS: usize = 28;

/// Whether this asks for a commit. The writer waits for all other answers before, but for those to batches that
/// it has sent, so it comes first.
fn commits(asked: &[u8]) -> bool {
    asked.ends_with(COMMIT)
        || parameters_bound(asked).is_some_and(|count| count >= BATCH_PARAMETERS)
}

/// How many parameters the first message binds, if it is a `Bind`: a type, its length, the names of portal and
/// statement, the formats, the parameters.
fn parameters_bound(asked: &[u8]) -> Option<usize> {
    let mut names = asked.strip_prefix(b"B")?.get(4..)?.splitn(3, |byte| *byte == 0);
    let rest = names.nth(2)?;
    let number =
        |at: usize| Some(usize::from(u16::from_be_bytes([*rest.get(at)?, *rest.get(at + 1)?])));
    number(2 + 2 * number(0)?)
}

/// Listens until it is dropped.
pub(crate) struct Proxy {
    address: SocketAddr,
    fault: Arc<Mutex<Fault>>,
    task: JoinHandle<()>,
}

impl Proxy {
    /// Listens before the server at `port`.
    pub(crate) async fn before(port: u16) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let fault = Arc::new(Mutex::new(Fault::None));
        let task = tokio::spawn(listen(listener, port, Arc::clone(&fault)));
        Self { address, fault, task }
    }

    /// The same database, through here.
    pub(crate) fn config(&self, direct: &Config) -> Config {
        let mut config = Config::new();
        config
            .host("127.0.0.1")
            .port(self.address.port())
            .user(direct.get_user().unwrap())
            .dbname(direct.get_dbname().unwrap());
        config
    }

    /// From now on. The faults of a commit happen once.
    pub(crate) fn set(&self, fault: Fault) {
        *self.fault.lock().unwrap_or_else(PoisonError::into_inner) = fault;
    }

    /// What has not happened yet.
    pub(crate) fn fault(&self) -> Fault {
        *self.fault.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn listen(listener: TcpListener, port: u16, fault: Arc<Mutex<Fault>>) {
    loop {
        let (client, _) = listener.accept().await.unwrap();
        if *fault.lock().unwrap_or_else(PoisonError::into_inner) == Fault::Refuse {
            continue;
        }
        let server = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.unwrap();
        tokio::spawn(relay(client.into_split(), server.into_split(), Arc::clone(&fault)));
    }
}

/// Passes on what comes from either side until one hangs up. Returning drops both connections.
async fn relay(
    (mut from_client, mut to_client): (OwnedReadHalf, OwnedWriteHalf),
    (mut from_server, mut to_server): (OwnedReadHalf, OwnedWriteHalf),
    fault: Arc<Mutex<Fault>>,
) {
    let (mut asked, mut answered) = (vec![0; 64 * 1024], vec![0; 64 * 1024]);
    let mut loses_answer = false;
    let mut strands = None;
    loop {
        let passed_on = tokio::select! {
            () = async { tokio::time::sleep_until(strands.unwrap()).await }, if strands.is_some() => {
                drop((from_client, to_client));
                let _server = (from_server, to_server);
                return std::future::pending().await;
            }
            read = from_client.read(&mut asked) => {
                let Ok(length @ 1..) = read else { return };
                if commits(&asked[..length]) {
                    let mut fault = fault.lock().unwrap_or_else(PoisonError::into_inner);
                    match *fault {
                        Fault::LoseCommit => {
                            *fault = Fault::None;
                            return;
                        }
                        Fault::LoseAnswer => {
                            *fault = Fault::None;
                            loses_answer = true;
                        }
                        Fault::Strand => {
                            *fault = Fault::None;
                            strands = Some(Instant::now() + STRANDED_AFTER);
                        }
                        Fault::None | Fault::Refuse => {}
                    }
                }
                to_server.write_all(&asked[..length]).await
            }
            read = from_server.read(&mut answered) => {
                let Ok(length @ 1..) = read else { return };
                if loses_answer {
                    if answered[..length].ends_with(READY) {
                        return;
                    }
                    continue;
                }
                to_client.write_all(&answered[..length]).await
            }
        };
        if passed_on.is_err() {
            return;
        }
    }
}
