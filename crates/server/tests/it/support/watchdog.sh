# Keeps a PostgreSQL server for a test process and takes it down when that process ends, however it
# ends: the end closes the pipe from which orders are read. Each order is answered with its exit code.
#
# usage: sh -c "$(cat watchdog.sh)" watchdog FOLDER BINARIES USER
# USER is whom PostgreSQL runs as, empty for whoever runs this: it refuses to run as root, which is
# what containers run tests as.

# Whoever stops the tests with a signal to all processes must not stop the cleaning up.
trap '' INT TERM HUP

folder=$1
binaries=$2
user=$3

run() {
    program=$binaries/$1
    shift
    if [ -n "$user" ]; then
        setpriv --reuid="$user" --regid="$(id -g "$user")" --init-groups "$program" "$@"
    else
        "$program" "$@"
    fi </dev/null >>"$folder/orders.log" 2>&1
}

# Sorting by language where PostgreSQL can, as most servers do: a column that is meant to sort byte by
# byte must say so itself.
create() {
    set -- --auth=trust --username=pisync --encoding=UTF8 --locale=C --no-sync \
        --wal-segsize=1 "$folder/data"
    run initdb --locale-provider=icu --icu-locale=en-US "$@" || run initdb "$@"
}

# Sends a signal to all processes of the server, the one that starts the others first.
signal() {
    main=$(head -n 1 "$folder/data/postmaster.pid") || return
    kill -s "$1" "$main"
    for status in /proc/[0-9]*/status; do
        parent=$(sed -n 's/^PPid:[[:space:]]*//p' "$status" 2>/dev/null)
        if [ "$parent" = "$main" ]; then
            process=${status#/proc/}
            kill -s "$1" "${process%/status}"
        fi
    done
    return 0
}

if [ -n "$user" ]; then
    chown "$user" "$folder"
fi

while read -r order argument settings; do
    case $order in
        create) create ;;
        follow) run pg_basebackup --pgdata="$folder/data" --host=127.0.0.1 --port="$argument" \
                    --username=pisync --write-recovery-conf --checkpoint=fast --no-sync ;;
        start) run pg_ctl start -w -t 60 -D "$folder/data" -l "$folder/server.log" \
                   -o "-p $argument -k $folder $settings" ;;
        pause) signal STOP ;;
        resume) signal CONT ;;
        stop) run pg_ctl stop -w -t 60 -D "$folder/data" -m "$argument" ;;
    esac
    echo $?
done

signal CONT 2>/dev/null
run pg_ctl stop -w -t 60 -D "$folder/data" -m immediate
rm -rf "$folder"
