//! What carries messages: an HTTP client that reaches checked addresses only, and the SMTP server (`smtp`). A process makes
//! one [`Sender`] and every channel uses it. It keeps no connection, follows no redirect, keeps no cookie and takes no
//! proxy from the environment.

use std::{error::Error, fmt, sync::Arc, time::Duration};

use axum::http::{HeaderMap, StatusCode, header};
use ipnet::IpNet;
use reqwest::{Client, Proxy, Response, Url, redirect};
use rustls::{RootCertStore, pki_types::CertificateDer};
use tokio::time::timeout;

use super::{
    Hidden,
    smtp::{Smtp, SmtpSettings},
    targets::{Refusal, Targets},
};
use crate::{build_info::PACKAGE_VERSION, tls_trust};

/// How long connecting may take, with looking the name up and TLS.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// How long an attempt may take as a whole.
pub const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(15);

/// How much of an answer is read: enough for a sentence about what is wrong.
pub const ANSWER_BYTES: usize = 200;

/// Where Telegram's bots are asked. <https://core.telegram.org/bots/api#making-requests>
const TELEGRAM: &str = "https://api.telegram.org/";

/// How messages are sent.
#[derive(Debug, Clone)]
pub struct SenderSettings {
    /// Networks that are not public and may be reached all the same (`NOTIFY_ALLOW`).
    pub allowed: Vec<IpNet>,
    /// The proxy through which everything but mail is sent (`NOTIFY_PROXY`).
    pub proxy: Option<ProxyUrl>,
    /// The server for e-mail (`SMTP_URL`, `SMTP_FROM`).
    pub smtp: Option<SmtpSettings>,
    /// The certificates to trust instead of the system's.
    pub roots: Option<Vec<CertificateDer<'static>>>,
    /// [`CONNECT_TIMEOUT`].
    pub connect_timeout: Duration,
    /// [`ATTEMPT_TIMEOUT`].
    pub attempt_timeout: Duration,
    /// Telegram's API, or a server that stands for it.
    pub telegram: Option<Url>,
    /// What resolves names instead of the system.
    pub targets: Option<Targets>,
}

impl Default for SenderSettings {
    fn default() -> Self {
        Self {
            allowed: Vec::new(),
            proxy: None,
            smtp: None,
            roots: None,
            connect_timeout: CONNECT_TIMEOUT,
            attempt_timeout: ATTEMPT_TIMEOUT,
            telegram: None,
            targets: None,
        }
    }
}

/// The URL of a proxy, which may hold a password.
#[derive(Debug, Clone)]
pub struct ProxyUrl(Hidden<Url>);

impl ProxyUrl {
    /// Reads `NOTIFY_PROXY`.
    ///
    /// # Errors
    /// What is wrong with it, without repeating it.
    pub fn parse(text: &str) -> Result<Self, String> {
        let url =
            Url::parse(text).map_err(|error| format!("NOTIFY_PROXY is not a URL: {error}"))?;
        if !["http", "https"].contains(&url.scheme()) {
            return Err("NOTIFY_PROXY must begin with http:// or https://".to_owned());
        }
        if !matches!(url.path(), "" | "/") || url.query().is_some() || url.fragment().is_some() {
            return Err("NOTIFY_PROXY must end behind its host and port; in the password, / must be written as %2F, \
                        ? as %3F and # as %23"
                .to_owned());
        }
        Ok(Self(Hidden::new(url)))
    }
}

/// Sends messages. Cheap to clone.
#[derive(Clone)]
pub struct Sender {
    client: Client,
    targets: Targets,
    has_proxy: bool,
    attempt_timeout: Duration,
    connect_timeout: Duration,
    smtp: Option<Arc<Smtp>>,
    telegram: Url,
}

impl Sender {
    /// Prepares everything for sending. Nothing is connected yet.
    ///
    /// # Errors
    /// When TLS cannot be set up, or the settings contradict each other.
    pub fn new(settings: SenderSettings) -> Result<Self, String> {
        let SenderSettings {
            allowed,
            proxy,
            smtp,
            roots,
            connect_timeout,
            attempt_timeout,
            telegram,
            targets,
        } = settings;
        let roots = trusted(roots.unwrap_or_else(tls_trust::system_roots));
        let smtp = match smtp {
            Some(settings) => {
                let smtp = Smtp::new(settings, &roots, connect_timeout, attempt_timeout)?;
                Some(Arc::new(smtp))
            }
            None => None,
        };
        let mut store = RootCertStore::empty();
        store.add_parsable_certificates(roots);
        if store.is_empty() {
            tracing::warn!(
                "this system has no root certificates: no receiver of messages can be reached by https"
            );
        }
        let tls = tls_trust::named_by(store).map_err(|error| format!("TLS: {error}"))?;
        let targets = targets.unwrap_or_else(|| Targets::new(&allowed));
        let client = Client::builder()
            .tls_backend_preconfigured(tls)
            .user_agent(format!("pisync/{PACKAGE_VERSION}"))
            .redirect(redirect::Policy::none())
            .referer(false)
            .connect_timeout(connect_timeout)
            .timeout(attempt_timeout)
            // Attempts are seconds apart. A connection that the other side has closed meanwhile would cost an attempt,
            // and a kept one would outlive the check of its address.
            .pool_max_idle_per_host(0)
            // Answers are cut to a few bytes.
            .no_gzip()
            .no_brotli()
            // Variables such as HTTP_PROXY are not for us.
            .no_proxy();
        let has_proxy = proxy.is_some();
        let client = match proxy {
            // The proxy resolves names by itself, and may have a private address.
            Some(ProxyUrl(url)) => {
                let proxy = Proxy::all(url.reveal().clone())
                    .map_err(|error| format!("NOTIFY_PROXY: {}", root_cause(&error)))?;
                client.proxy(proxy)
            }
            None => client.dns_resolver(Arc::new(targets.clone())),
        };
        let client = client
            .build()
            .map_err(|error| format!("cannot send over HTTP: {}", root_cause(&error)))?;
        let telegram = match telegram {
            Some(url) => url,
            None => Url::parse(TELEGRAM).map_err(|error| error.to_string())?,
        };
        Ok(Self { client, targets, has_proxy, attempt_timeout, connect_timeout, smtp, telegram })
    }

    /// The addresses that may be reached.
    #[must_use]
    pub fn targets(&self) -> &Targets {
        &self.targets
    }

    /// Checks where a URL leads, for whoever is about to store it. Behind a proxy only a literal address can be checked.
    ///
    /// # Errors
    /// When it leads to an address that may not be reached.
    pub async fn check(&self, url: &Url) -> Result<(), Refusal> {
        if self.has_proxy {
            return self.targets.check_literal(url);
        }
        // Like a name that nobody knows: what cannot be told now is checked when something is sent.
        timeout(self.connect_timeout, self.targets.check(url)).await.unwrap_or(Ok(()))
    }

    /// Whether mail can be sent.
    #[must_use]
    pub fn has_smtp(&self) -> bool {
        self.smtp.is_some()
    }

    pub(super) fn smtp(&self) -> Option<&Smtp> {
        self.smtp.as_deref()
    }

    pub(super) fn telegram(&self) -> &Url {
        &self.telegram
    }

    /// Posts a body, and reads the beginning of the answer.
    ///
    /// # Errors
    /// Why there is no answer. It names neither the URL nor a header.
    pub(super) async fn post(
        &self,
        url: &Url,
        content_type: &str,
        headers: HeaderMap,
        body: Vec<u8>,
    ) -> Result<Answer, String> {
        // A literal address does not pass the resolver.
        self.targets.check_literal(url).map_err(|refusal| format!("the URL {refusal}"))?;
        let request = self
            .client
            .post(url.clone())
            .header(header::CONTENT_TYPE, content_type)
            .headers(headers)
            .body(body);
        let response = request.send().await.map_err(|error| self.explain(&error))?;
        Ok(Answer {
            status: response.status(),
            retry_after: response
                .headers()
                .get(header::RETRY_AFTER)
                .and_then(|value| value.to_str().ok())
                .map(str::to_owned),
            beginning: beginning(response).await,
        })
    }

    /// Why there was no answer, in words.
    fn explain(&self, error: &reqwest::Error) -> String {
        let mut source = error.source();
        while let Some(cause) = source {
            if let Some(refusal) = cause.downcast_ref::<Refusal>() {
                return format!("the URL {refusal}");
            }
            source = cause.source();
        }
        match () {
            () if error.is_timeout() && error.is_connect() => {
                format!("cannot connect within {}", seconds(self.connect_timeout))
            }
            () if error.is_timeout() => {
                format!("no answer within {}", seconds(self.attempt_timeout))
            }
            () if error.is_connect() => format!("cannot connect: {}", root_cause(error)),
            () => format!("the connection ended without an answer: {}", root_cause(error)),
        }
    }
}

impl fmt::Debug for Sender {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Sender")
            .field("targets", &self.targets)
            .field("has_proxy", &self.has_proxy)
            .field("smtp", &self.smtp)
            .finish_non_exhaustive()
    }
}

/// What was answered.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) status: StatusCode,
    /// The header of that name.
    pub(super) retry_after: Option<String>,
    /// At most [`ANSWER_BYTES`] of the body. Empty when reading it failed: the status counts.
    pub(super) beginning: Vec<u8>,
}

async fn beginning(mut response: Response) -> Vec<u8> {
    let mut beginning = Vec::new();
    while beginning.len() < ANSWER_BYTES {
        match response.chunk().await {
            Ok(Some(chunk)) => {
                let room = ANSWER_BYTES - beginning.len();
                beginning.extend_from_slice(&chunk[..chunk.len().min(room)]);
            }
            Ok(None) | Err(_) => break,
        }
    }
    beginning
}

/// The certificates that TLS can read: the system's may hold others.
fn trusted(certificates: Vec<CertificateDer<'static>>) -> Vec<CertificateDer<'static>> {
    let is_legible = |certificate: &CertificateDer<'static>| {
        RootCertStore::empty().add(certificate.clone()).is_ok()
    };
    certificates.into_iter().filter(is_legible).collect()
}

/// What lies at the bottom of an error. What is above it may name the URL.
fn root_cause(error: &(dyn Error + 'static)) -> String {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    if cause.is::<reqwest::Error>() { "the request failed".to_owned() } else { cause.to_string() }
}

pub(super) fn seconds(duration: Duration) -> String {
    format!("{} s", duration.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proxys_url_is_read_and_not_shown() {
        for url in ["http://u:hunter2@proxy:3128", "https://proxy", "http://[fd00::1]:3128/"] {
            let proxy = ProxyUrl::parse(url).unwrap();
            assert_eq!(format!("{proxy:?} {proxy:#?}").matches("hunter2").count(), 0);
            assert_eq!(format!("{proxy:?}").matches("proxy:").count(), 0);
        }
        for url in [
            "socks5://u:hunter2@proxy",
            "hunter2",
            "http://u:hunter2@proxy/path",
            "http://u:hunter2@proxy/?x",
            "http://u:hunter2",
            "http://u:hunter2/x@proxy",
            "http://proxy/#hunter2",
        ] {
            let error = ProxyUrl::parse(url).unwrap_err();
            assert!(error.starts_with("NOTIFY_PROXY"), "{error}");
            assert!(!error.contains("hunter"), "{error}");
        }
    }

    #[test]
    fn nothing_of_the_settings_is_shown() {
        let settings = SenderSettings {
            proxy: Some(ProxyUrl::parse("http://u:hunter2@proxy:3128").unwrap()),
            smtp: Some(
                SmtpSettings::parse("smtp://u:hunter3@mail.example", Some("pisync@mail.example"))
                    .unwrap(),
            ),
            ..SenderSettings::default()
        };
        let shown = format!("{settings:?}");
        let sender = Sender::new(settings).unwrap();
        assert!(sender.has_smtp());
        let shown = format!("{shown} {sender:?} {sender:#?}");
        assert!(!shown.contains("hunter"), "{shown}");
    }
}
