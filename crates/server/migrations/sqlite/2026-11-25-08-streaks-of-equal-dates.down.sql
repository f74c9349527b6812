-- loses: nothing
-- The version before does not count failures with the date of the last success.
update device_jobs
   set consecutive_failures = (
           select count(*)
             from sync_events event
            where event.device = device_jobs.device
              and ifnull(event.job, '') = device_jobs.job
              and event.total_errors > 0
              and event.timestamp > device_jobs.last_success
       )
 where last_failure >= last_success
   and last_success >= ifnull((select streaks_since from roll_up_state), -9223372036854775808)
   and exists (
           select 1
             from sync_events event
            where event.device = device_jobs.device
              and ifnull(event.job, '') = device_jobs.job
              and event.total_errors > 0
              and event.timestamp = device_jobs.last_success
       );
