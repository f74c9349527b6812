//! `pisync incident`: incidents listed, shown and acknowledged on the command line.

use serde_json::{Value, json};

use crate::{
    json_output::documented,
    support::{
        events::at,
        fleet::{Row, entry, member},
        http::column,
        program::{Installed, Program},
    },
};

both_stores!(incidents_on_the_command_line, incidents_as_documents);

async fn prepare(installed: &Installed) {
    let Installed { program, database } = installed;
    program.run(&["db", "setup"]).success();
    let sql = [
        Row::of_group(1, "school-17").sql(database),
        Row { flapping_since: Some(at(0)), ..Row::of_device(2, "pi-9", "school-17") }.sql(database),
        Row::of_group(3, "school-18").resolved(at(-1)).sql(database),
        Row { kind: "silent", ..Row::of_device(5, "lone", "") }.resolved(at(-1)).sql(database),
        Row {
            scope: "fleet",
            subject: "fleet".to_owned(),
            opened_at: at(-90),
            ..Row::of_group(4, "")
        }
        .sql(database),
        member(database, 1, "pi-1", Some(at(-10)), false),
        member(database, 1, "pi-2", None, true),
        entry(database, 1, 1, "opened"),
    ];
    database.execute(&sql.concat()).await;
}

async fn incidents_on_the_command_line(installed: &Installed) {
    prepare(installed).await;
    let program = &installed.program;
    let listed = program.run(&["incident", "list"]);
    let lines: Vec<_> = listed.success().lines().collect();
    assert_eq!(lines.len(), 4, "{listed:?}");
    assert!(lines[0].starts_with("ID  SEVERITY  KIND     ABOUT"), "{listed:?}");
    for (line, words) in lines[1..].iter().zip([
        ["2 ", "failing", "device pi-9", "1 of 1", "nobody (flapping)"],
        ["1 ", "silent", "group school-17", "199 of 200, 1 late", "nobody"],
        ["4 ", "silent", "the fleet", "199 of 200", "nobody"],
    ]) {
        assert!(line.starts_with(words[0]), "{listed:?}");
        assert!(words.iter().all(|word| line.contains(word)), "{words:?} in {line}");
        assert!(line.contains("2026-11-22T11:5"), "{line}");
    }
    for (options, expected) in [
        (&["--state", "resolved"][..], 3),
        (&["--state", "resolved", "--group", ""], 2),
        (&["--kind", "failing"], 2),
        (&["--scope", "group", "--group", "school-17"], 2),
        (&["--device", "pi-2"], 2),
        (&["--since", "2026-11-22T11:59:00Z"], 3),
    ] {
        let listed = program.run(&[&["incident", "list"], options].concat());
        assert_eq!(listed.success().lines().count(), expected, "{listed:?}");
    }
    let none = program.run(&["incident", "list", "--group", "nowhere"]);
    assert_eq!(none.success(), "there are no open incidents like this\n");
    let some = program.run(&["incident", "list", "--limit", "1"]);
    assert_eq!((some.code(), some.stdout.lines().count()), (0, 2));
    assert!(some.stderr.starts_with("there are more; "), "{some:?}");

    let acknowledged =
        program.run(&["incident", "ack", "1", "--note", "power is off", "--for", "4h"]);
    let expected = "acknowledged incident 1: group school-17 is silent (critical)\n";
    assert_eq!(acknowledged.success(), expected);
    let shown = program.run(&["incident", "show", "1"]);
    for text in [
        "incident 1: group school-17 is silent (critical)\n  since 2026-11-22T11:59:00Z, open\n",
        "  devices: 199 of 200, 1 late\n  last heard 2026-11-22T10:30:00Z\n",
        "  acknowledged by command line at 20",
        "Z: power is off\n",
        "DEVICE  JOBS",
        "pi-1    -, nightly  2026-11-22T11:59:00Z  2026-11-22T11:59:50Z\n",
        "only late\n",
        "2026-11-22T11:59:00Z  opened  devices: 199\n",
        "  acknowledged by command line  note: power is off; until: 20",
    ] {
        assert!(shown.success().contains(text), "{text:?} in {}", shown.stdout);
    }
    let withdrawn = program.run(&["incident", "ack", "1", "--withdraw"]);
    assert!(withdrawn.success().starts_with("withdrew "), "{withdrawn:?}");
    let shown = program.run(&["incident", "show", "1"]);
    assert!(shown.success().contains("nobody looks after it yet: `pisync incident ack 1`"));

    let unknown = program.run(&["incident", "show", "7"]);
    assert_eq!(unknown.failure(), "no such incident: 7; `pisync incident list` lists them");
    let over = program.run(&["incident", "ack", "3"]);
    assert_eq!(over.failure(), "incident 3 is already resolved; there is nothing to look after");
}

async fn incidents_as_documents(installed: &Installed) {
    prepare(installed).await;
    let program = &installed.program;
    let ended = program.run(&["incident", "list", "--json"]);
    assert_eq!(ended.stderr, "");
    let listed = documented("incident list", &ended);
    assert_eq!(column(&listed["incidents"], "id"), [2, 1, 4].map(Value::from));
    assert_eq!((&listed["total"], &listed["total_is_at_least"]), (&json!(3), &Value::Null));
    let shown = documented("incident show", &program.run(&["incident", "show", "1", "--json"]));
    assert_eq!(shown["members"], 2);
    // The API gives the same fields the same names.
    let serving = program.serve(&[]);
    let served = serving.client.get("/api/incident/1").await.data(200);
    for (field, value) in shown["incident"].as_object().unwrap() {
        assert_eq!(served[field], *value, "{field}");
    }
    serving.stop();
    let given = program.run(&["incident", "ack", "1", "--note", "n", "--json"]);
    assert!(given.stderr.starts_with("acknowledged incident 1"), "{given:?}");
    let given = documented("incident ack", &given);
    assert_eq!(given["incident"]["acknowledged"]["note"], "n");
}

#[test]
fn commands_that_make_no_sense() {
    let program = Program::new();
    for (arguments, expected) in [
        (&["list", "--kind", "odd"][..], "[possible values: silent, failing]"),
        (&["list", "--state", "over"], "[possible values: open, resolved]"),
        (&["list", "--device", ""], "--device is not allowed to be empty"),
        (&["list", "--since", "soon"], "--since soon: expected a time such as"),
        (&["list", "--limit", "1001"], "expected a whole number from 1 to 1000"),
        (&["show", "0"], "expected a whole number from 1 to"),
        (&["ack", "1", "--for", "soon"], "--for soon: expected so many minutes, hours"),
        (&["ack", "1", "--for", "1h", "--until", "2099-01-01"], "cannot be used with"),
        (&["ack", "1", "--until", "2020-01-01"], "--until must be in the future"),
        (&["ack", "1", "--until", "9999-12-31"], "--until must be within 10 years; leave it out"),
        (&["ack", "1", "--for", "600w"], "--for must be within 10 years; leave it out"),
        (&["ack", "1", "--note", "two\nlines"], "--note must not contain control characters"),
        (&["ack", "1", "--note", "n", "--withdraw"], "cannot be used with"),
    ] {
        let ended = program.run(&[&["incident"], arguments].concat());
        assert_eq!(ended.code(), 2, "{ended:?}");
        assert!(ended.stderr.contains(expected), "{expected}: {ended:?}");
    }
    assert!(program.names_in(".").is_empty(), "nothing was made");
}
