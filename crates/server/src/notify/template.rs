//! Texts that administrators write for a channel, in the language of Jinja (minijinja). A template is checked when it is
//! saved, against a sample of each kind of message. It can neither loop for long nor write without end, and it reads nothing but the message.

use std::io;

use minijinja::{
    Environment, Error, ErrorKind, UndefinedBehavior, Value as Variable, value::Serde,
};
use pisync_core::{Timestamp, Violation, ViolationCode, health::State};
use serde_json::{Value, json};

use super::message::{Message, MessageEvent, MessageItem, MessageKind};
use crate::store::StateCounts;

/// The longest template, in bytes.
pub const MAX_TEMPLATE: usize = 16 << 10;

/// The most that a template may write, in bytes. The longest text that a channel takes has 16 KiB.
const MAX_OUTPUT: usize = 32 << 10;

/// How much work a template may do: some instructions for each of 1,000 members, 20 times over. It bounds memory, too:
/// minijinja counts 64 bytes as one instruction.
const FUEL: u64 = 100_000;

/// How deep a template may nest.
const DEPTH: usize = 100;

/// The stack on which templates are read and rendered, in bytes. A chain of operators nests for each of them, and [`DEPTH`] does
/// not count these. 16,000 of them pass with 8 MiB.
const STACK: usize = 64 << 20;

/// Checks a template that is to be saved.
///
/// # Errors
/// What is wrong with it, in which line.
pub fn check(template: &str) -> Result<(), Violation> {
    let refuse = |code, words: &str| Err(Violation::of("template", code, words, None));
    if template.trim().is_empty() {
        return refuse(ViolationCode::Length, "is not allowed to be empty");
    }
    if template.len() > MAX_TEMPLATE {
        return refuse(ViolationCode::Length, "must have at most 16384 bytes");
    }
    let is_allowed = |letter: char| !letter.is_control() || matches!(letter, '\n' | '\r' | '\t');
    if !template.chars().all(is_allowed) {
        return refuse(ViolationCode::Format, "must not contain control characters");
    }
    let rendered = samples()
        .iter()
        .try_for_each(|sample| render_with(template, sample, str::to_owned).map(drop));
    rendered.map_err(|error| {
        let line = error.line().map_or_else(String::new, |line| format!(" line {line}"));
        let message = format!("\"template\"{line}: {}", explain(&error));
        Violation::worded("template", ViolationCode::Format, message, None)
    })
}

/// The text that a template makes of a message; `None` when it fails. Values pass through `escape`, since names of devices
/// are not the template's author's.
#[must_use]
pub fn render(template: &str, message: &Message, escape: fn(&str) -> String) -> Option<String> {
    let text = render_with(template, message, escape).ok()?;
    // An empty text is refused by most services.
    (!text.trim().is_empty()).then_some(text)
}

/// Renders on a thread of its own, whose stack is large enough for every template of [`MAX_TEMPLATE`] bytes.
fn render_with(
    template: &str,
    message: &Message,
    escape: fn(&str) -> String,
) -> Result<String, Error> {
    let failed = |why: &str| Error::new(ErrorKind::InvalidOperation, why.to_owned());
    std::thread::scope(|scope| {
        std::thread::Builder::new()
            .name("template".to_owned())
            .stack_size(STACK)
            .spawn_scoped(scope, || render_here(template, message, escape))
            .map_err(|error| failed(&error.to_string()))?
            .join()
            .unwrap_or_else(|_| Err(failed("the template cannot be rendered")))
    })
}

fn render_here(
    template: &str,
    message: &Message,
    escape: fn(&str) -> String,
) -> Result<String, Error> {
    let mut environment = Environment::new();
    environment.set_undefined_behavior(UndefinedBehavior::Strict);
    environment.set_fuel(Some(FUEL));
    environment.set_recursion_limit(DEPTH);
    // Errors then name the variable.
    environment.set_debug(true);
    environment.set_formatter(move |out, _, value| {
        if value.is_none() {
            return Ok(());
        }
        out.write_str(&escape(&value.to_string())).map_err(Error::from)
    });
    let mut output = Bounded(Vec::new());
    let template = environment.template_from_str(template)?;
    template.render_captured_to(Variable::from(Serde(variables(message))), &mut output)?;
    // The engine writes whole texts.
    String::from_utf8(output.0)
        .map_err(|error| Error::new(ErrorKind::WriteFailure, error.to_string()))
}

/// What a template can use. Every name is always there, so that one which passed the check does not fail later.
fn variables(message: &Message) -> Value {
    let text = message.text();
    let incidents: Vec<Value> = message.items.iter().map(|item| incident(item, message)).collect();
    json!({
        "type": message.kind.event_type(),
        "timestamp": message.at,
        "group": message.group,
        "subject": text.subject,
        "text": text.fit(MAX_OUTPUT, str::len),
        "url": text.link,
        "incidents": incidents,
        "incidents_total": message.items_total,
        "devices": devices(message.states),
    })
}

/// How many devices are in which state; without numbers in messages that do not tell it.
fn devices(states: Option<StateCounts>) -> Value {
    let number = |state| states.map(|states| states.count(state));
    let numbers = State::ALL.map(|state| (state.as_str().to_owned(), json!(number(state))));
    Value::Object(numbers.into_iter().collect())
}

fn incident(item: &MessageItem, message: &Message) -> Value {
    json!({
        "event": item.event.as_str(),
        "id": item.id,
        "scope": item.scope,
        "subject": item.subject,
        "kind": item.kind,
        "severity": item.severity,
        "since": item.since,
        "text": item.text(message.at),
        "resolution": item.resolution,
        "lasted_seconds": item.lasted_seconds,
        "affected": item.affected,
        "judged": item.judged,
        "last_heard": item.last_heard,
        "members": item.members,
        "members_total": item.members_total,
        "url": message.base().map(|base| item.url(base)),
    })
}

/// A message of each kind that a template is used for. A template must pass with both.
fn samples() -> [Message; 2] {
    let incidents = sample();
    let still_open = incidents.items.iter().map(|item| MessageItem {
        event: MessageEvent::Reminder,
        resolution: None,
        lasted_seconds: None,
        ..item.clone()
    });
    let digest = Message {
        kind: MessageKind::Digest,
        group: None,
        items: still_open.collect(),
        states: Some(StateCounts([0, 1, 199, 2, 0, 10])),
        ..incidents.clone()
    };
    [incidents, digest]
}

/// A message in which everything happens that may happen to incidents.
fn sample() -> Message {
    // 2026-03-02T10:31:00Z.
    let at = Timestamp::from_millisecond(1_772_447_460_000).unwrap_or(Timestamp::MIN);
    let group = MessageItem {
        event: MessageEvent::Opened,
        id: 812,
        scope: "group".to_owned(),
        subject: "school-17".to_owned(),
        kind: "silent".to_owned(),
        severity: "critical".to_owned(),
        since: at.saturating_add_milliseconds(-60_000),
        resolution: None,
        lasted_seconds: None,
        affected: 199,
        judged: 200,
        last_heard: Some(at.saturating_add_milliseconds(-5_450_000)),
        members: vec!["pi-001".to_owned(), "pi-002".to_owned()],
        members_total: 199,
    };
    let device = MessageItem {
        event: MessageEvent::Resolved,
        id: 811,
        scope: "device".to_owned(),
        subject: "pi-201".to_owned(),
        kind: "failing".to_owned(),
        severity: "warning".to_owned(),
        resolution: Some("recovered".to_owned()),
        lasted_seconds: Some(7_500),
        affected: 1,
        judged: 1,
        members: Vec::new(),
        members_total: 0,
        ..group.clone()
    };
    Message {
        kind: MessageKind::Incidents,
        at,
        group: Some("school-17".to_owned()),
        items: vec![group, device],
        items_total: 2,
        states: None,
        base_url: Some("https://fleet.example".to_owned()),
    }
}

/// What is wrong, in words for the template's author.
fn explain(error: &Error) -> String {
    let detail = error.detail().unwrap_or_default();
    match error.kind() {
        ErrorKind::UndefinedError => match detail.split('`').nth(1) {
            Some(name) => format!("unknown variable {name}"),
            None => "unknown variable".to_owned(),
        },
        ErrorKind::OutOfFuel => "it does too much work".to_owned(),
        ErrorKind::WriteFailure => format!("it writes more than {MAX_OUTPUT} bytes"),
        kind if detail.is_empty() => kind.to_string(),
        kind => format!("{kind}: {detail}"),
    }
}

/// Takes up to [`MAX_OUTPUT`] bytes.
struct Bounded(Vec<u8>);

impl io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > MAX_OUTPUT {
            return Err(io::Error::from(io::ErrorKind::WriteZero));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::notify::message::tests::{digest, message, school};

    fn error(template: &str) -> String {
        check(template).unwrap_err().message
    }

    #[test]
    fn an_error_names_the_line_and_the_variable() {
        for (template, expected) in [
            ("a\nb\n{{ grup }}", "\"template\" line 3: unknown variable grup"),
            (
                "{% for incident in incidents %}\n{{ incident.txt }}\n{% endfor %}",
                "\"template\" line 2: unknown variable incident.txt",
            ),
            ("{% if grup %}x{% endif %}", "\"template\" line 1: unknown variable grup"),
            ("{{ group.name.first }}", "\"template\" line 1: unknown variable group.name"),
            ("{{ incidents[7].text }}", "\"template\" line 1: unknown variable incidents[7]"),
        ] {
            assert_eq!(error(template), expected);
        }
        for (template, part) in [
            ("\n{{ text", "line 2: syntax error"),
            ("{% for x in incidents %}", "line 1: syntax error"),
            ("{{ text|nope }}", "line 1: unknown filter: filter nope is unknown"),
            ("{{ nope() }}", "line 1: unknown"),
            ("{% include 'x' %}", "line 1: syntax error"),
            ("{% macro x() %}{% endmacro %}", "line 1: syntax error"),
        ] {
            assert!(error(template).contains(part), "{template}: {}", error(template));
        }
        assert_eq!(error(" \n"), "\"template\" is not allowed to be empty");
        assert_eq!(error("a\u{1b}[0m"), "\"template\" must not contain control characters");
        assert_eq!(
            error(&"x".repeat(MAX_TEMPLATE + 1)),
            "\"template\" must have at most 16384 bytes"
        );
        assert_eq!(check(&"x".repeat(MAX_TEMPLATE)), Ok(()));
    }

    #[test]
    fn a_template_ends_and_is_bounded() {
        let loops =
            "{% for a in range(9999) %}{% for b in range(9999) %}{{ 1 }}{% endfor %}{% endfor %}";
        assert!(error(loops).contains("it does too much work"), "{}", error(loops));
        let quiet = "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}x";
        assert!(error(quiet).contains("it does too much work"), "{}", error(quiet));
        let writes = "{% for a in range(5000) %}0123456789{% endfor %}";
        assert!(error(writes).contains("it writes more than 32768 bytes"), "{}", error(writes));
        let grows = "{% set x = 'x' * 1000000000 %}{{ x|length }}";
        assert!(check(grows).is_err());
        let deep = format!("{}x{}", "{% if 1 %}".repeat(800), "{% endif %}".repeat(800));
        assert!(check(&deep).is_err());
        let brackets = format!("{{{{ {}1{} }}}}", "(".repeat(5_000), ")".repeat(5_000));
        assert!(check(&brackets).is_err());
    }

    /// Tests run on a stack of 2 MiB, as requests do.
    #[test]
    fn a_chain_of_operators_takes_no_more_stack_than_there_is() {
        for template in [
            format!("{{{{ {}1 }}}}", "-".repeat(16_000)),
            format!("{{{{ 1{} }}}}", "+1".repeat(8_000)),
            format!("{{{{ {}true }}}}", "not ".repeat(4_000)),
            format!("{{{{ 1{} }}}}", "|abs".repeat(4_000)),
        ] {
            // Whether they are taken is of no interest; the program goes on.
            let _is_taken = check(&template).is_ok();
        }
    }

    #[test]
    fn values_are_escaped_and_the_template_is_not() {
        let mut message = message(vec![school()]);
        message.items[0].subject = "<b>".to_owned();
        message.group = None;
        let escape = |text: &str| text.replace('<', "&lt;");
        let template = "<i>{{ group }}{{ incidents[0].subject }}</i> {{ incidents[0].subject|safe }} {{ incidents_total }}";
        assert_eq!(render(template, &message, escape).unwrap(), "<i>&lt;b></i> &lt;b> 1");
    }

    #[test]
    fn a_template_that_fails_or_is_empty_gives_nothing() {
        let template = "{{ incidents[0].text }}";
        assert_eq!(check(template), Ok(()));
        let escape = str::to_owned;
        assert_eq!(
            render(template, &message(vec![school()]), escape).unwrap(),
            "school-17: 199 of 200 devices silent, last heard 09:00 UTC"
        );
        let test = Message::test(sample().at, None);
        assert_eq!(render(template, &test, escape), None);
        assert_eq!(render("{{ url }}", &test, escape), None);
    }

    /// Whatever a message lacks, each name is there.
    #[test]
    fn the_same_names_are_there_in_every_message() {
        let names =
            |value: &Value| -> Vec<String> { value.as_object().unwrap().keys().cloned().collect() };
        let least = Message {
            base_url: None,
            group: None,
            ..message(vec![MessageItem { last_heard: None, ..school() }])
        };
        let (least, most) = (variables(&least), variables(&sample()));
        assert_eq!(names(&least), names(&most));
        assert_eq!(names(&least["incidents"][0]), names(&most["incidents"][1]));
        let of_digest = variables(&digest(vec![school()]));
        assert_eq!(names(&of_digest), names(&most));
        assert_eq!(names(&of_digest["devices"]), names(&most["devices"]));
        assert_eq!(of_digest["devices"]["ok"], 198);
        assert_eq!(most["devices"]["ok"], Value::Null);
    }

    #[test]
    fn a_template_is_checked_with_a_digest_too() {
        let counts = "{{ devices.ok }} ok, {{ devices.silent }} silent";
        assert_eq!(check(counts), Ok(()));
        let escape = str::to_owned;
        let of_digest = |template| render(template, &digest(vec![school()]), escape);
        assert_eq!(of_digest(counts).unwrap(), "198 ok, 9 silent");
        assert_eq!(error("{{ devices.oka }}"), "\"template\" line 1: unknown variable devices.oka");
        // What holds in one kind of message alone must be said in that kind alone.
        assert!(error("{{ devices.ok + devices.failing }}").contains("line 1"));
        let guarded = "{% if type == 'fleet.digest' %}{{ devices.ok + devices.failing }}{% else %}x{% endif %}";
        assert_eq!(check(guarded), Ok(()));
        assert_eq!(of_digest(guarded).unwrap(), "203");
        assert!(error("{% if type == 'fleet.digest' %}{{ grup }}{% endif %}").contains("grup"));
    }
}
