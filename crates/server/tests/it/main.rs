//! PiSync as a whole, against real databases. One binary, so that all tests share one PostgreSQL.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test that cannot go on fails by panicking"
)]

#[macro_use]
mod support;

mod api_docs;
mod api_document;
mod attacks;
mod audit_log;
mod authentication;
mod backup;
mod browser;
mod channel_command;
mod channel_mail;
mod channels;
mod channels_api;
mod clock_jumps;
mod command_line;
mod command_logs;
mod connections;
mod copy;
mod cors;
mod crash;
mod culprits;
mod database_files;
mod devices;
mod doctor;
mod documentation;
mod documented_commands;
mod documented_lists;
mod exit_codes;
mod export;
mod express;
mod faults;
mod file_owners;
mod fleet_commands;
mod fleet_month;
mod fleet_settings;
mod fuzz_corpus;
mod group_keys;
mod health;
mod help;
mod ids_used_up;
mod import;
mod import_again;
mod incident_command;
mod incidents;
mod ingest;
mod ingest_batches;
mod ingest_journal;
mod ingest_recovery;
mod json_output;
mod key_command;
mod keys;
mod kill_soak;
mod layout;
mod log_damage;
mod metrics;
mod migrate_command;
mod migrations;
mod node_wire;
mod notification_kills;
mod notification_lanes;
mod notification_list;
mod notification_scenarios;
mod notification_times;
mod notifications;
mod pages_elsewhere;
mod postgres_outcomes;
mod postgres_rights;
mod postgres_sessions;
mod rate_limit;
mod repeated_failures;
mod replay;
mod resolutions;
mod revoked_midway;
mod routes;
mod scenarios;
mod server_log;
mod settings_file;
mod signals;
mod simulate;
mod stats;
mod store_contract;
mod sweep;
mod sweep_kills;
mod sync_event;
mod sync_events;
mod sync_history;
mod sync_start;
mod take_over;
mod timeouts;
mod tls;
mod upgrades;
mod verify;
mod wrong_clock;
mod wrong_fields;
