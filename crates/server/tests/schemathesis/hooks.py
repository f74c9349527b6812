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


@schemathesis.serializer("application/x-ndjson")
def lines(context, value):
    """Any text may be lines of events: those that are none are rejected one by one."""
    return value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogatepass")


@schemathesis.hook
def before_call(context, case, kwargs):
    """Also for bodies that no other hook sees: a key is for a device or a group only to report for them,
    and ends in the future."""
    body = case.body
    if case.path.endswith("/acknowledge") and isinstance(body, dict):
        until = body.get("until")
        if isinstance(until, str) and until[:4].isdigit():
            case.body = {**body, "until": "3" + until[1:]}
        return
    if not isinstance(body, dict) or body.get("scope") not in ("ingest", "read", "operate", "admin"):
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
