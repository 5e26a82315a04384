//! What the objects of a kind look like: one description for everything that must know it.
//!
//! A [`Type`] says which fields there are, how lists merge, and what is written when a field is empty. From
//! it come the reading of objects ([`normal`](crate::normal)), strategic merge patches, server-side apply,
//! and OpenAPI. Built-in kinds are described in `kinds/*.types` ([`read`]); a custom resource's type is made
//! from its schema ([`structural`](crate::crd::structural)).

use std::{
    collections::BTreeMap,
    sync::{Arc, LazyLock},
};

pub(crate) mod read;

/// What a value may be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Type {
    /// One indivisible value.
    Scalar(Scalar),
    /// Anything: maps merge by key, lists are indivisible.
    Any,
    /// Fields of known names.
    Struct(Arc<Struct>),
    /// Values by key.
    Map { of: Box<Self>, atomic: bool },
    /// Values in order.
    List { of: Box<Self>, merge: Merge },
}

/// An indivisible value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scalar {
    Text,
    Int32,
    Int64,
    Number,
    Bool,
    /// RFC 3339, seconds.
    Time,
    /// RFC 3339, microseconds.
    MicroTime,
    Quantity,
    IntOrString,
    /// Base64.
    Bytes,
}

/// How two lists become one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Merge {
    /// The later one replaces the other.
    Atomic,
    /// Elements with the same keys are one. A strategic merge patch looks at the first key alone.
    Keys(Vec<String>),
    /// Equal elements are one.
    Set,
    /// Strategic merge patches merge by this key; server-side apply replaces.
    PatchKey(String),
}

/// Fields of known names.
#[derive(Debug, PartialEq, Eq, Default)]
pub(crate) struct Struct {
    /// Name of the type; empty for one that is not named.
    pub(crate) name: String,
    /// One sentence for people.
    pub(crate) doc: String,
    /// It is replaced as a whole.
    pub(crate) atomic: bool,
    /// A strategic merge patch names the fields that stay: a union of which one is set.
    pub(crate) retain_keys: bool,
    /// Fields that it does not name are kept as they are.
    pub(crate) open: bool,
    /// Its fields.
    pub(crate) fields: BTreeMap<String, Field>,
}

/// One field of a [`Struct`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Field {
    /// What it holds.
    pub(crate) ty: Type,
    /// What is written when it is empty.
    pub(crate) presence: Presence,
    /// One sentence for people.
    pub(crate) doc: String,
}

/// What is written when a field is empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Presence {
    /// Nothing: empty and absent are the same.
    Omit,
    /// Empty is not the same as absent, and is kept.
    Keep,
    /// The empty value, even if it is absent.
    Always,
}

impl Type {
    /// Whether a writer owns it as one value.
    pub(crate) fn is_atomic(&self) -> bool {
        match self {
            Self::Scalar(_) => true,
            Self::Any => false,
            Self::Struct(of) => of.atomic,
            Self::Map { atomic, .. } => *atomic,
            Self::List { merge, .. } => matches!(merge, Merge::Atomic | Merge::PatchKey(_)),
        }
    }

    /// The type of a field or of a map's values; `None` if it has no such field.
    pub(crate) fn child(&self, name: &str) -> Option<&Self> {
        match self {
            Self::Struct(of) => match of.fields.get(name) {
                Some(field) => Some(&field.ty),
                None => of.open.then_some(&Self::Any),
            },
            Self::Map { of, .. } => Some(of),
            Self::Any => Some(&Self::Any),
            Self::Scalar(_) | Self::List { .. } => None,
        }
    }

    /// Whether this is a field of a struct, and so exists whether it is set or not.
    pub(crate) fn is_named_field(&self, name: &str) -> bool {
        matches!(self, Self::Struct(of) if of.fields.contains_key(name))
    }
}

/// The built-in types by name.
pub(crate) static BUILT_IN: LazyLock<BTreeMap<String, Arc<Struct>>> = LazyLock::new(|| {
    let texts = [
        include_str!("../kinds/meta.types"),
        include_str!("../kinds/core.types"),
        include_str!("../kinds/pod.types"),
        include_str!("../kinds/workloads.types"),
        include_str!("../kinds/others.types"),
        include_str!("../kinds/metrics.types"),
    ];
    read::read(&texts).expect("the descriptions of built-in kinds are part of this program and tested")
});

/// A built-in type.
pub(crate) fn built_in(name: &str) -> Type {
    Type::Struct(Arc::clone(BUILT_IN.get(name).expect("a type that kinds/*.types describes")))
}
