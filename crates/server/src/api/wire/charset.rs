//! The character encoding of a body, as its Content-Type names it. JSON is UTF-8, but the Node service also accepted
//! UTF-16 when the request declared it. The readers of bodies call it.

use axum::http::{HeaderMap, header};
use bytes::Bytes;

use crate::api::wire::error::ApiError;

/// The character encoding of a body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Charset {
    Utf8,
    /// Little-endian, unless a byte order mark says otherwise.
    Utf16,
    /// Big-endian, unless a byte order mark says otherwise.
    Utf16BigEndian,
}

impl Charset {
    /// The charset that the request declares; UTF-8 without one.
    pub(crate) fn of(headers: &HeaderMap) -> Result<Self, ApiError> {
        let content_type = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
        let named = content_type.and_then(|text| {
            text.split(';').skip(1).find_map(|parameter| {
                let (name, value) = parameter.split_once('=')?;
                let value = value.trim().trim_matches('"').to_ascii_lowercase();
                name.trim().eq_ignore_ascii_case("charset").then_some(value)
            })
        });
        match named.as_deref() {
            None | Some("" | "utf-8" | "utf8" | "us-ascii") => Ok(Self::Utf8),
            Some("utf-16" | "utf-16le") => Ok(Self::Utf16),
            Some("utf-16be") => Ok(Self::Utf16BigEndian),
            Some(_) => Err(ApiError::UnsupportedMediaType(
                "send UTF-8, with Content-Type: application/json; charset=utf-8",
            )),
        }
    }

    /// Converts the body to UTF-8. A body declared as UTF-8 is not checked here: its reader does that.
    pub(crate) fn to_utf8(self, body: Bytes) -> Result<Bytes, ApiError> {
        let is_big_endian = match self {
            Self::Utf8 => return Ok(body),
            Self::Utf16 => body.starts_with(&[0xfe, 0xff]),
            Self::Utf16BigEndian => !body.starts_with(&[0xff, 0xfe]),
        };
        let malformed = |why: &str| {
            ApiError::Malformed(format!("it is not the UTF-16 that it is declared to be: {why}"))
        };
        if !body.len().is_multiple_of(2) {
            return Err(malformed("it has an odd number of bytes"));
        }
        let units = body.chunks_exact(2).map(|pair| {
            let unit = u16::from_be_bytes([pair[0], pair[1]]);
            if is_big_endian { unit } else { unit.swap_bytes() }
        });
        // A byte order mark becomes one in UTF-8, which the JSON reader skips.
        let text: Result<String, _> = char::decode_utf16(units).collect();
        text.map(Bytes::from).map_err(|_| malformed("it has half a surrogate pair"))
    }
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    fn of(content_type: &'static str) -> Option<Charset> {
        let headers =
            HeaderMap::from_iter([(header::CONTENT_TYPE, HeaderValue::from_static(content_type))]);
        Charset::of(&headers).ok()
    }

    #[test]
    fn what_content_types_name() {
        for content_type in [
            "application/json",
            "application/json;",
            "application/json; charset=",
            "application/json; charset=utf-8",
            "application/json;charset=UTF-8",
            "application/json ; Charset = \"Utf-8\"",
            "application/json; charset=utf8",
            "application/json; charset=us-ascii",
            "application/json; version=2; charset=utf-8; x=y",
            "application/json; xcharset=latin1",
        ] {
            assert_eq!(of(content_type), Some(Charset::Utf8), "{content_type}");
        }
        assert_eq!(of("application/json; charset=utf-16"), Some(Charset::Utf16));
        assert_eq!(of("application/json; charset=\"UTF-16LE\""), Some(Charset::Utf16));
        assert_eq!(of("application/json; charset=utf-16be"), Some(Charset::Utf16BigEndian));
        for charset in ["iso-8859-1", "windows-1252", "utf-32", "utf-7", "latin1"] {
            let content_type = format!("application/json; charset={charset}");
            assert_eq!(of(String::leak(content_type)), None, "{charset}");
        }
        assert_eq!(Charset::of(&HeaderMap::new()).ok(), Some(Charset::Utf8));
    }

    #[test]
    fn utf16_becomes_utf8() {
        let text = "{\"device_id\":\"Gerät \u{1f600}\"}";
        let encoded = |mark: &str, to_bytes: fn(u16) -> [u8; 2]| -> Bytes {
            let units = mark.encode_utf16().chain(text.encode_utf16());
            units.flat_map(to_bytes).collect()
        };
        for (charset, body) in [
            (Charset::Utf16, encoded("", u16::to_le_bytes)),
            (Charset::Utf16, encoded("\u{feff}", u16::to_le_bytes)),
            (Charset::Utf16, encoded("\u{feff}", u16::to_be_bytes)),
            (Charset::Utf16BigEndian, encoded("", u16::to_be_bytes)),
            (Charset::Utf16BigEndian, encoded("\u{feff}", u16::to_be_bytes)),
            (Charset::Utf16BigEndian, encoded("\u{feff}", u16::to_le_bytes)),
        ] {
            let read = charset.to_utf8(body).unwrap();
            let read = std::str::from_utf8(&read).unwrap();
            assert_eq!(read.trim_start_matches('\u{feff}'), text, "{charset:?}");
        }
        for broken in [&b"{\0}"[..], b"\x00\xd8", b"\x00\xdc{\0"] {
            assert!(Charset::Utf16.to_utf8(Bytes::from_static(broken)).is_err(), "{broken:?}");
        }
        assert_eq!(Charset::Utf16.to_utf8(Bytes::new()).unwrap(), Bytes::new());
    }
}
