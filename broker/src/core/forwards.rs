//! Whom a relay may forward for.
//!
//! `identity/<relay>` in the tier's `sys` lists names. A hub reads it there; a relay is told in Welcome, keeps
//! the list on disk, and so admits its nodes also while no hub can be reached. The list is complete: it holds
//! everybody behind the names on it too, with what a certificate of each must be, so that relays may stand
//! behind relays.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use bytes::Bytes;
use codec::{Kind, proto};
use serde::Deserialize;

use super::{
    Core,
    event::{Origin, Role, SessionId},
    link::{FEATURE_RELAY, Import, Phase, Side},
};
use crate::store::LocalFact;

/// The fact that holds what a relay was told.
const FORWARDS: &[u8] = b"forwards";
/// Names that may stand behind one relay.
pub(super) const BEHIND_MAX: usize = 4096;

/// What stands in `identity/<name>`, as far as links care.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Identity {
    generation: u32,
    key: String,
    revoked: Vec<String>,
    forwards: Vec<String>,
}

/// Who stands behind a peer.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Behind {
    /// Enrolled: whom it may speak for.
    pub(super) known: BTreeMap<Origin, proto::Forward>,
    /// Named, and not enrolled.
    missing: BTreeSet<Origin>,
}

impl Behind {
    pub(super) fn contains(&self, name: &str) -> bool {
        self.known.contains_key(name)
    }

    fn names(&self, name: &str) -> bool {
        self.known.contains_key(name) || self.missing.contains(name)
    }

    fn is_nobody(&self) -> bool {
        self.known.is_empty() && self.missing.is_empty()
    }

    pub(super) fn list(&self) -> Vec<proto::Forward> {
        self.known.values().cloned().collect()
    }
}

impl Core {
    /// What is known here of a name: from the tier's State, or from what this relay was told.
    fn forward(&self, name: &str) -> Option<proto::Forward> {
        if !self.config.is_hub() {
            return self.forwards.get(name).cloned();
        }
        let sys = (Origin::clone(&self.own), "sys".into());
        let entry = self.spaces[*self.space_names.get(&sys)?].get(&format!("identity/{name}"))?;
        let identity: Identity = serde_json::from_slice(&entry.value()).ok()?;
        Some(proto::Forward {
            name: name.to_owned(),
            generation: identity.generation,
            key: identity.key,
            revoked: identity.revoked,
            forwards: identity.forwards,
        })
    }

    /// Everybody whom this peer may speak for beside itself, and names on its list that nobody enrolled yet.
    pub(super) fn behind(&self, peer: &str) -> Behind {
        let mut behind = Behind::default();
        if self.config.shared {
            return behind; // a tier's replica adopts who links to it, and nobody else
        }
        let mut next = VecDeque::from(self.forward(peer).map_or_else(Vec::new, |known| known.forwards));
        while let Some(name) = next.pop_front() {
            let beside = *name != *peer && *name != *self.config.name;
            if !beside || behind.known.contains_key(&*name) || behind.known.len() >= BEHIND_MAX {
                continue;
            }
            match self.forward(&name) {
                Some(known) => {
                    next.extend(known.forwards.iter().cloned());
                    behind.known.insert(Origin::from(name), known);
                }
                None => {
                    behind.missing.insert(Origin::from(name));
                }
            }
        }
        behind
    }

    /// These may be spoken for by the peer of a link.
    pub(super) fn stand_behind(&mut self, session: SessionId, behind: Behind) {
        let link = self.links.get_mut(&session).expect("a link of this core");
        if behind.is_nobody() {
            link.behind = None;
            self.speakers.remove(&session);
        } else {
            link.behind = Some(Box::new(behind));
            self.speakers.insert(session);
        }
    }

    /// For the acceptor of a relay: what a certificate of this name must be, if it may link here.
    pub(super) fn forwarded(&self) -> Vec<proto::Forward> {
        self.forwards.values().cloned().collect()
    }

    /// What the peer above says about whom this node may forward for.
    pub(super) fn on_forwards(&mut self, forwards: &[proto::Forward]) {
        let told: BTreeMap<Origin, proto::Forward> = forwards
            .iter()
            .filter(|forward| {
                *forward.name != *self.own && codec::topic::validate_node_name(&forward.name).is_ok()
            })
            .take(BEHIND_MAX)
            .map(|forward| (Origin::from(forward.name.as_str()), forward.clone()))
            .collect();
        if told == self.forwards {
            return;
        }
        let value = codec::encode(&proto::Forwards { forwards: told.values().cloned().collect() });
        self.ledger.write_local(Kind::META, Bytes::from_static(FORWARDS), Some(value));
        self.forwards = told;
        self.exports_changed(None);
        let below: Vec<SessionId> =
            self.links.iter().filter(|(_, link)| link.side == Side::Below).map(|(id, _)| *id).collect();
        for session in below {
            self.judge_again(session);
        }
    }

    pub(super) fn restore_forwards(&mut self, locals: &[LocalFact]) {
        let stored = locals.iter().find(|fact| fact.kind == Kind::META && fact.key == FORWARDS);
        let Some(stored) = stored.and_then(|fact| codec::decode::<proto::Forwards>(fact.value.clone()).ok())
        else {
            return;
        };
        self.forwards = stored
            .forwards
            .into_iter()
            .map(|forward| (Origin::from(forward.name.as_str()), forward))
            .collect();
    }

    /// `identity/<name>` has changed: whoever speaks for this name is judged anew.
    pub(super) fn on_identity_changed(&mut self, name: &str) {
        let names = |session: &SessionId| {
            let link = &self.links[session];
            *link.peer.name == *name || link.behind.as_ref().is_some_and(|behind| behind.names(name))
        };
        let holder = self.claims.get(name).and_then(|claim| claim.session);
        let concerned: BTreeSet<SessionId> =
            self.speakers.iter().copied().chain(holder).filter(names).collect();
        for session in concerned {
            self.judge_again(session);
        }
    }

    /// What is known of a peer below may have changed: it is told, or its session ends.
    fn judge_again(&mut self, session: SessionId) {
        let Some(link) = self.links.get(&session) else { return };
        if link.phase != Phase::Established || link.peer.role != Role::Node {
            return;
        }
        let peer = link.peer.clone();
        if let Err(refusal) = self.admit(&peer) {
            return self.refuse_with(session, refusal);
        }
        let behind = self.behind(&peer.name);
        let link = &self.links[&session];
        if link.behind.as_deref().map_or_else(|| behind.is_nobody(), |known| *known == behind) {
            return;
        }
        let gone = |origin: &Origin| !origin.is_empty() && *origin != peer.name && !behind.contains(origin);
        let speaks_for_others = link.imports.values().any(|import| match import {
            Import::Log { origin, .. } | Import::Live { origin } => gone(origin),
            Import::State { space, .. } => gone(&self.spaces[*space].origin),
            Import::Unknown => false,
        });
        if speaks_for_others || link.present.keys().any(gone) {
            let what = format!("{} may not forward for all of its nodes any more: link again", peer.name);
            return self.refuse(session, proto::RefusalReason::NotAuthorized, &what, 1_000);
        }
        let told = link.can(FEATURE_RELAY);
        let forwards = behind.list();
        self.stand_behind(session, behind);
        if told {
            self.send_control(session, proto::control::Message::Forwards(proto::Forwards { forwards }));
        }
    }
}
