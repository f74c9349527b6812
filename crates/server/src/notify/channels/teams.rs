//! Microsoft Teams: a workflow that posts what it receives, or an incoming webhook. Both take Adaptive Cards.
//! <https://learn.microsoft.com/microsoftteams/platform/webhooks-and-connectors/how-to/add-incoming-webhook>

use std::time::Duration;

use axum::http::HeaderMap;
use reqwest::Url;
use serde_json::{Map, Value, json};

use super::{
    Attempt, Channel, Delivery, JSON, Rendered, Verdict,
    fields::Fields,
    json_bytes, json_length, one,
    outcome::{self, said},
    text_of, url,
};
use crate::notify::{Hidden, message::Message, redact, sender::Sender};

/// More than four requests a second are throttled. Workflows are slower.
/// <https://learn.microsoft.com/microsoftteams/platform/webhooks-and-connectors/how-to/add-incoming-webhook>
pub(super) const SPACING: Duration = Duration::from_secs(1);

/// The most bytes of the text in a card. A message may have 28 KB (see [`SPACING`]). The gem `msteams_hermes` met
/// refusals from 21 KB on.
const LIMIT: usize = 18 << 10;

/// What a line of its own costs beside its text.
const LINE: usize = 120;

/// How an incoming webhook's answer begins when Teams itself refused the message: its status is 200.
/// <https://learn.microsoft.com/microsoftteams/platform/webhooks-and-connectors/how-to/connectors-using#rate-limiting-for-connectors>
const FAILED: &str = "Webhook message delivery failed";

/// A channel in Teams.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TeamsChannel {
    url: Hidden<Url>,
}

impl Channel for TeamsChannel {
    fn read(fields: &mut Fields) -> Option<Self> {
        url(fields).map(|url| Self { url })
    }

    fn public(&self) -> Map<String, Value> {
        Map::new()
    }

    fn secrets(&self) -> Map<String, Value> {
        one("url", self.url.reveal().as_str())
    }

    fn target(&self) -> Option<(&'static str, &Url)> {
        Some(("url", self.url.reveal()))
    }

    fn render(&self, message: &Message, template: Option<String>) -> Rendered {
        let is_built_in = template.is_none();
        let mut text = text_of(message, template, str::to_owned);
        let actions: Vec<Value> = text
            .link
            .take()
            .map(|link| json!({ "type": "Action.OpenUrl", "title": "Open", "url": link }))
            .into_iter()
            .collect();
        let fitted = text.fit(LIMIT, |text| json_length(text) + text.lines().count() * LINE);
        let blocks: Vec<Value> = if is_built_in {
            // Runs of text know no markup, so that nothing must be escaped.
            // <https://adaptivecards.io/explorer/TextRun.html>
            let lines = fitted.lines().enumerate();
            lines.map(|(number, line)| rich_line(line, number == 0)).collect()
        } else {
            vec![json!({ "type": "TextBlock", "wrap": true, "text": broken(&fitted) })]
        };
        let plain = message.text().map(Self::escape);
        let plain = plain.fit(LIMIT, |text| json_length(text) + text.lines().count() * 2);
        let plain = vec![json!({ "type": "TextBlock", "wrap": true, "text": broken(&plain) })];
        Rendered {
            content_type: JSON.to_owned(),
            body: json_bytes(&card("1.4", &blocks, &actions)),
            plain: Some(json_bytes(&card("1.0", &plain, &[]))),
        }
    }

    /// The marks of the Markdown that cards know.
    /// <https://learn.microsoft.com/adaptive-cards/authoring-cards/text-features>
    fn escape(text: &str) -> String {
        let mut escaped = String::with_capacity(text.len());
        for (at, letter) in text.char_indices() {
            if "\\*_[]()~`".contains(letter) || at == 0 && "-+#>".contains(letter) {
                escaped.push('\\');
            }
            escaped.push(letter);
        }
        escaped
    }

    async fn deliver(
        &self,
        attempt: &Attempt<'_>,
        sender: &Sender,
        secrets: &[String],
    ) -> Delivery {
        let body = attempt.body.to_vec();
        let posted =
            sender.post(self.url.reveal(), attempt.content_type, HeaderMap::new(), body).await;
        let answer = match posted {
            Ok(answer) => answer,
            Err(error) => return Delivery::unanswered(redact(&error, secrets)),
        };
        let said = said(&answer.beginning, secrets);
        if answer.status.is_success() && said.starts_with(FAILED) {
            // Such as `… failed with error: Microsoft Teams endpoint returned HTTP error 413 with ContextId …`.
            let code =
                said.split("HTTP error ").nth(1).and_then(|rest| rest.get(..3)?.parse().ok());
            return Delivery::Failed {
                status: Some(answer.status.as_u16()),
                error: said,
                retry_after: None,
                verdict: code.map_or(Verdict::Channel, outcome::verdict_of),
            };
        }
        outcome::judge(&answer, secrets, attempt.at)
    }
}

fn card(version: &str, blocks: &[Value], actions: &[Value]) -> Value {
    let mut content = json!({
        "$schema": "http://adaptivecards.io/schemas/adaptive-card.json",
        "type": "AdaptiveCard",
        "version": version,
        "body": blocks,
    });
    if !actions.is_empty() {
        content["actions"] = actions.into();
    }
    let attachment = json!({ "contentType": "application/vnd.microsoft.card.adaptive", "contentUrl": null, "content": content });
    json!({ "type": "message", "attachments": [attachment] })
}

fn rich_line(line: &str, is_first: bool) -> Value {
    let mut run = json!({ "type": "TextRun", "text": line });
    let mut block = json!({ "type": "RichTextBlock" });
    if is_first {
        run["weight"] = "Bolder".into();
    } else {
        block["spacing"] = "Small".into();
    }
    block["inlines"] = vec![run].into();
    block
}

/// In Markdown only an empty line begins a new one.
fn broken(text: &str) -> String {
    text.lines().collect::<Vec<_>>().join("\n\n")
}
