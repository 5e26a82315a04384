//! Enrolling many nodes at once, without tokens.
//!
//! For whoever holds the tier's CA and has issued the certificates itself: simulated fleets, and factories
//! that write identities into machines before they ship. Only the administration socket leads here. It gives
//! nothing that the CA's key does not: a name that is enrolled with another key stays what it is.

use broker::{clock, event::Expect, limits};
use codec::topic::validate_node_name;

use crate::registry::{Enrolment, Registry, RegistryError};

/// Names in one request: they are one write of State.
pub const NODES_MAX: usize = limits::STATE_OPS_MAX;
/// Hexadecimal digits of a SHA-256.
const KEY_DIGITS: usize = 64;
/// Somebody else enrols the same names meanwhile: more often than this in a row means a bug.
const ATTEMPTS: usize = 8;

/// Why nobody was enrolled.
#[derive(Debug, thiserror::Error)]
pub enum EnrolError {
    /// A name cannot be a node's.
    #[error("{0}")]
    Name(#[from] codec::topic::TopicError),
    /// The key is not named as keys are.
    #[error(
        "the key is named by the SHA-256 of its SubjectPublicKeyInfo, in {KEY_DIGITS} lower-case hexadecimal digits"
    )]
    Key,
    /// One write of State has a bound.
    #[error("at most {NODES_MAX} names at a time")]
    TooMany,
    /// A name is somebody's.
    #[error(
        "a node {0} is enrolled already, with another key; to give its name away make a token with --replace"
    )]
    Taken(String),
    /// State cannot be read or written.
    #[error(transparent)]
    Registry(#[from] RegistryError),
}

/// Enrols these nodes with one key, in generation 1: all of them, or none (in a tier, where keys are written one by
/// one, perhaps the first ones: asking again completes it). How many were not yet.
///
/// # Errors
/// See [`EnrolError`].
pub async fn enrol(registry: &Registry, nodes: &[String], key: &str) -> Result<usize, EnrolError> {
    if nodes.len() > NODES_MAX {
        return Err(EnrolError::TooMany);
    }
    let is_digit = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
    if key.len() != KEY_DIGITS || !key.bytes().all(is_digit) {
        return Err(EnrolError::Key);
    }
    for node in nodes {
        validate_node_name(node)?;
    }
    let enrolment = Enrolment {
        generation: 1,
        key: key.to_owned(),
        revoked: Vec::new(),
        enrolled_us: clock::wall_us(),
        forwards: Vec::new(),
    };
    for _attempt in 0..ATTEMPTS {
        let mut ops = Vec::new();
        for node in nodes {
            match registry.enrolment(node).await? {
                Some(held) if held.value.key == key && held.value.generation == 1 => {}
                Some(_) => return Err(EnrolError::Taken(node.clone())),
                None => ops.push(registry.put_enrolment(node, &enrolment, Expect::Absent)),
            }
        }
        // A name that stands there twice is enrolled once.
        ops.sort_by(|a, b| a.key.cmp(&b.key));
        ops.dedup_by(|a, b| a.key == b.key);
        let enrolled = ops.len();
        if enrolled == 0 {
            return Ok(0);
        }
        if registry.write(ops).await?.is_ok() {
            tracing::info!(enrolled, "enrolled nodes that hold certificates of this tier");
            return Ok(enrolled);
        }
    }
    Err(RegistryError::Refused("the same names are enrolled by others all the time".into()).into())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use broker::{Tasks, core, driver, store::mem::MemStore};

    use super::*;
    use crate::fabric::Local;

    #[tokio::test]
    async fn all_are_enrolled_or_none_and_again_is_nothing_new() {
        let config = core::Config::hub("hub", "t", [1; 16], 1);
        let handle = driver::start(config, MemStore::auto(), Default::default(), &Tasks::new());
        let registry = Registry::new(Arc::new(Local::new(handle.clone())), handle);
        let (one, two) = ("1".repeat(64), "2".repeat(64));
        let names = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect::<Vec<_>>();
        assert_eq!(enrol(&registry, &names(&["a", "b", "a"]), &one).await.unwrap(), 2);
        assert_eq!(enrol(&registry, &names(&["a", "b", "c"]), &one).await.unwrap(), 1);
        let taken = enrol(&registry, &names(&["d", "a"]), &two).await.unwrap_err();
        assert!(matches!(taken, EnrolError::Taken(name) if name == "a"));
        assert_eq!(registry.enrolment("d").await.unwrap(), None);
        assert_eq!(registry.enrolment("c").await.unwrap().unwrap().value.key, one);
        assert!(matches!(enrol(&registry, &names(&["e"]), "x").await, Err(EnrolError::Key)));
        assert!(matches!(enrol(&registry, &names(&["e/f"]), &one).await, Err(EnrolError::Name(_))));
    }
}
