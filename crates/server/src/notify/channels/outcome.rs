//! What a receiver's answer means for the message and for its channel. The rules are the same for all services but for
//! the places in which some of them say how long to wait.

use std::time::Duration;

use jiff::fmt::rfc2822::DateTimeParser;
use pisync_core::Timestamp;
use serde_json::Value;

use super::{Delivery, Verdict};
use crate::notify::{redact, sender::Answer};

/// The longest time for which a receiver may ask us to wait.
pub const LONGEST_WAIT: Duration = Duration::from_secs(60 * 60);

/// Judges an answer.
pub(super) fn judge(answer: &Answer, secrets: &[String], now: Timestamp) -> Delivery {
    let status = answer.status;
    if status.is_success() {
        return Delivery::Delivered { status: status.as_u16() };
    }
    let error = match status {
        _ if status.is_redirection() => {
            format!("it answers {status}, a redirect: set the address that it leads to")
        }
        _ => match said(&answer.beginning, secrets) {
            said if said.is_empty() => format!("it answers {status}"),
            said => format!("it answers {status}: {said}"),
        },
    };
    Delivery::Failed {
        status: Some(status.as_u16()),
        error,
        retry_after: retry_after(answer, now),
        verdict: verdict_of(status.as_u16()),
    }
}

/// Whose fault a status is. What a later attempt, or other settings, may change is the channel's.
pub(super) fn verdict_of(status: u16) -> Verdict {
    match status {
        410 => Verdict::Disable,
        401 | 403 | 404 | 408 | 425 | 429 => Verdict::Channel,
        400..=499 => Verdict::Message,
        _ => Verdict::Channel,
    }
}

/// What the receiver says about it, in one line and without our secrets.
pub(super) fn said(beginning: &[u8], secrets: &[String]) -> String {
    let text = String::from_utf8_lossy(beginning);
    let text: Vec<&str> = text
        .split(|letter: char| letter.is_control() || letter.is_whitespace())
        .filter(|word| !word.is_empty())
        .collect();
    redact(text.join(" ").trim_end_matches(char::REPLACEMENT_CHARACTER), secrets)
}

/// How long the receiver wants us to wait, an hour at most.
fn retry_after(answer: &Answer, now: Timestamp) -> Option<Duration> {
    let body: Option<Value> = serde_json::from_slice(&answer.beginning).ok();
    let in_body = body.as_ref().and_then(|body| {
        // Telegram: <https://core.telegram.org/bots/api#responseparameters>; Discord:
        // <https://discord.com/developers/docs/topics/rate-limits#exceeding-a-rate-limit>, with a fraction.
        body["parameters"]["retry_after"].as_f64().or_else(|| body["retry_after"].as_f64())
    });
    let in_header = answer.retry_after.as_deref().map(str::trim).and_then(|header| {
        if let Ok(seconds) = header.parse::<f64>() {
            return Some(seconds);
        }
        // A date is the other form of the header (RFC 9110, 10.2.3).
        let date = DateTimeParser::new().parse_timestamp(header).ok()?;
        let milliseconds = date.as_millisecond() - now.as_millisecond();
        #[expect(clippy::cast_precision_loss, reason = "a time to wait is a small number")]
        Some(milliseconds as f64 / 1000.0)
    });
    let seconds =
        in_body.into_iter().chain(in_header).filter(|seconds| *seconds > 0.0).reduce(f64::max)?;
    Some(Duration::try_from_secs_f64(seconds).unwrap_or(LONGEST_WAIT).min(LONGEST_WAIT))
}

#[cfg(test)]
mod tests {
    use axum::http::StatusCode;

    use super::*;
    use crate::notify::message::tests::at;

    fn answer(status: u16, header: Option<&str>, body: &str) -> Delivery {
        let answer = Answer {
            status: StatusCode::from_u16(status).unwrap(),
            retry_after: header.map(str::to_owned),
            beginning: body.as_bytes().to_vec(),
        };
        judge(&answer, &["s3cret-path".to_owned()], at("2026-03-02T10:31:00Z"))
    }

    #[test]
    fn who_is_to_blame() {
        for (status, expected) in [
            (400, Verdict::Message),
            (401, Verdict::Channel),
            (402, Verdict::Message),
            (403, Verdict::Channel),
            (404, Verdict::Channel),
            (405, Verdict::Message),
            (408, Verdict::Channel),
            (410, Verdict::Disable),
            (413, Verdict::Message),
            (422, Verdict::Message),
            (425, Verdict::Channel),
            (429, Verdict::Channel),
            (301, Verdict::Channel),
            (500, Verdict::Channel),
            (503, Verdict::Channel),
        ] {
            let Delivery::Failed { status: told, verdict, .. } = answer(status, None, "") else {
                panic!("{status} is a failure")
            };
            assert_eq!((told, verdict), (Some(status), expected));
        }
        for status in [200, 202, 204] {
            assert_eq!(answer(status, Some("5"), "no"), Delivery::Delivered { status });
        }
    }

    #[test]
    fn how_long_to_wait() {
        for (header, body, expected) in [
            (None, "", None),
            (Some("7"), "", Some(7.0)),
            (Some(" 1.5 "), "", Some(1.5)),
            (Some("-7"), "", None),
            (Some("NaN"), "", None),
            (Some("soon"), "", None),
            (Some("99999999999999999999"), "", Some(3600.0)),
            (Some("inf"), "", Some(3600.0)),
            (Some("Mon, 02 Mar 2026 10:31:30 GMT"), "", Some(30.0)),
            (Some("Mon, 02 Mar 2026 10:30:30 GMT"), "", None),
            (Some("Tue, 02 Mar 2027 10:30:30 GMT"), "", Some(3600.0)),
            (None, r#"{"message": "limited", "retry_after": 0.25, "global": false}"#, Some(0.25)),
            (None, r#"{"ok":false,"error_code":429,"parameters":{"retry_after":8}}"#, Some(8.0)),
            (Some("3"), r#"{"retry_after": 0.25}"#, Some(3.0)),
            (None, r#"{"retry_after": "8"}"#, None),
        ] {
            let Delivery::Failed { retry_after, .. } = answer(429, header, body) else {
                panic!("429 is a failure")
            };
            assert_eq!(retry_after.map(|wait| wait.as_secs_f64()), expected, "{header:?} {body}");
        }
    }

    #[test]
    fn what_is_said_is_one_line_without_secrets() {
        let error = |body: &str| match answer(404, None, body) {
            Delivery::Failed { error, .. } => error,
            Delivery::Delivered { .. } => panic!("404 is a failure"),
        };
        assert_eq!(
            error("Cannot POST\r\n\t/s3cret-path"),
            "it answers 404 Not Found: Cannot POST /[hidden]"
        );
        assert_eq!(error("\u{1b}[31mred"), "it answers 404 Not Found: [31mred");
        assert_eq!(error(" "), "it answers 404 Not Found");
        let Delivery::Failed { error, .. } = answer(302, None, "s3cret-path") else {
            panic!("302")
        };
        assert_eq!(error, "it answers 302 Found, a redirect: set the address that it leads to");
    }
}
