//! What everything of a tier is called in NATS: buckets, streams, subjects and keys.
//!
//! | in NATS | holds |
//! |---|---|
//! | bucket `octobus-sys` | `identity/<n>`, `token/<id>`, `claims/<n>`, `lease/<replica>` |
//! | bucket `octobus-fleet` | `obj/...`, `want/<n>`, `barrier`, and what else `fleet` has for nodes |
//! | bucket `octobus-node` | what nodes own, and what the tier must know of them: `<n>/...` |
//! | stream `OCTOBUS_LOG_<shard>` | subjects `octobus.log.<shard>.<n>.<stream>`: batches of one Log |
//! | stream `OCTOBUS_DOWNLOG` | subjects `octobus.downlog.<n>`: what the tier sends a node |
//! | stream `OCTOBUS_DEAD_LETTER` | subjects `octobus.deadletter.<n>`: what cannot be kept |
//! | `octobus.up.<n>.<topic>` | Live: what nodes said |
//! | `octobus.down.<n>.<topic>` | Live: what nodes are to be told |
//! | `octobus.replica.<replica>.<n>.<topic>` | requests on their way to the replica that has the node |
//!
//! A key of State is a topic; its levels are escaped one by one (`codec::name`), so that `identity/plant.1` is
//! the KV key `identity.plant=2E1` and nothing else. A JetStream stream is bound to subjects by pattern, which
//! cannot hash: hence the shard in a Log's subject. It follows from the node alone.

use codec::name::{self, NameError};

/// A key-value bucket of the tier.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Bucket {
    /// Identities, tokens, claims, leases.
    Sys,
    /// Objects and wants.
    Fleet,
    /// What nodes own, and what is known of each.
    Node,
}

impl Bucket {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Sys, Self::Fleet, Self::Node];

    /// Its name for `nats kv`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Sys => "octobus-sys",
            Self::Fleet => "octobus-fleet",
            Self::Node => "octobus-node",
        }
    }

    /// The JetStream stream that it is.
    pub const fn stream(self) -> &'static str {
        match self {
            Self::Sys => "KV_octobus-sys",
            Self::Fleet => "KV_octobus-fleet",
            Self::Node => "KV_octobus-node",
        }
    }

    const fn prefix(self) -> &'static str {
        match self {
            Self::Sys => "$KV.octobus-sys.",
            Self::Fleet => "$KV.octobus-fleet.",
            Self::Node => "$KV.octobus-node.",
        }
    }

    /// The space of State that it holds; `None` of the bucket that holds those of all nodes.
    pub const fn space(self) -> Option<&'static str> {
        match self {
            Self::Sys => Some("sys"),
            Self::Fleet => Some("fleet"),
            Self::Node => None,
        }
    }

    /// The bucket of a space that the tier owns.
    pub fn of_space(space: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|bucket| bucket.space() == Some(space))
    }

    /// The subject of a key, which is a topic.
    pub fn subject(self, key: &str) -> String {
        format!("{}{}", self.prefix(), name::kv_key_encode(key.split('/')))
    }

    /// The key of a subject.
    ///
    /// # Errors
    /// It is not of this bucket, or not spelled as [`subject`](Self::subject) spells it.
    pub fn key(self, subject: &str) -> Result<String, NameError> {
        let key = subject.strip_prefix(self.prefix()).ok_or(NameError::EmptyToken)?;
        Ok(name::kv_key_decode(key)?.join("/"))
    }

    /// What matches the subjects of every key.
    pub fn all(self) -> String {
        format!("{}>", self.prefix())
    }

    /// What matches the subjects of every key that has more levels behind these.
    pub fn below(self, key: &str) -> String {
        format!("{}.>", self.subject(key))
    }
}

/// The stream of what the tier sends nodes.
pub const DOWNLOG: &str = "OCTOBUS_DOWNLOG";
/// Its subjects.
pub const DOWNLOG_ALL: &str = "octobus.downlog.*";
const DOWNLOG_PREFIX: &str = "octobus.downlog.";
/// The stream of records that no message of their kind can hold.
pub const LETTERS: &str = "OCTOBUS_DEAD_LETTER";
/// Its subjects.
pub const LETTERS_ALL: &str = "octobus.deadletter.*";
const LETTER_PREFIX: &str = "octobus.deadletter.";
/// What is kept of one of them: enough to see what it is.
pub const LETTER_BYTES: usize = 64 << 10;
/// What users publish to reach nodes.
pub const DOWN_ALL: &str = "octobus.down.>";
/// The group of which one member gets each of those.
pub const DOWN_GROUP: &str = "octobus-down";

/// Which of `shards` streams holds the Logs of a node. The same on every replica, for ever.
pub fn shard(node: &str, shards: u32) -> u32 {
    hash(node) % shards.max(1)
}

/// FNV-1a: small, and never to change.
fn hash(node: &str) -> u32 {
    node.bytes().fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193))
}

/// The JetStream stream of a shard.
pub fn log_stream(shard: u32) -> String {
    format!("OCTOBUS_LOG_{shard}")
}

/// The subjects of a shard.
pub fn log_subjects(shard: u32) -> String {
    format!("octobus.log.{shard}.>")
}

/// The subject of one Log of a node.
pub fn log_subject(node: &str, stream: &str, shards: u32) -> String {
    let mut subject = format!("octobus.log.{}.", shard(node, shards));
    name::escape_token(node, &mut subject);
    subject.push('.');
    name::escape_token(stream, &mut subject);
    subject
}

/// What matches the subjects of every Log of a node.
pub fn logs_of(node: &str, shards: u32) -> String {
    let mut subject = format!("octobus.log.{}.", shard(node, shards));
    name::escape_token(node, &mut subject);
    subject.push_str(".*");
    subject
}

/// Node and stream of a Log's subject.
///
/// # Errors
/// It is not spelled as [`log_subject`] spells it.
pub fn log_of_subject(subject: &str) -> Result<(String, String), NameError> {
    let rest = subject.strip_prefix("octobus.log.").ok_or(NameError::EmptyToken)?;
    let (_shard, rest) = rest.split_once('.').ok_or(NameError::EmptyToken)?;
    let (node, stream) = rest.split_once('.').ok_or(NameError::EmptyToken)?;
    Ok((name::unescape_token(node)?, name::unescape_token(stream)?))
}

/// The subject of what the tier sends a node.
pub fn downlog_subject(node: &str) -> String {
    let mut subject = DOWNLOG_PREFIX.to_owned();
    name::escape_token(node, &mut subject);
    subject
}

/// The node of such a subject.
///
/// # Errors
/// It is not spelled as [`downlog_subject`] spells it.
pub fn node_of_downlog(subject: &str) -> Result<String, NameError> {
    name::unescape_token(subject.strip_prefix(DOWNLOG_PREFIX).ok_or(NameError::EmptyToken)?)
}

/// The subject of a node's records that cannot be kept.
pub fn letter_subject(node: &str) -> String {
    let mut subject = LETTER_PREFIX.to_owned();
    name::escape_token(node, &mut subject);
    subject
}

/// Where a replica takes requests for the nodes that it has.
pub fn replica_all(replica: &str) -> String {
    format!("{}>", replica_prefix(replica))
}

/// What stands before the node and the topic there.
pub fn replica_prefix(replica: &str) -> String {
    let mut subject = "octobus.replica.".to_owned();
    name::escape_token(replica, &mut subject);
    subject.push('.');
    subject
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_and_subjects_are_the_same_both_ways() {
        for (bucket, key, subject) in [
            (Bucket::Sys, "identity/plant.1", "$KV.octobus-sys.identity.plant=2E1"),
            (Bucket::Fleet, "obj/core/pods/-/a.b", "$KV.octobus-fleet.obj.core.pods.-.a=2Eb"),
            (Bucket::Node, "n//x y", "$KV.octobus-node.n.=.x=20y"),
        ] {
            assert_eq!(bucket.subject(key), subject);
            assert_eq!(bucket.key(subject).as_deref(), Ok(key));
        }
        assert!(Bucket::Sys.key("$KV.octobus-fleet.a").is_err(), "another bucket's");
        assert!(Bucket::Sys.key("$KV.octobus-sys.a=41").is_err(), "a needless escape");
    }

    #[test]
    fn a_log_is_found_by_its_node_and_stream_and_stays_in_its_shard() {
        let subject = log_subject("plant.1", "default", 8);
        assert_eq!(subject, format!("octobus.log.{}.plant%2E1.default", shard("plant.1", 8)));
        assert_eq!(log_of_subject(&subject), Ok(("plant.1".to_owned(), "default".to_owned())));
        assert_eq!(log_subject("edge-1", "a", 1), "octobus.log.0.edge-1.a");
        // Written down: a node's Logs would be lost to whoever computes another shard.
        assert_eq!([shard("edge-1", 8), shard("edge-2", 8), shard("plant.1", 8)], [6, 3, 7]);
    }

    #[test]
    fn a_node_of_any_name_has_a_downlog() {
        assert_eq!(downlog_subject("plant.1"), "octobus.downlog.plant%2E1");
        assert_eq!(node_of_downlog("octobus.downlog.plant%2E1").as_deref(), Ok("plant.1"));
        assert!(node_of_downlog("octobus.log.0.a.b").is_err());
    }
}
