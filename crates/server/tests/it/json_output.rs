//! `--json`: standard output holds one document whose fields docs/operations.md names, and nothing else; what people read is
//! on standard error.

use serde_json::{Value, json};

use crate::support::{
    documents::text,
    http::{event, keys, with},
    program::{Ended, Installed, Program},
};

both_stores!(keys_as_documents, commands_on_data_as_documents);

/// The fields of a document, which must be those that the page names for the command.
#[track_caller]
pub(crate) fn documented(command: &str, ended: &Ended) -> Value {
    let document = ended.document();
    let page = text("docs/operations.md");
    let row = page.lines().find(|line| line.starts_with(&format!("| `{command}` | ")));
    let cell = row.unwrap_or_else(|| panic!("docs/operations.md has no {command}"));
    let named: Vec<_> = cell
        .split(" | ")
        .nth(1)
        .unwrap()
        .split('`')
        .skip(1)
        .step_by(2)
        .map(str::to_owned)
        .collect();
    let mut named: Vec<_> = named.iter().map(String::as_str).collect();
    named.sort_unstable();
    let mut found = keys(&document);
    found.sort_unstable();
    assert_eq!(found, named, "{command}");
    document
}

async fn keys_as_documents(installed: &Installed) {
    let Installed { program, database } = installed;
    program.run(&["db", "setup"]).success();
    assert_eq!(program.run(&["key", "list", "--json"]).document()["keys"], json!([]));
    let create = ["key", "create", "--scope", "ingest", "--device", "pi", "--name", "p", "--json"];
    let ended = program.run(&create);
    assert_eq!(
        ended.stderr,
        format!("made key 1 in {}; it is shown this once:\n", database.target)
    );
    let made = documented("key create", &ended);
    assert_eq!(made["database"], database.target.to_string());
    assert_eq!(
        (&made["id"], &made["scope"], &made["device_id"]),
        (&json!(1), &json!("ingest"), &json!("pi"))
    );
    assert!(made["key"].as_str().unwrap().starts_with("psk_"), "{made}");
    let admin = program.run(&["key", "create", "--scope", "admin", "--expires", "1d"]);

    let ended = program.run(&["key", "--json", "list"]);
    assert_eq!(ended.stderr, "");
    let listed = documented("key list", &ended)["keys"].take();
    assert_eq!(listed[0]["hint"], made["key"].as_str().unwrap()[..8]);
    // The API gives the same fields the same names.
    let serving = program.serve(&[]);
    let client = serving.client.with_key(admin.made_key());
    let served = client.get("/api/keys").await.data(200)["keys"].take();
    for (key, same) in listed.as_array().unwrap().iter().zip(served.as_array().unwrap()) {
        let same = with(same.clone(), &json!({"state": "valid", "last_used": key["last_used"]}));
        assert_eq!(*key, same);
    }
    serving.stop();

    let ended = program.run(&["key", "revoke", "1", "--json"]);
    assert_eq!(ended.stderr, "revoked key 1\n");
    assert_eq!(documented("key revoke", &ended)["revoked"], json!([1]));
    let ended = program.run(&["key", "revoke", "--json", "1", "9"]);
    assert_eq!(ended.code(), 1);
    let revoked = ended.document();
    assert_eq!((&revoked["revoked_before"], &revoked["unknown"]), (&json!([1]), &json!([9])));
    let listed = program.run(&["key", "list", "--json"]).document();
    assert_eq!(listed["keys"][0]["state"], "revoked");
}

async fn commands_on_data_as_documents(installed: &Installed) {
    let Installed { program, database } = installed;
    let name = database.target.to_string();
    program.run(&["migrate", "up"]).success();
    program.run(&["migrate", "down", "1", "--yes"]).success();
    let status = documented("migrate status", &program.run(&["migrate", "status", "--json"]));
    assert_eq!(status["database"], name);
    let migrations = status["migrations"].as_array().unwrap();
    let (last, others) = migrations.split_last().unwrap();
    assert_eq!((&last["state"], &last["applied_at"]), (&json!("pending"), &Value::Null));
    assert!(others.iter().all(|one| one["state"] == "applied" && one["applied_at"].is_string()));
    program.run(&["migrate", "up"]).success();

    let records = format!("{}\nnonsense\n", event("pi"));
    std::fs::write(program.path("records"), records).unwrap();
    let ended = program.run(&["import", "records", "--json"]);
    assert_eq!(ended.code(), 3, "{ended:?}");
    assert!(ended.stderr.contains("imported 1 events into "), "{ended:?}");
    let imported = documented("import", &ended);
    let expected = json!({
        "database": name, "source": "records", "records": 2, "stored": 1, "duplicates": 0, "rejected": 1,
        "rejected_file": "records.rejected", "is_cut_off": false,
    });
    assert_eq!(with(imported.clone(), &expected), imported);
    let again = program.run(&["import", "records", "--json"]);
    assert!(again.document()["imported_before_at"].is_string(), "{again:?}");

    let right = documented("verify", &program.run(&["verify", "--json"]));
    assert_eq!((&right["events"], &right["differences"]), (&json!(1), &json!([])));
    database.execute("update device_jobs set total_syncs = 7, last_success = null").await;
    let ended = program.run(&["verify", "--json"]);
    assert_eq!(ended.code(), 1, "{ended:?}");
    let differs = ended.document();
    assert_eq!((&differs["differing_jobs"], &differs["is_repaired"]), (&json!(1), &json!(false)));
    let expected = json!({"device_id": "pi", "job": null, "figure": "total_syncs", "stored": 7, "recounted": 1});
    assert_eq!(differs["differences"][0], expected);
    assert_eq!(differs["differences"][1]["stored"], Value::Null);
    let repaired = program.run(&["verify", "--repair", "--json"]);
    assert_eq!((repaired.code(), &repaired.document()["is_repaired"]), (0, &json!(true)));

    let from = crate::support::program::url(&database.target);
    let copy = ["copy", "--from", &from, "--to", "sqlite:copy.db", "--json"];
    let ended = program.run(&copy);
    assert!(ended.stderr.contains("all tables have the same rows and checksums"), "{ended:?}");
    let copied = documented("copy", &ended);
    assert_eq!((&copied["from"], &copied["rows"]["sync_events"]), (&json!(name), &json!(1)));
    // PostgreSQL has tools of its own.
    let copy = Program::new()
        .with("DATABASE_URL", format!("sqlite:{}", program.path("copy.db").display()));
    let held = documented("backup", &copy.run(&["backup", "copy.db", "--json"]));
    assert_eq!((&held["file"], &held["events"]), (&json!("copy.db"), &json!(1)));
    // What fails writes no document.
    let failed = copy.run(&["backup", "copy.db", "--json"]);
    assert!(failed.failure().contains("copy.db"), "{failed:?}");
    assert_eq!(failed.stdout, "");
}
