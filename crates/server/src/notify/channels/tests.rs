//! What all kinds of channels have in common, and how a message looks in each.

use serde_json::json;

use super::*;
use crate::{
    notify::{
        message::{
            MessageEvent, MessageItem, MessageKind,
            tests::{at, device, digest, message, school},
        },
        sender::SenderSettings,
        smtp::SmtpSettings,
    },
    random::Randomness,
};

/// Parts of every secret in [`fields`].
const SECRETS: [&str; 9] = [
    "hooks.example/services/T0000/s3cretpath0123",
    "s3cretpath",
    "czNjcmV0LXNpZ25pbmcta2V5LTAxMjM0NTY3",
    "s3cret-header",
    "s3cret_topic",
    "tk_s3cret",
    "s3crettelegramtoken",
    "s3cret-signing",
    "115, 51, 99",
];

fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(fields) => fields,
        other => panic!("{other} is no object"),
    }
}

/// The fields of a channel of each kind.
fn fields(kind: ChannelKind) -> Map<String, Value> {
    let url = "https://hooks.example/services/T0000/s3cretpath0123";
    object(match kind {
        ChannelKind::Webhook => json!({
            "url": url,
            "signing_secret": "whsec_czNjcmV0LXNpZ25pbmcta2V5LTAxMjM0NTY3",
            "headers": {"x-token": "s3cret-header-0123"},
        }),
        ChannelKind::Slack | ChannelKind::Discord | ChannelKind::Teams => json!({"url": url}),
        ChannelKind::Ntfy => {
            json!({"server": "https://ntfy.example/", "topic": "s3cret_topic", "token": "tk_s3cret0123456"})
        }
        ChannelKind::Telegram => {
            json!({"bot_token": "123456:s3crettelegramtoken", "chat_id": "-100123", "thread_id": 7})
        }
        ChannelKind::Email => json!({"to": "ada@example.com"}),
    })
}

fn config(kind: ChannelKind) -> ChannelConfig {
    ChannelConfig::read(kind, &fields(kind), None).unwrap()
}

fn messages(result: Result<ChannelConfig, Vec<Violation>>) -> Vec<String> {
    let violations = result.unwrap_err();
    assert!(violations.iter().all(|violation| violation.value.is_none()), "{violations:?}");
    violations.into_iter().map(|violation| violation.message).collect()
}

fn assert_hidden(text: &str) {
    for secret in SECRETS {
        assert!(!text.contains(secret), "{secret} in {text}");
    }
}

fn json_of(bytes: &[u8]) -> Value {
    serde_json::from_slice(bytes).unwrap()
}

#[test]
fn nothing_shows_a_secret() {
    for kind in ChannelKind::ALL {
        let config = config(kind);
        let until = at("2026-03-02T10:31:00Z");
        let secret = SigningSecret::generate(&Randomness::new(|| Ok([7; 32]))).unwrap();
        let rotated = config.rotated(secret.clone(), until);
        assert_eq!(rotated.is_some(), kind == ChannelKind::Webhook);
        for text in [
            format!("{config:?}"),
            format!("{config:#?}"),
            format!("{rotated:?} {rotated:#?} {secret:?}"),
            format!("{:?}", config.masked()),
            format!("{}", config.stored().0),
            // What was rendered is stored as it is.
            format!("{:?}", config.render(&message(vec![school()]), None)),
            each!(&config, channel => format!("{channel:?} {channel:#?}")),
        ] {
            assert_hidden(&text);
        }
        let rendered = config.render(&message(vec![school()]), None);
        assert_hidden(&String::from_utf8_lossy(&rendered.body));
        assert_hidden(&String::from_utf8_lossy(&rendered.plain.unwrap_or_default()));
    }
    // The test itself finds secrets.
    assert!(
        SECRETS.iter().any(|secret| format!("{:?}", fields(ChannelKind::Slack)).contains(secret))
    );
}

#[test]
fn what_is_stored_is_read_again() {
    for kind in ChannelKind::ALL {
        let config = config(kind);
        let (public, secrets) = config.stored();
        assert_eq!(ChannelConfig::from_stored(kind, &public, &secrets), Some(config.clone()));
        assert_eq!(ChannelConfig::from_stored(kind, &Value::Null, &secrets), None);
        assert_eq!(ChannelConfig::from_stored(kind, &public, b"no JSON"), None);
        assert_eq!(config.kind(), kind);
        assert_eq!(ChannelKind::from_word(kind.as_str()), Some(kind));
        assert!(kind.spacing() > Duration::ZERO);
    }
    let secret = SigningSecret::generate(&Randomness::new(|| Ok([7; 32]))).unwrap();
    let rotated = config(ChannelKind::Webhook).rotated(secret, at("2026-03-02T10:31:00Z")).unwrap();
    let (public, secrets) = rotated.stored();
    let again = ChannelConfig::from_stored(ChannelKind::Webhook, &public, &secrets);
    assert_eq!(again, Some(rotated.clone()));
    assert_ne!(again, Some(config(ChannelKind::Webhook)));
    // A change that does not name the secret keeps both of them; one that names another drops the former.
    assert_eq!(rotated.patch(&Map::new()), Ok(rotated.clone()));
    let other = object(json!({"signing_secret": "whsec_czNjcmV0LXNpZ25pbmcta2V5LTAxMjM0NTY3"}));
    assert_eq!(rotated.patch(&other), Ok(config(ChannelKind::Webhook)));
    // It is no field of the API.
    let mut foreign = fields(ChannelKind::Webhook);
    foreign.insert("former_secret".into(), json!({"secret": "x", "until": "y"}));
    assert_eq!(
        messages(ChannelConfig::read(ChannelKind::Webhook, &foreign, None)),
        ["\"former_secret\" is not allowed"]
    );
}

#[test]
fn secrets_are_masked_in_answers() {
    let masked = |kind| Value::Object(config(kind).masked());
    assert_eq!(
        masked(ChannelKind::Webhook),
        json!({"url": "…0123", "signing_secret": "…NTY3", "headers": {"x-token": "…0123"}})
    );
    assert_eq!(masked(ChannelKind::Slack), json!({"url": "…0123"}));
    assert_eq!(
        masked(ChannelKind::Ntfy),
        json!({"server": "https://ntfy.example/", "topic": "…pic", "token": "…3456"})
    );
    assert_eq!(
        masked(ChannelKind::Telegram),
        json!({"bot_token": "…oken", "chat_id": "-100123", "thread_id": 7})
    );
    assert_eq!(masked(ChannelKind::Email), json!({"to": "ada@example.com"}));
}

#[test]
fn what_is_masked_is_not_taken_for_a_secret() {
    for kind in ChannelKind::ALL {
        let present = config(kind);
        let result = ChannelConfig::read(kind, &present.masked(), Some(&present));
        let expected: Vec<String> = secret_fields(kind)
            .iter()
            .map(|field| format!("\"{field}\" is masked; leave it out to keep it"))
            .collect();
        if expected.is_empty() {
            assert_eq!(result, Ok(present));
        } else {
            assert_eq!(messages(result), expected);
            // Without the present channel nothing else is said of these fields.
            assert_eq!(messages(ChannelConfig::read(kind, &present.masked(), None)), expected);
        }
    }
}

#[test]
fn secrets_that_are_left_out_are_kept() {
    for kind in ChannelKind::ALL {
        let present = config(kind);
        let mut public = fields(kind);
        public.retain(|field, _| !secret_fields(kind).contains(&field.as_str()));
        assert_eq!(ChannelConfig::read(kind, &public, Some(&present)), Ok(present.clone()));
        assert_eq!(present.patch(&Map::new()), Ok(present.clone()));
        // Those of another kind are not.
        let other = config(ChannelKind::Email);
        let result = ChannelConfig::read(kind, &public, Some(&other));
        assert_eq!(result.is_ok(), kind == ChannelKind::Email);
    }
    // PUT: what is not secret must be there again; PATCH: it stays.
    let ntfy = config(ChannelKind::Ntfy);
    let put = ChannelConfig::read(ChannelKind::Ntfy, &Map::new(), Some(&ntfy));
    assert_eq!(messages(put), ["\"server\" is required"]);
    let without_token = ntfy.patch(&object(json!({"token": null}))).unwrap();
    assert_eq!(without_token.masked().get("token"), None);
    let telegram = config(ChannelKind::Telegram);
    let moved = telegram.patch(&object(json!({"chat_id": -5, "thread_id": null}))).unwrap();
    assert_eq!(
        (&moved.masked()["chat_id"], &moved.masked()["thread_id"]),
        (&json!("-5"), &Value::Null)
    );
}

#[test]
fn every_wrong_field_is_named_at_once() {
    let wrong = |kind, fields| messages(ChannelConfig::read(kind, &object(fields), None));
    assert_eq!(
        wrong(ChannelKind::Webhook, json!({"headers": 7, "urll": "https://s3cret"})),
        [
            "\"url\" is required",
            "\"signing_secret\" is required",
            "\"headers\" must be an object of texts",
            "\"urll\" is not allowed",
        ]
    );
    assert_eq!(
        wrong(ChannelKind::Ntfy, json!({"server": "ntfy.sh", "topic": "a b", "token": "ä"})),
        [
            "\"server\" must be a URL, such as https://example.com/hook",
            "\"topic\" must have 1 to 64 letters, digits, dashes and underscores",
            "\"token\" must be an access token, such as tk_AgQdq7mVBoFD37zQVN29RhuMzNIz2",
        ]
    );
    assert_eq!(
        wrong(
            ChannelKind::Telegram,
            json!({"bot_token": "1:a/../b", "chat_id": "Ada", "thread_id": -1})
        ),
        [
            "\"bot_token\" must be the token of a bot, such as 123456:ABC-DEF1234ghIkl",
            "\"chat_id\" must be a chat's number, such as -1001234567890, or a channel's name, such as @pisync",
            "\"thread_id\" must be a positive number",
        ]
    );
    for to in [
        "",
        "ada",
        "ada@example.com, b@example.com",
        "Ada <ada@example.com>",
        "ä@example.com",
        "a@b\r\nX: y",
    ] {
        assert_eq!(
            wrong(ChannelKind::Email, json!({"to": to})),
            ["\"to\" must be one e-mail address, such as ada@example.com"],
            "{to:?}"
        );
    }
    for (url, words) in [
        (json!("https://u:p@hooks.example/"), "must not hold a user name or a password"),
        (json!("ftp://hooks.example/"), "must begin with https:// or http://"),
        (json!(null), "must be a string"),
        (json!(5), "must be a string"),
    ] {
        for kind in [ChannelKind::Slack, ChannelKind::Discord, ChannelKind::Teams] {
            assert_eq!(wrong(kind, json!({"url": url})), [format!("\"url\" {words}")]);
        }
    }
    let with = |name: &str, value: Value| {
        let mut fields = fields(ChannelKind::Webhook);
        fields.insert(name.to_owned(), value);
        messages(ChannelConfig::read(ChannelKind::Webhook, &fields, None))
    };
    for secret in ["", "whsec_", "whsec_AAAA", "czNjcmV0LXNpZ25pbmcta2V5LTAxMjM0NTY3", "whsec_ä"] {
        assert_eq!(
            with("signing_secret", json!(secret)),
            ["\"signing_secret\" must be whsec_ and 24 to 64 bytes in base64"]
        );
    }
    let eleven: Map<String, Value> =
        (0..11).map(|name| (format!("x-{name}"), json!("v"))).collect();
    for (headers, words) in [
        (Value::Object(eleven), "must have at most 10 headers"),
        (json!({"Host": "x"}), "must not hold host, which is set by PiSync"),
        (json!({"Webhook-Id": "x"}), "must not hold webhook-id, which is set by PiSync"),
        (json!({"Content-Type": "x"}), "must not hold content-type, which is set by PiSync"),
        (json!({"x y": "x"}), "holds a name that no header has"),
        (json!({"x": "a\r\nb: c"}), "must hold values of 1 to 1000 visible characters"),
        (json!({"x": ""}), "must hold values of 1 to 1000 visible characters"),
        (json!({"x": 1}), "must be an object of texts"),
        (json!({"X": "1", "x": "2"}), "holds x twice"),
    ] {
        assert_eq!(with("headers", headers), [format!("\"headers\" {words}")]);
    }
}

/// An incident of which every text is as long as it can be, and of signs that have to be escaped everywhere.
fn longest(id: i64, sign: char) -> MessageItem {
    let name = |number: usize| {
        let number = number.to_string();
        std::iter::repeat_n(sign, 255 - number.len()).chain(number.chars()).collect::<String>()
    };
    MessageItem { id, subject: name(0), members: (0..20).map(name).collect(), ..school() }
}

/// How long the part of a body is that a service measures, and its limit.
fn measured(kind: ChannelKind, body: &[u8]) -> (usize, usize) {
    match kind {
        ChannelKind::Webhook => (body.len(), 20 << 10),
        ChannelKind::Slack => (json_of(body)["text"].as_str().unwrap().chars().count(), 4_000),
        ChannelKind::Discord => (utf16_length(json_of(body)["content"].as_str().unwrap()), 2_000),
        ChannelKind::Teams => (body.len(), 21_000),
        ChannelKind::Ntfy => {
            let whole = json_of(body);
            assert!(body.len() <= 2 * 4_096 - "\"topic\":\"\",".len() - 64);
            (whole["message"].as_str().unwrap().len(), 4_096)
        }
        ChannelKind::Telegram => (utf16_length(json_of(body)["text"].as_str().unwrap()), 4_096),
        ChannelKind::Email => {
            assert!(
                body.is_ascii() && body.split(|byte| *byte == b'\n').all(|line| line.len() <= 998)
            );
            (body.len(), 64 << 10)
        }
    }
}

#[test]
fn no_message_is_longer_than_its_service_takes() {
    for sign in ['a', '"', '\\', '<', '&', '_', '*', 'ä', '字', '😀'] {
        for count in [0, 1, 2, 7, 50] {
            let items: Vec<_> = (0..count).map(|id| longest(id, sign)).collect();
            let group = Some(longest(0, sign).subject);
            let message = Message { group, items_total: 10_000, ..message(items) };
            for kind in ChannelKind::ALL {
                for template in
                    [None, Some("{% for i in incidents %}{{ i.text }}\n{% endfor %}{{ text }}")]
                {
                    let rendered = config(kind).render(&message, template);
                    let bodies = std::iter::once(&rendered.body).chain(&rendered.plain);
                    for body in bodies {
                        let (length, limit) = measured(kind, body);
                        assert!(length > 0 && length <= limit, "{kind:?} {sign} {count}: {length}");
                    }
                }
            }
        }
    }
}

#[test]
fn lines_that_are_cut_are_counted_and_linked() {
    let items: Vec<_> = (0..50).map(|id| device(id, &format!("device-{id:0>200}"))).collect();
    let message = Message { items_total: 57, ..message(items) };
    for (kind, field) in [
        (ChannelKind::Slack, "text"),
        (ChannelKind::Discord, "content"),
        (ChannelKind::Telegram, "text"),
    ] {
        let body = json_of(&config(kind).render(&message, None).body);
        let lines: Vec<&str> = body[field].as_str().unwrap().lines().collect();
        let shown = lines.len() - 3;
        assert!(shown > 5 && shown < 50, "{kind:?}: {shown}");
        assert_eq!(lines[shown + 1], format!("and {} more", 57 - shown), "{kind:?}");
        assert_eq!(lines[shown + 2], "https://fleet.example/incidents");
    }
}

#[test]
fn names_are_text_and_no_markup() {
    let name = "<!channel> *x* _y_ [a](http://b) @everyone <@1> & `c` # ~";
    let message = message(vec![device(1, name)]);
    let slack = json_of(&config(ChannelKind::Slack).render(&message, None).body);
    let text = slack["text"].as_str().unwrap();
    assert!(
        text.starts_with("*&lt;!channel&gt; *x* _y_ [a](http://b) @everyone &lt;@1&gt; &amp; `c`"),
        "{text}"
    );
    let discord = json_of(&config(ChannelKind::Discord).render(&message, None).body);
    assert_eq!(discord["allowed_mentions"], json!({"parse": []}));
    let text = discord["content"].as_str().unwrap();
    assert!(
        text.starts_with(
            "**\\<!channel\\> \\*x\\* \\_y\\_ \\[a\\]\\(http\\://b\\) \\@everyone \\<\\@1\\>"
        ),
        "{text}"
    );
    let teams = config(ChannelKind::Teams).render(&message, None);
    let card = &json_of(&teams.body)["attachments"][0]["content"];
    let run = &card["body"][0]["inlines"][0];
    assert_eq!(
        (&run["type"], run["text"].as_str().unwrap().starts_with(name)),
        (&json!("TextRun"), true)
    );
    let plain = &json_of(&teams.plain.unwrap())["attachments"][0]["content"]["body"][0];
    assert!(
        plain["text"].as_str().unwrap().contains("\\*x\\* \\_y\\_ \\[a\\]\\(http://b\\)"),
        "{plain}"
    );
    let telegram = json_of(&config(ChannelKind::Telegram).render(&message, None).body);
    assert!(telegram["text"].as_str().unwrap().starts_with(name));
    assert_eq!(telegram.get("parse_mode"), None);
    // Also where a template places them.
    let template = Some("{{ incidents[0].subject }}");
    let slack = json_of(&config(ChannelKind::Slack).render(&message, template).body);
    assert!(slack["text"].as_str().unwrap().starts_with("&lt;!channel&gt; *x*"), "{slack}");
}

/// Every kind of channel tells in a digest how the fleet is, with and without markup.
#[test]
fn a_digest_tells_how_many_devices_are_in_which_state() {
    let line = "212 devices: 198 ok, 5 failing, 9 silent";
    let escaped = |kind, text: String| match kind {
        // Of its Markdown, which has no mark in the line but the colon.
        ChannelKind::Discord => text.replace("\\\\:", ":"),
        // A line of a mail may be broken by its encoding.
        ChannelKind::Email => text.replace("=\r\n", ""),
        _ => text,
    };
    for items in [vec![], vec![school()], vec![school(), device(1, "pi")]] {
        let message = digest(items);
        for kind in ChannelKind::ALL {
            let rendered = config(kind).render(&message, None);
            for body in std::iter::once(&rendered.body).chain(&rendered.plain) {
                let text = escaped(kind, String::from_utf8(body.clone()).unwrap());
                assert!(text.contains(line), "{kind:?}: {text}");
            }
        }
    }
    let body = json_of(&config(ChannelKind::Webhook).render(&digest(vec![school()]), None).body);
    assert_eq!(body["type"], "fleet.digest");
    assert_eq!(
        body["data"]["devices"],
        json!({"paused": 0, "never": 0, "silent": 9, "failing": 5, "degraded": 0, "ok": 198})
    );
    assert_eq!(body["data"]["group"], Value::Null);
    // Other messages are about what has happened.
    let body = json_of(&config(ChannelKind::Webhook).render(&message(vec![school()]), None).body);
    assert_eq!(body["data"].get("devices"), None);
}

#[test]
fn the_webhooks_body_is_the_contracts() {
    let rendered = config(ChannelKind::Webhook).render(&message(vec![school()]), None);
    assert_eq!((rendered.content_type.as_str(), rendered.plain), ("application/json", None));
    let text = "school-17: 199 of 200 devices silent, last heard 09:00 UTC";
    let whole = format!(
        "{text}\nSeverity critical, since 2026-03-02 10:30 UTC.\nDevices: pi-001 and 198 more\n\
         https://fleet.example/incidents/812"
    );
    assert_eq!(
        String::from_utf8(rendered.body).unwrap(),
        format!(
            concat!(
                r#"{{"type":"fleet.incidents","timestamp":"2026-03-02T10:31:00.000Z","data":{{"group":"school-17","#,
                r#""incidents":[{{"event":"opened","id":812,"scope":"group","subject":"school-17","kind":"silent","#,
                r#""severity":"critical","since":"2026-03-02T10:30:00.000Z","text":"{}","members":["pi-001"],"#,
                r#""members_total":199,"url":"https://fleet.example/incidents/812"}}],"incidents_total":1,"text":{}}}}}"#
            ),
            text,
            Value::from(whole)
        )
    );
    let resolved = MessageItem {
        event: MessageEvent::Resolved,
        resolution: Some("recovered".into()),
        lasted_seconds: Some(60),
        ..school()
    };
    let message = Message { base_url: None, group: None, ..message(vec![resolved]) };
    let body = json_of(&config(ChannelKind::Webhook).render(&message, None).body);
    let incident = &body["data"]["incidents"][0];
    assert_eq!(
        (&incident["resolution"], &incident["lasted_seconds"]),
        (&json!("recovered"), &json!(60))
    );
    assert_eq!((incident.get("url"), &body["data"]["group"]), (None, &Value::Null));
    for (kind, word) in [(MessageKind::Digest, "fleet.digest"), (MessageKind::Test, "fleet.test")] {
        let body =
            config(ChannelKind::Webhook).render(&Message { kind, ..message.clone() }, None).body;
        assert_eq!(json_of(&body)["type"], word);
    }
}

#[test]
fn a_webhooks_body_counts_what_it_does_not_list() {
    let items: Vec<_> = (0..60).map(|id| longest(id, 'n')).collect();
    let many = Message { items_total: 10_000, ..message(items) };
    let body = config(ChannelKind::Webhook).render(&many, None).body;
    let data = &json_of(&body)["data"];
    let incidents = data["incidents"].as_array().unwrap();
    assert!((10..=50).contains(&incidents.len()), "{}", incidents.len());
    assert_eq!(data["incidents_total"], 10_000);
    assert!(body.len() > 15 << 10, "{}", body.len());
    // A few incidents have room for all of the members.
    let members: Vec<String> = (0..20).map(|member| format!("pi-{member}")).collect();
    let items = (0..5).map(|id| MessageItem { id, members: members.clone(), ..school() }).collect();
    let body = config(ChannelKind::Webhook).render(&message(items), None).body;
    for incident in json_of(&body)["data"]["incidents"].as_array().unwrap() {
        assert_eq!(incident["members"].as_array().unwrap().len(), 20);
    }
    let items = (0..60).map(|id| device(id, "a")).collect();
    let body = config(ChannelKind::Webhook).render(&message(items), None).body;
    assert_eq!(json_of(&body)["data"]["incidents"].as_array().unwrap().len(), 50);
}

#[test]
fn a_template_is_the_text_and_a_failing_one_is_not() {
    let message = message(vec![school()]);
    for (kind, field) in [
        (ChannelKind::Slack, "/text"),
        (ChannelKind::Discord, "/content"),
        (ChannelKind::Teams, "/attachments/0/content/body/0/text"),
        (ChannelKind::Ntfy, "/message"),
        (ChannelKind::Telegram, "/text"),
        (ChannelKind::Webhook, "/data/text"),
    ] {
        let body = |template| json_of(&config(kind).render(&message, Some(template)).body);
        let made = body("Hello {{ group }}:\n{{ incidents[0].id }}");
        let text = made.pointer(field).unwrap().as_str().unwrap().to_owned();
        let text = text.replace("\n\n", "\n");
        assert_eq!(text, "Hello school-17:\n812", "{kind:?}");
        assert_eq!(
            body("{{ nope }}"),
            json_of(&config(kind).render(&message, None).body),
            "{kind:?}"
        );
    }
}

#[test]
fn ntfys_priority_is_the_severitys() {
    let priority = |items: Vec<MessageItem>| {
        let body = json_of(&config(ChannelKind::Ntfy).render(&message(items), None).body);
        (body["priority"].as_u64().unwrap(), body["tags"][0].as_str().unwrap().to_owned())
    };
    let resolved = MessageItem { event: MessageEvent::Resolved, ..school() };
    let info = MessageItem { severity: "info".into(), ..school() };
    assert_eq!(priority(vec![device(1, "a"), school()]), (5, "rotating_light".into()));
    assert_eq!(priority(vec![device(1, "a"), resolved.clone()]), (4, "warning".into()));
    assert_eq!(priority(vec![info]), (3, "warning".into()));
    assert_eq!(priority(vec![resolved]), (3, "white_check_mark".into()));
    let body = json_of(&config(ChannelKind::Ntfy).render(&message(vec![school()]), None).body);
    assert_eq!(body["title"], "school-17: 199 of 200 devices silent, last heard 09:00 UTC");
    assert_eq!(
        body["message"],
        "Severity critical, since 2026-03-02 10:30 UTC.\nDevices: pi-001 and 198 more"
    );
    assert_eq!(body["click"], "https://fleet.example/incidents/812");
}

#[test]
fn mail_is_threaded_by_incident() {
    let mail = |message: &Message| {
        String::from_utf8(config(ChannelKind::Email).render(message, None).body).unwrap()
    };
    let opened = mail(&message(vec![school(), device(811, "pi-201")]));
    for line in [
        "Date: Mon, 02 Mar 2026 10:31:00 +0000\r\n",
        "Subject: school-17: 2 opened\r\n",
        "Auto-Submitted: auto-generated\r\n",
        "MIME-Version: 1.0\r\n",
        "References: <incident-812@fleet.example> <incident-811@fleet.example>\r\n",
        "\r\n\r\nschool-17: 2 opened\r\n",
    ] {
        assert!(opened.contains(line), "{line:?} in {opened}");
    }
    let resolved = MessageItem { event: MessageEvent::Resolved, ..school() };
    let resolved = mail(&message(vec![resolved]));
    assert!(resolved.contains("References: <incident-812@fleet.example>\r\n"), "{resolved}");
    // No name can add a header.
    let forged = mail(&message(vec![device(1, "pi\r\nBcc: eve@example.com\r\n\r\nx")]));
    assert!(!forged.contains("\r\nBcc") && !forged.contains("\nBcc"), "{forged}");
    let test = mail(&Message::test(at("2026-03-02T10:31:00Z"), None));
    assert!(!test.contains("References"), "{test}");
}

#[test]
fn an_answer_that_repeats_the_address_gives_no_secret_away() {
    for kind in ChannelKind::ALL {
        let secrets = config(kind).redactable();
        for answer in [
            "Cannot POST /services/T0000/s3cretpath0123",
            "No route s3cretpath0123",
            "https://hooks.example/services/T0000/s3cretpath0123 not found",
            "unknown topic s3cret_topic",
            "bad token tk_s3cret0123456",
            "bot123456:s3crettelegramtoken",
            "s3cret-header-0123",
            "whsec_czNjcmV0LXNpZ25pbmcta2V5LTAxMjM0NTY3",
        ] {
            let is_ours = fields(kind).values().any(|value| {
                let value = value.to_string();
                value
                    .split(['/', '"'])
                    .filter(|part| part.len() > 8)
                    .any(|part| answer.contains(part))
            });
            if is_ours {
                assert_hidden(&crate::notify::redact(answer, &secrets));
            }
        }
    }
}

#[tokio::test]
async fn a_target_is_checked_before_it_is_stored() {
    let nobody = Sender::new(SenderSettings::default()).unwrap();
    let violation = async |sender: &Sender, kind, fields| {
        let config = ChannelConfig::read(kind, &object(fields), None).unwrap();
        config.check_target(sender).await.err().map(|violation| violation.message)
    };
    assert_eq!(
        violation(&nobody, ChannelKind::Slack, json!({"url": "https://10.0.0.5/x"}))
            .await
            .as_deref(),
        Some("\"url\" leads to 10.0.0.5, a private address; allow it with NOTIFY_ALLOW=10.0.0.0/8")
    );
    let ntfy = json!({"server": "http://[::1]:80", "topic": "topic"});
    assert_eq!(
        violation(&nobody, ChannelKind::Ntfy, ntfy).await.as_deref(),
        Some("\"server\" leads to ::1, a loopback address; allow it with NOTIFY_ALLOW=::1/128")
    );
    assert_eq!(
        violation(&nobody, ChannelKind::Discord, json!({"url": "https://1.1.1.1/x"})).await,
        None
    );
    let email = || json!({"to": "ada@example.com"});
    assert_eq!(
        violation(&nobody, ChannelKind::Email, email()).await.as_deref(),
        Some("\"kind\" cannot be email: there is no server for it; set SMTP_URL and SMTP_FROM")
    );
    let smtp = SmtpSettings::parse("smtp://mail.example", Some("pisync@example.com")).unwrap();
    let settings = SenderSettings { smtp: Some(smtp), ..SenderSettings::default() };
    let sender = Sender::new(settings).unwrap();
    assert_eq!(violation(&sender, ChannelKind::Email, email()).await, None);
}
