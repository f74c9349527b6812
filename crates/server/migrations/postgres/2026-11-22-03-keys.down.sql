-- loses: every API key and the audit log
drop table audit_log;
drop function audit_log_is_append_only;
drop table api_key_changes;
drop table api_keys;
