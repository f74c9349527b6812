"""What the OpenAPI document can say only in words, and something to be found."""

import schemathesis

KNOWN_DEVICE = "pi-device-001"
KEY_IN_USE = 1


@schemathesis.hook
def map_body(context, body):
    """An event must not be dated in the future: those of this millennium go back by one."""
    if isinstance(body, list):
        return [map_body(context, event) for event in body]
    if isinstance(body, dict) and isinstance(body.get("timestamp"), str):
        timestamp = body["timestamp"]
        if timestamp[:4].isdigit() and int(timestamp[:4]) >= 2000:
            body = {**body, "timestamp": "1" + timestamp[1:]}
    return body


@schemathesis.hook
def filter_case(context, case):
    """The event id may stand in the body or in a header, but not two different ones. A cursor comes from an answer."""
    in_header = "Idempotency-Key" in (case.headers or {})
    in_body = isinstance(case.body, dict) and case.body.get("event_id") is not None
    has_cursor = case.path.startswith("/api/devices") and "cursor" in (case.query or {})
    return not (in_header and in_body) and not has_cursor


@schemathesis.serializer("text/csv")
def table(context, value):
    """Any text may be a table. What is wrong in it is told."""
    return value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogatepass")


@schemathesis.serializer("application/x-ndjson")
def lines(context, value):
    """Any text may be lines of events: those that are none are rejected one by one."""
    return value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogatepass")


def within_years(date):
    """The same in 2032, which has a 29th of February. The server's clock stands in 2026: that is not past, and not too far ahead."""
    return "2032" + date[4:]


def is_date(value):
    return isinstance(value, str) and value[:4].isdigit()


def possible_policy(policy):
    """Cron expressions and time zones are texts with rules of their own, jobs are named once, and no more runs fail
    than there are."""
    if isinstance(policy, list):
        policy = [possible_policy(item) for item in policy]
        names = [item.get("job") for item in policy if isinstance(item, dict) and "job" in item]
        if all(name is None or isinstance(name, str) for name in names) and len(set(names)) < len(names):
            return policy[:1]
        return policy
    if not isinstance(policy, dict):
        return policy
    policy = {field: possible_policy(value) for field, value in policy.items()}
    for field, possible in (("cron", "0 2 * * *"), ("timezone", "Europe/Berlin")):
        if isinstance(policy.get(field), str) and len(policy[field]) <= 200:
            policy[field] = possible
    counts = [policy.get(field) for field in ("failures", "of_last")]
    if all(isinstance(count, int) and 1 <= count <= 50 for count in counts):
        policy["failures"], policy["of_last"] = min(counts), max(counts)
    return policy


def possible_window(body):
    """What a window is for, and its times, depend on one another."""
    body = dict(body)
    key = body.get("key")
    if body.get("scope") == "fleet":
        if isinstance(key, str) and 0 < len(key) <= 255 and key.isprintable():
            del body["key"]
    elif body.get("scope") in ("group", "device", "tag"):
        if key is None:
            body["key"] = "some"
        elif isinstance(key, str) and 0 < len(key) <= 255 and key.isprintable():
            body["key"] = key[:50]
    if isinstance(body.get("timezone"), str):
        body["timezone"] = "Europe/Berlin"
    for field, possible in (("from", "2026-01-01T00:00:00Z"), ("until", "2026-06-01T00:00:00Z")):
        if is_date(body.get(field)) or body.get("weekly") is None and body.get(field) is None:
            body[field] = possible
    return body


@schemathesis.hook
def before_call(context, case, kwargs):
    """Also for bodies that no other hook sees: a key is for a device or a group only to report for them,
    and ends in the future. So does a pause."""
    body = case.body
    if case.path.endswith("/acknowledge") and isinstance(body, dict):
        until = body.get("until")
        if isinstance(until, str) and until[:4].isdigit():
            case.body = {**body, "until": within_years(until)}
        return
    if not isinstance(body, dict):
        return
    if case.path.startswith("/api/window"):
        case.body = possible_window(body)
        return
    if "policy" in body or is_date(body.get("paused")):
        body = {**body, **({"policy": possible_policy(body["policy"])} if "policy" in body else {})}
        if is_date(body.get("paused")):
            body["paused"] = within_years(body["paused"])
        case.body = body
        return
    if body.get("scope") not in ("ingest", "read", "operate", "admin"):
        return

    def is_text(field):
        value = body.get(field)
        return isinstance(value, str) and 0 < len(value) <= 255 and value.isprintable()

    body = dict(body)
    if is_text("device_id") and (body["scope"] != "ingest" or is_text("group")):
        del body["device_id"]
    if is_text("group") and body["scope"] != "ingest":
        del body["group"]
    if is_text("expires_at") and body["expires_at"][:4].isdigit():
        body["expires_at"] = "3" + body["expires_at"][1:]
    case.body = body


@schemathesis.hook
def map_path_parameters(context, path_parameters):
    """The key that opens the door is not revoked. Half of the possible device ids become one that exists,
    unless it is to be removed."""
    if (path_parameters or {}).get("key_id") == KEY_IN_USE:
        path_parameters = {**path_parameters, "key_id": KEY_IN_USE + 1}
    device_id = (path_parameters or {}).get("device_id")
    possible = isinstance(device_id, str) and 0 < len(device_id) < 256 and device_id.isprintable()
    if possible and len(device_id) % 2 and context.operation.method != "delete":
        path_parameters = {**path_parameters, "device_id": KNOWN_DEVICE}
    return path_parameters
