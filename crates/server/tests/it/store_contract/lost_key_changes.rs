//! Changes of keys that the database no longer knows of: a standby took over without them, or a file from before was
//! put back. What a server knows must come to be what the database says, whatever is changed next.

use pisync::{
    keys::{self, Keyring},
    store::Scope,
};

use crate::support::{
    events::somebody,
    store::{TestStore, key_request},
};

both_stores!(a_server_never_takes_other_keys_for_the_same, servers_of_before_take_over_changes);

/// What a standby has of keys and their version.
const REPLICATE: &str = "
    create table standby_keys as select id, revoked_at from api_keys;
    create table standby_version as select version from api_key_changes;
";

/// The standby takes over.
const FAIL_OVER: &str = "
    update api_keys
       set revoked_at = (select s.revoked_at from standby_keys s where s.id = api_keys.id);
    delete from api_key_changes;
    insert into api_key_changes select version from standby_version;
    drop table standby_keys;
    drop table standby_version;
";

async fn a_server_never_takes_other_keys_for_the_same(fixture: &TestStore) {
    let store = &*fixture.store;
    // So many changes are lost, and so many are made before the server looks again.
    for (lost, made) in [(1, 1), (2, 2), (3, 1), (1, 3)] {
        let mut secrets = Vec::new();
        for _ in 0..lost + made {
            secrets.push(fixture.database.make_key(key_request(Scope::Read)).await);
        }
        let keyring = Keyring::default();
        keyring.refresh(store).await.unwrap();
        let opens = |(_, secret): &(i64, String)| {
            !keyring.find(&keys::hash(secret.as_bytes())).unwrap().is_revoked()
        };
        fixture.database.execute(REPLICATE).await;
        for (id, _) in &secrets[..lost] {
            store.revoke_key(*id, &somebody()).await.unwrap();
        }
        keyring.refresh(store).await.unwrap();
        assert!(!secrets[..lost].iter().any(opens));

        fixture.database.execute(FAIL_OVER).await;
        for (id, _) in &secrets[lost..] {
            store.revoke_key(*id, &somebody()).await.unwrap();
        }
        keyring.refresh(store).await.unwrap();
        // What the list says is what counts.
        let listed = store.keys().await.unwrap();
        for key in &secrets {
            let listed = listed.keys.iter().find(|listed| listed.id == key.0).unwrap();
            assert_eq!(opens(key), listed.revoked_at.is_none(), "{lost} lost, {made} made");
        }
        assert!(!secrets[lost..].iter().any(opens), "{lost} lost, {made} made");
    }
}

/// While servers are updated one after the other, one of the version before takes over a higher version only, and
/// counts it up by one.
async fn servers_of_before_take_over_changes(fixture: &TestStore) {
    let store = &*fixture.store;
    let mut before = store.keys_version().await.unwrap();
    for round in 0..6 {
        if round % 2 == 0 {
            fixture.database.execute("update api_key_changes set version = version + 1").await;
        } else {
            fixture.database.make_key(key_request(Scope::Read)).await;
        }
        let after = store.keys_version().await.unwrap();
        assert!(after > before, "{before} {after}");
        before = after;
    }
}
