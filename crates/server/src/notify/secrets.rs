//! The secrets of channels: how they are encrypted before the store keeps them, and where the key for that comes from. Whatever
//! stores or sends calls it. Nothing here may show a secret or a key, and without the right key nothing fails but the
//! channel itself, which is locked.
//!
//! Secrets are encrypted with XChaCha20-Poly1305. What is stored is a version byte, the 24 bytes of a random nonce, and the
//! ciphertext with its tag. The channel's id is authenticated with it, so that nobody can give one channel the secrets of
//! another by exchanging rows.

use std::{
    fmt,
    fs::{self, File},
    io::{self, Write as _},
    path::{Path, PathBuf},
    sync::Arc,
};

use base64::{
    Engine as _, alphabet,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig, general_purpose::STANDARD},
};
use chacha20poly1305::{
    KeyInit as _, XChaCha20Poly1305, XNonce,
    aead::{Aead as _, Payload},
};

use crate::{
    permissions::{self, PRIVATE, folder_of, give_to_owner_of, with_ending},
    random::Randomness,
    store::{Actor, Reseal, Resealed, Seal, Store, StoreError, Target},
    temporary::TemporaryFile,
};

/// The form in which secrets are stored.
const VERSION: u8 = 1;

const NONCE: usize = 24;

/// Stands before a channel's id in what is authenticated.
const PURPOSE: &[u8] = b"pisync channel ";

/// The file of the key, beside an SQLite database.
const FILE: &str = "secrets.key";

/// Behind the name of the file for the time of a change of keys.
const NEXT: &str = ".new";

/// The beginning of a signing secret, by Standard Webhooks.
const SIGNING_PREFIX: &str = "whsec_";

/// Tools differ in the alphabet of base64 and in its padding. Either is read.
const LENIENT: GeneralPurposeConfig =
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent);

/// The key under which secrets are stored: 32 bytes.
#[derive(Clone, PartialEq, Eq)]
pub struct SecretsKey([u8; 32]);

impl SecretsKey {
    /// Reads a key: 64 hexadecimal digits (`openssl rand -hex 32`), or base64 (`openssl rand -base64 32`). No text is both.
    ///
    /// # Errors
    /// Words that follow the name of what was read. They never hold the text.
    pub fn parse(text: &str) -> Result<Self, String> {
        let text = text.trim();
        let bytes = hexadecimal(text).or_else(|| {
            [alphabet::STANDARD, alphabet::URL_SAFE]
                .iter()
                .find_map(|alphabet| GeneralPurpose::new(alphabet, LENIENT).decode(text).ok())
        });
        bytes.and_then(|bytes| bytes.try_into().ok()).map(Self).ok_or_else(|| {
            "must be 32 bytes, as base64 or as 64 hexadecimal digits; `openssl rand -base64 32` makes one".to_owned()
        })
    }

    /// The key as text, for its file.
    fn to_text(&self) -> String {
        STANDARD.encode(self.0)
    }

    /// Encrypts the secrets of a channel.
    fn seal(&self, channel: i64, secrets: &[u8], nonce: [u8; NONCE]) -> Result<Vec<u8>, String> {
        let payload = Payload { msg: secrets, aad: &associated(channel) };
        let ciphertext = XChaCha20Poly1305::new(&self.0.into())
            .encrypt(&XNonce::from(nonce), payload)
            .map_err(|_| "the secrets are too long to be encrypted".to_owned())?;
        Ok([&[VERSION][..], &nonce, &ciphertext].concat())
    }

    /// The secrets of a channel; `None` when they were stored under another key, for another channel, or are damaged.
    fn open(&self, channel: i64, sealed: &[u8]) -> Option<Vec<u8>> {
        let (nonce, ciphertext) = sealed.strip_prefix(&[VERSION])?.split_first_chunk::<NONCE>()?;
        let payload = Payload { msg: ciphertext, aad: &associated(channel) };
        XChaCha20Poly1305::new(&self.0.into()).decrypt(&XNonce::from(*nonce), payload).ok()
    }
}

/// Never shows the key.
impl fmt::Debug for SecretsKey {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("[hidden]")
    }
}

/// What is authenticated beside a channel's secrets.
fn associated(channel: i64) -> Vec<u8> {
    [PURPOSE, &channel.to_be_bytes()].concat()
}

fn hexadecimal(text: &str) -> Option<Vec<u8>> {
    let digits: Option<Vec<_>> = text.chars().map(|digit| digit.to_digit(16)).collect();
    let digits = digits.filter(|digits| digits.len() == 64)?;
    let byte = |pair: &[u32]| u8::try_from(pair[0] << 4 | pair[1]).ok();
    digits.chunks_exact(2).map(byte).collect()
}

/// Where the key comes from.
#[derive(Debug, Clone)]
enum KeySource {
    /// `SECRETS_KEY`.
    Setting(SecretsKey),
    /// The file beside an SQLite database. It is made when it is needed first.
    File(PathBuf),
    /// Nowhere: every channel with secrets is locked.
    Missing,
}

/// Encrypts secrets and opens them, by the key that this process was given. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Secrets {
    source: Arc<KeySource>,
    randomness: Randomness,
}

impl Secrets {
    /// Those of a database: under `SECRETS_KEY` where it is set, or else under the key in a file beside an SQLite database,
    /// which must exist by now. PostgreSQL has no such file.
    #[must_use]
    pub fn of(target: &Target, given: Option<SecretsKey>, randomness: Randomness) -> Self {
        let source = match (given, target) {
            (Some(key), _) => KeySource::Setting(key),
            (None, Target::Sqlite(database)) => {
                // The database may be reached through links. Its other files are beside what they lead to.
                let database = fs::canonicalize(database).unwrap_or_else(|_| database.clone());
                KeySource::File(folder_of(&database).join(FILE))
            }
            (None, Target::Postgres(_)) => KeySource::Missing,
        };
        Self { source: Arc::new(source), randomness }
    }

    /// Without any key: all channels that have secrets are locked, and none can be made.
    #[must_use]
    pub fn unavailable() -> Self {
        Self { source: Arc::new(KeySource::Missing), randomness: Randomness::system() }
    }

    /// Whether there is a key, or will be one once it is needed.
    #[must_use]
    pub fn has_key(&self) -> bool {
        !matches!(&*self.source, KeySource::Missing)
    }

    /// What opens secrets now. The files are read each time: `pisync secrets rekey` may have replaced them.
    #[must_use]
    pub fn opener(&self) -> Opener {
        Opener(match &*self.source {
            KeySource::Setting(key) => vec![key.clone()],
            KeySource::Missing => Vec::new(),
            KeySource::File(path) => [with_ending(path, NEXT), path.clone()]
                .iter()
                .filter_map(|path| {
                    read(path).unwrap_or_else(|why| {
                        tracing::warn!("channels are locked: {why}");
                        None
                    })
                })
                .collect(),
        })
    }

    /// What encrypts these secrets once the store knows the channel's id. The store calls it within its transaction, so
    /// that no secrets are stored under a key that `rekey` has replaced in the meantime.
    #[must_use]
    pub fn seal(&self, secrets: Vec<u8>) -> Seal {
        let own = self.clone();
        Arc::new(move |channel| own.seal_now(channel, &secrets))
    }

    fn seal_now(&self, channel: i64, secrets: &[u8]) -> Result<Vec<u8>, String> {
        self.newest_key()?.seal(channel, secrets, self.nonce()?)
    }

    fn newest_key(&self) -> Result<SecretsKey, String> {
        match &*self.source {
            KeySource::Setting(key) => Ok(key.clone()),
            KeySource::Missing => Err("SECRETS_KEY is not set".to_owned()),
            KeySource::File(path) => match read(&with_ending(path, NEXT))? {
                Some(key) => Ok(key),
                None => read_or_make(path, &self.randomness),
            },
        }
    }

    fn nonce(&self) -> Result<[u8; NONCE], String> {
        let random = self.randomness.bytes()?;
        random.first_chunk().copied().ok_or_else(|| "there are too few random bytes".to_owned())
    }

    /// A new secret that signs a webhook's messages, as text.
    ///
    /// # Errors
    /// When the system gives no random bytes.
    pub fn new_signing_secret(&self) -> Result<String, String> {
        Ok(format!("{SIGNING_PREFIX}{}", STANDARD.encode(self.randomness.bytes()?)))
    }

    /// Encrypts the secrets of all channels anew, as one transaction: under `new`, or else under a new key in the file
    /// beside the database.
    ///
    /// The file is replaced in this order, so that a crash at any time leaves no channel locked: the new key is written
    /// beside it, the transaction is committed, then the new file takes its place. Both are tried until then. A rekey that
    /// was interrupted is finished by the next one, with the key that it had begun to use.
    ///
    /// # Errors
    /// See [`RekeyError`]. Nothing is changed then.
    pub async fn rekey(
        &self,
        store: &dyn Store,
        new: Option<SecretsKey>,
        by: &Actor,
    ) -> Result<Rekeyed, RekeyError> {
        let mut opener = self.opener();
        let list = store.channels().await?;
        let sealed: Vec<_> = list
            .channels
            .iter()
            .filter_map(|channel| Some((channel, channel.secrets.as_deref()?)))
            .collect();
        let known = opener.clone().and(new.clone());
        let locked =
            sealed.iter().filter(|(channel, sealed)| known.open(channel.id, sealed).is_none());
        let locked: Vec<_> =
            locked.map(|(channel, _)| format!("{} ({})", channel.id, channel.name)).collect();
        if !locked.is_empty() {
            return Err(RekeyError::Locked(locked.join(", ")));
        }
        let (key, file) = match (new, &*self.source) {
            (Some(key), _) => (key, None),
            (None, KeySource::Setting(_)) => {
                return Err(RekeyError::NoNewKey("no file holds the present key"));
            }
            (None, KeySource::Missing) => {
                return Err(RekeyError::NoNewKey("on PostgreSQL no file holds the key"));
            }
            (None, KeySource::File(path)) => {
                let next = with_ending(path, NEXT);
                let key = read_or_make(&next, &self.randomness).map_err(RekeyError::File)?;
                (key, Some((next, path)))
            }
        };
        opener = opener.and(Some(key.clone()));
        let own = self.clone();
        let reseal: Reseal =
            Arc::new(move |channel: i64, sealed: &[u8]| -> Result<Vec<u8>, String> {
                let secrets = opener.open(channel, sealed).ok_or("its secrets cannot be opened")?;
                key.seal(channel, &secrets, own.nonce()?)
            });
        let channels = match store.reseal_channels(&reseal, by).await? {
            Resealed::All(channels) => channels,
            Resealed::Refused { channel, why } => {
                return Err(RekeyError::Locked(format!("{channel}: {why}")));
            }
        };
        let file = file.map(|(next, path)| {
            fs::rename(&next, path)
                .and_then(|()| sync_folder_of(path))
                .map_err(|error| RekeyError::File(cannot("replace", path, &error)))
                .map(|()| path.clone())
        });
        Ok(Rekeyed { channels, file: file.transpose()? })
    }
}

/// What a change of keys has done.
#[derive(Debug)]
pub struct Rekeyed {
    /// How many channels have their secrets under the new key.
    pub channels: u64,
    /// The file that holds the new key; `None` when it was given.
    pub file: Option<PathBuf>,
}

/// Why the key was not changed.
#[derive(Debug, thiserror::Error)]
pub enum RekeyError {
    /// Secrets cannot be opened with the present key.
    #[error(
        "channels are locked, since their secrets were stored under another key: {0}; set their secrets anew or delete them first; nothing was changed"
    )]
    Locked(String),
    /// Nobody said which key to use.
    #[error("{0}: name a file with the new key behind --new-key")]
    NoNewKey(&'static str),
    /// The file of the key cannot be read or written.
    #[error("{0}")]
    File(String),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Opens secrets with the keys that were there at one moment.
#[derive(Debug, Clone)]
pub struct Opener(Vec<SecretsKey>);

impl Opener {
    /// The secrets of a channel; `None` when none of the keys opens them.
    #[must_use]
    pub fn open(&self, channel: i64, sealed: &[u8]) -> Option<Vec<u8>> {
        self.0.iter().find_map(|key| key.open(channel, sealed))
    }

    /// The same with another key.
    fn and(mut self, key: Option<SecretsKey>) -> Self {
        self.0.extend(key);
        self
    }
}

/// The key in a file; `None` when there is no file.
fn read(path: &Path) -> Result<Option<SecretsKey>, String> {
    let text = match fs::read_to_string(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        text => text.map_err(|error| cannot("read", path, &error))?,
    };
    // It opens everything that is encrypted.
    if let Ok(Some(before)) = permissions::restrict(path, PRIVATE) {
        tracing::warn!(path = %path.display(), "others had rights to the key of secrets (mode {before:o}); they were removed");
    }
    let key = SecretsKey::parse(&text).map_err(|rule| format!("{} {rule}", path.display()))?;
    Ok(Some(key))
}

/// The key in a file, which is made when there is none.
fn read_or_make(path: &Path, randomness: &Randomness) -> Result<SecretsKey, String> {
    if let Some(key) = read(path)? {
        return Ok(key);
    }
    let key = SecretsKey(randomness.bytes()?);
    match make(path, &key) {
        Ok(()) => {
            tracing::info!(path = %path.display(), "made the key of secrets; back it up, apart from the database");
            Ok(key)
        }
        // Another process was faster.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            read(path)?.ok_or_else(|| cannot("read", path, &error))
        }
        Err(error) => Err(cannot("make", path, &error)),
    }
}

/// Writes a key into a new file. Either all of it is there afterwards, also after a power cut, or nothing.
fn make(path: &Path, key: &SecretsKey) -> io::Result<()> {
    let file = TemporaryFile::beside(path)?;
    writeln!(file.as_file(), "{}", key.to_text())?;
    give_to_owner_of(folder_of(path), file.as_file())?;
    file.as_file().sync_all()?;
    file.persist_noclobber(path)?;
    sync_folder_of(path)
}

fn sync_folder_of(path: &Path) -> io::Result<()> {
    File::open(folder_of(path))?.sync_all()
}

fn cannot(do_what: &str, path: &Path, error: &io::Error) -> String {
    format!("cannot {do_what} the key of secrets {}: {error}", path.display())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn key(byte: u8) -> SecretsKey {
        SecretsKey([byte; 32])
    }

    fn of_folder(folder: &Path) -> Secrets {
        let database = folder.join("pisync.db");
        fs::write(&database, "").unwrap();
        Secrets::of(&Target::Sqlite(database), None, Randomness::system())
    }

    #[test]
    fn keys_are_read_in_either_form() {
        let bytes: [u8; 32] = std::array::from_fn(|at| 255 - 9 * u8::try_from(at % 28).unwrap());
        let hexadecimal: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        let base64 = STANDARD.encode(bytes);
        let url_safe = base64.replace('+', "-").replace('/', "_");
        assert_ne!(base64, url_safe);
        for text in [
            hexadecimal.as_str(),
            &hexadecimal.to_uppercase(),
            &base64,
            base64.trim_end_matches('='),
            &url_safe,
            &format!(" {base64}\n"),
        ] {
            assert_eq!(SecretsKey::parse(text), Ok(SecretsKey(bytes)), "{text}");
        }
        for text in ["", "secret", &hexadecimal[1..], &format!("{base64}AA"), &"ü".repeat(64)] {
            let rule = SecretsKey::parse(text).unwrap_err();
            assert!(rule.starts_with("must be 32 bytes"), "{rule}");
            assert!(text.is_empty() || !rule.contains(text), "{rule}");
        }
        assert_eq!(format!("{:?}", key(7)), "[hidden]");
        let secrets = Secrets::of(&Target::Sqlite("x".into()), Some(key(7)), Randomness::system());
        assert!(!format!("{secrets:?} {:?}", secrets.opener()).contains('7'), "{secrets:?}");
    }

    #[test]
    fn only_the_same_key_and_channel_open_what_is_whole() {
        let sealed = key(1).seal(5, b"a secret", [3; NONCE]).unwrap();
        assert_eq!(key(1).open(5, &sealed).as_deref(), Some(&b"a secret"[..]));
        assert!(!sealed.windows(6).any(|window| window == b"secret"));
        assert_eq!(key(2).open(5, &sealed), None);
        assert_eq!(key(1).open(6, &sealed), None);
        for at in 0..sealed.len() {
            let mut damaged = sealed.clone();
            damaged[at] ^= 1;
            assert_eq!(key(1).open(5, &damaged), None, "byte {at}");
            assert_eq!(key(1).open(5, &sealed[..at]), None, "{at} bytes");
        }
    }

    #[test]
    fn what_is_sealed_twice_differs() {
        let secrets = Secrets::of(&Target::Sqlite("x".into()), Some(key(1)), Randomness::system());
        let seal = secrets.seal(b"secret".to_vec());
        let (one, other) = (seal(1).unwrap(), seal(1).unwrap());
        assert_ne!(one, other);
        for sealed in [one, other] {
            assert_eq!(secrets.opener().open(1, &sealed).as_deref(), Some(&b"secret"[..]));
        }
    }

    #[test]
    fn the_file_is_made_at_the_first_need_and_is_private() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(FILE);
        let secrets = of_folder(folder.path());
        assert_eq!(secrets.opener().open(1, b"\x01"), None);
        assert!(!path.exists());
        let sealed = secrets.seal(b"secret".to_vec())(1).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&path), 0o600);
        // Another process reads the same, and takes rights away that others got.
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        let other = of_folder(folder.path());
        assert_eq!(other.opener().open(1, &sealed).as_deref(), Some(&b"secret"[..]));
        assert_eq!(mode(&path), 0o600);
        // A new key that is about to replace it goes first, and both open.
        make(&with_ending(&path, NEXT), &key(9)).unwrap();
        let next = other.seal(b"secret".to_vec())(1).unwrap();
        assert!(key(9).open(1, &next).is_some());
        for sealed in [sealed, next] {
            assert!(secrets.opener().open(1, &sealed).is_some());
        }
        fs::remove_file(with_ending(&path, NEXT)).unwrap();
        // What is no key is named, without its text.
        fs::write(&path, "a mistake").unwrap();
        let why = secrets.seal(b"secret".to_vec())(1).unwrap_err();
        assert!(why.contains(FILE) && !why.contains("mistake"), "{why}");
        assert_eq!(secrets.opener().open(1, b"\x01"), None);
    }

    #[test]
    fn without_a_key_nothing_is_sealed_or_opened() {
        let secrets = Secrets::unavailable();
        let why = secrets.seal(b"secret".to_vec())(1).unwrap_err();
        assert!(why.contains("SECRETS_KEY"), "{why}");
        assert_eq!(secrets.opener().open(1, b"anything"), None);
    }
}
