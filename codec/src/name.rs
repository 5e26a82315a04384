//! Names of the bus in NATS: subjects and key-value keys.
//!
//! A topic is made of levels that may hold almost any character and may be empty; a NATS subject is made of
//! tokens that may not be empty and give `.`, `*`, `>` and white space a meaning. The mapping is one to one:
//!
//! | | subject | KV key |
//! |---|---|---|
//! | separator | `.` | `.` |
//! | escaped | `%`, `.`, `*`, `>`, bytes up to 0x20, 0x7f | every byte outside `[A-Za-z0-9_-]` |
//! | as | `%XX`, upper-case hex | `=XX`, upper-case hex |
//! | an empty level | a lone `%` | a lone `=` |
//!
//! Decoders are strict: they refuse every spelling that the encoder would not have chosen, so that no two
//! subjects name one topic and permissions on subjects cannot be gone around. Nodes and streams are one token,
//! escaped as a level is: node `plant.1` is `plant%2E1`.
//!
//! The longest subject, a topic of 1 024 escaped bytes behind a node name of 253, stays under 3 700 bytes.
//!
//! **Wildcards**: `+` is `*`, and a trailing `>` is `+/#`, since it wants at least one token. MQTT's `a/#` also
//! matches `a`, which no one subject can say: [`filter_to_subjects`] gives two.

use crate::topic::{Filter, Level, TOPIC_LEVELS_MAX, TopicError, validate_topic};

/// Subjects of what nodes send: `octobus.up.<node>.<topic>`.
pub const UP_PREFIX: &str = "octobus.up.";
/// Subjects of what nodes are sent: `octobus.down.<node>.<topic>`.
pub const DOWN_PREFIX: &str = "octobus.down.";

/// Not a name that this crate would have written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Two separators meet, or the name begins or ends with one, or is empty.
    #[error("name has an empty token")]
    EmptyToken,
    /// An escape is not two upper-case hex digits.
    #[error("name has a malformed escape")]
    Escape,
    /// An escape stands for a byte that is written as itself.
    #[error("name escapes a byte that needs no escape")]
    NeedlessEscape,
    /// A byte stands for itself that has to be escaped.
    #[error("name contains byte {0:#04x} unescaped")]
    Unescaped(u8),
    /// `*` or `>` in a name that is no filter, or not alone in its token, or `>` before the last token.
    #[error("name has a misplaced wildcard")]
    Wildcard,
    /// The bytes are not UTF-8 once unescaped.
    #[error("name is not UTF-8 once unescaped")]
    Utf8,
    /// The decoded name is no topic or filter.
    #[error(transparent)]
    Topic(#[from] TopicError),
}

/// One of the two ways to escape.
#[derive(Debug, Clone, Copy)]
struct Escape {
    mark: u8,
    needs: fn(u8) -> bool,
}

const SUBJECT: Escape =
    Escape { mark: b'%', needs: |byte| matches!(byte, b'%' | b'.' | b'*' | b'>' | 0..=0x20 | 0x7f) };

const KV_KEY: Escape = Escape {
    mark: b'=',
    needs: |byte| !matches!(byte, b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'_' | b'-'),
};

impl Escape {
    fn write(self, level: &str, out: &mut String) {
        if level.is_empty() {
            out.push(char::from(self.mark));
            return;
        }
        // Runs of bytes that stand for themselves are copied whole. A run that is not empty ends at character
        // boundaries: what is escaped is ASCII, or (in KV keys) every byte of a character.
        let mut copied = 0;
        for (at, byte) in level.bytes().enumerate() {
            if (self.needs)(byte) {
                if copied < at {
                    out.push_str(&level[copied..at]);
                }
                out.push(char::from(self.mark));
                out.push(hex_digit(byte >> 4));
                out.push(hex_digit(byte & 15));
                copied = at + 1;
            }
        }
        out.push_str(&level[copied..]);
    }

    fn read(self, token: &str) -> Result<String, NameError> {
        if token.is_empty() {
            return Err(NameError::EmptyToken);
        }
        if token.as_bytes() == [self.mark] {
            return Ok(String::new());
        }
        let mut level = Vec::with_capacity(token.len());
        let mut rest = token.as_bytes();
        while let [byte, tail @ ..] = rest {
            rest = tail;
            if *byte == self.mark {
                let ([high, low], tail) = tail.split_first_chunk().ok_or(NameError::Escape)?;
                rest = tail;
                level.push(self.unescape(*high, *low)?);
            } else if (self.needs)(*byte) {
                return Err(if matches!(byte, b'*' | b'>') {
                    NameError::Wildcard
                } else {
                    NameError::Unescaped(*byte)
                });
            } else {
                level.push(*byte);
            }
        }
        String::from_utf8(level).map_err(|_| NameError::Utf8)
    }

    fn unescape(self, high: u8, low: u8) -> Result<u8, NameError> {
        let byte = hex_value(high)? << 4 | hex_value(low)?;
        if (self.needs)(byte) { Ok(byte) } else { Err(NameError::NeedlessEscape) }
    }
}

fn hex_digit(nibble: u8) -> char {
    char::from(b"0123456789ABCDEF"[usize::from(nibble & 15)])
}

fn hex_value(digit: u8) -> Result<u8, NameError> {
    match digit {
        b'0'..=b'9' => Ok(digit - b'0'),
        b'A'..=b'F' => Ok(digit - b'A' + 10),
        _ => Err(NameError::Escape),
    }
}

/// Appends a level, node or stream name as one token of a subject.
pub fn escape_token(name: &str, out: &mut String) {
    SUBJECT.write(name, out);
}

/// Reads one token of a subject.
///
/// # Errors
/// It is a wildcard, contains `.`, or is not spelled as [`escape_token`] spells it.
pub fn unescape_token(token: &str) -> Result<String, NameError> {
    SUBJECT.read(token)
}

/// Appends the subject of a valid topic.
pub fn topic_to_subject(topic: &str, out: &mut String) {
    for (at, level) in topic.split('/').enumerate() {
        if at > 0 {
            out.push('.');
        }
        SUBJECT.write(level, out);
    }
}

/// Appends the subject of a node's topic behind [`UP_PREFIX`] or [`DOWN_PREFIX`].
pub fn node_subject(prefix: &str, node: &str, topic: &str, out: &mut String) {
    out.push_str(prefix);
    escape_token(node, out);
    out.push('.');
    topic_to_subject(topic, out);
}

/// The node name and the rest (subject of a topic or of a filter) of what follows [`UP_PREFIX`] or
/// [`DOWN_PREFIX`]. The name is unescaped, not validated.
///
/// # Errors
/// There is no rest, or the first token is not the spelling of a name; a wildcard is not.
pub fn split_node(after_prefix: &str) -> Result<(String, &str), NameError> {
    let (node, rest) = after_prefix.split_once('.').ok_or(NameError::EmptyToken)?;
    Ok((unescape_token(node)?, rest))
}

/// Reads a subject as a topic.
///
/// # Errors
/// It has wildcards, is not spelled as [`topic_to_subject`] spells it, or the topic is invalid.
pub fn subject_to_topic(subject: &str) -> Result<String, NameError> {
    let mut topic = String::with_capacity(subject.len());
    for (at, token) in subject.split('.').enumerate() {
        if at > 0 {
            topic.push('/');
        }
        topic.push_str(&read_level(token)?);
    }
    validate_topic(&topic)?;
    Ok(topic)
}

/// Reads a subject with `*` and `>` as a filter that matches exactly the topics whose subjects NATS would
/// match, a first level's special rules apart (topic.rs).
///
/// # Errors
/// It is not spelled as [`filter_to_subjects`] spells it, or it is no filter; a token cannot hold `+` or `#`,
/// since no topic does.
pub fn subject_to_filter(subject: &str) -> Result<Filter, NameError> {
    let mut names = Vec::new();
    let mut tokens = subject.split('.').peekable();
    while let Some(token) = tokens.next() {
        match token {
            "*" => names.push(None),
            ">" if tokens.peek().is_none() => return open_filter(&names),
            ">" => return Err(NameError::Wildcard),
            _ => names.push(Some(read_level(token)?)),
        }
        if names.len() > TOPIC_LEVELS_MAX {
            return Err(TopicError::TooManyLevels(names.len()).into());
        }
    }
    Ok(Filter::from_levels(levels_of(&names))?)
}

/// The filter of `names` followed by `>`: at least one level more.
fn open_filter(names: &[Option<String>]) -> Result<Filter, NameError> {
    // At the limit `+/#` would be one level too many, and can match no more than `+` does.
    let hash = (names.len() + 1 < TOPIC_LEVELS_MAX).then_some(Level::Hash);
    Ok(Filter::from_levels(levels_of(names).chain([Level::Plus]).chain(hash))?)
}

fn levels_of(names: &[Option<String>]) -> impl Iterator<Item = Level<'_>> {
    names.iter().map(|name| name.as_deref().map_or(Level::Plus, Level::Name))
}

/// A level of a topic from a token. A topic's level cannot hold `/`, which a token may.
fn read_level(token: &str) -> Result<String, NameError> {
    let level = unescape_token(token)?;
    if level.contains('/') { Err(TopicError::Slash.into()) } else { Ok(level) }
}

/// The one or two subjects whose messages are those of the filter: `a/#` is `a.>` and also `a`.
///
/// `#` alone needs one, because there is no empty topic, so does `/#` for the same reason, and so does `a/+/#`,
/// which is `a.>`. Behind a prefix that is itself no topic, such as `octobus.up.edge-1.`, the same subjects hold.
#[must_use]
pub fn filter_to_subjects(filter: &Filter) -> (String, Option<String>) {
    let mut subject = String::with_capacity(filter.as_str().len() + 8);
    let mut last = None;
    for level in filter.levels() {
        let separator = if subject.is_empty() { "" } else { "." };
        match (level, last) {
            (Level::Hash, None) => subject.push('>'),
            (Level::Hash, Some(Level::Plus)) => {
                subject.pop();
                subject.push('>');
            }
            (Level::Hash, Some(Level::Name(""))) if subject == "%" => subject.push_str(".>"),
            (Level::Hash, Some(_)) => {
                let below = [&subject, ".>"].concat();
                return (subject, Some(below));
            }
            (Level::Plus, _) => {
                subject.push_str(separator);
                subject.push('*');
            }
            (Level::Name(name), _) => {
                subject.push_str(separator);
                SUBJECT.write(name, &mut subject);
            }
        }
        last = Some(level);
    }
    (subject, None)
}

/// Joins levels to a KV key. Levels may hold any character, `/` too.
#[must_use]
pub fn kv_key_encode<'l>(levels: impl IntoIterator<Item = &'l str>) -> String {
    let mut key = String::new();
    for (at, level) in levels.into_iter().enumerate() {
        if at > 0 {
            key.push('.');
        }
        KV_KEY.write(level, &mut key);
    }
    key
}

/// The levels of a KV key, at least one.
///
/// # Errors
/// The key is not spelled as [`kv_key_encode`] spells it.
pub fn kv_key_decode(key: &str) -> Result<Vec<String>, NameError> {
    key.split('.').map(|token| KV_KEY.read(token)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn subject(topic: &str) -> String {
        let mut out = String::new();
        topic_to_subject(topic, &mut out);
        out
    }

    fn subjects(filter: &str) -> (String, Option<String>) {
        filter_to_subjects(&Filter::parse(filter).unwrap())
    }

    #[test]
    fn topics_and_subjects_are_the_same_both_ways() {
        for (topic, expected) in [
            ("sensors/boiler/temp", "sensors.boiler.temp"),
            ("a//b", "a.%.b"),
            ("/", "%.%"),
            ("50 %/v1.2", "50%20%25.v1%2E2"),
            ("*/>", "%2A.%3E"),
            ("\t\u{7f}/ü", "%09%7F.ü"),
            ("$SYS/x", "$SYS.x"),
        ] {
            assert_eq!(subject(topic), expected);
            assert_eq!(subject_to_topic(expected).as_deref(), Ok(topic));
        }
    }

    #[test]
    fn any_other_spelling_is_refused() {
        for (text, error) in [
            ("", NameError::EmptyToken),
            ("a..b", NameError::EmptyToken),
            (".a", NameError::EmptyToken),
            ("a.", NameError::EmptyToken),
            ("a%2", NameError::Escape),
            ("%2e", NameError::Escape),
            ("a%", NameError::Escape),
            ("%%", NameError::Escape),
            ("%41", NameError::NeedlessEscape),
            ("%C3%BC", NameError::NeedlessEscape),
            ("a b", NameError::Unescaped(b' ')),
            ("*", NameError::Wildcard),
            ("a.>", NameError::Wildcard),
            ("a/b", NameError::Topic(TopicError::Slash)),
            ("a+", NameError::Topic(TopicError::Wildcard)),
            ("%00", NameError::Topic(TopicError::Nul)),
        ] {
            assert_eq!(subject_to_topic(text), Err(error), "{text}");
        }
    }

    #[test]
    fn subject_wildcards_are_filters() {
        for (text, filter) in
            [("a.*", "a/+"), ("a.>", "a/+/#"), (">", "+/#"), ("*.b", "+/b"), ("a.%.%2A", "a//*")]
        {
            assert_eq!(subject_to_filter(text), Ok(Filter::parse(filter).unwrap()), "{text}");
            assert_eq!(subjects(filter), (text.to_owned(), None));
        }
        for text in ["a*", ">.a", "a.>b", "a.**"] {
            assert_eq!(subject_to_filter(text), Err(NameError::Wildcard), "{text}");
        }
        for text in ["+", "a.#"] {
            assert_eq!(subject_to_filter(text), Err(TopicError::Wildcard.into()), "{text}");
        }
    }

    #[test]
    fn hash_behind_a_name_needs_the_parent_too() {
        assert_eq!(subjects("a/#"), ("a".to_owned(), Some("a.>".to_owned())));
        assert_eq!(subjects("+/b/#"), ("*.b".to_owned(), Some("*.b.>".to_owned())));
        assert_eq!(subjects("//#"), ("%.%".to_owned(), Some("%.%.>".to_owned())));
        assert_eq!(subjects("#"), (">".to_owned(), None));
        assert_eq!(subjects("/#"), ("%.>".to_owned(), None));
    }

    #[test]
    fn an_open_subject_at_the_level_limit_is_still_a_filter() {
        let names = |count| vec!["l"; count].join(".");
        let filter = subject_to_filter(&format!("{}.>", names(31))).unwrap();
        assert!(filter.matches(&vec!["l"; 32].join("/"), true));
        assert!(subject_to_filter(&format!("{}.>", names(30))).unwrap().matches(&["l"; 32].join("/"), true));
        assert_eq!(
            subject_to_filter(&format!("{}.>", names(32))),
            Err(NameError::Topic(TopicError::TooManyLevels(33)))
        );
    }

    #[test]
    fn a_node_is_one_token() {
        let mut out = String::new();
        node_subject(UP_PREFIX, "plant.1", "a/b", &mut out);
        assert_eq!(out, "octobus.up.plant%2E1.a.b");
        assert_eq!(split_node(&out[UP_PREFIX.len()..]), Ok(("plant.1".to_owned(), "a.b")));
        assert_eq!(split_node("edge-1"), Err(NameError::EmptyToken));
        assert_eq!(split_node("*.a"), Err(NameError::Wildcard));
    }

    #[test]
    fn the_longest_subject_stays_under_3700_bytes() {
        let topic = " ".repeat(1024);
        let node = [&"x".repeat(63)[..]; 4].join(".");
        let mut out = String::new();
        node_subject(DOWN_PREFIX, &node, &topic, &mut out);
        assert!(out.len() < 3700, "{}", out.len());
    }

    #[test]
    fn kv_keys_escape_every_byte_that_is_not_a_letter_digit_or_dash() {
        let levels = ["obj", "core", "v1.Pod", "", "a=b", "ü", "x/y"];
        let key = kv_key_encode(levels);
        assert_eq!(key, "obj.core.v1=2EPod.=.a=3Db.=C3=BC.x=2Fy");
        assert_eq!(kv_key_decode(&key).unwrap(), levels);
    }

    #[test]
    fn any_other_spelling_of_a_kv_key_is_refused() {
        for (key, error) in [
            ("", NameError::EmptyToken),
            ("a..b", NameError::EmptyToken),
            ("=41", NameError::NeedlessEscape),
            ("=2e", NameError::Escape),
            ("a=", NameError::Escape),
            ("a/b", NameError::Unescaped(b'/')),
            ("*", NameError::Wildcard),
            ("=C3", NameError::Utf8),
        ] {
            assert_eq!(kv_key_decode(key), Err(error), "{key}");
        }
    }
}
