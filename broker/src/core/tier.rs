//! One replica of a tier: Logs and State are durable in what the replicas share, and a node is this core's only
//! while it is linked here.
//!
//! ```text
//!  Hello ──> adopt ──> (claimed; what is durable of the node) ──> mirror is where the node is ──> Welcome
//!  link ends ──> everything written is durable ──> release
//! ```
//!
//! Every Hello adopts anew: what the node is told comes from what the replicas share, never from what an earlier
//! session left in this memory. Of a node's spaces only what is on its way is held here; what is durable is told
//! apart by its pair. The tier's own spaces are a mirror, which writes nothing.
//!
//! Invariants: nothing of a node is kept here once it is released; a lane that is abandoned is never
//! acknowledged; `fleet` is sent to nobody before the mirror holds at least what the node holds.

use std::{sync::Arc, time::Duration};

use codec::{Class, Kind, Record, proto};

use super::{
    Core, Timer,
    event::{
        Action, Origin, Peer, SessionId,
        tier::{Adopt, AdoptedLog, Adoption, Ask, DownLog, Mirrored, News, OfferedLog},
    },
    imports::STREAMS_MAX,
    ledger::Effect,
    link::{Greeting, LogExport, Phase},
    log::{self, Log, LogId},
    stats::DropReason,
};
use crate::store::SourceKind;

/// How long a node waits for a mirror that is behind it.
const MIRROR_PATIENCE: Duration = Duration::from_secs(5);
/// When a node comes again whose replica's mirror is behind.
const MIRROR_RETRY_MS: u32 = 2_000;

impl Core {
    pub(super) fn on_tier(&mut self, news: News) {
        match news {
            News::Adopted { session, outcome } => self.on_adopted(session, outcome),
            News::Written { node, lsn } => {
                self.ledger.persisted(&node, lsn);
                let effects = self.ledger.ready();
                self.take_effect(effects);
            }
            News::Fenced { node, refusal } => self.on_fenced(&node, &refusal),
            News::Arrived { node, down } => self.on_arrived(&node, down),
            News::Mirrored(mirrored) => self.on_mirrored(mirrored),
        }
    }

    /// A node has said Hello and holds its name here: what is durable of it is asked for.
    pub(super) fn adopt(&mut self, session: SessionId, peer: Peer, hello: proto::Hello) {
        let own = |origin: &str| *origin == *peer.name;
        let log = |offer: &proto::LogOffer| OfferedLog {
            stream: offer.stream.as_str().into(),
            first: offer.first,
            next: offer.next,
        };
        let logs = hello.logs.iter().filter(|offer| own(&offer.origin) && offer.next > 1);
        let spaces = hello.states.iter().filter(|offer| own(&offer.origin));
        let spaces = spaces.filter(|offer| super::NODE_SPACES.contains(&offer.space.as_str()));
        let adopt = Adopt {
            session,
            node: Arc::clone(&peer.name),
            generation: peer.generation,
            instance: hello.instance[..].try_into().expect("its length was checked"),
            stamp: hello.claim,
            logs: logs.take(STREAMS_MAX).map(log).collect(),
            spaces: spaces.take(super::NODE_SPACES.len()).map(|offer| offer.space.as_str().into()).collect(),
        };
        let link = self.links.get_mut(&session).expect("the link that said hello");
        link.phase = Phase::Adopting;
        link.greeting = Some(Greeting::Welcome(Box::new(hello)));
        self.adopted.insert(peer.name, session);
        self.out.push(Action::Tier(Ask::Adopt(Box::new(adopt))));
    }

    fn on_adopted(&mut self, session: SessionId, outcome: Result<Box<Adoption>, proto::Refusal>) {
        let Some(link) = self.links.get(&session).filter(|link| link.phase == Phase::Adopting) else {
            return; // it ended meanwhile, and said so
        };
        let node = Arc::clone(&link.peer.name);
        if self.adopted.get(&node) != Some(&session) {
            return;
        }
        match outcome {
            Err(refusal) => self.refuse_with(session, refusal),
            Ok(adoption) => {
                self.forget_node(&node);
                self.ledger.enter(&node);
                self.take_adoption(&node, *adoption);
                if self.is_mirrored(session) {
                    return self.greet_adopted(session);
                }
                self.awaiting_mirror.insert(session);
                self.after(MIRROR_PATIENCE, Timer::Mirror(session));
            }
        }
    }

    fn take_adoption(&mut self, node: &Origin, adoption: Adoption) {
        for adopted in adoption.logs.iter().take(STREAMS_MAX) {
            self.take_log(node, adopted);
        }
        for adopted in &adoption.spaces {
            let index = self.space_of(node, &adopted.space);
            self.spaces[index].adopted(adopted);
        }
        if let Some(down) = adoption.down {
            self.take_down(node, down);
        }
        self.exports_changed(Some(node));
    }

    /// Of a Log that is elsewhere, its end is known.
    fn take_log(&mut self, node: &Origin, adopted: &AdoptedLog) -> LogId {
        let source = self.declare(node, SourceKind::Log, &adopted.stream, adopted.class);
        let mut log = Box::new(Log::new(&source, self.policy_of(&source), adopted.mark.saturating_add(1)));
        log.epochs = vec![(adopted.from, adopted.epoch)];
        log.last_crc = adopted.crc;
        let name = log.name();
        self.log_names.insert(name.clone(), source.number);
        self.histories.entry(name).or_default().push(source.number);
        self.logs.insert(source.number, log);
        source.number
    }

    fn greet_adopted(&mut self, session: SessionId) {
        let link = self.links.get_mut(&session).expect("the link whose node was adopted");
        link.phase = Phase::Greeting;
        if let Some(greeting) = link.greeting.take() {
            self.greet_once_durable(session, greeting);
        }
    }

    /// Nothing of a node stays in memory.
    fn forget_node(&mut self, node: &Origin) {
        self.ledger.abandon(node);
        let down: (Origin, Arc<str>) = ("".into(), format!("down/{node}").into());
        let streams = self.histories_of(node).map(|(stream, _)| (Arc::clone(node), Arc::clone(stream)));
        for name in streams.chain([down]).collect::<Vec<_>>() {
            self.log_names.remove(&name);
            for id in self.histories.remove(&name).unwrap_or_default() {
                self.logs.remove(&id);
            }
        }
        for index in self.spaces_of(node).collect::<Vec<_>>() {
            let name = (Arc::clone(node), Arc::clone(&self.spaces[index].name));
            self.space_names.remove(&name);
            self.spaces[index].vacate();
            self.vacant.push(index);
        }
    }

    /// A link ended: its node is let go once nothing of it waits for durability.
    pub(super) fn release_later(&mut self, session: SessionId, node: &Origin) {
        self.awaiting_mirror.remove(&session);
        if self.adopted.get(node) == Some(&session) {
            self.ledger.enter(node);
            self.ledger.after(Effect::Release { node: Arc::clone(node), session });
        }
    }

    pub(super) fn release_adopted(&mut self, node: &Origin, session: SessionId) {
        if self.adopted.get(node) != Some(&session) {
            return; // it is back
        }
        self.adopted.remove(node);
        self.forget_node(node);
        // Who may come next is for the tier's claims to say.
        self.claims.remove(node);
        self.out.push(Action::Tier(Ask::Release { node: Arc::clone(node) }));
    }

    fn on_fenced(&mut self, node: &Origin, refusal: &proto::Refusal) {
        let fenced: Vec<(Origin, SessionId)> = match node.is_empty() {
            true => self.adopted.iter().map(|(node, session)| (Arc::clone(node), *session)).collect(),
            false => self
                .adopted
                .get_key_value(node)
                .map(|(node, at)| (Arc::clone(node), *at))
                .into_iter()
                .collect(),
        };
        for (node, session) in fenced {
            if self.links.get(&session).is_some_and(|link| link.phase != Phase::Closing) {
                self.refuse_with(session, refusal.clone());
            }
            let was_waiting = !self.links.contains_key(&session);
            self.forget_node(&node);
            if was_waiting {
                // Its link is gone, and what its release waited for will not come.
                self.release_adopted(&node, session);
            }
        }
    }

    // ---- the tier's own State ----

    /// Whether this replica's mirror of `fleet` holds what the node of a link holds of it.
    fn is_mirrored(&self, session: SessionId) -> bool {
        let Some(space) = self.space_names.get(&("".into(), "fleet".into())).map(|at| &self.spaces[*at])
        else {
            return false;
        };
        let Some(Greeting::Welcome(hello)) = &self.links[&session].greeting else { return true };
        let held = hello.positions.iter().filter(|at| at.origin.is_empty() && at.space == "fleet");
        let reached =
            held.map(|at| (at.incarnation, at.revision).max((at.reached_incarnation, at.reached_revision)));
        space.durable.0 != 0 && space.durable >= reached.max().unwrap_or_default()
    }

    pub(super) fn on_mirror_late(&mut self, session: SessionId) {
        if self.awaiting_mirror.remove(&session) {
            let message = "this replica's mirror of the tier's State is behind what the node holds; if no replica \
                           ever reaches it, NATS was put back to an older copy: delete the bucket of `fleet`, so \
                           that it begins a new incarnation";
            self.refuse(session, proto::RefusalReason::Overloaded, message, MIRROR_RETRY_MS);
        }
    }

    fn on_mirrored(&mut self, mirrored: Mirrored) {
        let index = self.space_of(&"".into(), &mirrored.space);
        let space = &mut self.spaces[index];
        if mirrored.incarnation < space.at.0 {
            return; // of a bucket that was deleted meanwhile
        }
        if mirrored.incarnation > space.at.0 {
            space.begin_mirror(mirrored.incarnation);
            if space.scoped {
                self.forget_parts();
            }
        }
        for record in &mirrored.records {
            self.mirror_entry(index, record);
        }
        if let Some(revision) = mirrored.complete {
            let space = &mut self.spaces[index];
            let was_whole = space.is_whole();
            space.mirrored_upto(revision);
            if space.scoped {
                self.mirror_moved(!was_whole);
            }
        }
        self.pump_watches_of(index);
    }

    fn mirror_entry(&mut self, index: usize, record: &Record) {
        let mono = self.now.mono;
        let Some((key, version)) = self.spaces[index].mirror(record) else { return };
        let (tombstone, revision) = (version.tombstone, version.local);
        self.spaces[index].persisted(&key, version, mono);
        if tombstone {
            self.on_tombstone(index);
        }
        if self.spaces[index].scoped {
            self.on_part_durable(index, &key, revision);
        } else if let Some(name) = key.strip_prefix("identity/") {
            self.on_identity_changed(name);
        }
    }

    /// `fleet` has begun anew: what links had of it counts for nothing.
    fn forget_parts(&mut self) {
        for link in self.links.values_mut() {
            if let Some(part) = link.part.take() {
                link.in_flight_bytes -= part.in_flight.bytes;
            }
            link.exports_changed = true;
        }
    }

    /// The mirror of `fleet` has got further: who waited for it is greeted. A mirror that has just become whole is
    /// for everybody.
    fn mirror_moved(&mut self, became_whole: bool) {
        let waiting: Vec<SessionId> = self.awaiting_mirror.iter().copied().collect();
        for session in waiting.into_iter().filter(|session| self.is_mirrored(*session)).collect::<Vec<_>>() {
            self.awaiting_mirror.remove(&session);
            let node = Arc::clone(&self.links[&session].peer.name);
            self.ledger.enter(&node);
            self.greet_adopted(session);
        }
        if became_whole {
            self.links.values_mut().for_each(|link| link.exports_changed = true);
            self.pump_links.extend(self.links.keys().copied());
        }
    }

    // ---- the Log of what goes down ----

    fn on_arrived(&mut self, node: &Origin, down: DownLog) {
        if self.adopted.contains_key(node) {
            self.ledger.enter(node);
            let id = self.take_down(node, down);
            self.pump_exports_of(id);
        }
    }

    /// The tier's Log for a node reaches this far.
    fn take_down(&mut self, node: &Origin, down: DownLog) -> LogId {
        let (tier, stream): (Origin, Arc<str>) = ("".into(), format!("down/{node}").into());
        let held = self.log_names.get(&(Arc::clone(&tier), Arc::clone(&stream))).copied();
        let id = held.filter(|id| self.logs[id].epoch() == down.epoch).unwrap_or_else(|| {
            let adopted =
                AdoptedLog { stream, class: Class::Event, epoch: down.epoch, from: 1, mark: 0, crc: 0 };
            if let Some(older) = held {
                self.forget_log(older);
            }
            self.exports_changed(Some(node));
            self.take_log(&tier, &adopted)
        });
        let log = self.logs.get_mut(&id).expect("just taken");
        log.next = log.next.max(down.last.saturating_add(1));
        log.durable_next = log.next;
        id
    }

    /// A Log that was deleted where it stood.
    fn forget_log(&mut self, id: LogId) {
        let Some(log) = self.logs.remove(&id) else { return };
        self.log_names.remove(&log.name());
        self.histories.remove(&log.name());
        for link in self.links.values_mut() {
            if let Some(export) = link.logs.remove(&id) {
                link.in_flight_bytes -= export.in_flight.bytes;
            }
        }
    }

    /// Where to go on with what is for a node, by what it says that it holds.
    pub(super) fn begin_down_export(&mut self, session: SessionId, id: LogId) {
        let log = &self.logs[&id];
        let link = self.links.get_mut(&session).expect("an established link");
        let of_log = |mark: &&proto::LogMark| mark.origin.is_empty() && *mark.stream == *log.stream;
        let marks = link.peer_marks.iter().filter(of_log).filter(|mark| mark.epoch == log.epoch());
        let mark = marks.map(|mark| mark.mark).max();
        // Unless it holds some of this history, that is announced.
        let export = LogExport {
            next: mark.map_or(1, |mark| mark.saturating_add(1)),
            epoch: mark.map_or(0, |_| log.epoch()),
            ..LogExport::default()
        };
        link.logs.insert(id, export);
        self.pump_links.insert(session);
    }

    /// What is for a node was read. Where its seqs have holes, nothing is missing: those are of other nodes.
    pub(super) fn on_down_read(&mut self, session: SessionId, id: LogId, records: &[Record]) {
        let Some(export) = self.links.get_mut(&session).and_then(|link| link.logs.get_mut(&id)) else {
            return;
        };
        export.reading = false;
        let Some(log) = self.logs.get(&id) else { return };
        if records.is_empty() && export.next < log.durable_next {
            // What was last sent to this node has expired where it stood.
            export.next = log.durable_next;
            self.stats.drop(DropReason::Expired);
        }
        for record in records.iter().filter(|record| record.header.kind == Kind::LOG) {
            let seq = record.header.seq;
            let Some(link) = self.links.get(&session) else { return };
            let Some(export) = link.logs.get(&id) else { return };
            let log = &self.logs[&id];
            if seq < export.next || seq >= log.durable_next || log.epoch() != export.epoch {
                continue;
            }
            if export.in_flight.bytes as u64 >= link.window.log_bytes {
                break;
            }
            if seq > export.next {
                let mut hole = log::gap(log, export.next, seq - 1, proto::GapReason::NotHere);
                if let Ok(mut gap) = codec::decode::<proto::Gap>(hole.body.clone()) {
                    gap.count = 0;
                    hole.body = codec::encode(&gap);
                }
                self.send_log_record(session, id, hole);
            }
            self.export_record(session, id, record.clone());
        }
        self.pump_links.insert(session);
    }
}
