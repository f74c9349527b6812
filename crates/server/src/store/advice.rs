//! Which setting to change for another database. The store knows a path or an address, and not who has named it: its
//! messages advise `DATA_DIR` and `DB_*`. The command line puts them in terms of the setting that is in use.

/// The setting that names a database.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NamedBy {
    /// `DATA_DIR`, or the parts of an address: `DB_HOST` and the others.
    Parts,
    /// `DATABASE_URL`, beside which the parts are not read.
    Url,
    /// An option with a URL.
    Option(&'static str),
}

/// Another database, as it is advised of.
const OTHER: &str = "another database";

/// What messages advise where parts name the database, and what to name instead in a URL.
const ADVICE: [(&str, &str); 5] = [
    ("set DATA_DIR to a folder that the server may write", "a file that the server may write"),
    ("set DATA_DIR to another folder", OTHER),
    ("set DATA_DIR", OTHER),
    ("set DB_NAME to another", OTHER),
    ("set DB_PASSWORD, or put it into DATABASE_URL", "the password, too,"),
];

impl NamedBy {
    /// A message of the store, in terms of this setting.
    #[must_use]
    pub fn advise(self, message: &str) -> String {
        let name = |what: &str| match self {
            Self::Url => format!("name {what} in DATABASE_URL"),
            Self::Option(option) => format!("name {what} behind {option}"),
            Self::Parts => what.to_owned(),
        };
        if self == Self::Parts {
            return message.replace("DB_PASSWORD, or put it into DATABASE_URL", "DB_PASSWORD");
        }
        let mut message = message.to_owned();
        for (of_parts, what) in ADVICE {
            message = message.replace(of_parts, &name(what));
        }
        let place = match self {
            Self::Option(option) => option,
            Self::Url | Self::Parts => "DATABASE_URL",
        };
        message
            .replace(
                "check DB_USER and DB_PASSWORD, or those in DATABASE_URL,",
                &format!("check the user and the password in the URL of {place}"),
            )
            .replace("for instance another DB_NAME", &name(OTHER))
            .replace(
                "set DB_HOST and DB_PORT to where it listens",
                &name("the host and the port where it listens"),
            )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn advice_names_the_setting_in_use() {
        for (message, of_url, of_option) in [
            (
                "no database at x; set DATA_DIR or run pisync serve once",
                "no database at x; name another database in DATABASE_URL or run pisync serve once",
                "no database at x; name another database behind --from or run pisync serve once",
            ),
            (
                "cannot open x; set DATA_DIR to a folder that the server may write",
                "cannot open x; name a file that the server may write in DATABASE_URL",
                "cannot open x; name a file that the server may write behind --from",
            ),
            (
                "x; create it with `pisync db setup`, or set DB_NAME to another",
                "x; create it with `pisync db setup`, or name another database in DATABASE_URL",
                "x; create it with `pisync db setup`, or name another database behind --from",
            ),
        ] {
            assert_eq!(NamedBy::Parts.advise(message), message);
            assert_eq!(NamedBy::Url.advise(message), of_url);
            assert_eq!(NamedBy::Option("--from").advise(message), of_option);
        }
    }
}
