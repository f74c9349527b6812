-- loses: nothing
alter table audit_log enable trigger audit_log_is_append_only;
