//! Settings of notifications: the server for e-mail, which addresses may be reached, and where links lead. `serve` has them,
//! and so have the commands that send.

use std::net::IpAddr;

use clap::Args;
use ipnet::IpNet;
use reqwest::Url;

use super::{ConfigError, Secret, given, items, wrong};
use crate::notify::{
    sender::{ProxyUrl, SenderSettings},
    smtp::SmtpSettings,
};

/// How messages are sent.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Notifications")]
pub struct NotifyArgs {
    /// Address at which people reach this server, such as https://fleet.example, for links in messages
    #[arg(long, env = "PUBLIC_URL", value_name = "ADDRESS")]
    public_url: Option<String>,
    /// Server for e-mail: smtp://USER:PASSWORD@HOST:587?tls=required or smtps://USER:PASSWORD@HOST
    #[arg(long, env = "SMTP_URL", value_name = "URL")]
    smtp_url: Option<Secret>,
    /// Sender of e-mail, such as PiSync <pisync@example.com>
    #[arg(long, env = "SMTP_FROM", value_name = "ADDRESS")]
    smtp_from: Option<String>,
    /// Networks (separated by commas) that channels may reach although they are not public, such as 10.0.0.0/8
    #[arg(long, env = "NOTIFY_ALLOW", value_name = "NETWORKS")]
    notify_allow: Option<String>,
    /// Proxy through which everything but e-mail is sent
    #[arg(long, env = "NOTIFY_PROXY", value_name = "URL")]
    notify_proxy: Option<Secret>,
}

impl NotifyArgs {
    /// How to send.
    ///
    /// # Errors
    /// What makes no sense, without any secret.
    pub fn sender(&self) -> Result<SenderSettings, ConfigError> {
        let smtp = match given(self.smtp_url.as_ref().map(|url| &url.0)) {
            Some(url) => Some(
                SmtpSettings::parse(url, given(self.smtp_from.as_ref())).map_err(ConfigError)?,
            ),
            None if given(self.smtp_from.as_ref()).is_some() => {
                return wrong("SMTP_FROM is set, but SMTP_URL is not; set both or neither");
            }
            None => None,
        };
        let proxy = given(self.notify_proxy.as_ref().map(|url| &url.0)).map(ProxyUrl::parse);
        let network = |item: &str| {
            let read = item.parse::<IpNet>().or_else(|_| item.parse::<IpAddr>().map(IpNet::from));
            read.or_else(|_| {
                wrong(format!(
                    "NOTIFY_ALLOW: {item:?} is neither an address nor a network such as 10.0.0.0/8"
                ))
            })
        };
        Ok(SenderSettings {
            allowed: items(self.notify_allow.as_ref()).map(network).collect::<Result<_, _>>()?,
            proxy: proxy.transpose().map_err(ConfigError)?,
            smtp,
            ..SenderSettings::default()
        })
    }

    /// Where people reach the server, without a slash at its end.
    ///
    /// # Errors
    /// When it is no such address. The message does not repeat it.
    pub fn public_url(&self) -> Result<Option<String>, ConfigError> {
        let Some(text) = given(self.public_url.as_ref()) else { return Ok(None) };
        let is_right = |url: &Url| {
            ["http", "https"].contains(&url.scheme())
                && url.has_host()
                && url.username().is_empty()
                && url.password().is_none()
                && url.query().is_none()
                && url.fragment().is_none()
        };
        match Url::parse(text).ok().filter(is_right) {
            Some(url) => Ok(Some(url.as_str().trim_end_matches('/').to_owned())),
            // It may have a password in it.
            None => wrong("PUBLIC_URL is no address such as https://fleet.example"),
        }
    }
}
