//! A server that asks everybody for a key, and what it answers who has none.

use std::time::Instant;

use pisync::{
    config::http::AuthMode,
    keys::{KeyRequest, REFRESH_INTERVAL},
    store::Scope,
};
use tokio::time::sleep;

use super::{
    events::somebody,
    http::{Answer, Client},
    server::TestServer,
    store::{Fixture, TestDatabase, key_request},
};

/// A server that asks everybody for a key.
pub(crate) struct LockedServer(pub(crate) TestServer);

impl Fixture for LockedServer {
    async fn prepare(database: TestDatabase) -> Self {
        Self(locked(database).await)
    }

    fn into_database(self) -> TestDatabase {
        self.0.into_database()
    }
}

pub(crate) async fn locked(database: TestDatabase) -> TestServer {
    TestServer::start_with(database, |settings| settings.http.auth = AuthMode::Required).await
}

impl LockedServer {
    /// A key that is made beside the server.
    pub(crate) async fn key(&self, key_request: KeyRequest) -> (i64, Client) {
        let made = self.0.database.make_key(key_request).await;
        (made.0, self.0.with_key(&made.1))
    }

    pub(crate) async fn admin(&self) -> Client {
        self.key(key_request(Scope::Admin)).await.1
    }

    /// Revokes a key behind the server's back, as another server does.
    pub(crate) async fn revoke_elsewhere(&self, id: i64) {
        let store = pisync::store::open(&self.0.database.target).await.unwrap();
        store.revoke_key(id, &somebody()).await.unwrap();
    }
}

/// Waits for a condition that must come true soon.
pub(crate) async fn until(condition: impl AsyncFn() -> bool) {
    let began = Instant::now();
    while !condition().await {
        assert!(began.elapsed().as_secs() < 30, "it does not come true");
        sleep(REFRESH_INTERVAL / 20).await;
    }
}

/// Asserts that a request was refused for want of a key, and why.
#[track_caller]
pub(crate) fn unauthorized(answer: &Answer, error: &str) {
    let said = answer.error(401);
    assert!(said.contains(error), "{said}");
    // As every answer.
    assert_eq!(answer.header("x-content-type-options"), "nosniff");
    assert!(answer.header("content-security-policy").starts_with("default-src 'none';"));
    let challenge = answer.header("www-authenticate");
    assert!(challenge.starts_with("Bearer realm=\"pisync\""), "{challenge}");
}

#[track_caller]
pub(crate) fn forbidden(answer: &Answer, error: &str) {
    let said = answer.error(403);
    assert!(said.contains(error), "{said}");
    assert!(answer.header("www-authenticate").contains("insufficient_scope"));
}
