//! The one place that reads the system's randomness. `app` and the commands make a [`Randomness`] and pass
//! it on; tests pass one that they know beforehand.

use std::sync::Arc;

/// Gives 32 bytes that nobody can guess.
type Source = dyn Fn() -> Result<[u8; 32], String> + Send + Sync;

/// A source of secrets. Cheap to clone.
#[derive(Clone)]
pub struct Randomness(Arc<Source>);

impl Randomness {
    /// The operating system's.
    #[must_use]
    pub fn system() -> Self {
        Self::new(|| {
            let mut bytes = [0; 32];
            getrandom::fill(&mut bytes)
                .map_err(|error| format!("the system gives no random numbers: {error}"))?;
            Ok(bytes)
        })
    }

    /// A source of one's own.
    pub fn new(source: impl Fn() -> Result<[u8; 32], String> + Send + Sync + 'static) -> Self {
        Self(Arc::new(source))
    }

    /// 32 random bytes.
    ///
    /// # Errors
    /// When the system has none to give.
    pub fn bytes(&self) -> Result<[u8; 32], String> {
        (self.0)()
    }
}

impl std::fmt::Debug for Randomness {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("Randomness")
    }
}
