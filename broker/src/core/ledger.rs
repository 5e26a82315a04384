//! The durable effects of the current `apply`, and what waits for groups to become durable.
//!
//! Everything that must survive goes through [`Ledger::write`]; everything that may only be said once it
//! has survived goes through [`Ledger::after`]. There is no other way to acknowledge.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
};

use bytes::Bytes;
use codec::{Flags, Kind, Record, RecordHeader, proto};

use super::{
    event::{CommandId, Group, Lsn, Origin, Output, Reply, Response, SessionId},
    link::LinkSource,
    log::LogId,
    space::{Pair, Version},
};

/// What happens once a group is durable.
#[derive(Debug)]
pub(super) enum Effect {
    /// A client's acknowledgement.
    Reply(SessionId, Reply),
    /// Any other output that must not be seen before.
    Output(SessionId, Output),
    /// A Log record may be seen by readers, routed and exported.
    LogDurable { log: LogId, seq: u64 },
    /// An own State entry may be exported and seen by watchers.
    StateDurable { space: usize, key: Arc<str>, version: Version },
    /// Everything of a space up to here is durable, by its owner's barrier.
    BarrierDurable { space: usize, pair: Pair },
    /// The peer of a link may be told that this source is durable up to here.
    LinkAck { session: SessionId, source: LinkSource },
    /// A part of a space is durable up to this many records of the session.
    PartDurable { session: SessionId, source: LinkSource, count: u64, space: usize },
    /// A link of a process that ends may be told to go: everything that it brought is durable.
    Leave(SessionId),
    /// The peer of a new link may be told what is held of its Logs and spaces.
    Greet(SessionId),
    /// Gaps that a Log's thinning wrote: the next step may read what they left.
    Thinned { log: LogId },
    /// The answer to a command.
    Respond(CommandId, Response),
    /// A node whose link ended may be let go.
    Release { node: Origin, session: SessionId },
}

/// What is written waits in *lanes*: what belongs to one becomes durable in order. There is one, unless this is
/// a tier's core: there each node has its own.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    last_lsn: Lsn,
    /// The lane of what is written now.
    lane: Origin,
    records: Vec<Record>,
    effects: Vec<Effect>,
    closed: VecDeque<Group>,
    waiting: BTreeMap<Origin, VecDeque<(Lsn, Vec<Effect>)>>,
    ready: Vec<Effect>,
}

impl Ledger {
    pub(super) fn new(last_lsn: Lsn) -> Self {
        Self { last_lsn, ..Self::default() }
    }

    /// What is written from here on belongs to this node.
    pub(super) fn enter(&mut self, lane: &Origin) {
        if self.lane != *lane {
            self.end_group();
            self.lane = Arc::clone(lane);
        }
    }

    /// What a node's lane waits for will never be durable here, and never be said.
    pub(super) fn abandon(&mut self, lane: &Origin) {
        if self.lane == *lane {
            self.records.clear();
            self.effects.clear();
        }
        self.closed.retain(|group| group.lane != *lane);
        self.waiting.remove(lane);
    }

    /// Adds a record to the group of this `apply`.
    pub(super) fn write(&mut self, record: Record) {
        self.records.push(record);
    }

    /// Writes a keyed fact of this store; no value: deletes it.
    pub(super) fn write_local(&mut self, kind: Kind, key: Bytes, value: Option<Bytes>) {
        self.write_local_of(kind, 0, 0, key, value);
    }

    /// As [`Self::write_local`], with the source and seq that the store must know without reading the body.
    pub(super) fn write_local_of(
        &mut self,
        kind: Kind,
        source: u32,
        seq: u64,
        key: Bytes,
        value: Option<Bytes>,
    ) {
        let body = codec::encode(&proto::Local { key, value });
        self.write(Record { header: local_header(kind, source, seq), body });
    }

    /// Does this once all that was written in this `apply` is durable.
    pub(super) fn after(&mut self, effect: Effect) {
        self.effects.push(effect);
    }

    /// Ends the `apply`: the groups to persist, one at a time.
    pub(super) fn close(&mut self) -> Option<Group> {
        self.end_group();
        self.closed.pop_front()
    }

    fn end_group(&mut self) {
        let effects = std::mem::take(&mut self.effects);
        if self.records.is_empty() {
            if effects.is_empty() {
                return;
            }
            // Nothing new was written; the effects depend on what was written before.
            match self.waiting.get_mut(&self.lane).and_then(VecDeque::back_mut) {
                Some((_, waiting)) => waiting.extend(effects),
                None => self.ready.extend(effects),
            }
            return;
        }
        self.last_lsn += 1;
        let lane = Arc::clone(&self.lane);
        let records = std::mem::take(&mut self.records);
        self.waiting.entry(Arc::clone(&lane)).or_default().push_back((self.last_lsn, effects));
        self.closed.push_back(Group { lsn: self.last_lsn, lane, records });
    }

    /// True if an effect would happen at once: everything written is durable.
    pub(super) fn is_settled(&self) -> bool {
        self.waiting.is_empty() && self.records.is_empty()
    }

    /// Groups of a lane up to `lsn` are durable.
    pub(super) fn persisted(&mut self, lane: &Origin, lsn: Lsn) {
        let Some(waiting) = self.waiting.get_mut(lane) else { return };
        while waiting.front().is_some_and(|(at, _)| *at <= lsn) {
            self.ready.extend(waiting.pop_front().expect("looked at the front").1);
        }
        if waiting.is_empty() {
            self.waiting.remove(lane);
        }
    }

    /// What may happen because all that it depends on is durable.
    pub(super) fn ready(&mut self) -> Vec<Effect> {
        std::mem::take(&mut self.ready)
    }
}

fn local_header(kind: Kind, source: u32, seq: u64) -> RecordHeader {
    RecordHeader { kind, class: 0, flags: Flags::default(), source, epoch: 0, seq, aux: 0 }
}
