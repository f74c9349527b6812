-- Also in sessions that replay what another database did (`session_replication_role`), where ordinary triggers rest.
alter table audit_log enable always trigger audit_log_is_append_only;
