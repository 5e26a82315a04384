//! Who asks.

use std::collections::BTreeMap;

use serde_json::{Value, json};

/// Who asks, as far as it is proven.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct User {
    /// Name.
    pub(crate) name: String,
    /// Uid; empty if there is none.
    pub(crate) uid: String,
    /// Groups.
    pub(crate) groups: Vec<String>,
    /// Whatever else its credentials say.
    pub(crate) extra: BTreeMap<String, Vec<String>>,
}

/// May do everything.
pub(crate) const MASTERS: &str = "system:masters";
/// Everybody who has proven a name.
pub(crate) const AUTHENTICATED: &str = "system:authenticated";
/// The group of node agents.
pub(crate) const NODES: &str = "system:nodes";

impl User {
    /// Nobody in particular.
    pub(crate) fn anonymous() -> Self {
        Self {
            name: "system:anonymous".to_owned(),
            groups: vec!["system:unauthenticated".to_owned()],
            ..Self::default()
        }
    }

    /// A part of this server.
    pub(crate) fn internal(name: &str) -> Self {
        Self { name: name.to_owned(), groups: vec![MASTERS.to_owned()], ..Self::default() }
    }

    /// Whether it belongs to a group.
    pub(crate) fn is_in(&self, group: &str) -> bool {
        self.groups.iter().any(|held| held == group)
    }

    /// The node that this is the agent of.
    pub(crate) fn node(&self) -> Option<&str> {
        self.name.strip_prefix("system:node:").filter(|name| !name.is_empty() && self.is_in(NODES))
    }

    /// As reviews show it.
    pub(crate) fn to_value(&self) -> Value {
        let mut value = json!({"username": self.name, "groups": self.groups});
        if !self.uid.is_empty() {
            value["uid"] = json!(self.uid);
        }
        if !self.extra.is_empty() {
            value["extra"] = json!(self.extra);
        }
        value
    }
}
