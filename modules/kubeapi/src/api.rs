//! What can be done with objects: the verbs, over the store. Who may do it was decided before.

pub(crate) mod create;
pub(crate) mod delete;
pub(crate) mod list;
pub(crate) mod read;
pub(crate) mod subresource;
pub(crate) mod update;
pub(crate) mod watch;

use std::sync::Arc;

use serde_json::Value;

use crate::{
    auth::Authenticator,
    cache::Cache,
    managed::Writer,
    registry::{Registry, Resource},
    status::Status,
    store::Store,
    user::User,
};

/// The API, without a way to reach it.
#[derive(Debug)]
pub(crate) struct Api {
    pub(crate) store: Store,
    pub(crate) cache: Cache,
    pub(crate) registry: Arc<Registry>,
    pub(crate) authenticator: Authenticator,
    /// The certificate of the CA that signs this server's, for pods.
    pub(crate) ca_pem: String,
}

/// One request for objects of a resource.
#[derive(Debug, Clone)]
pub(crate) struct Ask {
    /// Who asks.
    pub(crate) user: User,
    /// What for.
    pub(crate) resource: Arc<Resource>,
    /// In which namespace; empty for all or none.
    pub(crate) namespace: String,
    /// Which object; empty for all.
    pub(crate) name: String,
    /// Which part of it; empty for the object.
    pub(crate) subresource: String,
    /// Who is noted as having set the fields.
    pub(crate) manager: String,
    /// Nothing is written.
    pub(crate) dry_run: bool,
    /// What becomes of unknown fields.
    pub(crate) validation: Validation,
}

/// What becomes of unknown fields.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Validation {
    /// They go silently.
    Ignore,
    /// They go, and the client is told.
    Warn,
    /// The request is refused.
    Strict,
}

/// An object that was asked for or written, and what the client is to be told besides.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Done {
    /// The HTTP status.
    pub(crate) code: u16,
    /// The object, or a Status.
    pub(crate) object: Value,
    /// Warnings.
    pub(crate) warnings: Vec<String>,
}

impl Done {
    pub(crate) fn ok(object: Value) -> Self {
        Self { code: 200, object, warnings: Vec::new() }
    }

    pub(crate) fn created(object: Value) -> Self {
        Self { code: 201, object, warnings: Vec::new() }
    }
}

impl Ask {
    /// A request of a part of this server.
    pub(crate) fn internal(who: &str, resource: &Arc<Resource>, namespace: &str, name: &str) -> Self {
        Self {
            user: User::internal(who),
            resource: Arc::clone(resource),
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            subresource: String::new(),
            manager: who.strip_prefix("system:").unwrap_or(who).to_owned(),
            dry_run: false,
            validation: Validation::Ignore,
        }
    }

    /// The same for a part of the object.
    pub(crate) fn of(mut self, subresource: &str) -> Self {
        subresource.clone_into(&mut self.subresource);
        self
    }

    /// Where the object is stored.
    pub(crate) fn key(&self) -> String {
        self.resource.key(&self.namespace, &self.name)
    }

    pub(crate) fn not_found(&self) -> Status {
        Status::not_found(&self.resource.group, &self.resource.plural, &self.name)
    }

    pub(crate) fn conflict(&self, why: &str) -> Status {
        Status::conflict(&self.resource.group, &self.resource.plural, &self.name, why)
    }

    pub(crate) fn modified(&self) -> Status {
        Status::modified(&self.resource.group, &self.resource.plural, &self.name)
    }

    pub(crate) fn forbidden(&self, why: &str) -> Status {
        Status::forbidden(&self.resource.group, &self.resource.plural, &self.name, why)
    }

    /// Who is noted as having set the fields, now.
    pub(crate) fn writer<'a>(&'a self, api_version: &'a str, time: &'a str) -> Writer<'a> {
        Writer { manager: &self.manager, api_version, subresource: &self.subresource, time }
    }
}
