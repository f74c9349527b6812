//! A `.env` file, read as dotenv 16 reads it: the Node service used that, and its users keep their files. The
//! command line calls this. It must never show a value: there are passwords in these files.

use regex_lite::Regex;

/// One setting, with what dotenv's expression takes as its value. White space is that of JavaScript, which
/// counts the byte order mark in. A value that begins with a quotation mark and does not end with it is taken as
/// it stands; one in quotation marks may go on over several lines.
const SETTING: &str = concat!(
    r"(?m)^[W]*(?:export[W]+)?([\w.-]+)(?:[W]*=[W]*?|:[W]+?)",
    r#"([W]*'(?:\\'|[^'])*'|[W]*"(?:\\"|[^"])*"|[W]*`(?:\\`|[^`])*`|[^#\n]+)?"#,
    r"[W]*(?:#[^\n]*)?$",
);

/// What JavaScript's `\s` stands for, within brackets.
const WHITE_SPACE: &str = r"\t\n\x0B\x0C\r \x{A0}\x{1680}\x{2000}-\x{200A}\x{2028}\x{2029}\x{202F}\x{205F}\x{3000}\x{FEFF}";

/// What a `.env` file holds.
#[derive(Debug, Default)]
pub(crate) struct EnvFile {
    settings: Vec<Setting>,
    /// Numbers of lines that are neither a setting nor a comment nor empty.
    pub(crate) odd_lines: Vec<usize>,
    /// All of it is UTF-8. What is not stands as U+FFFD in the values.
    pub(crate) is_utf8: bool,
}

/// One line, or several, of a `.env` file.
pub(crate) struct Setting {
    /// Its name.
    pub(crate) name: String,
    /// Its value; empty is as good as none.
    pub(crate) value: String,
    /// The number of its line.
    pub(crate) line: usize,
    /// Its value begins with a quotation mark that is not closed.
    pub(crate) is_unclosed: bool,
    /// The number of the line in which its value ends.
    pub(crate) last_line: usize,
}

impl std::fmt::Debug for Setting {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{} in line {}", self.name, self.line)
    }
}

impl EnvFile {
    /// Reads the content of a file.
    ///
    /// # Errors
    /// When it is text in another encoding altogether; says which.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, String> {
        if bytes.starts_with(&[0xff, 0xfe]) || bytes.starts_with(&[0xfe, 0xff]) {
            return Err("it is UTF-16 text; save it as UTF-8".to_owned());
        }
        let is_utf8 = std::str::from_utf8(bytes).is_ok();
        let text = String::from_utf8_lossy(bytes).replace("\r\n", "\n").replace('\r', "\n");
        let expression = Regex::new(&SETTING.replace("[W]", &format!("[{WHITE_SPACE}]")))
            .map_err(|error| error.to_string())?;
        let mut file = Self { is_utf8, ..Self::default() };
        let mut lines = Lines { text: &text, read: 0, number: 1 };
        for found in expression.captures_iter(&text) {
            let (Some(whole), Some(name)) = (found.get(0), found.get(1)) else { continue };
            file.odd_lines.extend(lines.odd_before(whole.start()));
            let line = lines.number_at(name.start());
            let text = found.get(2).map_or("", |value| value.as_str());
            file.settings.push(Setting {
                name: name.as_str().to_owned(),
                value: unquoted(text),
                line,
                is_unclosed: is_unclosed(text),
                last_line: line + text.trim_matches(is_white_space).matches('\n').count(),
            });
            lines.number_at(whole.end());
        }
        file.odd_lines.extend(lines.odd_before(text.len()));
        Ok(file)
    }

    /// The setting of this name: of several, the last counts.
    #[must_use]
    pub(crate) fn get(&self, name: &str) -> Option<&Setting> {
        self.settings.iter().rfind(|setting| setting.name == name)
    }

    /// All settings, in the order of their lines.
    pub(crate) fn settings(&self) -> impl Iterator<Item = &Setting> {
        self.settings.iter()
    }
}

/// Whether a value begins with a quotation mark and does not end with it.
fn is_unclosed(text: &str) -> bool {
    let text = text.trim_matches(is_white_space);
    let quote = text.chars().next().filter(|first| matches!(first, '\'' | '"' | '`'));
    quote.is_some_and(|quote| text.len() == 1 || !text.ends_with(quote))
}

/// What a value means.
fn unquoted(text: &str) -> String {
    let text = text.trim_matches(is_white_space);
    let first = text.chars().next().filter(|first| matches!(first, '\'' | '"' | '`'));
    let within = first.and_then(|quote| text.strip_prefix(quote)?.strip_suffix(quote));
    let value = within.unwrap_or(text);
    // Also where the mark at the end is missing.
    if first == Some('"') {
        value.replace("\\n", "\n").replace("\\r", "\r")
    } else {
        value.to_owned()
    }
}

/// What JavaScript's `trim` takes away.
fn is_white_space(character: char) -> bool {
    // The next line (U+0085) is white space in Unicode alone, the byte order mark in JavaScript alone.
    (character.is_whitespace() && character != '\u{85}') || character == '\u{feff}'
}

/// Counts the lines of a text.
struct Lines<'a> {
    text: &'a str,
    read: usize,
    /// Of the line in which the text that was read ends.
    number: usize,
}

impl Lines<'_> {
    fn number_at(&mut self, position: usize) -> usize {
        let passed = self.text.get(self.read..position).unwrap_or_default();
        self.number += passed.matches('\n').count();
        self.read = position;
        self.number
    }

    /// The lines up to there, none of which is a setting, that are no comments either.
    fn odd_before(&mut self, position: usize) -> Vec<usize> {
        let start = self.number;
        let passed = self.text.get(self.read..position).unwrap_or_default();
        let odd = passed.split('\n').enumerate().filter(|(_, line)| {
            let line = line.trim_matches(is_white_space);
            !line.is_empty() && !line.starts_with('#')
        });
        let odd = odd.map(|(line, _)| start + line).collect();
        self.number_at(position);
        odd
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde::Deserialize;

    use super::*;

    #[derive(Deserialize)]
    struct Case {
        text: String,
        expected: BTreeMap<String, String>,
    }

    fn read(text: &str) -> BTreeMap<String, String> {
        let file = EnvFile::parse(text.as_bytes()).unwrap();
        let pair = |setting: &Setting| (setting.name.clone(), setting.value.clone());
        file.settings().map(pair).collect()
    }

    /// `scripts/dotenv-cases.mjs` has asked dotenv itself. `DOTENV_CASES` names a longer list.
    #[test]
    fn every_file_means_what_it_means_to_dotenv() {
        let more = std::env::var("DOTENV_CASES").map(|path| std::fs::read_to_string(path).unwrap());
        let table =
            more.unwrap_or_else(|_| include_str!("../../tests/data/dotenv.json").to_owned());
        let cases: Vec<Case> = serde_json::from_str(&table).unwrap();
        assert!(cases.len() > 600);
        for Case { text, expected } in cases {
            assert_eq!(read(&text), expected, "{text:?}");
            let file = EnvFile::parse(text.as_bytes()).unwrap();
            for (name, value) in expected {
                assert_eq!(file.get(&name).map(|setting| &*setting.value), Some(&*value));
            }
        }
    }

    #[test]
    fn lines_are_counted() {
        let text =
            "\u{feff}# ours\r\n\r\nA=1\r\nodd\r\nexport B='2\r\n3'\r\n  \r\n= 4\r\nC=5\r\n\0\0\0";
        let file = EnvFile::parse(text.as_bytes()).unwrap();
        let ends: Vec<_> = file.settings().map(|setting| setting.last_line).collect();
        assert_eq!(ends, [3, 6, 9]);
        let lines: Vec<_> =
            file.settings().map(|setting| (setting.name.as_str(), setting.line)).collect();
        assert_eq!(lines, [("A", 3), ("B", 5), ("C", 9)]);
        assert_eq!(file.odd_lines, [4, 8, 10]);
        assert!(!format!("{file:?}").contains("2\n3"), "values are not shown");
    }

    #[test]
    fn unclosed_quotation_marks_are_told() {
        for (text, is_unclosed) in [
            ("A='x", true),
            ("A=\"x # y", true),
            ("A=`", true),
            ("A='it's'", false),
            ("A=it's", false),
            ("A='x' # it's", false),
            ("A=\"x\ny\"", false),
            ("A=", false),
        ] {
            let file = EnvFile::parse(text.as_bytes()).unwrap();
            assert_eq!(file.get("A").unwrap().is_unclosed, is_unclosed, "{text}");
        }
    }

    #[test]
    fn other_encodings() {
        let latin = EnvFile::parse(b"# Sch\xfcler\nA=1\nB=\xfc\n").unwrap();
        assert!(!latin.is_utf8);
        assert_eq!(latin.get("A").unwrap().value, "1");
        assert_eq!(latin.get("B").unwrap().value, "\u{fffd}");
        for text in [&b"\xff\xfeA\0=\0b\0"[..], b"\xfe\xff\0A\0=\0b"] {
            assert!(EnvFile::parse(text).unwrap_err().contains("UTF-16"));
        }
    }
}
