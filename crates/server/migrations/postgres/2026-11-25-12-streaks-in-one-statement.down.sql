-- loses: nothing
drop function pisync_streak;
