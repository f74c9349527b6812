//! The real program, run as a user runs it: a process in a folder of its own, with its arguments and
//! environment and nothing else.

use std::{
    ffi::OsString,
    io::{BufRead, BufReader, Read, Write as _},
    net::SocketAddr,
    os::unix::ffi::OsStringExt,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, ExitStatus, Stdio},
    sync::mpsc::{self, Receiver},
    thread,
    time::{Duration, Instant},
};

use pisync::store::Target;
use serde_json::Value;
use tempfile::TempDir;

use super::{
    http::Client,
    small_disk::SmallDisk,
    store::{Fixture, TestDatabase},
};

/// No command may take longer, however loaded the machine is.
const PATIENCE: Duration = Duration::from_secs(60);

/// What a server says once it can be reached.
const READY: &str = "PiSync is ready on http";

/// Goes with its folder.
pub(crate) struct Program {
    folder: TempDir,
    environment: Vec<(String, OsString)>,
    /// What the command line begins with.
    entrance: Vec<String>,
    /// The program, when it is not the one that is tested.
    binary: Option<String>,
}

impl Program {
    pub(crate) fn new() -> Self {
        let folder = tempfile::Builder::new().prefix("pisync-program-").tempdir().unwrap();
        Self { folder, environment: Vec::new(), entrance: Vec::new(), binary: None }
    }

    /// With another environment variable.
    #[expect(clippy::needless_pass_by_value, reason = "short to write down")]
    pub(crate) fn with(mut self, name: &str, value: impl ToString) -> Self {
        self.environment.push((name.to_owned(), value.to_string().into()));
        self
    }

    /// With another environment variable, whose value need not be text.
    pub(crate) fn with_bytes(mut self, name: &str, value: &[u8]) -> Self {
        self.environment.push((name.to_owned(), OsString::from_vec(value.to_vec())));
        self
    }

    /// Another version of the program, from now on; the tested one again for `None`.
    pub(crate) fn set_binary(&mut self, path: Option<&str>) {
        self.binary = path.map(str::to_owned);
    }

    /// With sight of a small disk.
    pub(crate) fn with_small_disk(mut self, disk: &SmallDisk) -> Self {
        self.entrance = disk.entrance();
        // Who enters leaves the working directory behind.
        let folder = self.folder.path().to_str().unwrap().to_owned();
        self.entrance.extend(["env".to_owned(), "--chdir".to_owned(), folder]);
        self
    }

    /// Run by no other program any more.
    pub(crate) fn run_directly(mut self) -> Self {
        self.entrance.clear();
        self
    }

    /// Run by another program, which may change what a process starts with.
    pub(crate) fn run_by(mut self, words: &[&str]) -> Self {
        self.entrance.extend(words.iter().map(ToString::to_string));
        self
    }

    /// With a file in the working directory.
    pub(crate) fn with_file(self, name: &str, text: &str) -> Self {
        std::fs::write(self.path(name), text).unwrap();
        self
    }

    /// A path in the working directory.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The names of what is in a folder of the working directory, in order.
    pub(crate) fn names_in(&self, folder: &str) -> Vec<String> {
        names_in(&self.path(folder))
    }

    /// The lines of a log file, each of which is JSON.
    pub(crate) fn log(&self, name: &str) -> Vec<Value> {
        let text = std::fs::read_to_string(self.path("logs").join(name)).unwrap();
        text.lines().map(|line| serde_json::from_str(line).expect(line)).collect()
    }

    /// Starts a command that goes on beside the test.
    pub(crate) fn start(&self, arguments: &[&str]) -> Running {
        self.start_reading(arguments, Stdio::null())
    }

    fn start_reading(&self, arguments: &[&str], input: Stdio) -> Running {
        let entrance = self.entrance.iter().map(String::as_str);
        let program = self.binary.as_deref().unwrap_or(env!("CARGO_BIN_EXE_pisync"));
        self.spawn(entrance.chain([program]).chain(arguments.iter().copied()), input)
    }

    fn spawn<'a>(&self, mut words: impl Iterator<Item = &'a str>, input: Stdio) -> Running {
        let mut child = Command::new(words.next().unwrap_or_default())
            .args(words)
            .current_dir(self.folder.path())
            .env_clear()
            .envs(std::env::var_os("PATH").map(|path| ("PATH", path)))
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .stdin(input)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let stdout = lines_of(child.stdout.take().unwrap());
        let stderr = lines_of(child.stderr.take().unwrap());
        Running { child, stdout, stderr, said: String::new() }
    }

    /// Runs a command that ends by itself.
    pub(crate) fn run(&self, arguments: &[&str]) -> Ended {
        self.start(arguments).wait()
    }

    /// Runs a line in a shell, as somebody does who has copied it.
    pub(crate) fn shell(&self, line: &str) -> Ended {
        self.spawn(["sh", "-c", line].into_iter(), Stdio::null()).wait()
    }

    /// Runs a command that reads a file of the working directory as its standard input.
    pub(crate) fn run_reading(&self, arguments: &[&str], name: &str) -> Ended {
        let file = std::fs::File::open(self.path(name)).unwrap();
        self.start_reading(arguments, file.into()).wait()
    }

    /// Starts a command that reads from its standard input what it is fed.
    pub(crate) fn run_fed(&self, arguments: &[&str]) -> Fed {
        let mut running = self.start_reading(arguments, Stdio::piped());
        let input = running.child.stdin.take().unwrap();
        Fed { running, input }
    }

    /// Starts a command and kills it as soon as `enough` says so, or it ends before.
    pub(crate) async fn run_until(
        &self,
        arguments: &[&str],
        mut enough: impl AsyncFnMut() -> bool,
    ) -> Ended {
        let mut running = self.start(arguments);
        while running.child.try_wait().unwrap().is_none() {
            if enough().await {
                // It may have ended by itself.
                let _ = running.child.kill();
                break;
            }
        }
        running.wait()
    }

    /// Starts a command and sends it a signal as soon as `enough` says so, or it ends before.
    pub(crate) async fn signal_at(
        &self,
        arguments: &[&str],
        input: impl Into<Stdio>,
        name: &str,
        mut enough: impl AsyncFnMut() -> bool,
    ) -> Waiting {
        let mut running = self.start_reading(arguments, input.into());
        while running.child.try_wait().unwrap().is_none() {
            if enough().await {
                running.signal(name);
                break;
            }
        }
        Waiting(running)
    }

    /// Starts a command, and kills it as soon as it says something with this in it.
    pub(crate) fn kill_at(&self, arguments: &[&str], text: &str) {
        self.start(arguments).wait_for(text);
    }

    /// Starts a server and returns when it is ready.
    pub(crate) fn serve(&self, arguments: &[&str]) -> Serving {
        let mut running = self.start(arguments);
        let ready = running.wait_for(READY);
        Self::serving(running, &ready)
    }

    /// Starts a server, again and again while another command holds the database's lock for a moment, as a
    /// supervisor does.
    pub(crate) fn serve_as_supervised(&self) -> Serving {
        let until = Instant::now() + PATIENCE;
        loop {
            let mut running = self.start(&["serve"]);
            match running.try_wait_for(READY) {
                Some(ready) => return Self::serving(running, &ready),
                None => {
                    let ended = running.wait();
                    let is_locked = ended.stderr.contains("is in use by a running PiSync");
                    assert!(is_locked && Instant::now() < until, "{ended:?}");
                }
            }
        }
    }

    fn serving(running: Running, ready: &str) -> Serving {
        let address = ready.split("://").nth(1).unwrap();
        let address = address.split(';').next().unwrap().parse().expect(ready);
        Serving { running, client: Client::new(address) }
    }
}

fn names_in(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    let mut names: Vec<_> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Reads lines as they come, so that the program never waits for its reader.
#[expect(clippy::disallowed_methods, reason = "it ends with the program")]
fn lines_of(output: impl Read + Send + 'static) -> Receiver<String> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        for line in BufReader::new(output).lines() {
            // Nobody listens any more when the test has ended.
            let Ok(()) = sender.send(line.unwrap()) else { return };
        }
    });
    receiver
}

/// Leaves out what a command says of the shared PostgreSQL server, whose data nobody misses and which does not write
/// durably. `postgres_outcomes` looks at these warnings.
pub(crate) fn without_expected_warnings(stderr: &str) -> String {
    const EXPECTED: [&str; 2] =
        ["warning: commits were not durable", "warning: PostgreSQL does not write durably"];
    let is_expected = |line: &&str| EXPECTED.iter().any(|expected| line.contains(expected));
    stderr.split_inclusive('\n').filter(|line| !is_expected(line)).collect()
}

/// A process, which ends with its owner.
pub(crate) struct Running {
    child: Child,
    stdout: Receiver<String>,
    stderr: Receiver<String>,
    /// What was taken from stdout already.
    said: String,
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Running {
    /// Sends a signal. It may have ended by itself: until it is waited for, its number is nobody else's.
    fn signal(&self, name: &str) {
        let pid = self.child.id().to_string();
        let status = Command::new("kill").args(["-s", name, &pid]).status().unwrap();
        assert!(status.success());
    }

    /// The next line on stdout with this in it.
    pub(crate) fn wait_for(&mut self, text: &str) -> String {
        self.try_wait_for(text).unwrap_or_else(|| {
            let errors: Vec<_> = self.stderr.try_iter().collect();
            panic!("{text:?} does not come; it said:\n{}\n{}", self.said, errors.join("\n"));
        })
    }

    /// The next line on stdout with this in it; `None` when the process ends before, or takes too long.
    fn try_wait_for(&mut self, text: &str) -> Option<String> {
        let until = Instant::now() + PATIENCE;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let line = self.stdout.recv_timeout(left).ok()?;
            self.said += &line;
            self.said.push('\n');
            if line.contains(text) {
                return Some(line);
            }
        }
    }

    /// Whether it has a file open whose path ends so.
    pub(crate) fn has_open(&self, ending: &str) -> bool {
        let files = std::fs::read_dir(format!("/proc/{}/fd", self.child.id()));
        let links = files.into_iter().flatten().flatten();
        let paths = links.filter_map(|link| std::fs::read_link(link.path()).ok());
        paths.into_iter().any(|path| path.to_string_lossy().ends_with(ending))
    }

    pub(crate) fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    pub(crate) fn kill(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
    }

    pub(crate) fn wait(mut self) -> Ended {
        let until = Instant::now() + PATIENCE;
        // The output ends with the process.
        let rest = |lines: &Receiver<String>| {
            let mut text = String::new();
            loop {
                match lines.recv_timeout(until.saturating_duration_since(Instant::now())) {
                    Ok(line) => text = text + &line + "\n",
                    Err(mpsc::RecvTimeoutError::Disconnected) => return text,
                    Err(mpsc::RecvTimeoutError::Timeout) => {
                        panic!("it does not end; it said:\n{text}")
                    }
                }
            }
        };
        let stderr = without_expected_warnings(&rest(&self.stderr));
        let stdout = std::mem::take(&mut self.said) + &rest(&self.stdout);
        Ended { status: self.child.wait().unwrap(), stdout, stderr }
    }
}

/// A process that is fed through its standard input.
pub(crate) struct Fed {
    running: Running,
    input: ChildStdin,
}

impl Fed {
    pub(crate) fn feed(&mut self, text: &str) {
        self.input.write_all(text.as_bytes()).unwrap();
        self.input.flush().unwrap();
    }

    /// Closes its standard input and waits for its end.
    pub(crate) fn finish(self) -> Ended {
        drop(self.input);
        self.running.wait()
    }
}

/// A process that was sent a signal.
pub(crate) struct Waiting(Running);

impl Waiting {
    pub(crate) fn is_running(&mut self) -> bool {
        self.0.child.try_wait().unwrap().is_none()
    }

    /// Waits for its end.
    pub(crate) fn wait(self) -> Ended {
        self.0.wait()
    }
}

/// A server that runs as a process, and a client of it.
pub(crate) struct Serving {
    running: Running,
    pub(crate) client: Client,
}

impl Serving {
    pub(crate) fn address(&self) -> SocketAddr {
        self.client.address()
    }

    /// The number of its process.
    pub(crate) fn process(&self) -> u32 {
        self.running.child.id()
    }

    /// Sends a signal, as supervisors and terminals do.
    pub(crate) fn signal(&self, name: &str) {
        self.running.signal(name);
    }

    /// Waits until it says something with this in it.
    pub(crate) fn wait_for(&mut self, text: &str) -> String {
        self.running.wait_for(text)
    }

    /// The memory that it takes, in bytes.
    pub(crate) fn memory(&self) -> usize {
        let status = format!("/proc/{}/status", self.running.child.id());
        let status = std::fs::read_to_string(status).unwrap();
        let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        resident.trim().trim_end_matches(" kB").parse::<usize>().unwrap() << 10
    }

    /// Waits for its end.
    pub(crate) fn wait(self) -> Ended {
        self.running.wait()
    }

    /// Stops it the way a supervisor does; it must end well.
    #[track_caller]
    pub(crate) fn stop(self) -> Ended {
        self.signal("TERM");
        let ended = self.wait();
        assert_eq!(ended.code(), 0, "{ended:?}");
        ended
    }
}

/// What a process said, and how it ended.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Ended {
    #[track_caller]
    pub(crate) fn code(&self) -> i32 {
        self.status.code().expect("an exit code")
    }

    /// What a command said that ended well.
    #[track_caller]
    pub(crate) fn success(&self) -> &str {
        assert_eq!((self.code(), self.stderr.as_str()), (0, ""), "{self:?}");
        &self.stdout
    }

    /// The key that `key create` has made, which stands alone on standard output.
    #[track_caller]
    pub(crate) fn made_key(&self) -> &str {
        assert!(self.code() == 0 && self.stderr.starts_with("made key "), "{self:?}");
        assert!(self.stderr.ends_with("; it is shown this once:\n"), "{self:?}");
        let key = self.stdout.strip_suffix('\n').expect("a line");
        assert!(key.starts_with("psk_") && key.len() == 53 && !key.contains('\n'), "{self:?}");
        key
    }

    /// The one document that a command with `--json` has written.
    #[track_caller]
    pub(crate) fn document(&self) -> Value {
        assert_eq!(self.stdout.lines().count(), 1, "{self:?}");
        serde_json::from_str(&self.stdout).expect("a document")
    }

    /// The one line with which a command failed.
    #[track_caller]
    pub(crate) fn failure(&self) -> &str {
        self.only_line(1)
    }

    /// The one line that says which setting, or which word, makes no sense.
    #[track_caller]
    pub(crate) fn wrong_usage(&self) -> &str {
        self.only_line(2)
    }

    /// The one line with which a command ended that could not answer its question.
    #[track_caller]
    pub(crate) fn unanswered(&self) -> &str {
        self.only_line(4)
    }

    /// The one line with which any command refuses to work on a database: those that answer a question end with 4,
    /// others with 1.
    #[track_caller]
    pub(crate) fn refusal(&self) -> &str {
        self.only_line(if self.code() == 4 { 4 } else { 1 })
    }

    #[track_caller]
    fn only_line(&self, code: i32) -> &str {
        assert_eq!(self.code(), code, "{self:?}");
        assert_eq!(self.stderr.lines().count(), 1, "{self:?}");
        self.stderr.trim_end().strip_prefix("pisync: ").expect("the program's name")
    }
}

/// A program, and a database that it is told of.
pub(crate) struct Installed {
    pub(crate) program: Program,
    pub(crate) database: TestDatabase,
}

impl Fixture for Installed {
    async fn prepare(database: TestDatabase) -> Self {
        let program = Program::new()
            .with("DATABASE_URL", url(&database.target))
            .with("PORT", 0)
            .with("RATE_LIMIT_SYNC_PER_MINUTE", 0)
            .with("RATE_LIMIT_API_PER_MINUTE", 0);
        Self { program, database }
    }

    fn into_database(self) -> TestDatabase {
        self.database
    }
}

impl Installed {
    pub(crate) fn is_postgres(&self) -> bool {
        matches!(self.database.target, Target::Postgres(_))
    }
}

/// Every variable that a server reads, but for the Node service's name of one.
pub(crate) fn settings_of_a_server() -> Vec<String> {
    let settings = pisync::cli::reference::settings().into_iter();
    let read = settings.filter(|setting| setting.commands.iter().any(|command| command == "serve"));
    read.map(|setting| setting.variable).filter(|name| name != "NODE_ENV").collect()
}

/// The database as `DATABASE_URL` names it.
pub(crate) fn url(target: &Target) -> String {
    match target {
        Target::Sqlite(path) => format!("sqlite:{}", path.display()),
        Target::Postgres(target) => {
            let config = &target.config;
            let (port, name) = (config.get_ports()[0], config.get_dbname().unwrap());
            format!("postgres://{}@127.0.0.1:{port}/{name}", config.get_user().unwrap())
        }
    }
}
