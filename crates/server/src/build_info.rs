//! What this program was built from, as `build.rs` has found it out. `pisync --version` and the metric `pisync_build_info`
//! show it. Nothing here is read when the program runs.

/// The version of the package.
pub(crate) const PACKAGE_VERSION: &str = env!("CARGO_PKG_VERSION");

/// The version with the commit, such as `0.1.0 (abcdef123)`; without, when the source came without git.
pub(crate) const VERSION: &str = env!("PISYNC_VERSION");

/// The first digits of the commit, or `unknown`.
pub(crate) const COMMIT: &str = env!("PISYNC_COMMIT");

/// The compiler's version.
pub(crate) const RUSTC: &str = env!("PISYNC_RUSTC");
