-- Failures with the date of the job's last success are after it when their ids are: that is the order of a history.
-- Before, none of them counted. Only jobs that may have such failures are counted again, and only where all events
-- are still kept.
update device_jobs
   set consecutive_failures = (
           select count(*)
             from sync_events event
            where event.device = device_jobs.device
              and ifnull(event.job, '') = device_jobs.job
              and event.total_errors > 0
              and (event.timestamp, event.id) > (device_jobs.last_success, (
                      select max(success.id)
                        from sync_events success
                       where success.device = device_jobs.device
                         and ifnull(success.job, '') = device_jobs.job
                         and success.total_errors <= 0
                         and success.timestamp = device_jobs.last_success
                  ))
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
