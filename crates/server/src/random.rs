//! The only place that reads the system's randomness. `app` and the commands create a [`Randomness`] and pass it on.
//! Tests pass one with known bytes.

use std::sync::Arc;

/// Returns 32 bytes that nobody can guess.
type Source = dyn Fn() -> Result<[u8; 32], String> + Send + Sync;

/// A source of secrets. Cheap to clone.
#[derive(Clone)]
pub struct Randomness(Arc<Source>);

impl Randomness {
    /// The operating system's source.
    #[must_use]
    pub fn system() -> Self {
        Self::new(|| {
            let mut bytes = [0; 32];
            getrandom::fill(&mut bytes)
                .map_err(|error| format!("the system gives no random numbers: {error}"))?;
            Ok(bytes)
        })
    }

    /// A custom source.
    pub fn new(source: impl Fn() -> Result<[u8; 32], String> + Send + Sync + 'static) -> Self {
        Self(Arc::new(source))
    }

    /// 32 random bytes.
    ///
    /// # Errors
    /// When the source fails.
    pub fn bytes(&self) -> Result<[u8; 32], String> {
        (self.0)()
    }
}

impl std::fmt::Debug for Randomness {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("Randomness")
    }
}
