-- loses: nothing
drop trigger audit_log_is_only_added_to;
drop trigger audit_log_is_not_replaced;
