//! The SMTP server through which e-mail goes: `SMTP_URL`, `SMTP_FROM`, and one message handed over. `channels/email` says
//! what is in the message. The password is never shown.

use std::{fmt, str::FromStr, time::Duration};

use lettre::{
    Address,
    address::Envelope,
    message::Mailbox,
    transport::smtp::{
        Error,
        authentication::{Credentials, Mechanism},
        client::{AsyncSmtpConnection, Certificate, CertificateStore, TlsParameters},
        extension::ClientId,
    },
};
use percent_encoding::percent_decode_str;
use reqwest::Url;
use rustls::pki_types::CertificateDer;
use tokio::time::timeout;

use super::{
    Hidden, redact,
    sender::{ANSWER_BYTES, seconds},
};

/// For how long the farewell may take, once the server has the message.
const QUIT_TIMEOUT: Duration = Duration::from_secs(1);

/// What `SMTP_URL` may look like, for messages about a wrong one.
const FORM: &str = "smtp://USER:PASSWORD@HOST:587?tls=required or smtps://USER:PASSWORD@HOST";

/// How the connection is encrypted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SmtpTls {
    /// From the first byte (`smtps`).
    Implicit,
    /// By STARTTLS, which the server must offer (`tls=required`).
    Required,
    /// Not at all (`tls=none`).
    Off,
}

/// The server for e-mail.
#[derive(Debug, Clone)]
pub struct SmtpSettings {
    host: String,
    port: u16,
    tls: SmtpTls,
    credentials: Option<Hidden<(String, String)>>,
    from: Mailbox,
}

impl SmtpSettings {
    /// Reads `SMTP_URL` and `SMTP_FROM`.
    ///
    /// # Errors
    /// What is wrong, with the setting's name and without its value: any part of it may be a piece of the password.
    pub fn parse(url: &str, from: Option<&str>) -> Result<Self, String> {
        let wrong = |what: &str| format!("SMTP_URL: {what}; it looks like {FORM}");
        let scheme_end = url.find("://").ok_or_else(|| wrong("it is not a URL"))?;
        let (is_implicit, default_port) = match &url[..scheme_end] {
            "smtp" => (false, 587),
            "smtps" => (true, 465),
            _ => return Err(wrong("it must begin with smtp:// or smtps://")),
        };
        let parsed = Url::parse(url).map_err(|error| {
            wrong(&format!("{error} (in the user's name and the password, / must be written as %2F and @ as %40)"))
        })?;
        // The parser would take `a@b` in a password, but not say so.
        let authority = url[scheme_end + 3..].split(['/', '?', '#']).next().unwrap_or_default();
        if authority.matches('@').count() > 1 {
            return Err(wrong("an @ in the user's name or the password must be written as %40"));
        }
        if !matches!(parsed.path(), "" | "/") || parsed.fragment().is_some() {
            return Err(wrong(
                "behind the host and port there may only be ?tls=…; in the password, / must be written as %2F, ? as %3F \
                 and # as %23",
            ));
        }
        let host = match parsed.host() {
            Some(url::Host::Ipv6(address)) => address.to_string(),
            Some(host) => host.to_string(),
            None => String::new(),
        };
        if host.is_empty() || host.chars().any(|letter| letter == '%' || letter.is_whitespace()) {
            return Err(wrong("it names no host"));
        }
        let mut tls = if is_implicit { SmtpTls::Implicit } else { SmtpTls::Required };
        let parameters: Vec<_> = parsed.query_pairs().collect();
        match &parameters[..] {
            [] => {}
            [(name, value)] if name == "tls" => match (&**value, is_implicit) {
                ("required", _) => {}
                ("none", false) => tls = SmtpTls::Off,
                ("none", true) => return Err(wrong("smtps is always encrypted")),
                _ => return Err(wrong("tls must be required or none")),
            },
            _ => return Err(wrong("behind the ? there may only be tls=required or tls=none")),
        }
        let decode = |text: &str| {
            let text = percent_decode_str(text).decode_utf8().ok()?;
            (!text.contains('\0')).then(|| text.into_owned())
        };
        let credentials = match (parsed.username(), parsed.password()) {
            ("", None) => None,
            ("", Some(_)) | (_, None) => {
                return Err(wrong("a user's name and a password come together"));
            }
            (user, Some(password)) => match (decode(user), decode(password)) {
                (Some(user), Some(password)) => Some(Hidden::new((user, password))),
                _ => return Err(wrong("the user's name or the password is not UTF-8")),
            },
        };
        let is_here = host == "localhost"
            || host.parse().is_ok_and(|address: std::net::IpAddr| address.is_loopback());
        if credentials.is_some() && tls == SmtpTls::Off && !is_here {
            return Err(wrong("a password is not sent without encryption"));
        }
        let from = from.ok_or(
            "SMTP_FROM is missing: it is the sender's address, such as PiSync <pisync@example.com>",
        )?;
        let from = Mailbox::from_str(from)
            .ok()
            .filter(|from| is_ascii(&from.email))
            .ok_or("SMTP_FROM must be an address, such as PiSync <pisync@example.com>")?;
        Ok(Self { host, port: parsed.port().unwrap_or(default_port), tls, credentials, from })
    }

    /// The sender's address.
    #[must_use]
    pub fn from(&self) -> &Mailbox {
        &self.from
    }

    /// The server's name and port.
    #[must_use]
    pub fn server(&self) -> (&str, u16) {
        (&self.host, self.port)
    }

    /// How the connection is encrypted.
    #[must_use]
    pub fn tls(&self) -> SmtpTls {
        self.tls
    }
}

/// Not all servers take addresses with other letters (SMTPUTF8).
pub(super) fn is_ascii(address: &Address) -> bool {
    let address: &str = address.as_ref();
    address.is_ascii()
}

/// A mail that was not handed over.
#[derive(Debug)]
pub(super) struct SmtpError {
    /// What happened, in words.
    pub(super) words: String,
    /// The server's reply code, if it replied.
    pub(super) code: Option<u16>,
}

/// Hands mail over to the server.
pub(super) struct Smtp {
    settings: SmtpSettings,
    tls: Option<TlsParameters>,
    hello: ClientId,
    connect_timeout: Duration,
    attempt_timeout: Duration,
}

impl Smtp {
    pub(super) fn new(
        settings: SmtpSettings,
        roots: &[CertificateDer<'static>],
        connect_timeout: Duration,
        attempt_timeout: Duration,
    ) -> Result<Self, String> {
        let tls = if settings.tls == SmtpTls::Off {
            None
        } else {
            let failed = |error: Error| format!("SMTP: TLS: {error}");
            let mut tls = TlsParameters::builder(settings.host.clone())
                .certificate_store(CertificateStore::None);
            for root in roots {
                let root = Certificate::from_der(root.to_vec()).map_err(failed)?;
                tls = tls.add_root_certificate(root);
            }
            Some(tls.build_rustls().map_err(failed)?)
        };
        // Servers want a name with a dot. This machine's own is often none.
        let hello = ClientId::Domain(settings.from.email.domain().to_owned());
        Ok(Self { settings, tls, hello, connect_timeout, attempt_timeout })
    }

    /// The sender's address.
    pub(super) fn from(&self) -> &Mailbox {
        &self.settings.from
    }

    /// Hands a message over. Once this returns `Ok`, the server has taken it.
    pub(super) async fn send(&self, to: &Address, message: &[u8]) -> Result<(), SmtpError> {
        let late = || SmtpError {
            words: format!(
                "the SMTP server did not take the message within {}",
                seconds(self.attempt_timeout)
            ),
            code: None,
        };
        let envelope = Envelope::new(Some(self.settings.from.email.clone()), vec![to.clone()]);
        let envelope =
            envelope.map_err(|error| SmtpError { words: error.to_string(), code: None })?;
        let handed_over = timeout(self.attempt_timeout, self.hand_over(&envelope, message)).await;
        let mut connection =
            handed_over.map_err(|_| late())?.map_err(|error| self.explain(&error))?;
        // The message is the server's now, whatever comes of the farewell.
        let _ = timeout(QUIT_TIMEOUT, connection.quit()).await;
        Ok(())
    }

    async fn hand_over(
        &self,
        envelope: &Envelope,
        message: &[u8],
    ) -> Result<AsyncSmtpConnection, Error> {
        let SmtpSettings { host, port, tls, credentials, .. } = &self.settings;
        let implicit = self.tls.clone().filter(|_| *tls == SmtpTls::Implicit);
        let connect_timeout = Some(self.connect_timeout);
        let mut connection = AsyncSmtpConnection::connect_tokio1(
            (host.as_str(), *port),
            connect_timeout,
            &self.hello,
            implicit,
            None,
        )
        .await?;
        if let Some(tls) = self.tls.clone().filter(|_| *tls == SmtpTls::Required) {
            connection.starttls(tls, &self.hello).await?;
        }
        if let Some(credentials) = credentials {
            let (user, password) = credentials.reveal().clone();
            let credentials = Credentials::new(user, password);
            connection.auth(&[Mechanism::Plain, Mechanism::Login], &credentials).await?;
        }
        connection.send(envelope, message).await?;
        Ok(connection)
    }

    fn explain(&self, error: &Error) -> SmtpError {
        let code = error.status().map(u16::from);
        let secrets: Vec<String> = match &self.settings.credentials {
            Some(credentials) => vec![credentials.reveal().1.clone()],
            None => Vec::new(),
        };
        let words: String = error
            .to_string()
            .chars()
            .map(|letter| if letter.is_control() { ' ' } else { letter })
            .collect();
        let words = redact(&words, &secrets);
        let end =
            (0..=words.len().min(ANSWER_BYTES)).rev().find(|end| words.is_char_boundary(*end));
        SmtpError { words: format!("SMTP: {}", &words[..end.unwrap_or(0)]), code }
    }
}

impl fmt::Debug for Smtp {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Smtp").field("settings", &self.settings).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FROM: Option<&str> = Some("PiSync <pisync@example.com>");

    #[test]
    fn what_is_right_is_read() {
        let settings =
            SmtpSettings::parse("smtp://a%40b:p%3Aq%2F@mail.example:2525?tls=required", FROM)
                .unwrap();
        assert_eq!(settings.server(), ("mail.example", 2525));
        assert_eq!(settings.tls(), SmtpTls::Required);
        assert_eq!(settings.from().to_string(), "PiSync <pisync@example.com>");
        let credentials = settings.credentials.as_ref().unwrap().reveal();
        assert_eq!(*credentials, ("a@b".to_owned(), "p:q/".to_owned()));
        for (url, port, tls) in [
            ("smtp://mail.example", 587, SmtpTls::Required),
            ("smtps://u:p@mail.example", 465, SmtpTls::Implicit),
            ("smtps://u:p@mail.example:2465/?tls=required", 2465, SmtpTls::Implicit),
            ("smtp://mail.example:25?tls=none", 25, SmtpTls::Off),
            ("smtp://u:p@localhost:25?tls=none", 25, SmtpTls::Off),
            ("smtp://u:p@[::1]:25?tls=none", 25, SmtpTls::Off),
        ] {
            let settings = SmtpSettings::parse(url, FROM).unwrap();
            assert_eq!((settings.server().1, settings.tls()), (port, tls), "{url}");
        }
        assert_eq!(SmtpSettings::parse("smtp://[::1]", FROM).unwrap().server().0, "::1");
    }

    #[test]
    fn what_is_wrong_is_named_and_no_password_is_shown() {
        for url in [
            "mail.example",
            "smtp:mail.example",
            "http://u:hunter2@mail.example",
            "SMTP://u:hunter2@mail.example",
            "smtp://u:hunter2@",
            "smtp://u:hunter2@mail.example/path",
            "smtp://u:hunter2@mail.example#x",
            "smtp://u:hunter2@mail.example?tls=maybe",
            "smtp://u:hunter2@mail.example?tls=required&hunter2=1",
            "smtp://u:hunter2@mail.example?hunter2",
            "smtp://u:hunter2@mail.example?tls=none",
            "smtps://u:hunter2@mail.example?tls=none",
            "smtp://u:hunter2@mail.example:x",
            "smtp://hunter2@mail.example",
            "smtp://:hunter2@mail.example",
            "smtp://u:hunter2/x@mail.example",
            "smtp://u:hunter2@x@mail.example",
            "smtp://u:hunter2%ff@mail.example",
            "smtp://u:hunter2%00@mail.example",
            "smtp://u:x#hunter2@mail.example",
            "smtp://u:x?hunter2@mail.example",
        ] {
            let error = SmtpSettings::parse(url, FROM).unwrap_err();
            assert!(error.starts_with("SMTP_URL: "), "{url}: {error}");
            assert!(!error.contains("hunter"), "{url}: {error}");
        }
        let server = "smtp://u:hunter2@mail.example";
        for from in [
            None,
            Some(""),
            Some("pisync"),
            Some("a@b.example, c@d.example"),
            Some("ä@example.com"),
        ] {
            let error = SmtpSettings::parse(server, from).unwrap_err();
            assert!(error.starts_with("SMTP_FROM"), "{from:?}: {error}");
        }
        let settings = SmtpSettings::parse(server, FROM).unwrap();
        assert!(!format!("{settings:?} {settings:#?}").contains("hunter"));
    }
}
