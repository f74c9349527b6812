-- Failures with the date of the job's last success are after it when their ids are: that is the order of a history.
-- Before, none of them counted. Only jobs that may have such failures are counted again, and only where all events
-- are still kept.
update device_jobs stored
   set consecutive_failures = (
           select count(*)
             from sync_events event
            where event.device_id = stored.device_id
              and coalesce(event.job, '') = stored.job
              and event.total_errors > 0
              and (event.timestamp, event.id) > (stored.last_success, (
                      select max(success.id)
                        from sync_events success
                       where success.device_id = stored.device_id
                         and coalesce(success.job, '') = stored.job
                         and success.total_errors <= 0
                         and success.timestamp = stored.last_success
                  ))
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
