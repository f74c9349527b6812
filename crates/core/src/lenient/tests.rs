//! What the lenient reader accepts, and what it says about the rest.

use proptest::prelude::*;
use serde_json::json;

use super::*;

fn arrival() -> Arrival {
    let received = Timestamp::parse_iso8601("2026-01-01T00:00:00Z").unwrap();
    Arrival { received, latest: received }
}

fn read(body: &str) -> Result<SyncEvent, ParseError> {
    SyncEvent::from_json(body.as_bytes(), arrival())
}

fn with(field: &str, value: Value) -> String {
    let mut body = json!({
        "device_id": "pi-1", "timestamp": "2025-06-17T10:30:00Z",
        "total_files_synced": 150, "total_errors": 2,
    });
    body[field] = value;
    body.to_string()
}

/// The violations' fields and messages.
fn complaints(body: &str) -> Vec<(String, String)> {
    match read(body) {
        Err(ParseError::Invalid(violations)) => violations
            .into_iter()
            .map(|violation| (violation.field.into_owned(), violation.message))
            .collect(),
        other => panic!("{body} gave {other:?}"),
    }
}

fn complaint(field: &str, value: Value) -> String {
    let mut all = complaints(&with(field, value));
    assert_eq!(all.len(), 1, "{all:?}");
    assert_eq!(all[0].0, field);
    all.remove(0).1
}

#[test]
fn a_fraction_is_no_count_however_large() {
    let body = with("bytes_synced", json!("9007199254740991.4"));
    let message = "\"bytes_synced\" must be an integer".to_owned();
    assert_eq!(complaints(&body), [("bytes_synced".to_owned(), message)]);
}

#[test]
fn an_array_is_no_event() {
    let body = r#"["pi-1",null,"2025-06-17T10:30:00Z",null,150,2,null,null,null,null,null]"#;
    let message = "\"value\" must be of type object".to_owned();
    assert_eq!(complaints(body), [(String::new(), message)]);
}

#[test]
fn what_is_not_utf8_is_malformed_also_where_nobody_looks() {
    let mut body = with("extra", "?".into()).into_bytes();
    for byte in &mut body {
        if *byte == b'?' {
            *byte = 0xff;
        }
    }
    let result = SyncEvent::from_json(&body, arrival());
    assert!(matches!(result, Err(ParseError::Malformed(_))), "{result:?}");
}

#[test]
fn a_full_event() {
    let event = read(
        r#"{"device_id":"pi-1","timestamp":"2025-06-17T10:30:00.5+02:00","total_files_synced":150,
        "total_errors":2,"internet_speed":45.678,"job":"nightly","duration_seconds":12.3456,
        "bytes_synced":9007199254740991,"metadata":{"a": [1, 2]},"extra":{"deep":[[]]}}"#,
    )
    .unwrap();
    assert_eq!(event.timestamp.to_string(), "2025-06-17T08:30:00.500Z");
    assert_eq!(event.internet_speed.unwrap().hundredths(), 4568);
    assert_eq!(event.duration.unwrap().milliseconds(), 12_346);
    assert_eq!(event.bytes_synced, Some(MAX_BYTES_SYNCED));
    assert_eq!(event.metadata.unwrap().as_str(), r#"{"a": [1, 2]}"#);
    assert_eq!(event.job.unwrap().as_str(), "nightly");
}

#[test]
fn what_the_node_service_accepted() {
    for (field, value) in [
        ("timestamp", json!("2025-06-17")),
        ("total_files_synced", json!("150")),
        ("total_files_synced", json!(" 150 ")),
        ("total_files_synced", json!(150.0)),
        ("total_errors", json!("0")),
        ("internet_speed", json!("45.6")),
        ("internet_speed", json!(null)),
        ("job", json!(null)),
        ("device_id", json!("quote \" and \\ and ü")),
    ] {
        assert!(read(&with(field, value.clone())).is_ok(), "{field}: {value}");
    }
    assert!(read(&format!("\u{feff}{}", with("x", json!(1)))).is_ok());
    let twice = r#"{"device_id":"a","device_id":"b","timestamp":"2025-06-17","total_files_synced":1,"total_errors":0}"#;
    assert_eq!(read(twice).unwrap().device_id.as_str(), "b");
    let surrogate_key = with("x", json!(1)).replace("\"x\"", "\"\\ud800\"");
    assert!(read(&surrogate_key).is_ok(), "{surrogate_key}");
}

#[test]
fn every_wrong_field_is_named_in_order() {
    assert_eq!(
        complaints("{}"),
        ["device_id", "timestamp", "total_files_synced", "total_errors"]
            .map(|field| (field.to_owned(), format!("\"{field}\" is required"))),
    );
    assert_eq!(complaints("[]"), [(String::new(), "\"value\" must be of type object".to_owned())]);
    let all_wrong = json!({
        "device_id": 7, "timestamp": 1, "total_files_synced": 1.5, "total_errors": -1,
        "internet_speed": -3, "job": "", "duration_seconds": "x", "bytes_synced": -1, "metadata": 5,
    });
    assert_eq!(complaints(&all_wrong.to_string()).len(), 9);
}

#[test]
fn the_words() {
    assert_eq!(complaint("device_id", json!("")), "\"device_id\" is not allowed to be empty");
    assert_eq!(complaint("device_id", json!(7)), "\"device_id\" must be a string");
    assert_eq!(
        complaint("device_id", json!("a\u{0}b")),
        "\"device_id\" must not contain control characters"
    );
    assert_eq!(
        complaint("timestamp", json!("yesterday")),
        "\"timestamp\" must be in ISO 8601 date format"
    );
    assert_eq!(
        complaint("timestamp", json!("2025-02-30T10:00:00Z")),
        "\"timestamp\" must be a day that the calendar has"
    );
    assert_eq!(
        complaint("timestamp", json!("2025-06-17T10:30:00+25:00")),
        "\"timestamp\" must have an offset from UTC of at most 23:59"
    );
    assert_eq!(
        complaint("timestamp", json!("0000-06-17")),
        "\"timestamp\" must be within the years 1 to 9999"
    );
    assert_eq!(complaint("timestamp", json!("9999-12-31")), "Timestamp cannot be in the future");
    assert_eq!(
        complaint("timestamp", json!(1_750_000_000_000_i64)),
        "\"timestamp\" must be a valid date"
    );
    assert_eq!(
        complaint("timestamp", json!("2999-01-01T00:00:00Z")),
        "Timestamp cannot be in the future"
    );
    assert_eq!(
        complaint("total_files_synced", json!(1.5)),
        "\"total_files_synced\" must be an integer"
    );
    assert_eq!(
        complaint("total_files_synced", json!(3_000_000_000_i64)),
        "\"total_files_synced\" must be less than or equal to 2147483647"
    );
    assert_eq!(
        complaint("total_errors", json!(-1)),
        "\"total_errors\" must be greater than or equal to 0"
    );
    assert_eq!(complaint("total_errors", json!("two")), "\"total_errors\" must be a number");
    assert_eq!(complaint("total_errors", json!(null)), "\"total_errors\" must be a number");
    assert_eq!(
        complaint("internet_speed", json!(1e12)),
        "\"internet_speed\" must be less than or equal to 99999999.99"
    );
    assert_eq!(complaint("metadata", json!([1])), "\"metadata\" must be of type object");
    assert_eq!(
        complaint("metadata", json!({"a": "x".repeat(5000)})),
        "\"metadata\" must be at most 4096 bytes of JSON text"
    );
}

#[test]
fn numbers_beyond_a_double_and_half_surrogates_are_named() {
    let huge = with("internet_speed", json!(1)).replace(":1,", ":1e999,").replace(":1}", ":1e999}");
    assert_eq!(
        complaints(&huge)[0].1,
        "\"internet_speed\" must be less than or equal to 99999999.99"
    );
    let half = with("device_id", json!("X")).replace("\"X\"", r#""\ud800""#);
    assert_eq!(complaints(&half)[0].1, "\"device_id\" must be valid Unicode text");
}

#[test]
fn half_a_surrogate_pair_is_named_wherever_it_stands() {
    for field in EVENT_FIELDS.map(|field| field.name) {
        for half in [r#""\ud800""#, r#""\udfffx""#] {
            let value = if field == "metadata" { format!("{{\"a\":{half}}}") } else { half.into() };
            let body = with(field, json!("X")).replace("\"X\"", &value);
            let expected = format!("\"{field}\" must be valid Unicode text");
            assert_eq!(complaints(&body)[0].1, expected, "{body}");
        }
    }
}

#[test]
fn metadata_that_no_reader_gives_back_says_why() {
    let complaint = |metadata: &str| {
        let body = with("metadata", json!("X")).replace("\"X\"", metadata);
        complaints(&body).remove(0).1
    };
    for number in ["1e999", "-1E+400", "[[{\"b\": 1e400}]]"] {
        let message = complaint(&format!("{{\"a\":{number}}}"));
        assert_eq!(message, "\"metadata\" must not hold numbers beyond 1.8e308");
    }
    let deep = |levels: usize| {
        let (open, close) = ("[".repeat(levels - 1), "]".repeat(levels - 1));
        format!("{{\"a\":{open}{close}}}")
    };
    assert_eq!(complaint(&deep(128)), "\"metadata\" must not be nested more than 127 levels deep");
    let body = with("metadata", json!("X")).replace("\"X\"", &deep(127));
    assert!(read(&body).is_ok());
    for other in ["[1]", "[{}]", "\"{}\"", "7", "true"] {
        assert_eq!(complaint(other), "\"metadata\" must be of type object", "{other}");
    }
}

#[test]
fn an_empty_array_is_what_php_makes_of_an_empty_object() {
    for metadata in ["[]", "[ \n]"] {
        let body = with("metadata", json!("X")).replace("\"X\"", metadata);
        assert_eq!(read(&body).unwrap().metadata.unwrap().as_str(), "{}", "{body}");
    }
    let unsynced = r#"{"device_id":"a","timestamp":"2025-06-17","clock":"unsynced","total_files_synced":1,"total_errors":0,"metadata":[]}"#;
    let kept = r#"{"device_timestamp":"2025-06-17T00:00:00.000Z"}"#;
    assert_eq!(read(unsynced).unwrap().metadata.unwrap().as_str(), kept);
}

#[test]
fn what_is_wrong_with_a_body_as_a_whole() {
    let malformed = |body: &[u8]| match SyncEvent::from_json(body, arrival()) {
        Err(ParseError::Malformed(why)) => why,
        other => panic!("{other:?}"),
    };
    for nothing in ["", " ", "\r\n", "\u{feff}"] {
        assert_eq!(malformed(nothing.as_bytes()), "there is nothing in it", "{nothing:?}");
    }
    assert_eq!(
        malformed(b"{\"device_id\":\"M\xfcller\"}"),
        "it is not UTF-8: byte 0xfc after 15 bytes; send UTF-8"
    );
    assert_eq!(malformed(b"\xff\xfe{\0}\0"), "it is UTF-16; send UTF-8");
    assert_eq!(malformed(b"\xfe\xff\0{\0}"), "it is UTF-16; send UTF-8");
    assert!(malformed(b"{\"a\":").starts_with("EOF while parsing"));
}

#[test]
fn what_is_not_json_is_malformed() {
    for body in ["", "{", "nul", "{\"a\":1}x", "{'a':1}"] {
        assert!(matches!(read(body), Err(ParseError::Malformed(_))), "{body}");
    }
    assert!(matches!(SyncEvent::from_json(b"\"\xff\"", arrival()), Err(ParseError::Malformed(_))));
}

#[test]
fn deep_nesting_neither_overflows_nor_stalls() {
    let bomb = "[".repeat(30_000);
    assert!(matches!(read(&bomb), Err(ParseError::Malformed(_))));
    let nested = format!("{}{}", "[".repeat(30_000), "]".repeat(30_000));
    let unknown = with("x", json!(0)).replace("\"x\":0", &format!("\"x\":{nested}"));
    assert!(read(&unknown).is_ok());
    let metadata = with("metadata", json!(0)).replace(
        "\"metadata\":0",
        &format!("\"metadata\":{{\"a\":{}}}", "[".repeat(200) + &"]".repeat(200)),
    );
    let message = "\"metadata\" must not be nested more than 127 levels deep";
    assert_eq!(complaints(&metadata)[0].1, message);
}

/// JSON values of the kinds that a careless client sends.
fn any_value() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        ".{0,12}".prop_map(Value::from),
        "[0-9]{1,12}".prop_map(Value::from),
        Just(json!("2025-06-17T10:30:00Z")),
        Just(json!([])),
        Just(json!({"a": 1})),
    ]
}

proptest! {
    #[test]
    fn bytes_never_panic(body in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = SyncEvent::from_json(&body, arrival());
    }

    /// The lenient reader gives the same meaning to everything that the strict pass accepts. A refusal names at least
    /// one field.
    #[test]
    fn both_readings_agree(values in prop::collection::vec((0..EVENT_FIELDS.len(), any_value()), 0..12)) {
        let mut body: Value = serde_json::from_str(&with("x", json!(1))).unwrap();
        for (field, value) in values {
            body[EVENT_FIELDS[field].name] = value;
        }
        let text = body.to_string();
        let both = read(&text);
        prop_assert_eq!(&both, &read_sync_event(text.as_bytes(), arrival()));
        if let Err(ParseError::Invalid(violations)) = both {
            prop_assert!(!violations.is_empty());
        }
    }

    #[test]
    fn a_valid_event_reads_back(
        device in "[^\\p{C}]{1,255}", files in 0..=MAX_COUNT, errors in 0..=MAX_COUNT,
        speed in proptest::option::of(0i64..=9_999_999_999),
    ) {
        let body = json!({
            "device_id": device, "timestamp": "2025-06-17T10:30:00.250Z",
            "total_files_synced": files, "total_errors": errors,
            "internet_speed": speed.map(|hundredths| f64::from(Mbps::from_hundredths(hundredths).unwrap())),
        });
        let event = read(&body.to_string()).unwrap();
        prop_assert_eq!(event.device_id.as_str(), device);
        prop_assert_eq!((event.total_files_synced, event.total_errors), (files, errors));
        prop_assert_eq!(event.internet_speed.map(Mbps::hundredths), speed);
    }
}
