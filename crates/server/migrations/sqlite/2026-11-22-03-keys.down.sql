-- loses: every API key and the audit log
drop table audit_log;
drop table api_key_changes;
drop table api_keys;
