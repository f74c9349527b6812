//! `/api/keys`, `/api/key/{key_id}` and `/api/audit`: keys made, listed and revoked over HTTP, and what the log of
//! changes keeps.

use pisync::store::Scope;
use serde_json::{Value, json};

use crate::support::events::{at, now};
use crate::support::http::{column, event, keys, with};
use crate::support::locked_server::{LockedServer, forbidden, unauthorized};
use crate::support::store::key_request;

both_stores!(admins_make_list_and_revoke_keys, pages_of_keys, changes_are_in_the_audit_log);

async fn admins_make_list_and_revoke_keys(server: &LockedServer) {
    let admin = server.admin().await;
    let key_request =
        json!({"scope": "ingest", "device_id": "pi-1", "name": "Ω", "expires_at": at(60)});
    let answer = admin.post("/api/keys", &key_request).await;
    assert_eq!(answer.header("cache-control"), "no-store");
    let made = answer.data(201);
    assert_eq!(keys(&made), ["id", "key"]);
    let key = made["key"].as_str().unwrap();
    // At once.
    let client = server.0.with_key(key);
    client.report(&event("pi-1")).await.data(201);
    forbidden(&client.report(&event("pi-2")).await, "for other devices");

    let answer = admin.get("/api/keys").await;
    assert!(!answer.text().contains(key));
    let listed = answer.data(200);
    assert_eq!(
        listed["pagination"],
        json!({"limit": 50, "offset": 0, "total": 2, "total_keys": 2, "next_cursor": null})
    );
    let expected = json!({
        "id": 2, "hint": key[..8], "name": "Ω", "scope": "ingest", "device_id": "pi-1", "group": null,
        "created_at": now(), "expires_at": at(60), "revoked_at": null, "last_used": null,
    });
    // The use may not be noted yet; that it will be, and how, is tested by itself.
    let mut listed = listed["keys"][1].clone();
    let last_used = listed["last_used"].take();
    assert!(last_used.is_null() || last_used == json!(now()), "{last_used}");
    assert_eq!(listed, expected);
    let second = admin.get("/api/keys?limit=1&offset=1").await.data(200);
    assert_eq!(second["keys"].as_array().unwrap().len(), 1);
    assert_eq!(second["keys"][0]["id"], 2);

    for _ in 0..2 {
        assert_eq!(admin.delete("/api/key/2").await.data(200), json!({"id": 2}));
        unauthorized(&client.report(&event("pi-1")).await, "This key was revoked");
    }
    assert_eq!(
        admin.get("/api/keys?offset=1").await.data(200)["keys"][0]["revoked_at"],
        json!(now())
    );
    assert_eq!(admin.delete("/api/key/99").await.error(404), "Key not found");
    for wrong in ["0", "-1", "x", "1e3", "%00"] {
        let complaints = admin.delete(&format!("/api/key/{wrong}")).await.complaints();
        assert_eq!(complaints, ["\"key_id\" must be a positive number"], "{wrong}");
    }
    for (wrong, complaints) in [
        (json!({}), &["\"scope\" is required"][..]),
        (json!({"scope": null}), &["\"scope\" must be a string"]),
        (json!({"scope": "root"}), &["\"scope\" must be one of [ingest, read, operate, admin]"]),
        (
            json!({"scope": "read", "device_id": "pi"}),
            &["\"device_id\" is only for keys of the scope ingest"],
        ),
        (
            json!({"scope": "ingest", "device_id": "pi", "group": "g"}),
            &["\"group\" cannot stand beside \"device_id\""],
        ),
        (json!({"scope": "read", "expires_at": at(0)}), &["\"expires_at\" must be in the future"]),
        (
            json!({"scope": 1, "name": "", "expires_at": "soon", "expires": "90d"}),
            &[
                "\"scope\" must be a string",
                "\"name\" is not allowed to be empty",
                "\"expires_at\" must be in ISO 8601 date format",
                "\"expires\" is not allowed",
            ],
        ),
        (
            json!({"scope": "all", "device_id": "pi", "group": "g", "expires_at": at(0)}),
            &[
                "\"scope\" must be one of [ingest, read, operate, admin]",
                "\"group\" cannot stand beside \"device_id\"",
                "\"expires_at\" must be in the future",
            ],
        ),
        (
            json!({"scope": "read", "device_id": "pi", "group": "g", "expires_at": at(0)}),
            &[
                "\"device_id\" is only for keys of the scope ingest",
                "\"group\" is only for keys of the scope ingest",
                "\"group\" cannot stand beside \"device_id\"",
                "\"expires_at\" must be in the future",
            ],
        ),
        (json!([]), &["\"value\" must be of type object"]),
    ] {
        assert_eq!(admin.post("/api/keys", &wrong).await.complaints(), complaints, "{wrong}");
    }
    assert_eq!(admin.get("/api/keys").await.data(200)["pagination"]["total_keys"], 2);
}

async fn pages_of_keys(server: &LockedServer) {
    let admin = server.admin().await;
    for _ in 0..4 {
        server.key(key_request(Scope::Read)).await;
    }
    let (mut ids, mut cursor) = (Vec::new(), String::new());
    loop {
        let page = admin.get(&format!("/api/keys?limit=2{cursor}")).await.data(200);
        ids.extend(column(&page["keys"], "id"));
        let pagination = &page["pagination"];
        assert_eq!((&pagination["total"], &pagination["total_keys"]), (&json!(5), &json!(5)));
        let Some(next) = pagination["next_cursor"].as_str() else { break };
        cursor = format!("&cursor={next}");
    }
    assert_eq!(json!(ids), json!([1, 2, 3, 4, 5]));
    for (query, complaint) in [
        ("cursor=x", "\"cursor\" must be a next_cursor of this list"),
        ("cursor=0", "\"cursor\" must be a next_cursor of this list"),
        ("curser=1", "\"curser\" is not allowed"),
    ] {
        let complaints = admin.get(&format!("/api/keys?{query}")).await.complaints();
        assert_eq!(complaints, [complaint], "{query}");
    }
}

async fn changes_are_in_the_audit_log(server: &LockedServer) {
    let admin = server.admin().await;
    admin.report(&event("pi")).await.data(201);
    server.0.clock.set(at(1));
    let change = json!({"name": "Library", "group": null});
    admin.patch("/api/device/pi", &change).await.data(200);
    let made = admin.post("/api/keys", &json!({"scope": "read", "name": "n"})).await.data(201);
    admin.delete("/api/key/2").await.data(200);
    // What changes nothing leaves nothing.
    admin.delete("/api/key/2").await.data(200);
    admin.delete("/api/device/nobody").await.error(404);
    admin.patch("/api/device/nobody", &json!({})).await.error(404);
    admin.delete("/api/device/pi").await.data(200);
    let answer = admin.get("/api/audit").await;
    assert!(!answer.text().contains(made["key"].as_str().unwrap()));
    let log = answer.data(200);
    assert_eq!(log["next_before"], Value::Null);
    let by_key = json!({"at": at(1), "via": "key", "key_id": 1, "address": "127.0.0.1"});
    let hint = &made["key"].as_str().unwrap()[..8];
    let expected = [
        json!({"action": "device.delete", "subject": "pi", "details": {"deleted_events": 1}}),
        json!({"action": "key.revoke", "subject": "2", "details": {}}),
        json!({"action": "key.create", "subject": "2", "details": {
            "hint": hint, "name": "n", "scope": "read", "device_id": null, "group": null, "expires_at": null,
        }}),
        json!({"action": "device.update", "subject": "pi", "details": change}),
    ];
    let entries = log["entries"].as_array().unwrap();
    assert_eq!(entries.len(), 5, "{log}");
    for (entry, expected) in entries.iter().zip(&expected) {
        let expected = with(with(expected.clone(), &by_key), &json!({"id": entry["id"]}));
        assert_eq!(*entry, expected);
    }
    let first = &entries[4];
    assert_eq!(first["action"], "key.create");
    assert_eq!(first["via"], "command line");
    assert_eq!((&first["key_id"], &first["address"]), (&Value::Null, &Value::Null));
    // Page by page.
    let mut paged = Vec::new();
    let mut rest = String::new();
    loop {
        let page = admin.get(&format!("/api/audit?limit=2{rest}")).await.data(200);
        paged.extend(page["entries"].as_array().unwrap().clone());
        let pagination = &page["pagination"];
        assert_eq!((&pagination["limit"], &pagination["offset"]), (&json!(2), &json!(0)));
        assert_eq!(pagination["total"], 5);
        let Some(next) = page["next_before"].as_i64() else {
            assert_eq!(pagination["next_cursor"], Value::Null);
            break;
        };
        assert_eq!(pagination["next_cursor"], next.to_string());
        // Both names say the same.
        let name = if paged.len() == 2 { "before" } else { "cursor" };
        rest = format!("&{name}={next}");
    }
    assert_eq!(&paged, entries);
    // The last page is full, and yet the last.
    let page = admin.get("/api/audit?limit=5").await.data(200);
    assert_eq!(page["next_before"], Value::Null);
}
