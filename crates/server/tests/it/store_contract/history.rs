//! Events in, events out: ids, order, pages, filters, and the widest values.

use pisync::store::{HistoryQuery, StoredEvent, SyncHistory};
use pisync_core::{
    DeviceId, Mbps, Metadata, SyncDuration, SyncEvent, Timestamp,
    sync_event::{MAX_BYTES_SYNCED, MAX_COUNT},
};

use crate::support::{
    events::{at, batch_at, device_id, failure, job_name, now, of_job, success, write, write_at},
    store::TestStore,
};

every_writer!(
    ids_rise_in_order_of_arrival,
    every_field_comes_back_as_sent,
    newest_first_and_the_later_id_first_among_equals,
    oldest_first_is_the_same_backwards,
    pages_and_their_total,
    bounds_are_inclusive,
    one_job_only,
    an_unknown_device_has_no_history,
    the_largest_values,
    the_earliest_and_the_latest_instant,
    device_ids_are_taken_literally,
    device_ids_of_the_greatest_length,
    received_in_other_months,
    a_large_batch,
);

/// All of a device's events.
fn whole(device: &DeviceId) -> HistoryQuery {
    HistoryQuery::newest(device.clone(), 1000)
}

async fn history(fixture: &TestStore, query: &HistoryQuery) -> SyncHistory {
    fixture.store.sync_history(query).await.unwrap().unwrap()
}

/// Dates of the events, in seconds from now.
fn seconds(history: &SyncHistory) -> Vec<i64> {
    let from_now =
        |event: &StoredEvent| (event.timestamp.as_millisecond() - now().as_millisecond()) / 1000;
    history.events.iter().map(from_now).collect()
}

/// That `stored` is what was sent.
fn assert_stored(stored: &StoredEvent, sent: &SyncEvent, id: i64, received: Timestamp) {
    assert_eq!(stored.id, id);
    assert_eq!(stored.timestamp, sent.timestamp);
    assert_eq!(stored.total_files_synced, i64::from(sent.total_files_synced));
    assert_eq!(stored.total_errors, i64::from(sent.total_errors));
    assert_eq!(stored.internet_speed, sent.internet_speed.map(Mbps::hundredths));
    assert_eq!(stored.job, sent.job.as_ref().map(|job| job.as_str().to_owned()));
    assert_eq!(stored.duration, sent.duration.map(SyncDuration::milliseconds));
    assert_eq!(stored.bytes_synced, sent.bytes_synced.map(u64::cast_signed));
    assert_eq!(
        stored.metadata.as_ref().map(|text| text.get()),
        sent.metadata.as_ref().map(Metadata::as_str)
    );
    assert_eq!((stored.created_at, stored.updated_at), (received, received));
}

async fn ids_rise_in_order_of_arrival(fixture: &TestStore) {
    let mut writer = fixture.writer();
    // Neither the devices' order nor that of the dates is the order of arrival.
    let first = vec![success("c", at(3)), success("a", at(1)), success("c", at(2))];
    let mut ids = write(&mut *writer, first).await.ids;
    ids.extend(write(&mut *writer, vec![success("b", at(0)), success("a", at(-5))]).await.ids);
    assert_eq!(ids.len(), 5);
    assert!(ids.is_sorted_by(|left, right| left < right), "{ids:?}");
    for (device, expected) in [("a", vec![1, 4]), ("b", vec![3]), ("c", vec![0, 2])] {
        let history = history(fixture, &whole(&device_id(device))).await;
        let mut found: Vec<i64> = history.events.iter().map(|event| event.id).collect();
        found.sort_unstable();
        let expected: Vec<i64> = expected.into_iter().map(|position| ids[position]).collect();
        assert_eq!(found, expected, "{device}");
    }
}

async fn every_field_comes_back_as_sent(fixture: &TestStore) {
    let full = SyncEvent {
        total_files_synced: 150,
        total_errors: 2,
        internet_speed: Mbps::from_hundredths(4567),
        job: Some(job_name("nightly backup / Büro")),
        duration: SyncDuration::from_milliseconds(12_345),
        bytes_synced: Some(987_654_321),
        // Neither the spaces nor the order of the keys, nor a key that comes twice, are tidied up.
        metadata: Some(Metadata::new(r#"{ "b": 1.50,  "a": "\u00e9é", "b": null }"#).unwrap()),
        ..success("pi", at(-10))
    };
    let zeros = SyncEvent {
        total_files_synced: 0,
        internet_speed: Mbps::from_hundredths(0),
        duration: SyncDuration::from_milliseconds(0),
        bytes_synced: Some(0),
        metadata: Some(Metadata::new("{}").unwrap()),
        ..success("pi", at(-20))
    };
    let bare = success("pi", at(-30));
    let sent = [full, zeros, bare];
    let written = write(&mut *fixture.writer(), sent.to_vec()).await;
    let history = history(fixture, &whole(&device_id("pi"))).await;
    assert_eq!(history.events.len(), sent.len());
    for ((stored, sent), id) in history.events.iter().zip(&sent).zip(written.ids) {
        assert_stored(stored, sent, id, now());
    }
}

async fn newest_first_and_the_later_id_first_among_equals(fixture: &TestStore) {
    let mut writer = fixture.writer();
    let events = [5, 1, 5, 3, 1, 5].map(|second| success("pi", at(second)));
    let ids = write(&mut *writer, events.to_vec()).await.ids;
    let later = write(&mut *writer, vec![success("pi", at(3))]).await.ids;
    let history = history(fixture, &whole(&device_id("pi"))).await;
    let found: Vec<i64> = history.events.iter().map(|event| event.id).collect();
    assert_eq!(found, [ids[5], ids[2], ids[0], later[0], ids[3], ids[4], ids[1]]);
}

async fn oldest_first_is_the_same_backwards(fixture: &TestStore) {
    // Few dates for many events, some of them before 1970.
    let events = (0..40).map(|number| success("pi", at(number % 7 * -400_000_000)));
    write(&mut *fixture.writer(), events.collect()).await;
    let pi = device_id("pi");
    let bounded =
        HistoryQuery { from: Some(at(-2_000_000_000)), until: Some(at(-1)), ..whole(&pi) };
    for query in [whole(&pi), bounded] {
        let mut expected: Vec<_> =
            history(fixture, &query).await.events.iter().map(|event| event.id).collect();
        expected.reverse();
        for limit in [1, 3, 1000] {
            let mut query = HistoryQuery { limit, oldest_first: true, ..query.clone() };
            let mut found = Vec::new();
            loop {
                let page = fixture.store.events(&query).await.unwrap().unwrap();
                found.extend(page.events.iter().map(|event| event.id));
                let Some(next) = page.next else { break };
                query.after = Some(next);
            }
            assert_eq!(found, expected, "{limit}");
        }
    }
}

async fn pages_and_their_total(fixture: &TestStore) {
    let events = (0..10).map(|second| success("pi", at(second))).collect();
    write(&mut *fixture.writer(), events).await;
    for (limit, offset, expected) in [
        (3, 0, vec![9, 8, 7]),
        (3, 3, vec![6, 5, 4]),
        (3, 9, vec![0]),
        (3, 10, vec![]),
        (1, 4, vec![5]),
        (1000, u64::from(u32::MAX), vec![]),
    ] {
        let query = HistoryQuery { limit, offset, ..whole(&device_id("pi")) };
        let page = history(fixture, &query).await;
        assert_eq!(seconds(&page), expected, "{limit} after {offset}");
        assert_eq!(page.total_events, 10);
        let bounded = HistoryQuery { from: Some(at(2)), until: Some(at(8)), ..query };
        assert_eq!(history(fixture, &bounded).await.total_events, 7);
    }
}

async fn bounds_are_inclusive(fixture: &TestStore) {
    let events = (0..5).map(|second| success("pi", at(second))).collect();
    write(&mut *fixture.writer(), events).await;
    for (from, until, expected) in [
        (Some(at(1)), Some(at(3)), vec![3, 2, 1]),
        (Some(at(2)), None, vec![4, 3, 2]),
        (None, Some(at(2)), vec![2, 1, 0]),
        (Some(at(2)), Some(at(2)), vec![2]),
        (Some(at(3)), Some(at(2)), vec![]),
        (Some(at(2).saturating_add_milliseconds(1)), None, vec![4, 3]),
        (None, Some(at(2).saturating_add_milliseconds(-1)), vec![1, 0]),
        (Some(Timestamp::MIN), Some(Timestamp::MAX), vec![4, 3, 2, 1, 0]),
    ] {
        let query = HistoryQuery { from, until, ..whole(&device_id("pi")) };
        let found = history(fixture, &query).await;
        assert_eq!(seconds(&found), expected, "{from:?} to {until:?}");
        assert_eq!(found.total_events, expected.len() as u64, "{from:?} to {until:?}");
        // The figures are always those of everything.
        assert_eq!(found.figures.total_syncs, 5);
    }
}

async fn one_job_only(fixture: &TestStore) {
    let events = vec![
        of_job("backup", success("pi", at(0))),
        of_job("Backup", success("pi", at(1))),
        success("pi", at(2)),
        of_job("backup", failure("pi", at(3))),
        of_job("backup", success("other", at(4))),
    ];
    write(&mut *fixture.writer(), events).await;
    for (job, from, expected) in [
        ("backup", None, vec![3, 0]),
        ("backup", Some(at(1)), vec![3]),
        ("Backup", None, vec![1]),
        ("restore", None, vec![]),
        ("restore", Some(at(0)), vec![]),
    ] {
        let query = HistoryQuery { job: Some(job_name(job)), from, ..whole(&device_id("pi")) };
        let found = history(fixture, &query).await;
        assert_eq!(seconds(&found), expected, "{job} from {from:?}");
        assert_eq!(found.total_events, expected.len() as u64, "{job} from {from:?}");
    }
    assert_eq!(history(fixture, &whole(&device_id("pi"))).await.total_events, 4);
}

async fn an_unknown_device_has_no_history(fixture: &TestStore) {
    assert!(fixture.store.sync_history(&whole(&device_id("pi"))).await.unwrap().is_none());
    assert!(fixture.store.device(&device_id("pi")).await.unwrap().is_none());
    let written = write(&mut *fixture.writer(), vec![success("pi", at(0))]).await;
    assert_eq!(written.new_devices, [device_id("pi")]);
    assert_eq!(history(fixture, &whole(&device_id("pi"))).await.events.len(), 1);
    let found = fixture.store.device(&device_id("pi")).await.unwrap().unwrap();
    assert_eq!((found.device.device_id.as_str(), found.device.created_at), ("pi", now()));
    assert!(fixture.store.sync_history(&whole(&device_id("p"))).await.unwrap().is_none());
}

async fn the_largest_values(fixture: &TestStore) {
    let metadata = format!(r#"{{"text":"{}"}}"#, "x".repeat(4096 - r#"{"text":""}"#.len()));
    let largest = SyncEvent {
        total_files_synced: MAX_COUNT,
        total_errors: MAX_COUNT,
        internet_speed: Some(Mbps::parse("99999999.99").unwrap()),
        job: Some(job_name(&"𝕁".repeat(100))),
        duration: Some(SyncDuration::parse("31536000").unwrap()),
        bytes_synced: Some(MAX_BYTES_SYNCED),
        metadata: Some(Metadata::new(&metadata).unwrap()),
        ..success("pi", at(0))
    };
    let written = write(&mut *fixture.writer(), vec![largest.clone(), largest.clone()]).await;
    let history = history(fixture, &whole(&device_id("pi"))).await;
    assert_stored(&history.events[0], &largest, written.ids[1], now());
    assert_stored(&history.events[1], &largest, written.ids[0], now());
    assert_eq!(history.figures.total_files_synced, 2 * i64::from(MAX_COUNT));
    assert_eq!(history.figures.total_errors, 2 * i64::from(MAX_COUNT));
    assert_eq!(history.figures.speed_sum, 2 * 9_999_999_999);
}

async fn the_earliest_and_the_latest_instant(fixture: &TestStore) {
    let dates = [
        Timestamp::MIN,
        Timestamp::MIN.saturating_add_milliseconds(1),
        // The last instant before PostgreSQL's own epoch, and before everybody's.
        Timestamp::parse_iso8601("1999-12-31T23:59:59.999Z").unwrap(),
        Timestamp::parse_iso8601("1969-12-31T23:59:59.999Z").unwrap(),
        now().saturating_add_milliseconds(599_999),
    ];
    let mut writer = fixture.writer();
    for date in dates {
        write(&mut *writer, vec![failure("pi", date)]).await;
    }
    let found = history(fixture, &whole(&device_id("pi"))).await;
    let mut expected = dates.to_vec();
    expected.sort_unstable_by(|left, right| right.cmp(left));
    let found_dates: Vec<_> = found.events.iter().map(|event| event.timestamp).collect();
    assert_eq!(found_dates, expected);
    assert_eq!(found.figures.first_sync, Some(Timestamp::MIN));
    assert_eq!(found.figures.last_failure, Some(dates[4]));
    assert_eq!(found.figures.consecutive_failures, 5);
    // A success as early as can be ends nothing but what has the same date.
    write(&mut *writer, vec![success("pi", Timestamp::MIN)]).await;
    let found = history(fixture, &whole(&device_id("pi"))).await;
    assert_eq!(found.figures.consecutive_failures, 4);
    assert_eq!(found.figures.last_success, Some(Timestamp::MIN));
    let earliest = HistoryQuery { until: Some(Timestamp::MIN), ..whole(&device_id("pi")) };
    assert_eq!(history(fixture, &earliest).await.total_events, 2);
}

async fn device_ids_are_taken_literally(fixture: &TestStore) {
    // Each is another device, however alike some database may find them.
    let texts = [
        "pi",
        "Pi",
        "PI",
        " pi",
        "pi ",
        "p i",
        "pi%",
        "p_",
        "p\\i",
        "\"pi\"",
        "'pi'",
        "'; drop --",
        "$1",
        "?1",
        ":pi",
        "{pi}",
        "null",
        "NULL",
        "0",
        "00",
        "pí",
        "pi\u{301}",
        "ｐｉ",
        "𝓅𝒾",
        "🥧",
        "\u{200b}pi",
        "\u{feff}pi",
        "ß",
        "ss",
        "İ",
        "i̇",
        "\u{10ffff}",
        "\u{e000}",
    ];
    let mut writer = fixture.writer();
    for (number, text) in texts.iter().enumerate() {
        let second = i64::try_from(number).unwrap();
        let written = write(&mut *writer, vec![success(text, at(second))]).await;
        assert_eq!(written.new_devices, [device_id(text)]);
    }
    // And together, so that a batch's order is put to use.
    let again = texts.iter().map(|text| success(text, at(-1))).collect();
    assert_eq!(write(&mut *writer, again).await.new_devices, []);
    for (number, text) in texts.iter().enumerate() {
        let found = history(fixture, &whole(&device_id(text))).await;
        assert_eq!(seconds(&found), [i64::try_from(number).unwrap(), -1], "{text:?}");
        let found = fixture.store.device(&device_id(text)).await.unwrap().unwrap();
        assert_eq!(found.device.device_id, *text);
    }
}

async fn device_ids_of_the_greatest_length(fixture: &TestStore) {
    let longest = "🥧".repeat(DeviceId::MAX_CHARACTERS);
    let almost = format!("{}🥨", "🥧".repeat(DeviceId::MAX_CHARACTERS - 1));
    let job = "🥐".repeat(100);
    let events =
        vec![of_job(&job, failure(&longest, at(0))), of_job(&job, success(&almost, at(1)))];
    write(&mut *fixture.writer(), events).await;
    let found = fixture.store.device(&device_id(&longest)).await.unwrap().unwrap();
    assert_eq!(found.device.device_id, longest);
    assert_eq!(found.jobs[0].0.as_deref(), Some(job.as_str()));
    assert_eq!(seconds(&history(fixture, &whole(&device_id(&almost))).await), [1]);
}

async fn received_in_other_months(fixture: &TestStore) {
    let months = [
        "2026-11-30T23:59:59.999Z",
        "2026-12-01T00:00:00.000Z",
        // None of these has been prepared for: an import, a server that slept, a clock set right.
        "2025-02-28T12:00:00.000Z",
        "2027-08-01T00:00:00.000Z",
        "1999-01-01T00:00:00.000Z",
    ];
    let mut writer = fixture.writer();
    for text in months {
        let received = Timestamp::parse_iso8601(text).unwrap();
        let sent = success("pi", received);
        let written = write_at(&mut *writer, received, vec![sent.clone()]).await;
        let query =
            HistoryQuery { from: Some(received), until: Some(received), ..whole(&device_id("pi")) };
        let found = history(fixture, &query).await;
        assert_stored(&found.events[0], &sent, written.ids[0], received);
    }
    let found = history(fixture, &whole(&device_id("pi"))).await;
    assert_eq!(found.total_events, 5);
    assert_eq!(found.figures.last_seen, Timestamp::parse_iso8601(months[3]));
    // A second writer finds the partitions made.
    let received = Timestamp::parse_iso8601(months[2]).unwrap();
    write_at(&mut *fixture.writer(), received, vec![success("pi", received)]).await;
}

async fn a_large_batch(fixture: &TestStore) {
    // More than the ids that are taken ahead, and more than one might give a statement parameters.
    let events: Vec<_> = (0..10_000)
        .map(|number| success(&format!("pi-{}", number % 100), at(-number / 100)))
        .collect();
    let mut writer = fixture.writer();
    let written = writer.write(&batch_at(now(), events)).await.unwrap();
    assert_eq!(written.ids.len(), 10_000);
    assert!(written.ids.is_sorted_by(|left, right| left < right));
    assert_eq!(written.new_devices.len(), 100);
    let found = history(fixture, &whole(&device_id("pi-42"))).await;
    assert_eq!((found.total_events, found.events.len()), (100, 100));
}
