//! What is told, as data, and in words for people. Every kind of channel takes its text from here. The dispatcher makes a
//! [`Message`] from the store; nothing here reads a clock.

use jiff::tz::TimeZone;
use pisync_core::{Timestamp, health::Resolution};

use crate::store::StateCounts;

/// The most incidents in one message. What is beyond is counted.
pub const MAX_ITEMS: usize = 50;

/// The most members that a message names for each incident. What is beyond is counted.
pub const MAX_MEMBERS: usize = 20;

/// The most characters of members' names in one line for people. A name may have 255.
const MEMBERS_LINE: usize = 500;

/// Why there is a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MessageKind {
    /// Something happened to incidents.
    Incidents,
    /// What is open at a time of day.
    Digest,
    /// Somebody tries whether a channel works.
    Test,
}

impl MessageKind {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Incidents, Self::Digest, Self::Test];

    /// The word that stands for it in the database and in templates.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Incidents => "incidents",
            Self::Digest => "digest",
            Self::Test => "test",
        }
    }

    /// The one that a word stands for.
    #[must_use]
    pub fn from_word(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.as_str() == word)
    }

    /// The type of an event, as webhooks call it.
    #[must_use]
    pub fn event_type(self) -> &'static str {
        match self {
            Self::Incidents => "fleet.incidents",
            Self::Digest => "fleet.digest",
            Self::Test => "fleet.test",
        }
    }
}

/// What happened to an incident.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MessageEvent {
    /// It began.
    Opened,
    /// It began again.
    Reopened,
    /// It is still there.
    Reminder,
    /// It begins again and again, so nobody is told any more until it is calm.
    Flapping,
    /// It is over.
    Resolved,
}

impl MessageEvent {
    /// All of them.
    pub const ALL: [Self; 5] =
        [Self::Opened, Self::Reopened, Self::Reminder, Self::Flapping, Self::Resolved];

    /// The word that stands for it in messages and in the database.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Opened => "opened",
            Self::Reopened => "reopened",
            Self::Reminder => "reminder",
            Self::Flapping => "flapping",
            Self::Resolved => "resolved",
        }
    }

    /// The one that a word stands for.
    #[must_use]
    pub fn from_word(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|event| event.as_str() == word)
    }
}

/// What is told together. It is rendered once.
#[derive(Debug, Clone, PartialEq)]
pub struct Message {
    /// Why there is one.
    pub kind: MessageKind,
    /// When it was rendered.
    pub at: Timestamp,
    /// The group that it is about; `None` for devices of no group, and for the fleet.
    pub group: Option<String>,
    /// What happened, at most [`MAX_ITEMS`].
    pub items: Vec<MessageItem>,
    /// How much happened, with what is not in `items`.
    pub items_total: u64,
    /// How many devices of the fleet are in which state. Only a digest tells it.
    pub states: Option<StateCounts>,
    /// Where people reach this server (`PUBLIC_URL`).
    pub base_url: Option<String>,
}

/// What happened to one incident.
#[derive(Debug, Clone, PartialEq)]
pub struct MessageItem {
    /// What happened.
    pub event: MessageEvent,
    /// The incident's number.
    pub id: i64,
    /// What it is about: `device`, `group`, `fleet` or `channel`.
    pub scope: String,
    /// The device's id, or the name of the group or of the channel; `fleet` for the fleet.
    pub subject: String,
    /// What is wrong: `silent` or `failing`.
    pub kind: String,
    /// How bad that is: `info`, `warning` or `critical`.
    pub severity: String,
    /// Since when it is wrong.
    pub since: Timestamp,
    /// Why it is over.
    pub resolution: Option<String>,
    /// How long it lasted, once it is over.
    pub lasted_seconds: Option<i64>,
    /// How many devices have the problem.
    pub affected: i64,
    /// Of how many devices a report was expected.
    pub judged: i64,
    /// When the last of its devices was heard.
    pub last_heard: Option<Timestamp>,
    /// Devices that it is about, at most [`MAX_MEMBERS`]. Empty when it is about one device.
    pub members: Vec<String>,
    /// How many they are.
    pub members_total: i64,
}

impl Message {
    /// The message with which somebody tries whether a channel works.
    #[must_use]
    pub fn test(at: Timestamp, base_url: Option<String>) -> Self {
        Self {
            kind: MessageKind::Test,
            at,
            group: None,
            items: Vec::new(),
            items_total: 0,
            states: None,
            base_url,
        }
    }

    /// The words for people.
    #[must_use]
    pub fn text(&self) -> Text {
        let texts: Vec<String> = self.items.iter().map(|item| item.text(self.at)).collect();
        let unlisted = self.items_total.saturating_sub(self.items.len() as u64);
        let (subject, lines) = match (self.kind, &self.items[..]) {
            (MessageKind::Test, _) => (
                "Test message from PiSync".to_owned(),
                vec!["If you can read this, the channel works.".to_owned()],
            ),
            (MessageKind::Incidents, [item]) if unlisted == 0 => {
                (item.text(self.at), item.details())
            }
            (MessageKind::Incidents, _) => (self.summary(), texts),
            (MessageKind::Digest, _) => {
                let open = match self.items_total {
                    0 => "no open incident".to_owned(),
                    1 => "1 open incident".to_owned(),
                    many => format!("{many} open incidents"),
                };
                let states = self.states.as_ref().map(StateCounts::in_words);
                let lines = states.into_iter().chain(texts).collect();
                (format!("{}: {open}", self.place()), lines)
            }
        };
        Text { subject, lines, unlisted, link: self.link(), is_link_for_cut: false }
    }

    /// Whose message it is.
    fn place(&self) -> String {
        self.group.as_deref().map_or_else(|| "PiSync".to_owned(), printable)
    }

    /// What happened how often, such as `school-17: 2 opened, 1 resolved`.
    fn summary(&self) -> String {
        if self.items_total > self.items.len() as u64 {
            return format!("{}: {} changes of incidents", self.place(), self.items_total);
        }
        let counts: Vec<String> = MessageEvent::ALL
            .into_iter()
            .map(|event| (event, self.items.iter().filter(|item| item.event == event).count()))
            .filter(|(_, count)| *count > 0)
            .map(|(event, count)| match event {
                MessageEvent::Reminder => format!("{count} still open"),
                _ => format!("{count} {}", event.as_str()),
            })
            .collect();
        format!("{}: {}", self.place(), counts.join(", "))
    }

    /// The page about what is told.
    fn link(&self) -> Option<String> {
        let base = self.base()?;
        match (self.kind, &self.items[..]) {
            (MessageKind::Test, _) => Some(base.to_owned()),
            (_, [item]) if self.items_total <= 1 => Some(item.url(base)),
            _ => Some(format!("{base}/incidents")),
        }
    }

    /// The server's address without a slash at its end.
    pub(crate) fn base(&self) -> Option<&str> {
        self.base_url.as_deref().map(|base| base.trim_end_matches('/'))
    }

    /// How bad the worst is that is told and not over; `None` when all of it is over.
    pub(crate) fn severity(&self) -> Option<Urgency> {
        let is_open = |item: &&MessageItem| item.event != MessageEvent::Resolved;
        self.items.iter().filter(is_open).map(|item| Urgency::of(&item.severity)).max()
    }
}

/// How urgent a severity is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Urgency {
    Info,
    Warning,
    Critical,
}

impl Urgency {
    fn of(severity: &str) -> Self {
        match severity {
            "critical" => Self::Critical,
            "warning" => Self::Warning,
            _ => Self::Info,
        }
    }
}

impl MessageItem {
    /// One line for people, such as `school-17: 199 of 200 devices silent, last heard 09:00 UTC`.
    #[must_use]
    pub fn text(&self, now: Timestamp) -> String {
        let subject = printable(&self.subject);
        let kind = printable(&self.kind);
        let is_one = self.scope == "device";
        if self.event == MessageEvent::Resolved {
            let end = self.end();
            return match self.scope.as_str() {
                "channel" => format!("channel {subject}: works again{end}"),
                "device" => format!("{subject}: no longer {kind}{end}"),
                _ => format!("{subject}: devices no longer {kind}{end}"),
            };
        }
        if self.scope == "channel" {
            let since = time(self.since, now);
            return format!("channel {subject}: nothing could be delivered since {since}");
        }
        let who = if is_one {
            String::new()
        } else {
            format!("{} of {} devices ", self.affected, self.judged)
        };
        let (before, after) = match self.event {
            MessageEvent::Opened | MessageEvent::Resolved => ("", ""),
            MessageEvent::Reopened => ("", " again"),
            MessageEvent::Reminder => ("still ", ""),
            MessageEvent::Flapping => ("", " again and again"),
        };
        let when = match (self.kind.as_str(), self.last_heard) {
            ("silent", Some(heard)) => format!(", last heard {}", time(heard, now)),
            ("silent", None) if is_one => ", never heard".to_owned(),
            ("silent", None) => String::new(),
            _ => format!(", since {}", time(self.since, now)),
        };
        let end = match self.event {
            MessageEvent::Flapping => "; no more messages until it is calm",
            _ => "",
        };
        format!("{subject}: {who}{before}{kind}{after}{when}{end}")
    }

    /// How it ended, such as ` after 2 h 5 min: recovered`.
    fn end(&self) -> String {
        let mut end = match self.lasted_seconds {
            Some(seconds) => format!(" after {}", duration(seconds)),
            None => String::new(),
        };
        if let Some(word) = &self.resolution {
            let known = Resolution::ALL.into_iter().find(|resolution| resolution.as_str() == word);
            let why = match known {
                Some(Resolution::Recovered) => "recovered".to_owned(),
                Some(Resolution::LateReport) => "a report came late".to_owned(),
                Some(Resolution::Policy) => "the policy was changed".to_owned(),
                Some(Resolution::Paused) => "paused".to_owned(),
                Some(Resolution::Deleted) => "deleted".to_owned(),
                Some(Resolution::Merged) => "now part of a larger incident".to_owned(),
                None => printable(word),
            };
            end.push_str(&format!(": {why}"));
        }
        end
    }

    /// Further lines about it, when it is told alone.
    fn details(&self) -> Vec<String> {
        let mut lines = vec![format!(
            "Severity {}, since {} UTC.",
            printable(&self.severity),
            in_utc(self.since).strftime("%Y-%m-%d %H:%M")
        )];
        lines.extend(self.members_line());
        lines
    }

    /// The members' names, as far as they fit in a line.
    fn members_line(&self) -> Option<String> {
        let mut line = String::new();
        let mut named = 0;
        for member in &self.members {
            let member = printable(member);
            let comma = if named == 0 { "" } else { ", " };
            if line.chars().count() + comma.len() + member.chars().count() > MEMBERS_LINE {
                break;
            }
            line.push_str(comma);
            line.push_str(&member);
            named += 1;
        }
        let more = self.members_total.saturating_sub(named);
        match (named, more) {
            (0, 0) => None,
            (0, more) => Some(format!("Devices: {more}")),
            (_, more) if more > 0 => Some(format!("Devices: {line} and {more} more")),
            _ => Some(format!("Devices: {line}")),
        }
    }

    /// The page about it, below the server's address.
    pub(crate) fn url(&self, base: &str) -> String {
        format!("{base}/incidents/{}", self.id)
    }
}

/// Words for people, in lines.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Text {
    /// What it is about, in one line.
    pub subject: String,
    /// The rest.
    pub lines: Vec<String>,
    /// How many lines there would be beyond.
    pub unlisted: u64,
    /// Where there is more to read.
    pub link: Option<String>,
    /// Whether the link stands there only when lines were cut: a template has its own where it wants one.
    pub is_link_for_cut: bool,
}

impl Text {
    /// Lines that somebody's template made.
    pub(crate) fn of_template(text: &str, link: Option<String>) -> Self {
        let mut lines = text.trim_end().lines().map(str::to_owned);
        let subject = lines.next().unwrap_or_default();
        Self { subject, lines: lines.collect(), unlisted: 0, link, is_link_for_cut: true }
    }

    /// The same text with every part passed through `change`, the link excepted.
    pub(crate) fn map(self, change: impl Fn(&str) -> String) -> Self {
        Self {
            subject: change(&self.subject),
            lines: self.lines.iter().map(|line| change(line)).collect(),
            ..self
        }
    }

    /// Subject, lines and link as one text that `measure` finds to be at most `limit`. Whole lines are cut from the end
    /// and counted, such as `and 37 more`.
    #[must_use]
    pub fn fit(&self, limit: usize, measure: impl Fn(&str) -> usize) -> String {
        self.join(Some(&self.subject), limit, measure)
    }

    /// The same without the subject, for services that show it by itself.
    #[must_use]
    pub fn fit_body(&self, limit: usize, measure: impl Fn(&str) -> usize) -> String {
        self.join(None, limit, measure)
    }

    fn join(&self, head: Option<&str>, limit: usize, measure: impl Fn(&str) -> usize) -> String {
        let with = |shown: usize, link: Option<&str>| {
            let cut = (self.lines.len() - shown) as u64 + self.unlisted;
            let more = (cut > 0).then(|| format!("and {cut} more"));
            let lines = self.lines[..shown].iter().map(String::as_str);
            let parts: Vec<&str> =
                head.into_iter().chain(lines).chain(more.as_deref()).chain(link).collect();
            parts.join("\n")
        };
        let link = self.link.as_deref();
        let all = with(self.lines.len(), link.filter(|_| !self.is_link_for_cut));
        if measure(&all) <= limit {
            return all;
        }
        if measure(&with(0, link)) <= limit {
            // From here on another line only makes the text longer.
            let most = last_that(self.lines.len(), |shown| measure(&with(shown, link)) <= limit);
            return with(most, link);
        }
        let head = with(0, None);
        if measure(&head) <= limit {
            return head;
        }
        // Even the first line is too long: it is cut within.
        let ends: Vec<usize> = head.char_indices().map(|(at, _)| at).collect();
        let shorter = |kept: usize| format!("{}…", &head[..ends.get(kept).copied().unwrap_or(0)]);
        let kept = last_that(ends.len(), |kept| measure(&shorter(kept)) <= limit);
        shorter(kept)
    }
}

/// The last number below `end` for which `holds`, which holds for all before it; 0 if there is none.
fn last_that(end: usize, holds: impl Fn(usize) -> bool) -> usize {
    let (mut least, mut beyond) = (0, end);
    while beyond - least > 1 {
        let middle = usize::midpoint(least, beyond);
        if holds(middle) { least = middle } else { beyond = middle }
    }
    least
}

/// A text without control characters: foreign SQL may have stored any. They could forge lines.
fn printable(text: &str) -> String {
    text.chars().map(|letter| if letter.is_control() { ' ' } else { letter }).collect()
}

fn in_utc(at: Timestamp) -> jiff::Zoned {
    at.to_jiff().to_zoned(TimeZone::UTC)
}

/// A time of day, with its date when that is not today's.
fn time(at: Timestamp, now: Timestamp) -> String {
    let (local, today) = (in_utc(at), in_utc(now));
    let form = if local.date() == today.date() { "%H:%M UTC" } else { "%Y-%m-%d %H:%M UTC" };
    local.strftime(form).to_string()
}

/// A duration in its two largest units, such as `2 h 5 min`.
fn duration(seconds: i64) -> String {
    let seconds = seconds.max(0);
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60);
    let parts = match (days, hours, minutes) {
        (0, 0, 0) => return format!("{seconds} s"),
        (0, 0, minutes) => [(minutes, "min"), (0, "")],
        (0, hours, minutes) => [(hours, "h"), (minutes, "min")],
        (days, hours, _) => [(days, "d"), (hours, "h")],
    };
    let parts = parts.into_iter().filter(|(count, _)| *count > 0);
    parts.map(|(count, unit)| format!("{count} {unit}")).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn at(text: &str) -> Timestamp {
        Timestamp::parse_iso8601(text).unwrap()
    }

    /// The incident of the contract's example.
    pub(crate) fn school() -> MessageItem {
        MessageItem {
            event: MessageEvent::Opened,
            id: 812,
            scope: "group".into(),
            subject: "school-17".into(),
            kind: "silent".into(),
            severity: "critical".into(),
            since: at("2026-03-02T10:30:00Z"),
            resolution: None,
            lasted_seconds: None,
            affected: 199,
            judged: 200,
            last_heard: Some(at("2026-03-02T09:00:10Z")),
            members: vec!["pi-001".into()],
            members_total: 199,
        }
    }

    pub(crate) fn device(id: i64, name: &str) -> MessageItem {
        MessageItem {
            id,
            scope: "device".into(),
            subject: name.into(),
            severity: "warning".into(),
            affected: 1,
            judged: 1,
            members: Vec::new(),
            members_total: 0,
            ..school()
        }
    }

    pub(crate) fn message(items: Vec<MessageItem>) -> Message {
        Message {
            kind: MessageKind::Incidents,
            at: at("2026-03-02T10:31:00Z"),
            group: Some("school-17".into()),
            items_total: items.len() as u64,
            items,
            states: None,
            base_url: Some("https://fleet.example/".into()),
        }
    }

    /// A digest of incidents that are still open.
    pub(crate) fn digest(items: Vec<MessageItem>) -> Message {
        let remind = |item| MessageItem { event: MessageEvent::Reminder, ..item };
        Message {
            kind: MessageKind::Digest,
            group: None,
            states: Some(StateCounts([0, 0, 9, 5, 0, 198])),
            ..message(items.into_iter().map(remind).collect())
        }
    }

    fn characters(text: &str) -> usize {
        text.chars().count()
    }

    #[test]
    fn an_incident_in_one_line() {
        let now = at("2026-03-02T10:31:00Z");
        let line = |change: &dyn Fn(&mut MessageItem)| {
            let mut item = school();
            change(&mut item);
            item.text(now)
        };
        type Change<'a> = &'a dyn Fn(&mut MessageItem);
        let cases: [(Change<'_>, &str); 14] = [
            (&|_| {}, "school-17: 199 of 200 devices silent, last heard 09:00 UTC"),
            (
                &|item| item.last_heard = Some(at("2026-02-27T23:59:00Z")),
                "school-17: 199 of 200 devices silent, last heard 2026-02-27 23:59 UTC",
            ),
            (&|item| item.last_heard = None, "school-17: 199 of 200 devices silent"),
            (
                &|item| item.event = MessageEvent::Reminder,
                "school-17: 199 of 200 devices still silent, last heard 09:00 UTC",
            ),
            (
                &|item| item.kind = "failing".into(),
                "school-17: 199 of 200 devices failing, since 10:30 UTC",
            ),
            (
                &|item| {
                    item.event = MessageEvent::Resolved;
                    item.lasted_seconds = Some(7500);
                    item.resolution = Some("recovered".into());
                },
                "school-17: devices no longer silent after 2 h 5 min: recovered",
            ),
            (&|item| *item = device(1, "pi-001"), "pi-001: silent, last heard 09:00 UTC"),
            (
                &|item| *item = MessageItem { last_heard: None, ..device(1, "pi-001") },
                "pi-001: silent, never heard",
            ),
            (
                &|item| {
                    *item = MessageItem {
                        event: MessageEvent::Reopened,
                        kind: "failing".into(),
                        ..device(1, "pi")
                    }
                },
                "pi: failing again, since 10:30 UTC",
            ),
            (
                &|item| *item = MessageItem { event: MessageEvent::Flapping, ..device(1, "pi") },
                "pi: silent again and again, last heard 09:00 UTC; no more messages until it is calm",
            ),
            (
                &|item| {
                    *item = MessageItem {
                        event: MessageEvent::Resolved,
                        lasted_seconds: Some(93_600),
                        resolution: Some("late_report".into()),
                        ..device(1, "pi")
                    };
                },
                "pi: no longer silent after 1 d 2 h: a report came late",
            ),
            (
                &|item| item.scope = "channel".into(),
                "channel school-17: nothing could be delivered since 10:30 UTC",
            ),
            (
                &|item| {
                    item.scope = "channel".into();
                    item.event = MessageEvent::Resolved;
                    item.lasted_seconds = Some(59);
                },
                "channel school-17: works again after 59 s",
            ),
            (
                &|item| item.subject = "a\r\nb".into(),
                "a  b: 199 of 200 devices silent, last heard 09:00 UTC",
            ),
        ];
        for (change, expected) in cases {
            assert_eq!(line(change), expected);
        }
    }

    #[test]
    fn one_incident_is_told_with_details_and_several_as_a_list() {
        let text = message(vec![school()]).text();
        assert_eq!(text.subject, "school-17: 199 of 200 devices silent, last heard 09:00 UTC");
        assert_eq!(
            text.lines,
            ["Severity critical, since 2026-03-02 10:30 UTC.", "Devices: pi-001 and 198 more"]
        );
        assert_eq!(text.link.as_deref(), Some("https://fleet.example/incidents/812"));

        let resolved = MessageItem { event: MessageEvent::Resolved, ..device(2, "b") };
        let text = message(vec![device(1, "a"), device(3, "c"), resolved]).text();
        assert_eq!(text.subject, "school-17: 2 opened, 1 resolved");
        assert_eq!(text.lines.len(), 3);
        assert_eq!(text.lines[2], "b: no longer silent");
        assert_eq!(text.link.as_deref(), Some("https://fleet.example/incidents"));

        let text = digest(vec![school()]).text();
        assert_eq!(text.subject, "PiSync: 1 open incident");
        assert_eq!(
            text.lines,
            [
                "212 devices: 198 ok, 5 failing, 9 silent",
                "school-17: 199 of 200 devices still silent, last heard 09:00 UTC"
            ]
        );
        let calm = Message { states: Some(StateCounts([0, 0, 0, 0, 0, 1])), ..digest(vec![]) };
        assert_eq!(
            calm.text().fit(100, characters),
            "PiSync: no open incident\n1 device: 1 ok\nhttps://fleet.example/incidents"
        );
        let new = Message { states: Some(StateCounts::default()), ..calm.clone() };
        assert_eq!(new.text().lines, ["no device has been evaluated yet"]);
        let test = Message::test(calm.at, None).text();
        assert_eq!((test.subject.as_str(), test.link), ("Test message from PiSync", None));
        let many = Message { items_total: 80, group: None, ..message(vec![device(1, "a")]) }.text();
        assert_eq!((many.subject.as_str(), many.unlisted), ("PiSync: 80 changes of incidents", 79));
    }

    #[test]
    fn whole_lines_are_cut_and_counted() {
        let text = Text {
            subject: "head".into(),
            lines: (0..40).map(|line| format!("line {line}")).collect(),
            unlisted: 10,
            link: Some("https://x/incidents".into()),
            is_link_for_cut: false,
        };
        for limit in [60, 61, 62, 63, 64, 65, 66, 67, 68, 100, 200, 420, 1000] {
            let fitted = text.fit(limit, characters);
            assert!(characters(&fitted) <= limit, "{limit}: {fitted}");
            let lines: Vec<&str> = fitted.lines().collect();
            let shown = lines.len() - 3;
            assert_eq!(lines[0], "head");
            assert_eq!(
                lines[shown],
                if shown == 0 { "head".into() } else { format!("line {}", shown - 1) }
            );
            assert_eq!(lines[shown + 1], format!("and {} more", 50 - shown));
            assert_eq!(lines[shown + 2], "https://x/incidents");
            // One line more would not have fitted.
            let next = format!("line {shown}\n").len();
            assert!(shown == 40 || characters(&fitted) + next > limit, "{limit}: {fitted}");
        }
        assert_eq!(text.fit(20, characters), "head\nand 50 more");
        assert_eq!(text.fit(3, characters), "he…");
        assert!(!text.fit_body(100, characters).contains("head"));
        let whole = Text { unlisted: 0, link: None, lines: vec!["x".into()], ..text };
        // Where "and 1 more" would be longer than the line itself.
        assert_eq!(whole.fit(6, characters), "head\nx");
    }

    #[test]
    fn a_line_names_as_many_members_as_fit() {
        let members: Vec<String> = (0..20).map(|name| format!("{name:0>40}")).collect();
        let line = MessageItem { members, ..school() }.members_line().unwrap();
        assert!(line.ends_with(" and 188 more"), "{line}");
        assert_eq!(line.matches(", ").count(), 10);
        let nobody = MessageItem { members: Vec::new(), members_total: 3, ..school() };
        assert_eq!(nobody.members_line().unwrap(), "Devices: 3");
        assert_eq!(device(1, "a").members_line(), None);
    }

    #[test]
    fn words_are_read_as_written() {
        for event in MessageEvent::ALL {
            assert_eq!(MessageEvent::from_word(event.as_str()), Some(event));
        }
        for kind in MessageKind::ALL {
            assert_eq!(MessageKind::from_word(kind.as_str()), Some(kind));
        }
    }
}
