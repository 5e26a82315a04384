//! Topics and filters: MQTT's rules, with two of the bus.
//!
//! A topic is 1 to [`TOPIC_BYTES_MAX`] bytes of UTF-8 in at most [`TOPIC_LEVELS_MAX`] levels separated by `/`.
//! Levels may be empty. A filter may have `+` for one whole level and `#` as its last level for any number of
//! levels, *none included*: `a/#` matches `a`.
//!
//! A wildcard in a filter's first level is special:
//! - it matches a topic that begins with `$` only for who says so (NATS clients do, MQTT clients do not);
//! - it never matches a topic whose first level is [`INBOX`]: answers are for who asked.
//!
//! [`Filter::covers`] and [`Filter::intersects`] are exact over the topics that can exist, not approximations;
//! permissions rest on the first, the choice of Logs on the second.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// The longest topic or filter, in bytes.
pub const TOPIC_BYTES_MAX: usize = 1024;
/// The most levels of a topic or filter.
pub const TOPIC_LEVELS_MAX: usize = 32;
/// The longest node name, in bytes: that of a Kubernetes node.
pub const NODE_NAME_BYTES_MAX: usize = 253;
/// First level of the topics that answers come to. A wildcard in the first level never matches it.
pub const INBOX: &str = "_INBOX";
/// First level of the bus's own subjects on a hub; never a topic of a node.
pub const RESERVED: &str = "octobus";

/// Not a topic, a filter or a node name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TopicError {
    /// Nothing there.
    #[error("topic is empty")]
    Empty,
    /// More bytes than [`TOPIC_BYTES_MAX`].
    #[error("topic has {0} bytes, at most 1024 are allowed")]
    TooLong(usize),
    /// More levels than [`TOPIC_LEVELS_MAX`].
    #[error("topic has {0} levels, at most 32 are allowed")]
    TooManyLevels(usize),
    /// U+0000.
    #[error("topic contains U+0000")]
    Nul,
    /// `+` or `#` where a topic or a plain level is wanted.
    #[error("topic contains a wildcard")]
    Wildcard,
    /// `+` or `#` together with other characters in one level.
    #[error("wildcard does not stand alone in its level")]
    PartialWildcard,
    /// `#` before the last level.
    #[error("# is not the last level")]
    HashNotLast,
    /// A level that contains `/`.
    #[error("level contains /")]
    Slash,
    /// Not a DNS subdomain name as Kubernetes wants it.
    #[error(
        "node name is not lower-case letters, digits, '-' and '.', in labels of 1 to 63, at most 253 in all"
    )]
    NodeName,
}

/// Checks a topic: 1 to 1 024 bytes, at most 32 levels (empty ones allowed), no `+`, `#` or U+0000.
///
/// # Errors
/// What is wrong with it.
pub fn validate_topic(topic: &str) -> Result<(), TopicError> {
    let levels = validate_bytes(topic)?;
    if topic.bytes().any(|byte| matches!(byte, b'+' | b'#')) {
        return Err(TopicError::Wildcard);
    }
    validate_level_count(levels)
}

/// What topics and filters have in common; returns the number of levels.
fn validate_bytes(text: &str) -> Result<usize, TopicError> {
    if text.is_empty() {
        return Err(TopicError::Empty);
    }
    if text.len() > TOPIC_BYTES_MAX {
        return Err(TopicError::TooLong(text.len()));
    }
    let mut levels = 1;
    for byte in text.bytes() {
        match byte {
            0 => return Err(TopicError::Nul),
            b'/' => levels += 1,
            _ => {}
        }
    }
    Ok(levels)
}

fn validate_level_count(levels: usize) -> Result<(), TopicError> {
    if levels > TOPIC_LEVELS_MAX { Err(TopicError::TooManyLevels(levels)) } else { Ok(()) }
}

/// Checks a node name: a DNS subdomain as Kubernetes names nodes (lower-case letters, digits, `-` and `.`),
/// at most 253 bytes, each label of 1 to 63 bytes that neither begins nor ends with `-`.
///
/// # Errors
/// [`TopicError::NodeName`].
pub fn validate_node_name(name: &str) -> Result<(), TopicError> {
    let label = |label: &str| {
        matches!(label.len(), 1..=63)
            && label.bytes().all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-'))
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    if name.len() <= NODE_NAME_BYTES_MAX && name.split('.').all(label) {
        Ok(())
    } else {
        Err(TopicError::NodeName)
    }
}

/// True if the topic's first level belongs to the bus ([`INBOX`], [`RESERVED`]): never a topic of a node.
#[must_use]
pub fn is_reserved(topic: &str) -> bool {
    matches!(first_level(topic), INBOX | RESERVED)
}

fn first_level(topic: &str) -> &str {
    topic.split('/').next().unwrap_or_default()
}

/// One level of a filter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Level<'a> {
    /// Exactly this level; may be empty.
    Name(&'a str),
    /// `+`: any one level.
    Plus,
    /// `#`: any number of levels, none included. Only the last level.
    Hash,
}

impl<'a> Level<'a> {
    fn read(text: &'a str) -> Self {
        match text {
            "+" => Self::Plus,
            "#" => Self::Hash,
            name => Self::Name(name),
        }
    }
}

/// A validated topic filter (`+`, `#`). Cheap to clone.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Filter {
    text: Arc<str>,
}

impl Filter {
    /// Reads a filter.
    ///
    /// # Errors
    /// What is wrong with it; the limits of topics hold for filters too.
    pub fn parse(text: &str) -> Result<Self, TopicError> {
        let levels = validate_bytes(text)?;
        validate_level_count(levels)?;
        for (at, level) in text.split('/').enumerate() {
            if level.len() > 1 && level.bytes().any(|byte| matches!(byte, b'+' | b'#')) {
                return Err(TopicError::PartialWildcard);
            }
            if level == "#" && at + 1 != levels {
                return Err(TopicError::HashNotLast);
            }
        }
        Ok(Self { text: text.into() })
    }

    /// The filter that matches this topic alone.
    ///
    /// # Errors
    /// The topic is none; see [`validate_topic`].
    pub fn exact(topic: &str) -> Result<Self, TopicError> {
        validate_topic(topic)?;
        Ok(Self { text: topic.into() })
    }

    /// Builds a filter from its levels. Unlike [`Self::parse`] of the joined text, a name never becomes a
    /// wildcard or two levels.
    ///
    /// # Errors
    /// A name contains `/`, `+` or `#`, or the whole is no filter.
    pub fn from_levels<'l>(levels: impl IntoIterator<Item = Level<'l>>) -> Result<Self, TopicError> {
        let mut text = String::new();
        for (at, level) in levels.into_iter().enumerate() {
            if at > 0 {
                text.push('/');
            }
            text.push_str(match level {
                Level::Plus => "+",
                Level::Hash => "#",
                Level::Name(name) if name.contains('/') => return Err(TopicError::Slash),
                Level::Name(name) if name.contains(['+', '#']) => return Err(TopicError::Wildcard),
                Level::Name(name) => name,
            });
        }
        Self::parse(&text)
    }

    /// The text, as it was parsed.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// The levels in order; `Hash` only as the last.
    pub fn levels(&self) -> impl Iterator<Item = Level<'_>> {
        self.text.split('/').map(Level::read)
    }

    /// True if it names one topic only.
    #[must_use]
    pub fn is_exact(&self) -> bool {
        !self.text.contains(['+', '#'])
    }

    /// True if the filter matches the topic.
    ///
    /// `wildcard_matches_dollar`: whether a wildcard in the first level matches a topic that begins with `$`
    /// (NATS: yes, MQTT: no). It never matches one in [`INBOX`].
    #[must_use]
    pub fn matches(&self, topic: &str, wildcard_matches_dollar: bool) -> bool {
        if self.begins_with_wildcard() && !wildcard_reaches(first_level(topic), wildcard_matches_dollar) {
            return false;
        }
        let mut rest = topic.split('/');
        for level in self.levels() {
            let matched = match level {
                Level::Hash => return true,
                Level::Plus => rest.next().is_some(),
                Level::Name(name) => rest.next() == Some(name),
            };
            if !matched {
                return false;
            }
        }
        rest.next().is_none()
    }

    /// True if every topic that `other` matches is matched by `self` too (for permissions), both read by the
    /// same rule for `$`, whichever that is. So `#` does not cover `$SYS/#`.
    #[must_use]
    pub fn covers(&self, other: &Self) -> bool {
        let (mine, theirs) = (Shape::of(self), Shape::of(other));
        if theirs.count < mine.count || (!mine.open && (theirs.open || theirs.count != mine.count)) {
            return false;
        }
        let mut levels = mine.levels(self).zip(theirs.levels(other));
        let first = match levels.next() {
            Some((Level::Plus, Level::Name(name))) => wildcard_reaches(name, false),
            first => first.is_some_and(level_covers),
        };
        first && levels.all(level_covers)
    }

    /// True if some topic is matched by both (for choosing which Logs a subscription can see), a wildcard in
    /// the first level read as widely as anyone may read it.
    #[must_use]
    pub fn intersects(&self, other: &Self) -> bool {
        let (mine, theirs) = (Shape::of(self), Shape::of(other));
        if (!mine.open && mine.count < theirs.count) || (!theirs.open && theirs.count < mine.count) {
            return false;
        }
        let first = (mine.levels(self).next(), theirs.levels(other).next());
        if let (Some(Level::Plus), Some(Level::Name(name))) | (Some(Level::Name(name)), Some(Level::Plus)) =
            first
            && !wildcard_reaches(name, true)
        {
            return false;
        }
        shortest_common_topic(mine.levels(self), theirs.levels(other))
            .is_some_and(|len| len <= TOPIC_BYTES_MAX)
    }

    fn begins_with_wildcard(&self) -> bool {
        matches!(first_level(&self.text), "+" | "#")
    }
}

impl fmt::Display for Filter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl FromStr for Filter {
    type Err = TopicError;

    fn from_str(text: &str) -> Result<Self, TopicError> {
        Self::parse(text)
    }
}

/// Whether a wildcard in the first level matches a topic with this first level.
fn wildcard_reaches(first: &str, matches_dollar: bool) -> bool {
    first != INBOX && (matches_dollar || !first.starts_with('$'))
}

fn level_covers((mine, theirs): (Level<'_>, Level<'_>)) -> bool {
    mine == Level::Plus || mine == theirs
}

/// Bytes of the shortest topic that has all levels of both, the first level's rules apart; `None` if two names
/// differ. Two long filters may agree on no topic that is short enough to exist.
fn shortest_common_topic<'f>(
    mut mine: impl Iterator<Item = Level<'f>>,
    mut theirs: impl Iterator<Item = Level<'f>>,
) -> Option<usize> {
    let (mut bytes, mut levels) = (0, 0usize);
    loop {
        let name = match (mine.next(), theirs.next()) {
            (None, None) => return Some(bytes + levels.saturating_sub(1)),
            (Some(Level::Name(mine)), Some(Level::Name(theirs))) if mine != theirs => return None,
            (Some(Level::Name(name)), _) | (_, Some(Level::Name(name))) => name,
            _ => "",
        };
        bytes += name.len();
        levels += 1;
    }
}

/// A filter as the levels that must be there, and whether more may follow.
///
/// There is no topic without a byte, so `#` alone wants one level like `+/#`, and `/#`, whose parent would be
/// the empty topic, wants two like `/+/#`.
struct Shape {
    count: usize,
    open: bool,
}

impl Shape {
    fn of(filter: &Filter) -> Self {
        let levels = filter.levels().count();
        let open = filter.levels().last() == Some(Level::Hash);
        let hash_wants_a_level = matches!(filter.as_str(), "#" | "/#");
        Self { count: if open && !hash_wants_a_level { levels - 1 } else { levels }, open }
    }

    /// The levels that must be there: names and `Plus` only.
    fn levels<'f>(&self, filter: &'f Filter) -> impl Iterator<Item = Level<'f>> + use<'f> {
        filter.levels().take(self.count).map(|level| if level == Level::Hash { Level::Plus } else { level })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filter(text: &str) -> Filter {
        Filter::parse(text).unwrap()
    }

    #[test]
    fn topics_within_the_limits_are_accepted() {
        for topic in ["a", "/", "//a/", "a b", "ü/%/.", "$SYS/x", &"x".repeat(1024), &["l"; 32].join("/")] {
            assert_eq!(validate_topic(topic), Ok(()), "{topic}");
        }
    }

    #[test]
    fn topics_beyond_the_limits_are_refused() {
        assert_eq!(validate_topic(""), Err(TopicError::Empty));
        assert_eq!(validate_topic(&"x".repeat(1025)), Err(TopicError::TooLong(1025)));
        assert_eq!(validate_topic(&["l"; 33].join("/")), Err(TopicError::TooManyLevels(33)));
        assert_eq!(validate_topic("a\0"), Err(TopicError::Nul));
        assert_eq!(validate_topic("a/+"), Err(TopicError::Wildcard));
        assert_eq!(validate_topic("a#"), Err(TopicError::Wildcard));
    }

    #[test]
    fn node_names_are_kubernetes_names() {
        let label = "x".repeat(63);
        let longest = [&label[..], &label, &label, &"y".repeat(61)].join(".");
        assert_eq!(longest.len(), NODE_NAME_BYTES_MAX);
        for name in ["edge-1", "plant.1", "0", &longest] {
            assert_eq!(validate_node_name(name), Ok(()), "{name}");
        }
        let long_label = "x".repeat(64);
        let too_long = format!("{longest}y");
        for name in ["", "Edge", "a_b", "-a", "a-", "a..b", ".a", "a.", "a/b", "é", &long_label, &too_long] {
            assert_eq!(validate_node_name(name), Err(TopicError::NodeName), "{name}");
        }
    }

    #[test]
    fn a_wildcard_stands_alone_and_hash_stands_last() {
        for text in ["#", "+", "+/+", "a/#", "/+", "+//#"] {
            assert_eq!(Filter::parse(text).as_ref().map(Filter::as_str), Ok(text));
        }
        assert_eq!(Filter::parse("a+/b"), Err(TopicError::PartialWildcard));
        assert_eq!(Filter::parse("a/b#"), Err(TopicError::PartialWildcard));
        assert_eq!(Filter::parse("##"), Err(TopicError::PartialWildcard));
        assert_eq!(Filter::parse("#/a"), Err(TopicError::HashNotLast));
        assert_eq!(Filter::parse("a/#/"), Err(TopicError::HashNotLast));
        assert_eq!(Filter::parse(""), Err(TopicError::Empty));
    }

    #[test]
    fn names_given_as_levels_never_become_wildcards() {
        let built = Filter::from_levels([Level::Name("a"), Level::Name(""), Level::Plus, Level::Hash]);
        assert_eq!(built, Filter::parse("a//+/#"));
        assert_eq!(Filter::from_levels([Level::Name("+")]), Err(TopicError::Wildcard));
        assert_eq!(Filter::from_levels([Level::Name("a/b")]), Err(TopicError::Slash));
        assert_eq!(Filter::from_levels([]), Err(TopicError::Empty));
    }

    #[test]
    fn matching_follows_mqtt() {
        for (text, topic, expected) in [
            ("a/b", "a/b", true),
            ("a/b", "a/b/c", false),
            ("a/b", "a", false),
            ("a/#", "a", true),
            ("a/#", "a/b/c", true),
            ("a/#", "ab", false),
            ("a/+", "a", false),
            ("a/+", "a/", true),
            ("a/+/#", "a", false),
            ("+", "/", false),
            ("+/+", "/", true),
            ("/+", "/x", true),
            ("#", "/", true),
            ("+/b/#", "a/b", true),
        ] {
            assert_eq!(filter(text).matches(topic, false), expected, "{text} {topic}");
            assert_eq!(filter(text).matches(topic, true), expected, "{text} {topic}");
        }
    }

    #[test]
    fn a_first_wildcard_reaches_dollar_topics_only_for_who_says_so() {
        for text in ["#", "+/a"] {
            assert!(!filter(text).matches("$x/a", false));
            assert!(filter(text).matches("$x/a", true));
        }
        assert!(filter("$x/#").matches("$x/a", false));
        assert!(filter("a/#").matches("a/$x", false));
    }

    #[test]
    fn a_first_wildcard_never_reaches_an_inbox() {
        for text in ["#", "+/a", "+/#"] {
            assert!(!filter(text).matches("_INBOX/a", true), "{text}");
            assert!(!filter(text).covers(&filter("_INBOX/a")), "{text}");
            assert!(!filter(text).intersects(&filter("_INBOX/a")), "{text}");
        }
        assert!(filter("_INBOX/+").matches("_INBOX/a", false));
        assert!(filter("#").matches("_INBOXES/a", false));
        assert!(is_reserved("_INBOX/a") && is_reserved("octobus") && !is_reserved("octobuses/a"));
    }

    #[test]
    fn covering_is_exact() {
        for (mine, theirs, expected) in [
            ("#", "+/#", true),
            ("+/#", "#", true),
            ("a/#", "a", true),
            ("a/+", "a/#", false),
            ("a/#", "a/+/#", true),
            ("+/b", "a/b", true),
            ("a/b", "+/b", false),
            ("#", "$SYS/#", false),
            ("+", "#", false),
            ("/+/#", "/#", true),
        ] {
            assert_eq!(filter(mine).covers(&filter(theirs)), expected, "{mine} {theirs}");
        }
    }

    #[test]
    fn filters_whose_common_topics_would_all_be_too_long_do_not_intersect() {
        let (left, right) = (format!("{}/+", "x".repeat(600)), format!("+/{}", "y".repeat(600)));
        assert!(!filter(&left).intersects(&filter(&right)));
        assert!(filter(&left).intersects(&filter("+/y")));
    }
}
