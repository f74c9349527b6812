-- Fills an empty PiSync database on PostgreSQL from inside: psql -v events=N. 5,000 devices that report in
-- turn until now, each 19 times a day: 100,000 events are those of 25 hours, 10 million those of 104 days. One
-- report in ten has errors. `pisync verify --repair` adds up all figures afterwards.
do $$
declare
    month timestamptz;
begin
    for back in 0..4 loop
        month := date_trunc('month', now() at time zone 'UTC') at time zone 'UTC' - make_interval(months => back);
        execute format('create table if not exists %I partition of sync_events for values from (%L) to (%L)',
            'sync_events_' || to_char(month at time zone 'UTC', 'YYYY_MM'), month, month + interval '1 month');
    end loop;
end $$;

insert into devices (device_id, created_at, updated_at)
select 'pi-' || lpad(number::text, 5, '0'), now() - interval '110 days', now()
  from generate_series(0, 4999) as number;

insert into sync_events (device_id, timestamp, total_files_synced, total_errors, internet_speed, created_at, updated_at)
select 'pi-' || lpad((number % 5000)::text, 5, '0'), at, number % 500,
       case when random() < 0.1 then 1 + number % 5 else 0 end, (number % 10000) * 0.01, at, at
  from generate_series(1, :events) as number,
       lateral (select now() - interval '900 milliseconds' * (:events - number) as at) as moment;

update roll_up_state set folded_until = (select max(created_at) from sync_events);

vacuum analyze;
