//! Tells the program when and what it was built from: no clock that is right shows an earlier time, and `pisync --version`
//! names the commit. Builds that are to come out the same twice set `SOURCE_DATE_EPOCH`, as
//! <https://reproducible-builds.org/specs/source-date-epoch/> has it. A build without git, from a source archive, names the
//! commit that `PISYNC_COMMIT` is set to, or none.

use std::{
    path::Path,
    process::Command,
    time::{SystemTime, UNIX_EPOCH},
};

/// Digits of a commit that are shown.
const DIGITS: &str = "--short=9";

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    for variable in ["SOURCE_DATE_EPOCH", "PISYNC_COMMIT"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    let given = std::env::var("SOURCE_DATE_EPOCH").ok();
    let seconds = given.and_then(|seconds| seconds.parse().ok()).unwrap_or_else(now);
    println!("cargo::rustc-env=PISYNC_BUILD_SECONDS={seconds}");
    println!("cargo::rustc-env=PISYNC_RUSTC={}", compiler().unwrap_or_else(|| "unknown".into()));
    let given = std::env::var("PISYNC_COMMIT").ok().filter(|commit| !commit.is_empty());
    let commit = given.or_else(commit);
    let package = env!("CARGO_PKG_VERSION");
    let version = match &commit {
        Some(commit) => format!("{package} ({commit})"),
        None => package.to_owned(),
    };
    println!("cargo::rustc-env=PISYNC_VERSION={version}");
    println!("cargo::rustc-env=PISYNC_COMMIT={}", commit.as_deref().unwrap_or("unknown"));
}

/// Seconds since 1970.
fn now() -> u64 {
    #[expect(clippy::disallowed_methods, reason = "there is no Clock while the program is built")]
    let now = SystemTime::now();
    now.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// The compiler's version, such as 1.89.0.
fn compiler() -> Option<String> {
    let output = Command::new(std::env::var_os("RUSTC")?).arg("--version").output().ok()?;
    let said = String::from_utf8(output.stdout).ok()?;
    said.split_whitespace().nth(1).map(str::to_owned)
}

/// The commit that is checked out; `None` without git, or when these files are not those of a repository of their own.
fn commit() -> Option<String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().ok()?;
    // A source archive may be unpacked somewhere in another repository.
    let top = git(&["rev-parse", "--show-toplevel"])?;
    if Path::new(&top).canonicalize().ok()? != root {
        return None;
    }
    let commit = git(&["rev-parse", DIGITS, "HEAD"])?;
    // What changes with a commit or a checkout. A path that is not there would build the program anew each time.
    let branch = git(&["symbolic-ref", "--quiet", "HEAD"]);
    let names = [Some("HEAD"), Some("logs/HEAD"), Some("packed-refs"), branch.as_deref()];
    for name in names.into_iter().flatten() {
        let Some(path) = git(&["rev-parse", "--git-path", name]) else { continue };
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
        if path.exists() {
            println!("cargo::rerun-if-changed={}", path.display());
        }
    }
    Some(commit)
}

/// What git answers in this folder, whatever repository a hook that builds has set.
fn git(arguments: &[&str]) -> Option<String> {
    let mut command = Command::new("git");
    command.args(arguments).current_dir(env!("CARGO_MANIFEST_DIR"));
    for variable in ["GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"] {
        command.env_remove(variable);
    }
    let output = command.output().ok().filter(|output| output.status.success())?;
    let said = String::from_utf8(output.stdout).ok()?;
    Some(said.trim().to_owned()).filter(|said| !said.is_empty())
}
