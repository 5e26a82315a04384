//! What a NATS subject means on the side where its front stands.
//!
//! | subject | on a node | on a hub |
//! |---|---|---|
//! | `a.b`, `_INBOX.x.y` | the node's topic `a/b`, `_INBOX/x/y` | the tier's topic, Live only |
//! | `octobus.up.<n>.a.b` | refused | topic `a/b` of node `n`; subscribe only |
//! | `octobus.down.<n>.a.b` | refused | topic `a/b` of node `n`; publish only |
//! | `octobus.` and else | refused | refused |
//! | `$SYS.>`, `$JS.>` | nothing is there | nothing is there |
//!
//! A pattern may reach several of these spaces: at a hub `>` and `*.up.>` see the tier's topics and every
//! node's, as they would on a nats-server that carried both. Since the spaces are disjoint, a message
//! still reaches such a subscription once.
//!
//! Permissions are granted in topics. A node's topic is called `node/<n>/a/b` there, up or down.

use std::sync::Arc;

use codec::{Filter, name, topic};

use super::Side;
use crate::core::event::{Origin, OriginFilter, Target};

/// Why a subject is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum SubjectError {
    /// No subject, or no spelling that a topic has.
    #[error("invalid subject")]
    Invalid,
    /// A subject that this side does not offer for this.
    #[error("not for clients here")]
    Forbidden,
}

/// Where a message goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Destination {
    /// A topic space that exists.
    Topic {
        /// Whose.
        target: Target,
        /// The topic in it.
        topic: String,
    },
    /// `$SYS.` and `$JS.`: services that this server does not have.
    System,
}

impl Destination {
    /// What permissions call it; `None` if it needs none.
    pub(super) fn permission(&self) -> Option<std::borrow::Cow<'_, str>> {
        match self {
            Self::System => None,
            Self::Topic { target: Target::Own, topic } => Some(topic.as_str().into()),
            Self::Topic { target: Target::Node(node), topic } => Some(format!("node/{node}/{topic}").into()),
        }
    }
}

/// The meaning of a subject that is published to.
///
/// # Errors
/// It is no valid subject, or nobody may publish to it here.
pub(super) fn destination(side: Side, subject: &str) -> Result<Destination, SubjectError> {
    if is_system(subject) {
        // Not a topic: only the form matters.
        return if is_well_formed(subject) { Ok(Destination::System) } else { Err(SubjectError::Invalid) };
    }
    if !is_reserved(subject) {
        return Ok(Destination::Topic { target: Target::Own, topic: to_topic(subject)? });
    }
    let down = subject.strip_prefix(name::DOWN_PREFIX).filter(|_| side == Side::Hub);
    let (node, subject) =
        down.ok_or(SubjectError::Forbidden)?.split_once('.').ok_or(SubjectError::Invalid)?;
    Ok(Destination::Topic { target: Target::Node(to_node(node)?), topic: to_topic(subject)? })
}

/// The topic of a reply subject.
///
/// # Errors
/// It is no valid subject, or lies in a reserved space.
pub(super) fn reply(subject: &str) -> Result<Arc<str>, SubjectError> {
    if is_reserved(subject) || is_system(subject) {
        return Err(SubjectError::Forbidden);
    }
    Ok(to_topic(subject)?.into())
}

/// What a subscription sees; nothing at all if both are `None`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Interest {
    /// Of this broker's own topics.
    pub own: Option<Filter>,
    /// Of the topics of nodes, at a hub.
    pub up: Option<(OriginFilter, Filter)>,
}

impl Interest {
    /// What permissions call what it sees. A name that is too long for a filter is replaced by one that
    /// covers it.
    pub(super) fn permissions(&self) -> impl Iterator<Item = Filter> {
        let up = self.up.as_ref().map(|(origin, filter)| {
            let node = match origin {
                OriginFilter::Node(node) => node,
                OriginFilter::Own | OriginFilter::AnyNode => "+",
            };
            Filter::parse(&format!("node/{node}/{}", filter.as_str())).unwrap_or_else(|_| {
                Filter::parse(&format!("node/{node}/#")).expect("a node's name is short and no wildcard")
            })
        });
        self.own.clone().into_iter().chain(up)
    }
}

/// The meaning of a pattern that is subscribed to.
///
/// # Errors
/// It is no valid pattern, or nobody may subscribe to it here.
pub(super) fn interest(side: Side, pattern: &str) -> Result<Interest, SubjectError> {
    if is_system(pattern) {
        return if is_well_formed(pattern) { Ok(Interest::default()) } else { Err(SubjectError::Invalid) };
    }
    if !is_well_formed(pattern) {
        return Err(SubjectError::Invalid);
    }
    let up = if side == Side::Hub { up_interest(pattern)? } else { None };
    if !is_reserved(pattern) {
        return Ok(Interest { own: Some(to_filter(pattern)?), up });
    }
    match (side, pattern.split('.').nth(1)) {
        (Side::Hub, Some("up" | "*" | ">")) => Ok(Interest { own: None, up }),
        _ => Err(SubjectError::Forbidden),
    }
}

/// The part of a pattern that lies in `octobus.up.`, if any does.
fn up_interest(pattern: &str) -> Result<Option<(OriginFilter, Filter)>, SubjectError> {
    let everything = || to_filter(">").map(|filter| Some((OriginFilter::AnyNode, filter)));
    let mut rest = pattern;
    for expected in [topic::RESERVED, "up"] {
        if rest == ">" {
            return everything();
        }
        match rest.split_once('.') {
            Some((token, tail)) if token == expected || token == "*" => rest = tail,
            _ => return Ok(None),
        }
    }
    if rest == ">" {
        return everything();
    }
    let Some((node, subject)) = rest.split_once('.') else {
        return Ok(None);
    };
    let origin = if node == "*" { OriginFilter::AnyNode } else { OriginFilter::Node(to_node(node)?) };
    Ok(Some((origin, to_filter(subject)?)))
}

/// The first token belongs to the bus.
fn is_reserved(subject: &str) -> bool {
    subject.split('.').next() == Some(topic::RESERVED)
}

fn is_system(subject: &str) -> bool {
    subject.starts_with("$SYS.") || subject.starts_with("$JS.")
}

/// nats-server's rule: tokens are not empty, `>` stands only at the end.
fn is_well_formed(subject: &str) -> bool {
    let mut tokens = subject.split('.').peekable();
    while let Some(token) = tokens.next() {
        if token.is_empty() || (token == ">" && tokens.peek().is_some()) {
            return false;
        }
    }
    true
}

fn to_topic(subject: &str) -> Result<String, SubjectError> {
    name::subject_to_topic(subject).map_err(|_| SubjectError::Invalid)
}

fn to_filter(pattern: &str) -> Result<Filter, SubjectError> {
    name::subject_to_filter(pattern).map_err(|_| SubjectError::Invalid)
}

fn to_node(token: &str) -> Result<Origin, SubjectError> {
    let node = name::unescape_token(token).map_err(|_| SubjectError::Invalid)?;
    topic::validate_node_name(&node).map_err(|_| SubjectError::Invalid)?;
    Ok(node.into())
}

#[cfg(test)]
mod tests;
