-- `insert or replace` puts a line in the place of another one, and SQLite calls no delete trigger for that unless
-- `recursive_triggers` is on. So an id that is there is refused before the insert. Whoever gives no id gets the next
-- one; what stands in new.id then is not defined, but in fact below 1.
create trigger audit_log_is_not_replaced before insert on audit_log
when new.id >= 1 and exists (select 1 from audit_log where id = new.id)
begin
    select raise(abort, 'audit_log is append-only');
end;
-- By now new.id is what the line got. It comes after all others, so that none is slipped in between them.
create trigger audit_log_is_only_added_to after insert on audit_log
when new.id < 1 or exists (select 1 from audit_log where id > new.id)
begin
    select raise(abort, 'audit_log is append-only');
end;
