-- Counts a job's failures after its last success, by date and then by id, up to its last failure, where ingest
-- cannot tell the streak from the figures alone. Ingest's upsert of figures calls it once it has the job's row locked.
-- It must stay volatile: each call then looks at the tables as they are at that moment. So it sees what another server
-- has committed while ingest waited for the row, and the events that ingest's own statement has inserted by then.
create function pisync_streak(of_device text, of_job text, success_at timestamptz, failure_at timestamptz)
    returns bigint language plpgsql volatile as $$
begin
    return (
        select count(*)
          from sync_events event
         where event.device_id = of_device
           and coalesce(event.job, '') = of_job
           and event.total_errors > 0
           and event.timestamp <= failure_at
           and (event.timestamp, event.id) > (coalesce(success_at, '-infinity'), coalesce((
                   select max(success.id)
                     from sync_events success
                    where success.device_id = of_device
                      and coalesce(success.job, '') = of_job
                      and success.total_errors <= 0
                      and success.timestamp = success_at
               ), 0))
    );
end
$$;
