//! From what the store recovered to a core.

use std::{
    collections::{BTreeMap, BTreeSet, BinaryHeap},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use codec::{Kind, proto};
use rand::Rng;

use super::{
    Config, Core, Timer,
    budget::Budgets,
    client::{self, Client, ClientIx, Cursor},
    credit,
    event::{Action, Front, Now, Origin, Publish, SessionId, Target, Will},
    ledger::Ledger,
    log::{Log, LogId},
    request::Requests,
    spend::Spend,
    stats::Stats,
    trie::Trie,
};
use crate::{
    clock::TRUSTED_FROM_US,
    store::{LocalFact, Recovered, SourceKind},
};

/// Facts about this store, by key.
pub(super) type Metas<'a> = BTreeMap<&'a [u8], &'a Bytes>;

fn metas(locals: &[LocalFact]) -> Metas<'_> {
    let metas = locals.iter().filter(|fact| fact.kind == Kind::META);
    metas.map(|fact| (&*fact.key, &fact.value)).collect()
}

/// What streams and spaces of nodes are commonly called.
fn names_of(config: &Config) -> BTreeSet<Arc<str>> {
    let streams =
        config.streams.iter().chain([&config.default_stream]).map(|stream| Arc::clone(&stream.name));
    let spaces = super::NODE_SPACES.into_iter().chain(["fleet", "intent/fleet", ""]).map(Arc::from);
    streams.chain(spaces).collect()
}

/// How far another broker's clock may have been ahead when it minted: ten years, for one that was never set.
const INCARNATION_AHEAD_MS: u64 = 10 * 365 * 86_400_000;
/// The fact that holds the incarnation of the spaces that this broker owns.
const INCARNATION: &[u8] = b"incarnation";

impl Core {
    /// A core over what its store held. What it must write at once is in `actions`.
    #[must_use]
    pub fn restore(config: Config, recovered: Recovered, now: Now, actions: &mut Vec<Action>) -> Self {
        let mut config = config;
        // What others hold may be ahead of what is left.
        config.mint |= recovered.uncertain;
        let own = config.own_origin();
        let mut core = Self {
            own,
            now,
            rng: super::seeded(config.seed),
            ledger: Ledger::new(recovered.last_lsn),
            out: Vec::new(),
            last_source: 0,
            logs: BTreeMap::new(),
            log_names: BTreeMap::new(),
            histories: BTreeMap::new(),
            spaces: Vec::new(),
            scoped: None,
            names: names_of(&config),
            littered: BTreeSet::new(),
            space_names: BTreeMap::new(),
            vacant: Vec::new(),
            watches: BTreeMap::new(),
            collecting: false,
            sweeping: false,
            incarnation: 0,
            minted_for: BTreeMap::new(),
            run: 0,
            trie: Trie::default(),
            group_turn: 0,
            clients: BTreeMap::new(),
            client_ids: BTreeMap::new(),
            sessions: BTreeMap::new(),
            next_client: 1,
            links: BTreeMap::new(),
            above: BTreeSet::new(),
            strangers: BTreeSet::new(),
            speakers: BTreeSet::new(),
            established: 0,
            links_queued: 0,
            marks: BTreeMap::new(),
            marks_moved: BTreeSet::new(),
            acks_owed: BTreeSet::new(),
            claims: BTreeMap::new(),
            adopted: BTreeMap::new(),
            awaiting_mirror: BTreeSet::new(),
            generations: BTreeMap::new(),
            requests: Requests::default(),
            forwards: BTreeMap::new(),
            last_claim: 0,
            share: credit::first_share(),
            granted: credit::UNTOLD,
            budgets: Budgets::new(&config.budgets, Spend::restore(&recovered.locals, now)),
            budgets_due: None,
            budgets_held: BTreeMap::new(),
            reads: BTreeMap::new(),
            next_read: 1,
            timers: BinaryHeap::new(),
            cursors_due: false,
            acknowledgements_moved: BTreeSet::new(),
            pump_clients: BTreeSet::new(),
            pump_links: BTreeSet::new(),
            pumped_last: SessionId(0),
            conditions: BTreeMap::new(),
            refusing: false,
            low: false,
            draining: None,
            stats: Stats::default(),
            config,
        };
        core.restore_sources(&recovered);
        core.restore_incarnation(&recovered.locals);
        core.restore_forwards(&recovered.locals);
        core.begin_runs(&recovered.locals);
        core.restore_clients(&recovered.locals);
        recovered.damage.iter().for_each(|damage| core.on_store_damaged(damage.clone()));
        core.begin();
        // Quotas may have been lowered, and nothing is ever appended again to an older history.
        let logs: Vec<LogId> = core.logs.keys().copied().collect();
        for id in logs {
            core.note_acknowledged(id);
            core.keep_policy(id);
        }
        core.settle();
        actions.append(&mut core.out);
        core
    }

    fn restore_sources(&mut self, recovered: &Recovered) {
        let mut sources = recovered.sources.clone();
        sources.sort_by_key(|source| source.number);
        let mut origin = Arc::clone(&self.own);
        for source in &mut sources {
            // What one node declared stands together.
            if source.origin == origin {
                source.origin = Arc::clone(&origin);
            }
            origin = Arc::clone(&source.origin);
            source.name = self.known_name(&source.name);
            match source.kind {
                SourceKind::Log => self.restore_log(source),
                SourceKind::State => {
                    self.add_space(source);
                }
                SourceKind::Live => {}
            }
        }
        self.last_source = sources.last().map_or(0, |source| source.number);
        for fact in recovered.locals.iter().filter(|fact| fact.kind == Kind::TABLE) {
            let id = LogId::from_be_bytes(fact.key[..].try_into().unwrap_or_default());
            if let (Some(log), Ok(table)) = (self.logs.get_mut(&id), codec::decode(fact.value.clone())) {
                log.recover_table(&table);
            }
        }
        for found in &recovered.logs {
            if let Some(log) = self.logs.get_mut(&found.source) {
                log.recover(found);
            }
        }
        let by_source: BTreeMap<u32, usize> =
            self.spaces.iter().map(|space| (space.source, space.index)).collect();
        for record in &recovered.state {
            if let Some(index) = by_source.get(&record.header.source) {
                self.spaces[*index].recover(record);
            }
        }
        let facts = metas(&recovered.locals);
        for space in &mut self.spaces {
            space.recover_horizon(&facts);
            space.window = space.window.take().map(|window| Box::new(window.begun_at(space.seen)));
        }
        for fact in recovered.locals.iter().filter(|fact| fact.kind == Kind::MARK) {
            let Some(zero) = fact.key.iter().position(|byte| *byte == 0) else { continue };
            let (receiver, log) = fact.key.split_at(zero);
            let id = LogId::from_be_bytes(log[1..].try_into().unwrap_or_default());
            if let (Ok(receiver), Ok(mark)) =
                (std::str::from_utf8(receiver), codec::decode(fact.value.clone()))
            {
                self.marks.insert((id, receiver.into()), mark);
            }
        }
    }

    fn restore_log(&mut self, source: &crate::store::Source) {
        let policy = self.policy_of(source);
        let name = (Arc::clone(&source.origin), Arc::clone(&source.name));
        if let Some(older) = self.log_names.insert(name, source.number) {
            self.logs.get_mut(&older).expect("a named Log exists").retired = true;
        }
        let log = Box::new(Log::new(source, policy, 1));
        self.histories.entry(log.name()).or_default().push(source.number);
        self.logs.insert(source.number, log);
    }

    /// The incarnation of owned spaces: as stored, or a new one where the store is new, restored or cloned.
    fn restore_incarnation(&mut self, locals: &[LocalFact]) {
        let stored = locals.iter().find(|fact| fact.kind == Kind::META && fact.key == INCARNATION);
        let stored = stored.and_then(|fact| Some(u64::from_be_bytes(fact.value[..].try_into().ok()?)));
        match stored {
            Some(incarnation) if !self.config.mint => {
                self.incarnation = incarnation;
                for space in self.spaces.iter_mut().filter(|space| space.owned) {
                    space.at = space.at.max((incarnation, 0));
                    space.durable = space.at;
                    space.horizon.listed = space.at.0;
                }
            }
            _ => self.mint_above(stored.unwrap_or(0)),
        }
        if self.config.mint {
            let own: Vec<LogId> = self
                .logs
                .values()
                .filter(|log| log.origin == self.own && !log.retired)
                .map(|log| log.id)
                .collect();
            for id in own {
                let epoch = self.rng.random();
                // What no receiver is known to have from here, it may have from another life of this store.
                let known = self.marks_of(id).map(|mark| mark.mark).min();
                let log = self.logs.get_mut(&id).expect("listed");
                let from = known.map_or(log.first, |mark| mark.saturating_add(1)).clamp(log.first, log.next);
                log.epochs.retain(|(start, _)| *start < from);
                log.begin_epoch(&mut self.ledger, from, epoch);
            }
        }
    }

    fn begin_runs(&mut self, locals: &[LocalFact]) {
        self.run = self.rng.random::<u64>().max(1);
        let facts = metas(locals);
        for space in &mut self.spaces {
            space.recover_lineage(&facts);
            if space.owned {
                space.begin_run(&mut self.ledger, self.run);
            }
        }
    }

    /// Whether a receiver can have seen an incarnation: it begins with the time when it was minted. A peer
    /// that could name any would leave no greater one to mint.
    pub(super) fn is_plausible(&self, incarnation: u64) -> bool {
        let latest_ms = (self.now.wall_us / 1000).saturating_add(INCARNATION_AHEAD_MS);
        !self.now.trusted || incarnation >> 20 <= latest_ms
    }

    /// Whether an owner can have minted it, above what a receiver showed to a clock ahead of this one.
    pub(super) fn is_mintable(&self, incarnation: u64) -> bool {
        let latest_ms = (self.now.wall_us / 1000).saturating_add(2 * INCARNATION_AHEAD_MS);
        !self.now.trusted || incarnation >> 20 <= latest_ms
    }

    /// A new incarnation, greater than `above`: every owned entry gets a revision of it.
    pub(super) fn mint_above(&mut self, above: u64) {
        if self.config.shared {
            return; // what the replicas share has its own incarnation
        }
        let wall_ms = self.now.wall_us / 1000;
        let minted = wall_ms << 20 | u64::from(self.rng.random::<u32>() >> 12);
        let greatest = self.spaces.iter().map(|space| space.at.0).max().unwrap_or(0);
        self.incarnation = minted.max(above.saturating_add(1)).max(greatest.saturating_add(1));
        let value = Bytes::copy_from_slice(&self.incarnation.to_be_bytes());
        self.ledger.write_local(Kind::META, Bytes::from_static(INCARNATION), Some(value));
        for space in self.spaces.iter_mut().filter(|space| space.owned) {
            space.mint(&mut self.ledger, self.now, self.incarnation);
        }
        // One space may make all begin anew while others are on their way already.
        let exports = self.links.values_mut().flat_map(|link| link.spaces.iter_mut());
        for (_, export) in exports.filter(|(index, _)| self.spaces[**index].owned) {
            export.begin_anew(self.incarnation);
        }
    }

    fn restore_clients(&mut self, locals: &[LocalFact]) {
        for fact in locals.iter().filter(|fact| fact.kind == Kind::SESSION) {
            if let Ok(stored) = codec::decode::<proto::ClientSession>(fact.value.clone()) {
                self.restore_client(&stored);
            }
        }
        for fact in locals.iter().filter(|fact| fact.kind == Kind::CURSOR) {
            self.restore_cursor(fact);
        }
        for fact in locals.iter().filter(|fact| fact.kind == Kind::PACKET_ID) {
            self.restore_packet_id(fact);
        }
        // Only now: a stored cursor must not be overwritten by one at the head.
        let interested = self.clients.iter().filter(|(_, client)| client.wants_logs());
        for ix in interested.map(|(ix, _)| *ix).collect::<Vec<_>>() {
            self.add_cursors(ix);
        }
    }

    fn restore_client(&mut self, stored: &proto::ClientSession) {
        let ix = ClientIx(self.next_client);
        self.next_client += 1;
        let id: Arc<str> = stored.client_id.as_str().into();
        let mut client = Client::new(ix, Arc::clone(&id), Front::Mqtt);
        client.expiry_s = stored.expiry_s;
        client.lost_at_us = if stored.lost_at_us == 0 { self.now.wall_us } else { stored.lost_at_us };
        client.will = stored.will.as_ref().map(|will| Will {
            message: Publish {
                target: Target::Own,
                frame: will.frame.clone(),
                qos: u8::try_from(will.qos).unwrap_or(0).min(2),
                packet_id: 0,
                dup: false,
                retain: will.retain,
                reply: None,
            },
            delay: Duration::from_secs(will.delay_s.into()),
        });
        let (visits, expiry_s) = (client.visits, client.expiry_s);
        let delay = client.will.as_ref().map(|will| will.delay);
        self.clients.insert(ix, client);
        self.client_ids.insert(id, ix);
        for (number, subscription) in (1..).zip(&stored.subscriptions) {
            if let Some(subscription) = Self::stored_subscription(number, subscription) {
                self.index_subscription(ix, subscription);
            }
        }
        // The connection ended with the process at the latest; on a clock that was never set, now.
        let away = if self.now.trusted && stored.lost_at_us >= TRUSTED_FROM_US {
            Duration::from_micros(self.now.wall_us.saturating_sub(stored.lost_at_us))
        } else {
            Duration::ZERO
        };
        if let Some(delay) = delay {
            self.after(delay.saturating_sub(away), Timer::Will(ix, visits));
        }
        self.arm_expiry(ix, Duration::from_secs(expiry_s.into()).saturating_sub(away));
    }

    fn restore_cursor(&mut self, fact: &LocalFact) {
        let Some((ix, _, number)) = self.client_of_key(&fact.key) else { return };
        let Ok(stored) = codec::decode::<proto::Cursor>(fact.value.clone()) else { return };
        let id = LogId::from_be_bytes(number.try_into().unwrap_or_default());
        let Some(log) = self.logs.get_mut(&id) else { return };
        log.consumers.remove(&ix);
        let cursor = Cursor {
            next: Some(stored.low + 1),
            acked: stored.acked.iter().copied().take(crate::limits::CURSOR_ACKED_MAX).collect(),
            ..Cursor::default()
        };
        self.clients.get_mut(&ix).expect("found by its key").cursors.insert(id, cursor);
    }

    fn restore_packet_id(&mut self, fact: &LocalFact) {
        let Some((ix, tag, number)) = self.client_of_key(&fact.key) else { return };
        let Ok(packet_id) = number.try_into().map(u16::from_be_bytes) else { return };
        let client = self.clients.get_mut(&ix).expect("found by its key");
        if tag == b'i' {
            client.received.insert(packet_id);
            return;
        }
        let Ok(stored) = codec::decode::<proto::Outbound>(fact.value.clone()) else { return };
        let name: (Origin, Arc<str>) = (stored.origin.as_str().into(), stored.stream.as_str().into());
        let at = self.log_names.get(&name).map(|log| (*log, stored.seq)).filter(|_| stored.seq > 0);
        client.hold_as(packet_id, at, None, 2, stored.released);
    }

    fn client_of_key<'a>(&self, key: &'a [u8]) -> Option<(ClientIx, u8, &'a [u8])> {
        let (id, tag, number) = client::parse_key(key)?;
        Some((*self.client_ids.get(id)?, tag, number))
    }

    /// What every broker has from its first start.
    fn begin(&mut self) {
        let littered = self.spaces.iter().filter(|space| space.has_tombstones());
        self.littered = littered.map(|space| space.index).collect();
        if !self.littered.is_empty() {
            self.collecting = true;
            self.after(self.config.tombstone_age, Timer::Tombstones);
        }
        self.resume_answers();
        let own = Arc::clone(&self.own);
        if self.config.is_hub() {
            self.space_of(&own, &"sys".into());
            self.space_of(&own, &"fleet".into());
        } else {
            for space in super::NODE_SPACES {
                self.space_of(&own, &space.into());
            }
            self.settle_parts();
        }
    }
}
