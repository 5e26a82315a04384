//! What the tier knows of nodes and tokens: JSON values in the State space `sys`, written through the fabric by
//! compare-and-set.
//!
//! | key | value |
//! |---|---|
//! | `identity/<node>` | [`Enrolment`]; its presence is what makes a node known to the broker |
//! | `token/<id>` | [`TokenRecord`] |
//!
//! This space never leaves the tier.

use std::sync::Arc;

use broker::{
    Handle, Stopped,
    event::{Command, Expect, StateChange, StateOp},
};
use bytes::Bytes;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::fabric::{Entry, Fabric, FabricError};

/// Value of `identity/<node>`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Enrolment {
    /// Raised by every enrolment of the name; certificates of another generation are refused.
    pub generation: u32,
    /// SHA-256 of the SubjectPublicKeyInfo of the one key of this generation, in hex.
    pub key: String,
    /// Serial numbers in hex, of certificates of this generation that are not to be accepted any more.
    #[serde(default)]
    pub revoked: Vec<String>,
    /// Wall time of the enrolment, microseconds.
    pub enrolled_us: u64,
    /// A relay: the names that it may forward for. Links read this too (`broker::core`).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub forwards: Vec<String>,
}

/// Value of `token/<id>`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenRecord {
    /// The one name it enrols.
    pub node: String,
    /// SHA-256 of its secret, in hex.
    pub secret_sha256: String,
    /// Wall time after which it enrols nobody, microseconds.
    pub expires_us: u64,
    /// It may take over a name that is enrolled.
    pub replace: bool,
    /// Makes a relay for these names.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub forwards: Vec<String>,
    /// Hash of the key that used it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub used_by: Option<String>,
    /// Generation that this use enrols. Written before the enrolment itself, which a tier writes apart.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generation: Option<u32>,
}

/// A value and the revision at which it was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Versioned<T> {
    /// The value.
    pub value: T,
    /// For [`Expect::Revision`].
    pub revision: u64,
}

/// Why the registry gives no answer.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// The process stops.
    #[error(transparent)]
    Stopped(#[from] Stopped),
    /// A value is not what this program wrote.
    #[error("State {key} is damaged: {source}")]
    Damaged { key: String, source: serde_json::Error },
    /// What holds the tier's State refuses, or does not answer.
    #[error("the tier's State cannot be read or written now: {0}")]
    Refused(String),
}

impl From<FabricError> for RegistryError {
    fn from(error: FabricError) -> Self {
        match error {
            FabricError::Stopped(stopped) => Self::Stopped(stopped),
            FabricError::Refused(why) | FabricError::Unavailable(why) => Self::Refused(why),
        }
    }
}

/// Somebody else wrote one of the keys since it was read: read again and decide again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Conflict;

/// Access to space `sys` of the tier. Cloning shares it.
#[derive(Debug, Clone)]
pub struct Registry {
    fabric: Arc<dyn Fabric>,
    handle: Handle,
}

const SPACE: &str = "sys";

impl Registry {
    /// The registry of the tier that this broker serves.
    #[must_use]
    pub fn new(fabric: Arc<dyn Fabric>, handle: Handle) -> Self {
        Self { fabric, handle }
    }

    /// The enrolment of a node.
    ///
    /// # Errors
    /// See [`RegistryError`].
    pub async fn enrolment(&self, node: &str) -> Result<Option<Versioned<Enrolment>>, RegistryError> {
        self.get(&identity_key(node)).await
    }

    /// The enrolment of a node as this replica saw it last, a moment ago: good enough to let a node in, since
    /// what changes afterwards ends its session; never to send it away.
    ///
    /// # Errors
    /// See [`RegistryError`].
    pub async fn enrolment_seen(&self, node: &str) -> Result<Option<Enrolment>, RegistryError> {
        let found = self.fabric.peek(SPACE, &identity_key(node)).await?;
        Ok(found.as_ref().map(decode).transpose()?.map(|enrolment| enrolment.value))
    }

    /// A token.
    ///
    /// # Errors
    /// See [`RegistryError`].
    pub async fn token(&self, id: &str) -> Result<Option<Versioned<TokenRecord>>, RegistryError> {
        self.get(&token_key(id)).await
    }

    /// At most `limit` tokens behind `after` in the order of their ids, as (id, token). Damaged ones are
    /// left out.
    ///
    /// # Errors
    /// See [`RegistryError`].
    pub async fn tokens(
        &self,
        after: Option<&str>,
        limit: usize,
    ) -> Result<Vec<(String, Versioned<TokenRecord>)>, RegistryError> {
        let entries = self.fabric.list(SPACE, TOKEN, after.map(token_key).as_deref(), limit).await?;
        let token = |entry: &Entry| {
            let id = entry.key.strip_prefix(TOKEN)?.to_owned();
            Some((id, decode(entry).ok()?))
        };
        Ok(entries.iter().filter_map(token).collect())
    }

    /// Writes in order; durable when this returns `Ok(Ok(()))`. What is left by a failure in between depends on
    /// the fabric: see [`Fabric::write`].
    ///
    /// # Errors
    /// See [`RegistryError`].
    pub async fn write(&self, ops: Vec<StateOp>) -> Result<Result<(), Conflict>, RegistryError> {
        match self.fabric.write(ops).await? {
            Ok(_revisions) => Ok(Ok(())),
            Err(_conflict) => Ok(Err(Conflict)),
        }
    }

    /// Ends the link of a node here, whose certificate is not good any more. Other replicas see the enrolment.
    ///
    /// # Errors
    /// The process stops.
    pub async fn close_sessions(&self, node: &str, generation: u32) -> Result<(), RegistryError> {
        self.handle.call(Command::CloseNode { node: Arc::from(node), generation }).await?;
        Ok(())
    }

    /// Sets `identity/<node>`, as part of a [`write`](Self::write).
    #[must_use]
    pub fn put_enrolment(&self, node: &str, value: &Enrolment, expect: Expect) -> StateOp {
        self.put(identity_key(node), value, expect)
    }

    /// Sets `token/<id>`, as part of a [`write`](Self::write).
    #[must_use]
    pub fn put_token(&self, id: &str, value: &TokenRecord, expect: Expect) -> StateOp {
        self.put(token_key(id), value, expect)
    }

    /// Deletes `token/<id>`, as part of a [`write`](Self::write).
    #[must_use]
    pub fn delete_token(&self, id: &str, expect: Expect) -> StateOp {
        StateOp { space: SPACE.into(), key: token_key(id), change: StateChange::Delete, expect }
    }

    fn put(&self, key: String, value: &impl Serialize, expect: Expect) -> StateOp {
        let value = serde_json::to_vec(value).expect("these structs have string keys and no maps");
        let change = StateChange::Put(Bytes::from(value));
        StateOp { space: SPACE.into(), key, change, expect }
    }

    async fn get<T: DeserializeOwned>(&self, key: &str) -> Result<Option<Versioned<T>>, RegistryError> {
        let found = self.fabric.get(SPACE, key).await?;
        found.as_ref().map(decode).transpose()
    }
}

const TOKEN: &str = "token/";

fn identity_key(node: &str) -> String {
    format!("identity/{node}")
}

fn token_key(id: &str) -> String {
    format!("{TOKEN}{id}")
}

fn decode<T: DeserializeOwned>(entry: &Entry) -> Result<Versioned<T>, RegistryError> {
    match serde_json::from_slice(&entry.value) {
        Ok(value) => Ok(Versioned { value, revision: entry.revision }),
        Err(source) => Err(RegistryError::Damaged { key: entry.key.clone(), source }),
    }
}
