-- loses: nothing
-- `pisync verify --repair` finds and counts the jobs whose dates have come meanwhile.
alter table device_jobs drop column set_aside_until;
