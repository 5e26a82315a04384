//! stub: signatures only; the codec owner replaces the bodies.
pub const TOPIC_BYTES_MAX: usize = 1024;
pub const TOPIC_LEVELS_MAX: usize = 32;
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("stub")]
pub struct TopicError;
/// 1..=1024 bytes, at most 32 levels (empty ones allowed), no `+`, `#`, U+0000.
pub fn validate_topic(_topic: &str) -> Result<(), TopicError> { unimplemented!() }
/// A node name: 1..=63 bytes, DNS label/subdomain as Kubernetes' node names (lower-case alphanumerics, '-', '.'), at most 253.
pub fn validate_node_name(_name: &str) -> Result<(), TopicError> { unimplemented!() }
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Level<'a> { Name(&'a str), Plus, Hash }
/// A validated topic filter (`+`, `#`). Cheap to clone.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Filter { text: std::sync::Arc<str> }
impl Filter {
    pub fn parse(_text: &str) -> Result<Self, TopicError> { unimplemented!() }
    pub fn as_str(&self) -> &str { &self.text }
    pub fn levels(&self) -> impl Iterator<Item = Level<'_>> { std::iter::empty() }
    /// MQTT rules, `#` also matches the parent level. `wildcard_matches_dollar` as in broker's Subscription.
    pub fn matches(&self, _topic: &str, _wildcard_matches_dollar: bool) -> bool { unimplemented!() }
    /// True if every topic that `other` matches is matched by `self` (for permissions).
    pub fn covers(&self, _other: &Self) -> bool { unimplemented!() }
    /// True if some topic is matched by both (for choosing which Logs a subscription can see).
    pub fn intersects(&self, _other: &Self) -> bool { unimplemented!() }
}
