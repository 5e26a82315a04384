//! A node's part of a space of the tier: what comes, what it demands to remove, and what is held back.
//!
//! The barrier and the want are State like everything else, so what is to be removed follows from what is
//! held, at any time and after any restart. Nothing is removed because it is absent. A removal of more
//! than half of the node's workloads at once waits until an operator accepts it.

use std::sync::Arc;

use codec::{FrameView, Kind, Record};

use super::{
    Core,
    event::SessionId,
    ledger::Effect,
    link::LinkSource,
    space::{
        BARRIER,
        scope::{ACCEPT, WANT},
    },
};

const HELD: &str = "RemovalHeld";
/// Where the hub reads it, in space `status`.
const HELD_KEY: &str = "condition/RemovalHeld";

impl Core {
    /// A record of a part of a space.
    pub(super) fn import_part(
        &mut self,
        session: SessionId,
        source: LinkSource,
        index: usize,
        record: &Record,
    ) {
        if record.header.kind == Kind::SYNCED {
            let space = &mut self.spaces[index];
            space.synced = (record.header.epoch, record.header.seq);
            space.write_horizon(&mut self.ledger);
        } else if self.spaces[index].import(&mut self.ledger, record) {
            let key = FrameView::parse(&record.body).map(|view| view.topic().to_owned());
            if key.is_ok_and(|key| key == BARRIER || key.starts_with(WANT) || key.starts_with(ACCEPT)) {
                self.settle_part(index);
            }
        } else {
            self.stats.link_duplicates_in += 1;
        }
        let link = self.links.get_mut(&session).expect("the link that a record came from");
        let count = link.part_records.get_or_insert_with(source, || (0, 0));
        count.0 += 1;
        let count = count.0;
        self.ledger.after(Effect::PartDurable { session, source, count, space: index });
    }

    /// Removes what the want and the barrier demand, or holds it back.
    pub(super) fn settle_part(&mut self, index: usize) {
        let own = Arc::clone(&self.own);
        let space = &self.spaces[index];
        let removal = space.removal(&own);
        // What is held stays held, also when others arrive beside it and the rest is no longer most.
        let (name, key) = (Arc::from("status"), HELD_KEY);
        let before = self.existing_space(&own, &name).and_then(|status| self.spaces[status].latest(key));
        let guarded = removal.is_large() || (before.is_some() && removal.workloads.0 > 0);
        let held = guarded && !space.accepts(&own, removal.by);
        if held {
            let (going, all) = removal.workloads;
            let message = format!(
                "the hub no longer lists {going} of the {all} workloads of this node, which keeps them: if \
                 that is meant, run `octobus accept-removal --node {own}` at the hub"
            );
            return self.say_held(Some(message));
        }
        let now = self.now;
        for key in &removal.keys {
            self.spaces[index].unlist(&mut self.ledger, now, key);
        }
        self.say_held(None);
    }

    /// Raises or clears the condition, here and where the hub can read it.
    fn say_held(&mut self, message: Option<String>) {
        let own = Arc::clone(&self.own);
        let status = self.space_of(&own, &"status".into());
        let said = self.spaces[status].latest(HELD_KEY).map(|held| held.payload().to_vec());
        if said.as_deref() != message.as_deref().map(str::as_bytes) && !self.refusing {
            let (now, value) = (self.now, message.as_deref().map(str::as_bytes));
            self.spaces[status].write(&mut self.ledger, now, HELD_KEY, value);
        }
        match message {
            Some(message) => self.set_condition(HELD, own.to_string(), message),
            None => self.clear_condition(HELD, &own),
        }
    }

    /// What was held back when the process ended is still held back, or accepted by now.
    pub(super) fn settle_parts(&mut self) {
        for index in 0..self.spaces.len() {
            if self.spaces[index].scoped && !self.spaces[index].owned {
                self.settle_part(index);
            }
        }
    }

    pub(super) fn on_part_acknowledgeable(
        &mut self,
        session: SessionId,
        source: LinkSource,
        count: u64,
        space: usize,
    ) {
        if let Some(link) = self.links.get_mut(&session)
            && let Some(counts) = link.part_records.get_mut(&source)
        {
            counts.1 = count;
            self.on_import_durable(session, source);
        }
        self.pump_watches_of(space);
    }
}
