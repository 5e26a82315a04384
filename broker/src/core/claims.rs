//! Who holds a node's name here: one path at a time, direct or through relays.
//!
//! The newest session of an instance fences the older one. A second instance of one name is refused until the
//! first has been away for a while. A relay passes on which nodes are linked behind it (`Presence`) and is
//! told when a path through it lost (`Fence`). What a node has put into a relay's store is taken from there
//! whoever holds the claim: records have positions, and only what is Live needs the path.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use codec::proto;

use super::{
    Core, Timer,
    event::{Origin, Peer, Role, SessionId},
    few::Few,
    link::{FEATURE_RELAY, Link, Phase},
};

const REPLACED: &str = "this enrolment was replaced by a newer one: join again with a new token";
/// Relays that a path may have: more is a loop.
const HOPS_MAX: usize = 8;
/// Longest name of a node, a DNS name.
const NAME_MAX: usize = 253;

/// Who holds a node's name.
#[derive(Debug)]
pub(super) struct Claim {
    instance: [u8; 16],
    generation: u32,
    /// The link that leads to it.
    pub(super) session: Option<SessionId>,
    /// Of the node's Hello: a greater one is newer. 0: from a build that has none.
    stamp: u64,
    /// Relays between that link's peer and the node, the node's own first; the peer is the last.
    via: Box<[String]>,
    /// When its last path ended.
    released: Duration,
}

impl Core {
    /// The established link that leads to a node.
    pub(super) fn link_of(&self, node: &str) -> Option<SessionId> {
        let session = self.claims.get(node)?.session?;
        let link = self.links.get(&session)?;
        (link.phase == Phase::Established).then_some(session)
    }

    /// Nodes that are reached through relays: (node, the relay that is linked here).
    pub(super) fn relayed_nodes(&self) -> impl Iterator<Item = (&Origin, &Link, SessionId)> {
        self.claims.iter().filter_map(|(name, claim)| {
            let session = claim.session.filter(|_| !claim.via.is_empty())?;
            Some((name, &**self.links.get(&session)?, session))
        })
    }

    /// Whether a node may link here at all, beyond what its certificate's chain has shown.
    pub(super) fn admit(&self, peer: &Peer) -> Result<(), proto::Refusal> {
        let least = self.generations.get(&peer.name).copied().unwrap_or(0);
        let known = if self.config.is_hub() { None } else { self.forwards.get(&peer.name) };
        if !self.config.is_hub() && known.is_none() {
            let message = format!(
                "relay {} does not forward for {}: name it where the relay is enrolled (`octobus token create \
                 --forwards`)",
                self.own, peer.name
            );
            return Err(refusal(proto::RefusalReason::NotAuthorized, message, 0));
        }
        if peer.generation < least.max(known.map_or(0, |known| known.generation)) {
            return Err(refusal(proto::RefusalReason::Revoked, REPLACED.to_owned(), 0));
        }
        Ok(())
    }

    /// Takes a node's name for a path, or says why not. An older path of the same instance is fenced.
    pub(super) fn claim(
        &mut self,
        session: SessionId,
        node: &Origin,
        present: &proto::Present,
    ) -> Result<(), proto::Refusal> {
        let hold = self.config.duplicate_hold;
        let now = self.now.mono;
        if let Some(held) = self.claims.get(node) {
            let other = held.instance != *present.instance && held.generation >= present.generation;
            let busy = held.session.is_some() || now < held.released + hold;
            if other && busy {
                let message = format!(
                    "another instance of node {node} is linked (or was within {} s): two machines hold the same \
                     certificate; stop one, or enrol it under its own name",
                    hold.as_secs()
                );
                self.set_condition("DuplicateIdentity", node.to_string(), message.clone());
                let since_us = self.now.wall_us;
                self.after(
                    Duration::from_mins(10),
                    Timer::Condition("DuplicateIdentity", node.to_string(), since_us),
                );
                let retry = u32::try_from(hold.as_millis()).unwrap_or(u32::MAX);
                return Err(refusal(proto::RefusalReason::DuplicateIdentity, message, retry));
            }
            // What a relay reports may be old news; a node that is here itself is not.
            let stale = !present.via.is_empty() && present.claim < held.stamp;
            if stale && held.session.is_some_and(|holder| holder != session) {
                return Err(fenced());
            }
            if let Some(older) = held.session.filter(|older| *older != session) {
                let lost = held.stamp;
                self.fence(older, node, fenced(), lost);
            }
        }
        let claim = Claim {
            instance: present.instance[..].try_into().expect("checked before: 16 bytes"),
            generation: present.generation,
            session: Some(session),
            stamp: present.claim,
            via: present.via.clone().into(),
            released: now,
        };
        self.claims.insert(Arc::clone(node), claim);
        self.links.get_mut(&session).expect("the link that claims").present.insert(Arc::clone(node), ());
        self.exports_changed(Some(node));
        self.pump_links.insert(session);
        self.tell_above(node);
        Ok(())
    }

    /// Ends a path to a node: its session here, or its relay's session with it.
    fn fence(&mut self, session: SessionId, node: &Origin, refusal: proto::Refusal, claim: u64) {
        let Some(link) = self.links.get(&session) else { return };
        if link.peer.name == *node {
            return self.refuse_with(session, refusal);
        }
        let fence = proto::Fence { name: node.to_string(), refusal: Some(refusal), claim };
        self.send_control(session, proto::control::Message::Fence(fence));
        self.release_claim(session, node);
    }

    /// A node is not reached by this link any more.
    pub(super) fn release_claim(&mut self, session: SessionId, node: &Origin) {
        if let Some(link) = self.links.get_mut(&session) {
            link.present.remove::<str>(node);
        }
        let Some(claim) = self.claims.get_mut(node).filter(|claim| claim.session == Some(session)) else {
            return;
        };
        claim.session = None;
        claim.released = self.now.mono;
        self.exports_changed(None);
        self.tell_above(node);
        self.fail_requests(session, node);
    }

    /// Every node that was reached by this link is offline.
    pub(super) fn release_all(&mut self, session: SessionId, present: &Few<Origin, ()>) {
        for node in present.keys() {
            self.release_claim(session, node);
        }
    }

    /// Whoever holds an older certificate of this node is out, whatever it has said so far; the new one is
    /// no duplicate of it.
    pub(super) fn replace_generation(&mut self, node: &Origin, generation: u32) {
        self.generations.insert(Arc::clone(node), generation);
        let older = |session: &SessionId| {
            let link = &self.links[session];
            let theirs = link.peer.role == Role::Node && link.peer.name == *node;
            theirs && link.peer.generation < generation && link.phase != Phase::Closing
        };
        // Who has said hello holds the claim, or is on its way out.
        let holder = self.claims.get(node).and_then(|claim| claim.session);
        let out: BTreeSet<SessionId> = self.strangers.iter().copied().chain(holder).filter(older).collect();
        for session in out {
            self.refuse(session, proto::RefusalReason::Revoked, REPLACED, 0);
        }
        let held = self.claims.get(node).filter(|claim| claim.generation < generation);
        if let Some((session, lost)) = held.and_then(|claim| Some((claim.session?, claim.stamp))) {
            self.fence(session, node, refusal(proto::RefusalReason::Revoked, REPLACED.to_owned(), 0), lost);
        }
        if self.claims.get(node).is_some_and(|claim| claim.generation < generation) {
            self.claims.remove(node);
        }
        self.on_identity_changed(&node.clone());
    }

    /// A relay says which of its nodes came or went.
    pub(super) fn on_presence(
        &mut self,
        session: SessionId,
        presence: &proto::Presence,
    ) -> Result<(), String> {
        for present in &presence.nodes {
            let link = &self.links[&session];
            if link.phase != Phase::Established {
                return Ok(());
            }
            let me = &*self.config.name;
            let loops = present.via.len() > HOPS_MAX || present.via.iter().any(|hop| hop == me);
            if !self.config.is_hub() && (*present.name == *me || loops) {
                let what = format!(
                    "{} and {me} relay for each other: a loop; change where one of them dials",
                    link.peer.name
                );
                self.set_condition("RelayLoop", link.peer.name.to_string(), what.clone());
                self.refuse(session, proto::RefusalReason::NotAuthorized, &what, 0);
                return Ok(());
            }
            let Some((node, known)) =
                link.behind.as_ref().and_then(|behind| behind.known.get_key_value(present.name.as_str()))
            else {
                let what = format!("{} may not forward for {:?}", link.peer.name, present.name);
                self.not_authorized(session, what);
                return Ok(());
            };
            let node = Arc::clone(node);
            if !present.linked {
                self.release_claim(session, &node);
                continue;
            }
            let path = !present.via.is_empty() && present.via.len() <= HOPS_MAX;
            if present.instance.len() != 16 || !path || present.via.iter().any(|hop| hop.len() > NAME_MAX) {
                return Err("a presence without instance or path, or with an endless one".to_owned());
            }
            let outcome = if present.generation < known.generation {
                Err(refusal(proto::RefusalReason::Revoked, REPLACED.to_owned(), 0))
            } else if self.config.is_hub() && present.generation > known.generation {
                let what = format!("generation {} of {node} was never enrolled", present.generation);
                Err(refusal(proto::RefusalReason::NotAuthorized, what, 0))
            } else {
                self.claim(session, &node, present)
            };
            if let Err(refusal) = outcome {
                let claim = present.claim;
                let fence = proto::Fence { name: node.to_string(), refusal: Some(refusal), claim };
                self.send_control(session, proto::control::Message::Fence(fence));
            }
        }
        Ok(())
    }

    /// The broker above has another path to this node.
    pub(super) fn on_fence(&mut self, fence: proto::Fence) {
        let Some((node, claim)) = self.claims.get_key_value(fence.name.as_str()) else { return };
        let (node, holder) = (Arc::clone(node), claim.session);
        // Said of a path that was there before: the node has come again since, and was told of.
        if claim.stamp > fence.claim {
            return;
        }
        if let Some(session) = holder {
            self.fence(session, &node, fence.refusal.unwrap_or_else(fenced), fence.claim);
        }
    }

    /// Tells the broker above whether a node is behind this relay.
    fn tell_above(&mut self, node: &Origin) {
        let Some(present) = self.present(node) else { return };
        let above: Vec<SessionId> = self.links_above().collect();
        for session in above {
            let presence = proto::Presence { nodes: vec![present.clone()] };
            self.send_control(session, proto::control::Message::Presence(presence));
        }
    }

    /// A link above was established: it learns who is behind this relay.
    pub(super) fn tell_presence(&mut self, session: SessionId) {
        let linked = self.claims.iter().filter(|(_, claim)| claim.session.is_some());
        let nodes: Vec<proto::Present> = linked.filter_map(|(node, _)| self.present(node)).collect();
        if !nodes.is_empty() {
            self.send_control(session, proto::control::Message::Presence(proto::Presence { nodes }));
        }
    }

    /// What is said above of a node; nothing if this broker may not speak for it.
    fn present(&self, node: &Origin) -> Option<proto::Present> {
        if self.config.is_hub() || !self.forwards.contains_key(node) {
            return None;
        }
        let claim = self.claims.get(node)?;
        let mut via = claim.via.to_vec();
        via.push(self.own.to_string());
        Some(proto::Present {
            name: node.to_string(),
            linked: claim.session.is_some(),
            instance: claim.instance.to_vec().into(),
            generation: claim.generation,
            claim: claim.stamp,
            via,
        })
    }

    /// Established links toward the tier whose peers know relays.
    pub(super) fn links_above(&self) -> impl Iterator<Item = SessionId> {
        let relays = |link: &Link| link.phase == Phase::Established && link.can(FEATURE_RELAY);
        self.above.iter().copied().filter(move |session| relays(&self.links[session]))
    }
}

fn fenced() -> proto::Refusal {
    refusal(proto::RefusalReason::Fenced, "a newer session of this instance exists".to_owned(), 0)
}

pub(super) fn refusal(reason: proto::RefusalReason, message: String, retry_after_ms: u32) -> proto::Refusal {
    proto::Refusal { reason: reason as i32, message, retry_after_ms }
}
