-- loses: nothing
-- The version before does not count failures with the date of the last success.
update device_jobs stored
   set consecutive_failures = (
           select count(*)
             from sync_events event
            where event.device_id = stored.device_id
              and coalesce(event.job, '') = stored.job
              and event.total_errors > 0
              and event.timestamp > stored.last_success
       )
 where stored.last_failure >= stored.last_success
   and stored.last_success >= coalesce((select streaks_since from roll_up_state), '-infinity')
   and exists (
           select
             from sync_events event
            where event.device_id = stored.device_id
              and coalesce(event.job, '') = stored.job
              and event.total_errors > 0
              and event.timestamp = stored.last_success
       );
