//! The files that pages load, compressed in memory and named by their hash, so that a browser loads each only once. A
//! handler that serves pages builds its set of files at the start. Nothing is compressed while a request waits.

use std::{
    collections::BTreeMap,
    io::{Read as _, Write as _},
    sync::OnceLock,
};

use axum::{
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use flate2::{Compression, read::GzDecoder, write::GzEncoder};
use sha2::{Digest as _, Sha256};

use crate::api::wire::weights::weighted;

/// Smaller files gain nothing from compression: headers alone are that large.
const WORTH_COMPRESSING: usize = 512;

/// Hexadecimal digits of the hash in a file's name. 48 bits are enough for a few hundred files and their versions.
const HASH_DIGITS: usize = 12;

/// A name with a hash always means the same bytes.
const FOREVER: HeaderValue = HeaderValue::from_static("public, max-age=31536000, immutable");

/// A plain name may mean other bytes after an upgrade, so browsers must ask whether their copy is current.
const ASK_AGAIN: HeaderValue = HeaderValue::from_static("no-cache");

/// A file in memory.
#[derive(Debug)]
struct Asset {
    content_type: HeaderValue,
    hash: String,
    /// `None` if compression does not pay.
    gzipped: Option<Bytes>,
    /// Decompressed for the first client that does not accept gzip.
    plain: OnceLock<Bytes>,
}

impl Asset {
    fn respond(&self, headers: &HeaderMap, cache_control: HeaderValue) -> Response {
        let gzipped = self.gzipped.as_ref().filter(|_| accepts_gzip(headers));
        let encoding = if gzipped.is_some() { "-gzip" } else { "" };
        let etag = format!("\"{}{encoding}\"", self.hash);
        let mut response = if is_current(headers, &etag) {
            StatusCode::NOT_MODIFIED.into_response()
        } else {
            let mut response = gzipped.cloned().unwrap_or_else(|| self.plain()).into_response();
            response.headers_mut().insert(header::CONTENT_TYPE, self.content_type.clone());
            if gzipped.is_some() {
                let gzip = HeaderValue::from_static("gzip");
                response.headers_mut().insert(header::CONTENT_ENCODING, gzip);
            }
            response
        };
        let answer = response.headers_mut();
        answer.insert(header::CACHE_CONTROL, cache_control);
        if self.gzipped.is_some() {
            answer.insert(header::VARY, header::ACCEPT_ENCODING.into());
        }
        if let Ok(etag) = HeaderValue::try_from(etag) {
            answer.insert(header::ETAG, etag);
        }
        response
    }

    fn plain(&self) -> Bytes {
        let decompress = || {
            let mut plain = Vec::new();
            let gzipped = self.gzipped.as_deref().unwrap_or_default();
            // This program or its build compressed it, so it cannot fail.
            let _ = GzDecoder::new(gzipped).read_to_end(&mut plain);
            plain.into()
        };
        self.plain.get_or_init(decompress).clone()
    }
}

/// A set of files.
#[derive(Debug, Default)]
pub(crate) struct Assets {
    by_name: BTreeMap<String, Asset>,
    /// The plain name of each name with a hash.
    hashed: BTreeMap<String, String>,
}

impl Assets {
    /// Adds a file.
    ///
    /// # Errors
    /// When its type is not a valid header value, or it cannot be compressed.
    pub(crate) fn add(
        &mut self,
        name: &str,
        content_type: &str,
        plain: Bytes,
    ) -> Result<(), std::io::Error> {
        let gzipped = if plain.len() >= WORTH_COMPRESSING && is_text(content_type) {
            let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
            encoder.write_all(&plain)?;
            Some(Bytes::from(encoder.finish()?))
        } else {
            None
        };
        self.insert(name, content_type, &plain.clone(), gzipped, OnceLock::from(plain))
    }

    /// Adds a file that is already compressed with gzip.
    ///
    /// # Errors
    /// When its type is not a valid header value.
    pub(crate) fn add_gzipped(
        &mut self,
        name: &str,
        content_type: &str,
        gzipped: Bytes,
    ) -> Result<(), std::io::Error> {
        if is_text(content_type) {
            return self.insert(
                name,
                content_type,
                &gzipped.clone(),
                Some(gzipped),
                OnceLock::new(),
            );
        }
        let mut plain = Vec::new();
        GzDecoder::new(&*gzipped).read_to_end(&mut plain)?;
        self.add(name, content_type, plain.into())
    }

    fn insert(
        &mut self,
        name: &str,
        content_type: &str,
        hashed: &[u8],
        gzipped: Option<Bytes>,
        plain: OnceLock<Bytes>,
    ) -> Result<(), std::io::Error> {
        let content_type = HeaderValue::try_from(content_type).map_err(std::io::Error::other)?;
        let mut hash = String::with_capacity(HASH_DIGITS);
        for byte in Sha256::digest(hashed).iter().take(HASH_DIGITS / 2) {
            hash.push_str(&format!("{byte:02x}"));
        }
        let (stem, extension) = name.rsplit_once('.').unwrap_or((name, ""));
        self.hashed.insert(format!("{stem}.{hash}.{extension}"), name.to_owned());
        self.by_name.insert(name.to_owned(), Asset { content_type, hash, gzipped, plain });
        Ok(())
    }

    /// Each file's name, and its name with the hash, which pages refer to.
    pub(crate) fn names(&self) -> impl Iterator<Item = (&str, &str)> {
        self.hashed.iter().map(|(hashed, name)| (name.as_str(), hashed.as_str()))
    }

    /// The response to a request for a file by either name; `None` if the file does not exist.
    pub(crate) fn respond(&self, name: &str, headers: &HeaderMap) -> Option<Response> {
        let (name, cache_control) = match self.hashed.get(name) {
            Some(name) => (name.as_str(), FOREVER),
            None => (name, ASK_AGAIN),
        };
        Some(self.by_name.get(name)?.respond(headers, cache_control))
    }
}

/// True if a content type is text, which compresses well. Pictures are compressed already.
fn is_text(content_type: &str) -> bool {
    let media_type = content_type.split(';').next().unwrap_or_default().trim();
    media_type.starts_with("text/")
        || matches!(media_type, "application/json" | "application/javascript" | "image/svg+xml")
}

/// True if the client accepts gzip (RFC 9110, 12.5.3).
fn accepts_gzip(headers: &HeaderMap) -> bool {
    let mut any = false;
    for (name, weight) in weighted(headers, header::ACCEPT_ENCODING) {
        let is_taken = weight > 0.0;
        if name.eq_ignore_ascii_case("gzip") || name.eq_ignore_ascii_case("x-gzip") {
            return is_taken;
        }
        any |= name == "*" && is_taken;
    }
    any
}

/// True if the client has this version (RFC 9110, 13.1.2).
fn is_current(headers: &HeaderMap, etag: &str) -> bool {
    let lines = headers.get_all(header::IF_NONE_MATCH).iter();
    lines.filter_map(|line| line.to_str().ok()).flat_map(|line| line.split(',')).any(|known| {
        let known = known.trim();
        known == "*" || known.strip_prefix("W/").unwrap_or(known) == etag
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(name: header::HeaderName, value: &'static str) -> HeaderMap {
        HeaderMap::from_iter([(name, HeaderValue::from_static(value))])
    }

    #[test]
    fn encodings_that_clients_take() {
        for (sent, takes) in [
            ("gzip", true),
            ("gzip, deflate, br, zstd", true),
            ("deflate, GZIP;q=0.5", true),
            ("*", true),
            ("br", false),
            ("", false),
            ("identity", false),
            ("gzip;q=0, *", false),
            ("gzip; q=0.0", false),
            ("gzip;Q=0", false),
            ("*;q=0", false),
        ] {
            assert_eq!(accepts_gzip(&headers(header::ACCEPT_ENCODING, sent)), takes, "{sent}");
        }
        assert!(!accepts_gzip(&HeaderMap::new()));
    }

    #[test]
    fn a_file_is_answered_by_both_names_and_only_when_it_has_changed() {
        let text = "body { color: black }\n".repeat(100);
        let mut assets = Assets::default();
        assets.add("a.css", "text/css", text.clone().into()).unwrap();
        assets.add("a.png", "image/png", vec![0; 2048].into()).unwrap();
        let names: BTreeMap<_, _> = assets.names().collect();
        let gzip = headers(header::ACCEPT_ENCODING, "gzip");
        for (name, cache) in [("a.css", ASK_AGAIN), (names["a.css"], FOREVER)] {
            let answer = assets.respond(name, &gzip).unwrap();
            assert_eq!(answer.headers()[header::CONTENT_ENCODING], "gzip");
            assert_eq!(answer.headers()[header::CACHE_CONTROL], cache);
            assert_eq!(answer.headers()[header::VARY], "accept-encoding");
            let mut again = gzip.clone();
            again.insert(header::IF_NONE_MATCH, answer.headers()[header::ETAG].clone());
            let answer = assets.respond(name, &again).unwrap();
            assert_eq!(answer.status(), StatusCode::NOT_MODIFIED);
            // The client has another representation.
            again.remove(header::ACCEPT_ENCODING);
            let answer = assets.respond(name, &again).unwrap();
            assert_eq!(answer.status(), StatusCode::OK);
            assert!(!answer.headers().contains_key(header::CONTENT_ENCODING));
        }
        let picture = assets.respond("a.png", &gzip).unwrap();
        assert!(!picture.headers().contains_key(header::CONTENT_ENCODING));
        assert!(assets.respond("b.css", &gzip).is_none());
        // A changed file has another name. A file that somebody else compressed has the same content.
        let mut changed = Assets::default();
        changed.add("a.css", "text/css", text.replace("black", "white").into()).unwrap();
        assert_ne!(changed.names().next().unwrap().1, names["a.css"]);
        let gzipped = assets.by_name["a.css"].gzipped.clone().unwrap();
        changed.add_gzipped("b.css", "text/css", gzipped).unwrap();
        assert_eq!(changed.by_name["b.css"].plain(), text);
        // A picture that others compressed only became larger by it.
        let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(&[7; 2048]).unwrap();
        changed.add_gzipped("b.png", "image/png", encoder.finish().unwrap().into()).unwrap();
        let picture = changed.respond("b.png", &gzip).unwrap();
        assert!(!picture.headers().contains_key(header::CONTENT_ENCODING));
        assert_eq!(changed.by_name["b.png"].plain(), vec![7; 2048]);
    }
}
