//! The thread on the acknowledgement path: journals groups, then says so.

use std::{collections::VecDeque, sync::atomic::Ordering::Relaxed};

use tokio::time::Instant;

use super::{
    Shared, lock_of,
    room::{PROBE, Part},
};
use crate::{
    core::event::{Group, Lsn},
    store::{
        StoreEvent,
        journal::{Journal, Place, format::SegmentHeader, scan::Segment},
    },
};

/// Takes whatever waits, until there will be no more.
pub(super) fn run(shared: &Shared, journal: Journal) {
    let mut writer = Writer { shared, journal, places: Vec::new(), opened: Vec::new(), failed_at: None };
    let mut waiting = VecDeque::new();
    let mut more = true;
    while more {
        // After the answer to what was written: making a file takes its time.
        let has_spare = writer.keep_spare();
        more = match has_spare {
            true => shared.groups.take(&mut waiting),
            false => shared.groups.take_within(PROBE, &mut waiting),
        };
        writer.write(&mut waiting);
    }
}

struct Writer<'a> {
    shared: &'a Shared,
    journal: Journal,
    places: Vec<Place>,
    opened: Vec<Segment>,
    /// When there was no room for a spare segment.
    failed_at: Option<Instant>,
}

impl Writer<'_> {
    /// Journals the groups and leaves `waiting` empty.
    fn write(&mut self, waiting: &mut VecDeque<Group>) {
        self.drop_refused(waiting);
        let Some(first) = waiting.front() else { return };
        if let Err(reason) = self.wait_for_room() {
            let lsn = first.lsn;
            waiting.clear();
            return self.refuse(lsn, reason);
        }
        let result = self.journal.append(waiting.make_contiguous(), &mut self.places, &mut self.opened);
        self.publish(waiting);
        waiting.clear();
        if let Err(error) = result {
            self.refuse(error.lsn, error.source.to_string());
        }
    }

    /// Holds back the room of the next segment, and says when that becomes or ceases to be possible.
    fn keep_spare(&mut self) -> bool {
        if self.failed_at.is_some_and(|at| at.elapsed() < PROBE) {
            return false;
        }
        let kept = self.journal.keep_spare();
        let short = kept.as_ref().err().map(|error| format!("no room for another segment: {error}"));
        self.shared.room.set(&self.shared.events, Part::Journal, short);
        self.failed_at = kept.is_err().then(Instant::now);
        kept.is_ok()
    }

    /// A group above the next lsn was submitted before the refusal of an earlier one was seen: it was
    /// refused with that one.
    fn drop_refused(&self, waiting: &mut VecDeque<Group>) {
        let mut next = self.journal.next_lsn();
        waiting.retain(|group| {
            let follows = group.lsn == next;
            if group.lsn < next {
                tracing::error!(lsn = group.lsn, next, "a group was submitted twice");
            }
            next += Lsn::from(follows);
            follows
        });
    }

    /// Waits for the keeper if the overlay has reached its bound.
    fn wait_for_room(&self) -> Result<(), String> {
        let cost_max = 2 * self.shared.options.checkpoint_bytes;
        let gathering = lock_of(&self.shared.gathering);
        let full = |gathering: &mut super::Gathering| {
            gathering.overlay.active.cost > cost_max && gathering.failing.is_none()
        };
        let gathering = self
            .shared
            .gathered
            .wait_while(gathering, full)
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        match &gathering.failing {
            Some(reason) if gathering.overlay.active.cost > cost_max => Err(reason.clone()),
            _ => Ok(()),
        }
    }

    /// Takes the effects of the groups that were written into the overlay, then says `Persisted`: in this
    /// order, so that whoever knows of a group can read it.
    fn publish(&mut self, groups: &mut VecDeque<Group>) {
        let headers = (self.opened.len() * SegmentHeader::LEN) as u64;
        let bytes: u64 = self.places.iter().map(|place| place.len).sum();
        self.shared.written.journal.fetch_add(headers + bytes, Relaxed);
        self.shared.segments.add(self.opened.drain(..));
        if self.places.is_empty() {
            return;
        }
        let mut last = 0;
        let mut gathering = lock_of(&self.shared.gathering);
        let (was_idle, was_full) = (gathering.is_idle(), gathering.is_full(&self.shared.options));
        for (place, group) in self.places.drain(..).zip(groups.drain(..)) {
            last = group.lsn;
            gathering.overlay.apply(group.lsn, place, group.records);
        }
        let is_full = gathering.is_full(&self.shared.options);
        drop(gathering);
        if was_idle || is_full && !was_full {
            self.shared.gathered.notify_all();
        }
        self.shared.events.push(StoreEvent::Persisted(last));
    }

    fn refuse(&self, lsn: Lsn, reason: String) {
        tracing::warn!(lsn, reason, "the store refuses groups");
        self.shared.events.push(StoreEvent::Refused { lsn, reason });
    }
}
