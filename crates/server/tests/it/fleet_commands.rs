//! `pisync device`, `policy` and `window`, with and without a server beside them.

use std::fs;

use serde_json::{Value, json};

use crate::{
    json_output::documented,
    support::{
        http::{column, event},
        program::Installed,
    },
};

both_stores!(
    a_roster_is_imported,
    devices_are_paused_and_deleted,
    a_device_is_resumed_while_others_are_paused,
    states_of_a_group_and_of_none,
    policies,
    windows,
);

async fn a_roster_is_imported(installed: &Installed) {
    let Installed { program, .. } = installed;
    program.run(&["db", "setup"]).success();
    let roster = program.path("roster.csv");
    fs::write(&roster, "device_id,name,group,tags\npi-1,Library,school,a;b\npi-2,,,\n").unwrap();
    let dry = program.run(&["device", "import", "roster.csv", "--dry-run"]);
    let said = "2 would be new, 0 would be changed, 0 as before; 0 other devices are not listed\n";
    assert_eq!(dry.success(), said);
    let list = program.run(&["device", "list"]);
    assert!(list.success().starts_with("there are no such devices"), "{list:?}");
    let imported =
        documented("device import", &program.run(&["device", "import", "roster.csv", "--json"]));
    assert_eq!((&imported["created"], &imported["dry_run"]), (&json!(2), &json!(false)));
    let again = program.run(&["device", "import", "roster.csv"]);
    assert!(again.success().starts_with("0 new, 0 changed, 2 as before"), "{again:?}");
    fs::write(&roster, "device_id,group\npi-3,\npi-1,x\npi-1,y\n").unwrap();
    let wrong = program.run(&["device", "import", "roster.csv"]);
    assert_eq!(wrong.code(), 1);
    assert!(
        wrong.stderr.contains("\"[2].device_id\" must not be listed twice (line 4)"),
        "{wrong:?}"
    );
    fs::write(&roster, "device_id,name\npi-3,\"Hall\npi-4,Attic\n").unwrap();
    let wrong = program.run(&["device", "import", "roster.csv"]);
    assert_eq!(wrong.code(), 1);
    let expected =
        "roster.csv was not imported:\n  \"[0]\" has a quotation mark that is not closed (line 2)";
    assert!(wrong.stderr.contains(expected) && !wrong.stderr.contains("JSON"), "{wrong:?}");
    let listed = documented("device list", &program.run(&["device", "list", "--json"]));
    assert_eq!(column(&listed["devices"], "device_id"), ["pi-1", "pi-2"]);
    assert_eq!(listed["devices"][0]["tags"], json!(["a", "b"]));
    let of_group = program.run(&["device", "list", "--group", "school"]);
    assert!(
        of_group.success().contains("pi-1") && !of_group.stdout.contains("pi-2"),
        "{of_group:?}"
    );
    let missing = program.run(&["device", "import", "nothing.csv"]);
    assert!(missing.stderr.contains("cannot read nothing.csv"), "{missing:?}");
}

async fn devices_are_paused_and_deleted(installed: &Installed) {
    let Installed { program, .. } = installed;
    program.run(&["db", "setup"]).success();
    let serving = program.serve(&[]);
    serving.client.store(&event("pi")).await;
    let shown = async || serving.client.get("/api/device/pi").await.data(200);
    let paused = documented(
        "device pause",
        &program.run(&["device", "pause", "pi", "--for", "2h", "--json"]),
    );
    let after = shown().await;
    assert_eq!(after["paused"], true);
    assert_eq!(after["paused_until"], paused["paused_until"]);
    program.run(&["device", "pause", "pi"]).success();
    assert_eq!(shown().await["paused_until"], Value::Null);
    documented("device resume", &program.run(&["device", "resume", "pi", "--json"]));
    assert_eq!(shown().await["paused"], false);
    for (words, status, said) in [
        (&["pause", "pi", "--for", "soon"][..], 2, "--for soon"),
        (&["pause", "pi", "--until", "2020-01-01"], 2, "must be in the future"),
        (&["pause", "pi", "--until", "9999-01-01"], 2, "must be within 10 years; leave it out"),
        (&["pause", "pi", "--for", "600w"], 2, "must be within 10 years; leave it out"),
        (&["pause", "pi", "--for", "1h", "--until", "2100-01-01"], 2, "cannot be used with"),
        (&["pause", "nobody"], 1, "no such device: nobody"),
        (&["delete", "nobody"], 1, "no such device: nobody"),
    ] {
        let ended = program.run(&[&["device"], words].concat());
        assert_eq!(ended.code(), status, "{ended:?}");
        assert!(ended.stderr.contains(said), "{ended:?}");
    }
    let deleted = documented("device delete", &program.run(&["device", "delete", "pi", "--json"]));
    assert_eq!(deleted["deleted_events"], 1);
    serving.client.get("/api/device/pi").await.error(404);
    serving.stop();
}

/// What `resume` says is what holds: a device whose group or fleet is paused is not judged.
async fn a_device_is_resumed_while_others_are_paused(installed: &Installed) {
    let Installed { program, .. } = installed;
    program.run(&["db", "setup"]).success();
    let serving = program.serve(&[]);
    serving.client.store(&event("pi")).await;
    let set = async |path: &str, paused: Value| {
        serving.client.patch(path, &json!({"paused": paused})).await.data(200);
    };
    let body = json!({"group": "school"});
    serving.client.patch("/api/device/pi", &body).await.data(200);
    let said = |words: &[&str]| program.run(&[&["device"], words].concat()).success().to_owned();
    assert_eq!(said(&["resume", "pi"]), "pi was not paused\n");
    let paused = program.run(&["device", "pause", "pi", "--for", "2h", "--json"]).document();
    let until = paused["paused_until"].as_str().unwrap();
    assert_eq!(said(&["resume", "pi"]), "pi is judged again\n");

    set("/api/group/school", json!(true)).await;
    let of_group = "its group is paused until somebody ends it";
    assert_eq!(
        said(&["resume", "pi"]),
        format!("pi has no pause of its own; it stays paused, because {of_group}\n")
    );
    set("/api/fleet", json!(until)).await;
    let both = format!("{of_group}, and the fleet is paused until {until}");
    assert_eq!(
        said(&["pause", "pi"]),
        format!("paused pi; `pisync device resume` ends it ({both} besides)\n")
    );
    let paused = documented("device pause", &program.run(&["device", "pause", "pi", "--json"]));
    assert_eq!(paused["paused_by"], json!(["device", "group", "fleet"]));
    assert_eq!(
        said(&["resume", "pi"]),
        format!("ended the pause of pi itself; it stays paused, because {both}\n")
    );
    let resumed = documented("device resume", &program.run(&["device", "resume", "pi", "--json"]));
    let served = serving.client.get("/api/device/pi").await.data(200);
    for field in ["paused", "paused_until", "paused_by"] {
        assert_eq!(resumed[field], served[field], "{field}");
    }
    assert_eq!((&resumed["paused"], &resumed["paused_until"]), (&json!(true), &Value::Null));
    let explained = program.run(&["fleet", "explain", "pi"]);
    for sentence in
        ["pi is paused.", "Its group is paused since ", "The whole fleet is paused since "]
    {
        assert!(explained.success().contains(sentence), "{sentence}: {explained:?}");
    }
    assert!(!explained.stdout.contains("The device itself is paused"), "{explained:?}");
    serving.stop();
}

/// The states of a group, of the devices that are in none, and when they are not told.
async fn states_of_a_group_and_of_none(installed: &Installed) {
    let Installed { program, database } = installed;
    program.run(&["db", "setup"]).success();
    let serving = program.serve(&[]);
    for device in ["lone", "pi-1", "pi-2"] {
        serving.client.store(&event(device)).await;
    }
    for device in ["pi-1", "pi-2"] {
        let path = format!("/api/device/{device}");
        serving.client.patch(&path, &json!({"group": "school"})).await.data(200);
    }
    // Until a sweep has seen them where they are.
    let states = async |group: &str, devices: u64| {
        for _ in 0..300 {
            let ended = program.run(&["fleet", "status", "--group", group, "--json"]);
            if ended.code() < 2 {
                let status = documented("fleet status", &ended);
                let evaluated = status["by_status"].as_object().unwrap().values();
                if evaluated.filter_map(Value::as_u64).sum::<u64>() == devices {
                    return status["groups"][0].clone();
                }
            }
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        }
        panic!("no sweep has evaluated {devices} devices of the group {group:?}");
    };
    let school = states("school", 2).await;
    assert_eq!((&school["name"], &school["devices"]), (&json!("school"), &json!(2)));
    let ungrouped = states("", 1).await;
    assert_eq!((&ungrouped["name"], &ungrouped["devices"]), (&Value::Null, &json!(1)));
    let shown = program.run(&["fleet", "status", "--group", ""]);
    assert!(shown.stdout.contains("(none)"), "{shown:?}");
    let listed = program.run(&["device", "list", "--group", "", "--json"]).document();
    assert_eq!(column(&listed["devices"], "device_id"), ["lone"]);
    serving.stop();

    // A sweep of three minutes ago says nothing about now.
    let ago = |minutes: i64| match installed.is_postgres() {
        true => format!("now() - interval '{minutes} minutes'"),
        false => format!("(unixepoch() - {minutes} * 60) * 1000"),
    };
    for (minutes, is_told) in [(1, true), (3, false)] {
        database.execute(&format!("update fleet_state set swept_at = {}", ago(minutes))).await;
        let ended = program.run(&["fleet", "status"]);
        let is_untold = ended.stderr.contains("no server has looked after this fleet since");
        assert_eq!(is_untold, !is_told, "{ended:?}");
        assert_eq!(ended.code() == 2, !is_told, "{ended:?}");
    }
}

async fn policies(installed: &Installed) {
    let Installed { program, .. } = installed;
    program.run(&["db", "setup"]).success();
    let file = program.path("policy.json");
    fs::write(&file, r#"{"grace_seconds": 60, "expect": {"every_seconds": 600}}"#).unwrap();
    program.run(&["policy", "set", "policy.json"]).success();
    documented(
        "policy set",
        &program.run(&["policy", "set", "--group", "school", "policy.json", "--json"]),
    );
    let shown = program.run(&["policy", "show", "--group", "school"]);
    let shown: Value = serde_json::from_str(shown.success()).unwrap();
    assert_eq!(shown, json!({"grace_seconds": 60, "expect": {"every_seconds": 600}}));
    let roster = program.path("roster.json");
    fs::write(&roster, r#"[{"device_id": "pi", "group": "school"}]"#).unwrap();
    program.run(&["device", "import", "roster.json"]).success();
    fs::write(&file, "{}").unwrap();
    program.run(&["policy", "set", "--device", "pi", "policy.json"]).success();
    let shown =
        documented("policy show", &program.run(&["policy", "show", "--device", "pi", "--json"]));
    assert_eq!(shown["policy"], json!({}));
    assert_eq!(shown["effective_policy"]["grace_seconds"], json!({"value": 60, "from": "group"}));
    fs::write(&file, r#"{"grace": 1, "recover_after": 0}"#).unwrap();
    let wrong = program.run(&["policy", "set", "policy.json"]);
    assert_eq!(wrong.code(), 1);
    for complaint in ["\"policy.grace\" is not allowed", "\"policy.recover_after\" must be greater"]
    {
        assert!(wrong.stderr.contains(complaint), "{wrong:?}");
    }
    let unknown = program.run(&["policy", "show", "--device", "nobody"]);
    assert!(unknown.stderr.contains("no such device: nobody"), "{unknown:?}");
}

async fn windows(installed: &Installed) {
    let Installed { program, .. } = installed;
    program.run(&["db", "setup"]).success();
    let empty = program.run(&["window", "list"]);
    assert!(empty.success().starts_with("there are no windows yet"), "{empty:?}");
    let nights = [
        "window",
        "add",
        "nights",
        "--group",
        "school",
        "--effect",
        "closed",
        "--timezone",
        "Europe/Berlin",
        "--days",
        "mon,fri",
        "--start",
        "16:00",
        "--end",
        "07:00",
        "--json",
    ];
    let made = documented("window add", &program.run(&nights));
    let holidays = [
        "window",
        "add",
        "holidays",
        "--effect",
        "quiet",
        "--timezone",
        "UTC",
        "--from",
        "2026-12-23",
        "--until",
        "2027-01-07",
    ];
    program.run(&holidays).success();
    let list = program.run(&["window", "list"]);
    for text in ["mon,fri 16:00-07:00", "group school", "until 2027-01-07T00:00:00.000Z"] {
        assert!(list.success().contains(text), "{list:?}");
    }
    let listed = documented("window list", &program.run(&["window", "list", "--json"]));
    let serving = program.serve(&[]);
    let served = serving.client.get("/api/windows").await.data(200);
    assert_eq!(listed["windows"], served["windows"]);
    serving.stop();
    let wrong = program.run(&["window", "add", "w", "--effect", "closed", "--timezone", "Mars"]);
    assert_eq!(wrong.code(), 2);
    for complaint in ["--timezone must be an IANA time zone", "--from is required"] {
        assert!(wrong.stderr.contains(complaint), "{wrong:?}");
    }
    let id = made["id"].to_string();
    let deleted = program.run(&["window", "delete", &id, "99", "--json"]);
    assert_eq!(deleted.code(), 1);
    let document = deleted.document();
    assert_eq!((&document["deleted"], &document["unknown"]), (&json!([made["id"]]), &json!([99])));
    let deleted = documented("window delete", &program.run(&["window", "delete", "2", "--json"]));
    assert_eq!(deleted["deleted"], json!([2]));
}
