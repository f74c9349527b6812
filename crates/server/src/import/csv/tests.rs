//! Tests of cutting CSV into records. The input may be wrong in any way, and may arrive in chunks of any size. Every
//! line that is an event must become a record exactly once.

use proptest::prelude::*;

use super::*;

const HEADER: &str = "timestamp,device_id,total_errors,total_files_synced,extra,metadata,id\n";

/// Cuts `text`, a few bytes at a time.
fn cut(text: &[u8], step: usize) -> Result<(Vec<Record>, Columns), ImportError> {
    let (mut cutter, mut found) = (CsvCutter::new(), VecDeque::new());
    for part in text.chunks(step) {
        cutter.push(part, &mut found)?;
    }
    cutter.finish(&mut found)?;
    Ok((found.into(), cutter.columns.unwrap()))
}

/// What is reported of a record: its text, or what is wrong with it.
fn told(record: &Record) -> String {
    let text = String::from_utf8_lossy(&record.text);
    let end = if record.may_be_cut_off { " (cut off)" } else { "" };
    match &record.problem {
        Some(problem) => format!("{problem}: {text}{end}"),
        None => format!("{text}{end}"),
    }
}

/// The records of the lines behind the first. They must be the same however the text is cut into chunks.
fn records(lines: &[u8]) -> Vec<String> {
    let whole = [HEADER.as_bytes(), lines].concat();
    let all: Vec<Vec<String>> = [1, 7, 10_000]
        .into_iter()
        .map(|step| {
            let (records, columns) = cut(&whole, step).unwrap();
            assert_eq!(columns.names.ignored, ["extra"]);
            records.iter().map(told).collect()
        })
        .collect();
    assert!(all.windows(2).all(|pair| pair[0] == pair[1]), "{all:?}");
    all.into_iter().next().unwrap()
}

#[test]
fn lines_become_objects() {
    assert_eq!(
        records(
            b"2025-06-17,pi,0,1,x,,7\r\n\"2025\",\"a \"\"b\"\", c\",-1, 2,,\"{\"\"a\"\":1}\"\n\n \t\r\rz,,,,,,\n"
        ),
        [
            r#"{"timestamp":"2025-06-17","device_id":"pi","total_errors":0,"total_files_synced":1}"#,
            r#"{"timestamp":"2025","device_id":"a \"b\", c","total_errors":-1,"total_files_synced":2,"metadata":{"a":1}}"#,
            r#"{"timestamp":"z"}"#,
        ]
    );
}

#[test]
fn blanks_around_cells_mean_nothing() {
    assert_eq!(
        records(b" 2025 ,\tpi one , 0,1 , \" x\" , \"{}\"\t,7\n2025,\" pi \",0,1\n"),
        [
            r#"{"timestamp":"2025","device_id":"pi one","total_errors":0,"total_files_synced":1,"metadata":{}}"#,
            r#"{"timestamp":"2025","device_id":" pi ","total_errors":0,"total_files_synced":1}"#,
        ]
    );
}

#[test]
fn cells_may_have_several_lines() {
    let expected = |metadata| {
        let event = r#"{"timestamp":"1","device_id":"pi","total_errors":0,"total_files_synced":1"#;
        format!("{event}{metadata}}}")
    };
    let text = "1,pi,0,1,\"a \"\"note\"\",\r\n\n2,of,lines\",,7\n1,pi,0,1,,\"{\n\"\"a\"\":\n1}\",\n1,pi,0,1,x,,7\n";
    let metadata = ",\"metadata\":{\n\"a\":\n1}";
    assert_eq!(records(text.as_bytes()), [expected(""), expected(metadata), expected("")]);
}

#[test]
fn a_quotation_mark_that_is_not_closed_costs_its_line_alone() {
    let unclosed = |line: &str| format!("has a quotation mark that is not closed: {line}");
    let event = r#"{"timestamp":"1","device_id":"pi","total_errors":0,"total_files_synced":1}"#;
    for bad in [
        "1,pi,0,1,\"x",
        "1,\"pi,0,1,x",
        "\"1,pi,0,1",
        "1,pi,0,1,,\"{\"\"a\"\":1}",
        "1,pi,0,1,\"\"\"\"\"x",
    ] {
        for others in [
            "1,pi,0,1,x,,7\n",
            "1,\"pi\",0,1\n",
            "1,pi,0,1,\"x\",,7\n",
            "1,pi,0,1,x\",,7\n",
            "1,pi,0,1,\"\",\"{}\",7\n",
        ] {
            let text = format!("{others}{bad}\n{others}{others}");
            let found = records(text.as_bytes());
            assert_eq!(found.len(), 4, "{text}: {found:?}");
            assert_eq!(found[1], unclosed(bad), "{text}");
            for index in [0, 2, 3] {
                assert!(found[index].starts_with(&event[..event.len() - 1]), "{text}: {found:?}");
            }
        }
    }
    // Text that follows much later makes no difference.
    let text = format!("1,pi,0,1,\"x\n{}1,pi,0,1,\"x\",,\n", "1,pi,0,1\n".repeat(20_000));
    let found = records_of(text.as_bytes(), 60_000);
    assert_eq!(found.len(), 20_002);
    assert_eq!(found[0], unclosed("1,pi,0,1,\"x"));
    assert!(found[1..].iter().all(|told| told == event));
    // Nor does the end, unless the input may be cut off there.
    assert_eq!(records(b"1,pi,0,1,\"x\n"), [unclosed("1,pi,0,1,\"x")]);
    assert_eq!(records(b"1,pi,0,1,\"x"), [unclosed("1,pi,0,1,\"x") + " (cut off)"]);
}

fn records_of(lines: &[u8], step: usize) -> Vec<String> {
    let (records, _) = cut(&[HEADER.as_bytes(), lines].concat(), step).unwrap();
    records.iter().map(told).collect()
}

#[test]
fn each_line_that_is_too_long_or_too_wide_is_told_of() {
    let long = "x".repeat(MAX_EVENT_BYTES * 2);
    let lines = format!("{long}\n\"{long}\n{long}\n2025,,,,,,,1\n2025,pi,0,1\n\"{long}\n");
    let found = records_of(lines.as_bytes(), 1000);
    let starts = [
        "is longer than 65536 bytes, the most that a record may have: ",
        "is longer than 65536 bytes, the most that a record may have: ",
        "is longer than 65536 bytes, the most that a record may have: ",
        "has more cells than the first line: 2025",
        "{\"timestamp\"",
        "is longer than 65536 bytes, the most that a record may have: ",
    ];
    assert_eq!(found.len(), starts.len());
    for (told, start) in found.iter().zip(starts) {
        assert!(told.starts_with(start), "{told}");
    }
    assert!(cut(long.as_bytes(), 1000).is_err());
}

#[test]
fn nul_bytes_keep_no_line_out() {
    let event = r#"{"timestamp":"1","device_id":"pi","total_errors":0,"total_files_synced":1}"#;
    let nuls = "is a run of NUL bytes, as a power cut leaves them: ";
    let cut_off = format!("{nuls} (cut off)");
    for (lines, expected) in [
        (&b"1,pi,0,1\n\0\0\0\0"[..], vec![event, &cut_off]),
        (b"1,pi,0,1\0\0\0", vec![event, &cut_off]),
        (b"1,pi,0,1\n1,p\0\0", vec![event, r#"{"timestamp":"1","device_id":"p"}"#, &cut_off]),
        (
            b"1,pi,0,1\n\0\0\x001,pi,0,1\n \0\n\0\n1,pi,0,1\n",
            vec![event, nuls, event, nuls, nuls, event],
        ),
        (
            b"1,pi,0,1,\"x\0\0\"\n1,pi,0,1\n",
            vec![
                "has a quotation mark that is not closed: 1,pi,0,1,\"x",
                nuls,
                "has a quotation mark that is not closed: \"",
                event,
            ],
        ),
    ] {
        assert_eq!(records(lines), expected, "{lines:?}");
    }
}

#[test]
fn a_last_line_that_is_short_may_be_cut_off() {
    let cut_off = |lines: &str| records(lines.as_bytes()).pop().unwrap().ends_with(" (cut off)");
    assert!(cut_off("2025,pi,0"));
    assert!(!cut_off("2025,pi,0\n"));
    assert!(!cut_off("2025,pi,0,1,,,"));
}

#[test]
fn a_first_line_must_name_the_columns() {
    for (text, expected) in [
        ("", "it holds nothing"),
        ("\u{feff}\n", "it holds nothing"),
        ("\u{0}\u{1}\n", "it holds no sync events"),
        ("hello\nworld\n", "it holds no sync events"),
        ("\"device_id,timestamp,total_files_synced,total_errors\n", "it holds no sync events"),
        ("device_id;timestamp;total_files_synced;total_errors\n", "separated by semicolons"),
        ("note, or remark;Device_ID;\"timestamp\"\n", "separated by semicolons"),
        ("device_id\ttimestamp\ttotal_files_synced\ttotal_errors", "separated by tabs"),
        ("device_id|timestamp\n", "separated by vertical bars"),
        ("device_id,timestamp\n", "the columns total_files_synced, total_errors"),
        ("device_id,device_id\n", "there are two columns device_id"),
        ("device_id,DEVICE_ID\n", "there are two columns device_id"),
    ] {
        for step in [1, 4, 1000] {
            let Err(error) = cut(text.as_bytes(), step) else { panic!("{text}") };
            assert!(error.to_string().contains(expected), "{text}: {error}");
        }
    }
    assert!(cut(b"\xff\xfe\x00\x01", 2).is_err());
    let (_, columns) = cut(HEADER.as_bytes(), 3).unwrap();
    assert_eq!(columns.names.ignored, ["extra"]);
    let capitals = "\u{feff}Timestamp, DEVICE_ID ,\"total_errors\",Total_Files_Synced,ID,Extra\r\n1,pi,0,1,5,x";
    let (records, columns) = cut(capitals.as_bytes(), 2).unwrap();
    assert_eq!(columns.names.capital, ["Timestamp", "DEVICE_ID", "Total_Files_Synced"]);
    assert_eq!(columns.names.ignored, ["Extra"]);
    let expected = r#"{"timestamp":"1","device_id":"pi","total_errors":0,"total_files_synced":1}"#;
    assert_eq!(records.iter().map(told).collect::<Vec<_>>(), [expected]);
}

/// A line that is an event by itself, of a device with a unique name.
fn event_line() -> impl Strategy<Value = String> {
    let note = prop_oneof![
        "[a-z ;']{0,6}",
        "[a-z ,\"\n]{0,6}".prop_map(|text| format!("\"{}\"", text.replace('"', "\"\""))),
        "[a-z]{1,3}\"[a-z]{0,3}",
    ];
    let metadata = prop_oneof![Just(""), Just("{}"), Just("\"{\"\"a\"\":\n1}\""), Just("\"\n{}\"")];
    (note, metadata).prop_map(|(note, metadata)| format!("2025,DEVICE,0,1,{note},{metadata},"))
}

/// A line that is no event, or may be one.
fn other_line() -> impl Strategy<Value = String> {
    prop_oneof!["[ab1,\" ]{0,12}", "2025,x,[01],1,[ab\",]{0,8}", Just("\0\0".to_owned())]
}

proptest! {
    /// Each line that is an event becomes one record, whatever stands between such lines. The size of the chunks makes
    /// no difference.
    #[test]
    fn no_event_vanishes(
        lines in prop::collection::vec((event_line(), prop::option::of(other_line())), 1..8),
        step in 1usize..40,
    ) {
        let mut text = HEADER.to_owned();
        for (number, (event, other)) in lines.iter().enumerate() {
            text += &event.replace("DEVICE", &format!("pi-{number}"));
            text.push('\n');
            if let Some(other) = other {
                text += other;
                text.push('\n');
            }
        }
        let (records, _) = cut(text.as_bytes(), 1 << 20).unwrap();
        for number in 0..lines.len() {
            let start = format!("{{\"timestamp\":\"2025\",\"device_id\":\"pi-{number}\",");
            let is_it = |record: &&Record| record.problem.is_none() && record.text.starts_with(start.as_bytes());
            prop_assert_eq!(records.iter().filter(is_it).count(), 1, "pi-{} of {:?}", number, text);
        }
        let (chunked, _) = cut(text.as_bytes(), step).unwrap();
        prop_assert_eq!(records.iter().map(told).collect::<Vec<_>>(), chunked.iter().map(told).collect::<Vec<_>>());
    }

    /// No input causes a panic, and each line that is not blank is in a record.
    #[test]
    fn no_line_vanishes(text in "[a1,\"\r\n\0 ]{0,60}", step in 1usize..9) {
        let whole = format!("{HEADER}{text}\n");
        let (records, _) = cut(whole.as_bytes(), step).unwrap();
        // Cells of an ignored column are not part of a record's text, so the test counts lines.
        let (mut rows, mut cutter, mut found) = (0, CsvCutter::new(), VecDeque::new());
        cutter.push(HEADER.as_bytes(), &mut found).unwrap();
        let mut rest = format!("{text}\n").into_bytes();
        while !rest.is_empty() {
            let used = match cutter.line(&rest, true).unwrap() {
                Line::Blank(used) => { prop_assert!(rest[..used].trim_ascii().is_empty()); used }
                Line::Nuls => { rows += 1; rest.iter().take_while(|byte| **byte == 0).count() }
                Line::Record(used) | Line::Unclosed(used) => { rows += 1; used }
                Line::Long => unreachable!("the text is short"),
            };
            prop_assert!(used > 0);
            rest.drain(..used);
        }
        prop_assert_eq!(records.len(), rows);
    }
}
