//! Tells the program when it was built: no clock that is right shows an earlier time. Builds that are to come out
//! the same twice set `SOURCE_DATE_EPOCH`, as <https://reproducible-builds.org/specs/source-date-epoch/> has it.

use std::time::{SystemTime, UNIX_EPOCH};

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=SOURCE_DATE_EPOCH");
    let given = std::env::var("SOURCE_DATE_EPOCH").ok();
    let seconds = given.and_then(|seconds| seconds.parse().ok()).unwrap_or_else(now);
    println!("cargo::rustc-env=PISYNC_BUILD_SECONDS={seconds}");
}

/// Seconds since 1970.
fn now() -> u64 {
    #[expect(clippy::disallowed_methods, reason = "there is no Clock while the program is built")]
    let now = SystemTime::now();
    now.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
