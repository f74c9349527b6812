-- loses: nothing
drop table trusted_time;
