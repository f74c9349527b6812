//! Every version's database becomes one of the newest, and goes back, with everything that was in it. A
//! version is a migration, and the rows that its own program wrote: each new migration needs its own here.

use std::{path::Path, sync::Arc};

use pisync::store::{
    self, FailureQuery, Figures, Freshness, HistoryQuery, Store, Window,
    migrations::{Migration, Migrator},
};
use pisync_core::{EventId, SyncEvent, Timestamp};

use crate::support::{
    events::{at, device_id, failure, now, success, write},
    store::{TestDatabase, assert_right, differences},
};

both_stores!(a_database_that_any_version_has_filled, streaks_follow_the_rule_of_their_version);

/// What the program wrote once a migration was its newest, and what there is to see of it ever after.
struct Version {
    /// The migration.
    name: &'static str,
    sqlite: &'static str,
    postgres: &'static str,
    /// An SQL expression that counts its rows, in this version's database and every later one.
    count: &'static str,
    rows: i64,
}

/// A sweep finds the only device silent.
const FOUND_SILENT: &str = "
    update device_health set state = 'silent';
    update group_states set state = 'silent';
    update device_states set urgency = 0;
";

/// From the first release on. The present is 2026-11-22T12:00:00Z, in milliseconds 1795348800000.
const VERSIONS: &[Version] = &[
    Version {
        name: "2026-11-22-01-sync-events",
        // Two jobs of one device, the unnamed one failing twice since its success; and one that never reported.
        sqlite: "
            insert into devices (id, device_id, name, \"group\", created_at)
            values (1, 'first', 'Library', 'school', 1795345200000), (2, 'silent', null, null, 1795345200000);
            insert into sync_events (
                id, device, timestamp, total_files_synced, total_errors, internet_speed, job, duration,
                bytes_synced, metadata, created_at
            ) values
                (1, 1, 1795345200000, 5, 0, 4560, null, 73250, 1024, '{\"tool\":\"rsync\"}', 1795345200100),
                (2, 1, 1795345260000, 0, 2, null, null, null, null, null, 1795345260100),
                (3, 1, 1795345320000, 1, 1, 100, null, null, null, null, 1795345320100),
                (4, 1, 1795345320000, 7, 0, null, 'nightly', null, null, null, 1795345320100);
            insert into device_jobs values
                (1, '', 3, 2, 6, 3, 4660, 2, 1795345200000, 1795345320000, 1795345200000, 1795345320000, 2,
                 1795345320100),
                (1, 'nightly', 1, 0, 7, 0, 0, 0, 1795345320000, 1795345320000, 1795345320000, null, 0,
                 1795345320100);
        ",
        postgres: "
            create table sync_events_2026_11 partition of sync_events
                for values from ('2026-11-01 00:00+00') to ('2026-12-01 00:00+00');
            insert into devices (device_id, name, \"group\", created_at, updated_at)
            values ('first', 'Library', 'school', '2026-11-22 11:00+00', '2026-11-22 11:02+00'),
                   ('silent', null, null, '2026-11-22 11:00+00', '2026-11-22 11:00+00');
            insert into sync_events (
                id, device_id, timestamp, total_files_synced, total_errors, internet_speed, job,
                duration_seconds, bytes_synced, metadata, created_at, updated_at
            )
            select id, 'first', timestamp::timestamptz, files, errors, speed, job, duration, bytes, metadata,
                   timestamp::timestamptz + interval '100 ms', timestamp::timestamptz + interval '100 ms'
              from (values
                  (1, '2026-11-22 11:00+00', 5, 0, 45.6, null, 73.25, 1024, '{\"tool\":\"rsync\"}'),
                  (2, '2026-11-22 11:01+00', 0, 2, null, null, null, null, null),
                  (3, '2026-11-22 11:02+00', 1, 1, 1.0, null, null, null, null),
                  (4, '2026-11-22 11:02+00', 7, 0, null, 'nightly', null, null, null)
              ) as events (id, timestamp, files, errors, speed, job, duration, bytes, metadata);
            select setval('sync_events_id_seq', 4);
            insert into device_jobs values
                ('first', '', 3, 2, 6, 3, 4660, 2, '2026-11-22 11:00+00', '2026-11-22 11:02+00',
                 '2026-11-22 11:00+00', '2026-11-22 11:02+00', 2, '2026-11-22 11:02:00.1+00'),
                ('first', 'nightly', 1, 0, 7, 0, 0, 0, '2026-11-22 11:02+00', '2026-11-22 11:02+00',
                 '2026-11-22 11:02+00', null, 0, '2026-11-22 11:02:00.1+00');
        ",
        count: "(select count(*) from sync_events where id <= 4) + (select count(*) from devices)
                     + (select count(*) from device_jobs)",
        rows: 4 + 2 + 2,
    },
    Version {
        name: "2026-11-22-02-event-keys-and-roll-ups",
        // The events before are aggregated; one with an id of the device's own is not.
        sqlite: "
            insert into device_days values (1, 1795305600000, 4, 2, 13, 3, 4660, 2);
            insert into fleet_hours values (1795345200000, 4, 2, 13, 3, 4660, 2);
            update roll_up_state set folded_id = 4;
            insert into sync_events (
                id, device, timestamp, total_files_synced, total_errors, job, created_at, event_id
            ) values (5, 1, 1795345380000, 1, 1, null, 1795345380100, 'run-5');
            insert into event_keys values (1, 'run-5', 5, 1795345380100);
            update device_jobs
               set total_syncs = 4, failed_syncs = 3, total_files_synced = 7, total_errors = 4,
                   last_sync = 1795345380000, last_failure = 1795345380000, consecutive_failures = 3,
                   last_received = 1795345380100
             where job = '';
        ",
        postgres: "
            insert into device_days values ('first', '2026-11-22', 4, 2, 13, 3, 4660, 2);
            insert into fleet_hours values ('2026-11-22 11:00+00', 4, 2, 13, 3, 4660, 2);
            update roll_up_state set folded_until = '2026-11-22 11:02:30+00';
            insert into sync_events (
                id, device_id, timestamp, total_files_synced, total_errors, created_at, updated_at, event_id
            ) values (nextval('sync_events_id_seq'), 'first', '2026-11-22 11:03+00', 1, 1,
                      '2026-11-22 11:03:00.1+00', '2026-11-22 11:03:00.1+00', 'run-5');
            insert into event_keys values
                ('first', 'run-5', 5, '2026-11-22 11:03+00', '2026-11-22 11:03:00.1+00');
            update device_jobs
               set total_syncs = 4, failed_syncs = 3, total_files_synced = 7, total_errors = 4,
                   last_sync = '2026-11-22 11:03+00', last_failure = '2026-11-22 11:03+00',
                   consecutive_failures = 3, last_received = '2026-11-22 11:03:00.1+00'
             where job = '';
        ",
        count: "(select count(*) from event_keys) + (select count(*) from sync_events where event_id = 'run-5')
                     + (select sum(total_syncs) from device_days) + (select sum(total_syncs) from fleet_hours)",
        rows: 1 + 1 + 5 + 5,
    },
    Version {
        name: "2026-11-22-03-keys",
        sqlite: "
            insert into api_keys (hash, hint, name, scope, created_at)
            values (x'00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff', 'psk_abc', 'me', 'admin',
                    1795345200000);
            update api_key_changes set version = 1;
            insert into audit_log (at, via, action, subject, details)
            values (1795345200000, 'command line', 'key.create', '1', '{\"hint\":\"psk_abc\"}');
        ",
        postgres: "
            insert into api_keys (hash, hint, name, scope, created_at)
            values ('\\x00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff', 'psk_abc', 'me', 'admin',
                    '2026-11-22 11:00+00');
            update api_key_changes set version = 1;
            insert into audit_log (at, via, action, subject, details)
            values ('2026-11-22 11:00+00', 'command line', 'key.create', '1', '{\"hint\":\"psk_abc\"}');
        ",
        count: "(select count(*) from api_keys) + (select count(*) from audit_log)
                     + (select version from api_key_changes)",
        rows: 3,
    },
    Version {
        name: "2026-11-22-04-imports",
        sqlite: "
            insert into imports values
                (x'01112233445566778899aabbccddeeff00112233445566778899aabbccddeeff', 'events.csv',
                 x'02112233445566778899aabbccddeeff00112233445566778899aabbccddeeff', 70,
                 x'03112233445566778899aabbccddeeff00112233445566778899aabbccddeeff', 2, 1, 1795345200000);
        ",
        postgres: "
            insert into imports values
                ('\\x01112233445566778899aabbccddeeff00112233445566778899aabbccddeeff', 'events.csv',
                 '\\x02112233445566778899aabbccddeeff00112233445566778899aabbccddeeff', 70,
                 '\\x03112233445566778899aabbccddeeff00112233445566778899aabbccddeeff', 2, true,
                 '2026-11-22 11:00+00');
        ",
        count: "(select records + rejected from imports)",
        rows: 72,
    },
    Version {
        name: "2026-11-23-05-ingest-journal",
        // How far the journal has come, which is of no use without it.
        sqlite: "update ingest_state set settled = 7",
        postgres: "",
        count: "(select 1)",
        rows: 1,
    },
    Version {
        name: "2026-11-23-06-failed-events",
        // An index, which the first version's failures are in.
        sqlite: "",
        postgres: "",
        count: "(select count(*) from sync_events where total_errors > 0 and id <= 4)",
        rows: 2,
    },
    Version {
        name: "2026-11-25-07-ingest-progress",
        // How far a record has come, which is of no use without the journal.
        sqlite: "update ingest_state set settled_events = 3",
        postgres: "",
        count: "(select 1)",
        rows: 1,
    },
    Version {
        name: "2026-11-25-08-streaks-of-equal-dates",
        // Figures, which here are what they were.
        sqlite: "",
        postgres: "",
        count: "(select sum(consecutive_failures) from device_jobs)",
        rows: 3,
    },
    Version {
        name: "2026-11-25-08-trusted-time",
        sqlite: "insert into trusted_time values (1, 1795345200000, 1795345200000, 0)",
        postgres: "insert into trusted_time values (1, '2026-11-22 11:00+00', '2026-11-22 11:00+00', 0)",
        count: "(select count(*) from trusted_time)",
        rows: 1,
    },
    Version {
        name: "2026-11-25-10-audit-log",
        // Triggers, which the lines of version 3 are none the worse for.
        sqlite: "",
        postgres: "",
        count: "(select count(*) from audit_log)",
        rows: 1,
    },
    Version {
        name: "2026-11-25-12-streaks-in-one-statement",
        // A function, which has no rows.
        sqlite: "",
        postgres: "",
        count: "(select 1)",
        rows: 1,
    },
    Version {
        name: "2026-11-25-13-device-deletions",
        // A deletion that was interrupted.
        sqlite: "
            insert into device_deletions values ('silent', 1795345200000, 1795345200000, 'local', null, null, 3);
        ",
        postgres: "
            insert into device_deletions values
                ('silent', '2026-11-22 11:00+00', '2026-11-22 11:00+00', 'local', null, null, 3);
        ",
        count: "(select sum(deleted_events) from device_deletions)",
        rows: 3,
    },
    Version {
        name: "2026-11-25-14-journal-in-use",
        // Whether there must be a journal, which there is none of.
        sqlite: "",
        postgres: "",
        count: "(select 1)",
        rows: 1,
    },
    Version {
        name: "2026-11-25-15-set-aside-events",
        // A job with events from a clock that was ahead has the date at which they count.
        sqlite: "update device_jobs set set_aside_until = 1826884800000 where job = '';",
        postgres: "update device_jobs set set_aside_until = '2027-11-22 12:00+00' where job = '';",
        count: "(select count(*) from device_jobs where set_aside_until is not null)",
        rows: 1,
    },
    Version {
        name: "2026-11-26-16-device-summaries",
        // What the background task has made of the rows above.
        sqlite: "",
        postgres: "",
        count: "(select count(*) from device_summaries)",
        rows: 2,
    },
    Version {
        name: "2026-11-27-17-groups-and-days",
        // A device that moved after its first runs, and what was aggregated since.
        sqlite: "
            insert into group_changes (device, changed_at, changed_id, former_group)
            values (1, 1795345300000, 3, 'elsewhere');
            update group_days set \"group\" = 'elsewhere', runs = 2, failed_runs = 1;
            insert into group_days values ('school', 1795305600000, 2, 1);
            insert into device_day_groups values (1, 1795305600000, 'school', 2, 1);
        ",
        postgres: "
            insert into group_changes (device_id, changed_at, changed_id, former_group)
            values ('first', '2026-11-22 11:01:40+00', 0, 'elsewhere');
            update group_days set \"group\" = 'elsewhere', runs = 2, failed_runs = 1;
            insert into group_days values ('school', '2026-11-22', 2, 1);
            insert into device_day_groups values ('first', '2026-11-22', 'school', 2, 1);
        ",
        count: "(select count(*) from group_changes)
                     + (select sum(runs) from group_days where \"group\" = 'elsewhere')",
        rows: 1 + 2,
    },
    Version {
        name: "2026-11-28-18-fleet-health",
        // What somebody has set for a device, its group and the fleet, and what a sweep has found.
        sqlite: "
            insert into device_settings values
                (1, '{\"grace_seconds\":60}', 1795345200000, 1795345200000, null, 1795345200000, 0, 'note');
            insert into device_tags values (1, 'indoor'), (1, 'wall');
            insert into groups values ('school', '{\"grace_seconds\":60}', 1795345200000, null, null, null);
            update fleet_state
               set policy = '{\"grace_seconds\":60}', policy_since = 1795345200000, version = 1,
                   swept_at = 1795345200000, alive_at = 1795345200000;
            insert into fleet_changes values (1, 'device', 'first');
            insert into outages values (1795341600000, 1795345200000, 'stopped', 'node-1');
            insert into windows (name, scope, key, effect, timezone, weekly)
            values ('nights', 'group', 'school', 'closed', 'Europe/Berlin',
                    '{\"days\":[\"mon\"],\"start\":\"16:00\",\"end\":\"07:00\"}');
            insert into device_health values
                (1, 'school', 'failing', 1795345260000, '[]', 1, 0, 0, 5400000, 1800000, 1795350900000, 1795349100000,
                 null, 3600000, 86400000, 1795349100000, null, 1795345500100, 1, 0);
            insert into job_health values
                (1, '', 0, 'failing', 'failures', 1795345260000, null, null, 1795345500100, 3, 3);
            insert into group_states values ('school', 'failing', 1, 1);
            insert into state_changes (at, device_id, \"to\") values (1795345500000, 'first', 'failing');
            insert into run_starts values (1, 'nightly', 'run-6', 1795345500000, null, 1795388700000);
            insert into incidents (scope, subject, \"group\", kind, severity, since, opened_at)
            values ('device', 'first', 'school', 'failing', 'warning', 1795345260000, 1795345500000);
            insert into incident_members values (1, 'first', '[]', 1795345500000, null, 0);
            insert into incident_entries values (1, 1, 1795345500000, 'opened', null, '{}');
        ",
        postgres: "
            insert into device_settings values
                ('first', '{\"grace_seconds\":60}', '2026-11-22 11:00+00', '2026-11-22 11:00+00', null,
                 '2026-11-22 11:00+00', false, 'note');
            insert into device_tags values ('first', 'indoor'), ('first', 'wall');
            insert into groups values ('school', '{\"grace_seconds\":60}', '2026-11-22 11:00+00', null, null, null);
            update fleet_state
               set policy = '{\"grace_seconds\":60}', policy_since = '2026-11-22 11:00+00', version = 1,
                   swept_at = '2026-11-22 11:00+00', alive_at = '2026-11-22 11:00+00';
            insert into fleet_changes values (1, 'device', 'first');
            insert into outages values ('2026-11-22 10:00+00', '2026-11-22 11:00+00', 'stopped', 'node-1');
            insert into windows (name, scope, key, effect, timezone, weekly)
            values ('nights', 'group', 'school', 'closed', 'Europe/Berlin',
                    '{\"days\":[\"mon\"],\"start\":\"16:00\",\"end\":\"07:00\"}');
            insert into device_health values
                ('first', 'school', 'failing', '2026-11-22 11:01+00', '[]', true, false, false, 5400000, 1800000,
                 '2026-11-22 12:35+00', '2026-11-22 12:05+00', null, 3600000, 86400000, '2026-11-22 12:05+00', null,
                 '2026-11-22 11:05:00.1+00', 1, false);
            insert into job_health values
                ('first', '', false, 'failing', 'failures', '2026-11-22 11:01+00', null, null,
                 '2026-11-22 11:05:00.1+00', 3, 3);
            insert into group_states values ('school', 'failing', 1, 1);
            insert into state_changes (at, device_id, \"to\") values ('2026-11-22 11:05+00', 'first', 'failing');
            insert into run_starts values
                ('first', 'nightly', 'run-6', '2026-11-22 11:05+00', null, '2026-11-22 23:05+00');
            insert into incidents (scope, subject, \"group\", kind, severity, since, opened_at)
            values ('device', 'first', 'school', 'failing', 'warning', '2026-11-22 11:01+00', '2026-11-22 11:05+00');
            insert into incident_members values (1, 'first', '[]', '2026-11-22 11:05+00', null, false);
            insert into incident_entries values (1, 1, '2026-11-22 11:05+00', 'opened', null, '{}');
        ",
        count: "(select count(*) from device_settings) + (select count(*) from device_tags)
                     + (select count(*) from groups) + (select version from fleet_state)
                     + (select count(*) from fleet_changes) + (select count(*) from outages)
                     + (select count(*) from windows) + (select count(*) from device_health)
                     + (select count(*) from job_health) + (select count(*) from group_states)
                     + (select count(*) from state_changes) + (select count(*) from run_starts)
                     + (select count(*) from incidents) + (select count(*) from incident_members)
                     + (select count(*) from incident_entries)",
        rows: 2 + 14,
    },
    Version {
        name: "2026-11-29-19-device-states",
        // A sweep has found another state.
        sqlite: FOUND_SILENT,
        postgres: FOUND_SILENT,
        count: "(select count(*) from device_states where urgency = 0)",
        rows: 1,
    },
    Version {
        name: "2026-11-30-20-notifications",
        // A channel, a route, and a message that waits.
        sqlite: "
            insert into channels (name, kind, config, secrets, is_enabled, is_default, created_at)
            values ('ops', 'webhook', '{}', x'0102', 1, 1, 1795345500000);
            insert into routes values (1, '{\"channels\":[1]}');
            update notify_state set version = 2;
            insert into notifications (channel, kind, \"group\", state, created_at, due_at)
            values (1, 'incidents', 'school', 'pending', 1795345500000, 1795345560000);
            insert into notification_items values (1, 1, 'opened', 1795345500000);
        ",
        postgres: "
            insert into channels (name, kind, config, secrets, is_enabled, is_default, created_at)
            values ('ops', 'webhook', '{}', '\\x0102', true, true, '2026-11-22 11:05+00');
            insert into routes values (1, '{\"channels\":[1]}');
            update notify_state set version = 2;
            insert into notifications (channel, kind, \"group\", state, created_at, due_at)
            values (1, 'incidents', 'school', 'pending', '2026-11-22 11:05+00', '2026-11-22 11:06+00');
            insert into notification_items values (1, 1, 'opened', '2026-11-22 11:05+00');
        ",
        count: "(select count(*) from channels) + (select count(*) from routes)
                     + (select version from notify_state) + (select count(*) from notifications)
                     + (select count(*) from notification_items)",
        rows: 1 + 1 + 2 + 1 + 1,
    },
    Version {
        name: "2026-12-01-21-unreconciled-devices",
        sqlite: "insert into unreconciled_devices values ('school', 1, 'failing')",
        postgres: "insert into unreconciled_devices values ('school', 'first', 'failing')",
        count: "(select count(*) from unreconciled_devices)",
        rows: 1,
    },
];

/// The program's own migrations, in their order, as files.
async fn migrations(database: &TestDatabase) -> Vec<Migration> {
    let mut migrator = migrator(database).await;
    migrator.up(now()).await.unwrap();
    let mut all = migrator.last(usize::MAX).await.unwrap();
    migrator.down(&all).await.unwrap();
    all.reverse();
    all
}

async fn migrator(database: &TestDatabase) -> Migrator {
    database.migrator(Path::new("/nonexistent")).await
}

/// Has a database live through the first versions, each of which leaves its rows.
async fn live_through(database: &TestDatabase, migrations: &[Migration]) {
    let is_sqlite = database.file().is_some();
    for (migration, version) in migrations.iter().zip(VERSIONS) {
        assert_eq!(migration.name, version.name);
        let applied_at = if is_sqlite { "1795345200000" } else { "'2026-11-22 11:00+00'" };
        let record = format!(
            "insert into pisync_migrations (name, source, checksum, batch, applied_at)
             values ('{}', 'embedded', '{}', 1, {applied_at});",
            migration.name,
            migration.checksum()
        );
        let fill = if is_sqlite { version.sqlite } else { version.postgres };
        for sql in [&migration.up, &record, fill] {
            database.execute(sql).await;
        }
    }
}

async fn a_database_that_any_version_has_filled(database: &TestDatabase) {
    let all = migrations(database).await;
    assert_eq!(all.len(), VERSIONS.len(), "a migration without rows of its version");
    for filled in 1..=all.len() {
        live_through(database, &all[..filled]).await;
        let mut migrator = migrator(database).await;
        let pending: Vec<_> =
            all[filled..].iter().map(|migration| migration.name.clone()).collect();
        assert_eq!(migrator.up(now()).await.unwrap(), pending);
        assert_newest(database, filled).await;

        // Back to the version that filled it, which finds its rows.
        let newer = migrator.last(all.len() - filled).await.unwrap();
        migrator.down(&newer).await.unwrap();
        assert_rows(database, filled).await;
        assert_eq!(migrator.up(now()).await.unwrap(), pending);
        assert_newest(database, filled).await;

        let everything = migrator.last(usize::MAX).await.unwrap();
        migrator.down(&everything).await.unwrap();
        assert_eq!(database.tables().await, ["pisync_migrations"]);
    }
}

/// What each of the first versions left is there.
async fn assert_rows(database: &TestDatabase, filled: usize) {
    for version in &VERSIONS[..filled] {
        assert_eq!(database.number(version.count).await, version.rows, "{}", version.name);
    }
}

/// What the newest version makes of the rows of the first ones.
async fn assert_newest(database: &TestDatabase, filled: usize) {
    let store = store::open(&database.target).await.unwrap();
    store.maintain(now()).await.unwrap();
    assert_right(&differences(&*store, false).await);
    assert_figures(&store, filled).await;
    // Before and after the background task has done its work.
    while store.aggregate_events(now()).await.unwrap() {}
    assert_figures(&store, filled).await;
    store.refresh_summaries().await.unwrap();
    let derived = store.verify_summaries(now(), false).await.unwrap();
    assert_eq!(derived.number(), 0, "{derived:?}");
    assert_rows(database, filled).await;

    if filled >= 2 {
        let event_id = Some(EventId::new("run-5").unwrap());
        let again = SyncEvent { event_id, ..success("first", at(0)) };
        let written = write(&mut *store.event_writer(), vec![again]).await;
        assert!(written.is_duplicate(0) && written.ids == [5], "{written:?}");
    }
    if filled >= 3 {
        let keys = store.keys().await.unwrap();
        assert_eq!((keys.version, keys.keys[0].hint.as_str()), (1, "psk_abc"));
        assert!(keys.keys[0].is_valid(now()));
        assert_eq!(store.audit(None, 10).await.unwrap()[0].action, "key.create");
    }
    if filled >= 4 {
        let import = &store.imports().await.unwrap()[0];
        assert_eq!((import.id[0], import.head[0], import.digest[0]), (1, 2, 3));
        assert_eq!((import.records, import.rejected, import.finished), (70, 2, true));
        assert_eq!((import.name.as_str(), import.at), ("events.csv", at(-3600)));
    }
    store.close().await.unwrap();
}

/// Since a failure with the date of the last success counts when it came after it.
async fn streaks_follow_the_rule_of_their_version(database: &TestDatabase) {
    let mut migrator = migrator(database).await;
    migrator.up(now()).await.unwrap();
    let store = store::open(&database.target).await.unwrap();
    store.maintain(now()).await.unwrap();
    let mut events = vec![failure("alike", at(0)), success("alike", at(0))];
    events.extend([failure("alike", at(0)), failure("alike", at(1))]);
    events.extend([success("later", at(0)), failure("later", at(1))]);
    events.extend([failure("never", at(0)), failure("never", at(0))]);
    write(&mut *store.event_writer(), events).await;
    store.close().await.unwrap();

    let streaks =
        async || database.number("(select sum(consecutive_failures) from device_jobs)").await;
    assert_eq!(streaks().await, 2 + 1 + 2);
    let all = migrator.last(usize::MAX).await.unwrap();
    let last =
        all.iter().position(|migration| migration.name == "2026-11-25-08-streaks-of-equal-dates");
    migrator.down(&all[..=last.unwrap()]).await.unwrap();
    assert_eq!(streaks().await, 1 + 1 + 2);
    migrator.up(now()).await.unwrap();
    assert_eq!(streaks().await, 2 + 1 + 2);
}

async fn assert_figures(store: &Arc<dyn Store>, filled: usize) {
    let later = i64::from(filled >= 2);
    let history = store.sync_history(&HistoryQuery::newest(device_id("first"), 10)).await.unwrap();
    let history = history.unwrap();
    let ids: Vec<_> = history.events.iter().map(|event| event.id).collect();
    assert!(ids.ends_with(&[4, 3, 2, 1]) && ids.len() == 4 + usize::from(filled >= 2), "{ids:?}");
    let first = history.events.last().unwrap();
    assert_eq!((first.internet_speed, first.duration), (Some(4560), Some(73_250)));
    assert_eq!(first.bytes_synced, Some(1024));
    assert!(first.metadata.as_ref().unwrap().get().contains("rsync"));
    let expected = Figures {
        total_syncs: 4 + later,
        failed_syncs: 2 + later,
        total_files_synced: 13 + later,
        total_errors: 3 + later,
        speed_sum: 4660,
        speed_count: 2,
        ..history.figures
    };
    assert_eq!(history.figures, expected);
    assert_eq!(history.figures.consecutive_failures, 2 + later);

    let stats = store.fleet_stats(Timestamp::MIN, 10, Freshness::Everything).await.unwrap();
    assert_eq!((stats.total_devices, stats.figures.total_syncs), (2, 4 + later));
    for window in [Window::last_24_hours(now()), Window::last_days(now(), 7)] {
        let sums = store.window_figures(&window).await.unwrap();
        assert_eq!((sums.total_syncs, sums.failed_syncs), (4 + later, 2 + later));
        let query = FailureQuery {
            threshold: 2,
            consecutive: false,
            window: Some(window),
            limit: None,
            offset: 0,
            after: None,
        };
        let failing = store.repeated_failures(&query).await.unwrap();
        assert_eq!(failing.items[0].figures.failed_syncs, 2 + later);
    }
}
