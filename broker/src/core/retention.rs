//! What policy removes from a Log, and what it says about it.
//!
//! Bytes are kept by whole stretches, which costs no look at records. Age and count are exact: the oldest page
//! is read, and what is too old or too much goes, a page at a time. Every step is bounded, and one step is under
//! way per Log: the next begins when it is done.
//!
//! What was removed at the front is not a record in the store but a line in the Log's table, one per reason:
//! exports and readers are shown gaps made of it.

use std::{collections::VecDeque, time::Duration};

use codec::{FrameView, Kind, Record, proto};

use super::{
    Core, Reading, Timer,
    log::{self, Log, LogId},
    policy::{ACKED_MIN, Full},
};
use crate::store::Extent;

/// One step of age and count reads this much.
const PAGE_BYTES: usize = 64 << 10;
/// Reasons at the front of one Log; beyond, the oldest two are told as one.
const REMOVED_MAX: usize = 16;
/// Acknowledged positions remembered with their time.
const ACKED_TIMES: u32 = 16;
/// A Log whose oldest record's age is not known is looked at this often.
const AGE_RETRY: Duration = Duration::from_mins(1);

/// What became of the seqs below a Log's first: runs of one reason each, ascending.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Removed {
    runs: VecDeque<(u64, proto::GapReason)>,
}

impl Removed {
    /// Everything up to `to` that was not removed before was removed for this reason.
    fn add(&mut self, to: u64, reason: proto::GapReason) {
        match self.runs.back_mut() {
            Some((last, held)) if *held == reason => *last = to,
            _ => self.runs.push_back((to, reason)),
        }
        if self.runs.len() > REMOVED_MAX {
            self.runs.pop_front();
        }
    }

    /// The run that holds `seq`: its end, at most `end`, and its reason.
    pub(super) fn at(&self, seq: u64, end: u64) -> (u64, proto::GapReason) {
        let found = self.runs.iter().find(|(to, _)| *to >= seq);
        found.map_or((end, proto::GapReason::DropOldest), |(to, reason)| ((*to).min(end), *reason))
    }

    pub(super) fn stored(runs: &[proto::Removed]) -> Self {
        Self { runs: runs.iter().map(|run| (run.to, run.reason())).take(REMOVED_MAX).collect() }
    }

    pub(super) fn to_store(&self) -> Vec<proto::Removed> {
        self.runs.iter().map(|(to, reason)| proto::Removed { to: *to, reason: *reason as i32 }).collect()
    }
}

/// Which upkeep of a Log is under way or due.
#[derive(Debug, Default)]
pub(super) struct Upkeep {
    /// A read is out, or gaps are on their way to the disk.
    pub(super) busy: bool,
    /// End of the region that is being thinned.
    pub(super) until: u64,
    /// Regions in which nothing could be thinned when they were last looked at.
    pub(super) blocked: u8,
    /// Thinning is tried again once this much was appended.
    pub(super) thin_after: u64,
    /// A timer for age is set.
    age_armed: bool,
    /// It fired.
    age_due: bool,
    /// Age was looked at up to here.
    age_from: u64,
    /// Everything below is too old.
    age_cut: u64,
    /// Where the page that is being read begins.
    front: u64,
}

/// What everybody has acknowledged, and since when.
#[derive(Debug, Default)]
pub(super) struct Acked {
    /// (monotonic time, seq), ascending in both.
    floors: VecDeque<(Duration, u64)>,
    armed: bool,
}

impl Acked {
    /// Everything up to `floor` is acknowledged; remembered for `hold`.
    fn add(&mut self, now: Duration, floor: u64, hold: Duration) {
        if self.floors.back().is_some_and(|(_, last)| *last >= floor) {
            return;
        }
        let recent = self.floors.len().checked_sub(2).map(|at| self.floors[at].0);
        if recent.is_some_and(|recent| now - recent < hold / ACKED_TIMES) {
            self.floors.pop_back();
        }
        self.floors.push_back((now, floor));
        while self.floors.get(1).is_some_and(|(at, _)| *at + hold <= now) {
            self.floors.pop_front();
        }
    }

    /// What has been acknowledged for this long.
    fn since(&self, now: Duration, hold: Duration) -> u64 {
        let old = self.floors.iter().take_while(|(at, _)| *at + hold <= now);
        old.last().map_or(0, |(_, floor)| *floor)
    }
}

impl Log {
    /// It has more than it should.
    pub(super) fn is_due(&self) -> bool {
        self.kept.bytes() > self.policy.bytes_due() || self.kept.records() > self.policy.count_due()
    }

    /// Another record of this size is within the quota.
    fn has_room(&self, bytes: u64) -> bool {
        let count = self.policy.count_max.is_none_or(|max| self.kept.records() < max);
        count && self.kept.bytes() + bytes <= self.policy.bytes_max
    }

    /// How long an acknowledgement must have been there before it counts.
    fn hold(&self) -> Duration {
        self.policy.retain_acked.unwrap_or(ACKED_MIN).max(ACKED_MIN)
    }

    /// Where the first stretch ends, if that is durable and at most `limit`.
    fn stretch_below(&self, limit: u64) -> Option<u64> {
        self.kept.second().filter(|second| *second <= limit.min(self.durable_next))
    }

    /// Everything below `first` goes.
    fn raise(&mut self, first: u64, reason: proto::GapReason) {
        if first <= self.first {
            return;
        }
        self.removed.add(first - 1, reason);
        self.first = first;
        for to in &mut self.thinned_to {
            *to = (*to).max(first);
        }
    }
}

impl Core {
    /// Drops whole stretches below `first`, durably.
    pub(super) fn remove_below(&mut self, id: LogId, first: u64, reason: proto::GapReason) {
        let log = self.logs.get_mut(&id).expect("a Log's id is valid");
        let mut records = log.kept.free_below(first);
        if first >= log.next {
            records += std::mem::take(&mut log.kept).records();
        }
        log.raise(first, reason);
        log.write_table(&mut self.ledger);
        self.stats.gap(name_of(reason), records);
    }

    /// True if a publish of this frame is within the stream's quota. What has been acknowledged for a while gives
    /// way first.
    pub(super) fn admits(&mut self, id: LogId, frame: usize) -> bool {
        let bytes = (codec::RecordHeader::LEN + frame) as u64;
        let log = &self.logs[&id];
        if log.policy.full != Full::Reject || log.has_room(bytes) {
            return true;
        }
        while !self.logs[&id].has_room(bytes) {
            if !self.free_acknowledged(id, ACKED_MIN) {
                return false;
            }
        }
        true
    }

    /// Frees one stretch that everybody has acknowledged for this long.
    fn free_acknowledged(&mut self, id: LogId, hold: Duration) -> bool {
        let log = &self.logs[&id];
        let floor = log.acked.since(self.now.mono, hold);
        let Some(first) = log.stretch_below(floor.saturating_add(1)) else { return false };
        self.remove_below(id, first, proto::GapReason::Acknowledged);
        true
    }

    /// A Log has grown: what is too much goes, or begins to.
    pub(super) fn keep_policy(&mut self, id: LogId) {
        if self.config.shared {
            return; // what the replicas share has a policy of its own
        }
        let log = &self.logs[&id];
        if log.policy.age_limit().is_some() && !log.upkeep.age_armed && !self.passes_on(id) {
            self.arm_age(id, AGE_RETRY);
        }
        let log = &self.logs[&id];
        if !log.is_due() {
            return;
        }
        if self.passes_on(id) {
            return self.free_passed(id);
        }
        while self.logs[&id].is_due() && self.free_acknowledged(id, ACKED_MIN) {}
        if self.logs[&id].policy.full != Full::Reject {
            self.drop_oldest(id);
        }
        self.begin_upkeep(id);
    }

    /// A relay drops nothing that it has not passed on: it makes the sender wait instead, where the stream's own
    /// policy holds.
    fn free_passed(&mut self, id: LogId) {
        let passed = self.passed_upto(id).saturating_add(1);
        while self.logs[&id].is_due()
            && let Some(first) = self.logs[&id].stretch_below(passed)
        {
            self.remove_below(id, first, proto::GapReason::Acknowledged);
        }
    }

    /// Drops the oldest stretches that are beyond the quota whole.
    fn drop_oldest(&mut self, id: LogId) {
        loop {
            let log = &self.logs[&id];
            let (Some(first), Some(oldest)) = (log.stretch_below(u64::MAX), log.kept.oldest()) else {
                return;
            };
            let count_max = log.policy.count_max.unwrap_or(u64::MAX);
            let bytes = log.kept.bytes() > log.policy.bytes_max;
            if !bytes && log.kept.records() - oldest.records < count_max {
                return;
            }
            self.remove_below(id, first, proto::GapReason::DropOldest);
        }
    }

    /// The older histories of a stream together keep at most half of its quota, however often it begins anew.
    pub(super) fn bound_older_histories(&mut self, current: LogId) {
        if self.config.shared {
            return;
        }
        let log = &self.logs[&current];
        let max = log.policy.bytes_max / 2;
        let older = self.histories.get(&log.name()).cloned().unwrap_or_default();
        let older: Vec<LogId> =
            older.into_iter().filter(|id| *id != current && !self.passes_on(*id)).collect();
        for id in &older {
            while older.iter().map(|id| self.logs[id].kept.bytes()).sum::<u64>() > max {
                let log = &self.logs[id];
                let whole = (!log.kept.is_empty() && log.durable_next == log.next).then_some(log.next);
                let Some(first) = log.stretch_below(u64::MAX).or(whole) else { break };
                self.remove_below(*id, first, proto::GapReason::DropOldest);
            }
        }
    }

    /// Begins the next step of what is due, unless one is under way.
    pub(super) fn begin_upkeep(&mut self, id: LogId) {
        let log = self.logs.get_mut(&id).expect("a Log's id is valid");
        if log.upkeep.busy {
            return;
        }
        let dropping = log.too_many() > 0 || log.upkeep.age_cut > log.first;
        if log.upkeep.age_due || dropping {
            let from = if dropping { log.first } else { log.first.max(log.upkeep.age_from) };
            if from < log.durable_next {
                log.upkeep.busy = true;
                log.upkeep.front = from;
                return self.read(id, from, PAGE_BYTES, Reading::Front(id));
            }
            log.upkeep.age_due = false;
        }
        self.begin_thinning(id);
    }

    fn arm_age(&mut self, id: LogId, delay: Duration) {
        let log = self.logs.get_mut(&id).expect("a Log's id is valid");
        log.upkeep.age_armed = true;
        self.after(delay, Timer::Age(id));
    }

    /// Age is looked at now; on a clock that is not trusted, later.
    pub(super) fn on_age_due(&mut self, id: LogId) {
        let Some(log) = self.logs.get_mut(&id) else { return };
        log.upkeep.age_armed = false;
        if !self.now.trusted {
            return self.arm_age(id, AGE_RETRY);
        }
        log.upkeep.age_due = true;
        self.begin_upkeep(id);
    }

    /// A page of the oldest records was read: what is too much or too old of it goes.
    pub(super) fn on_front_read(&mut self, id: LogId, records: &[Record]) {
        let log = self.logs.get_mut(&id).expect("a Log's id is valid");
        log.upkeep.busy = false;
        let page: Vec<&Record> =
            records.iter().filter(|record| log::range_of(record).1 >= log.first).collect();
        let looked = log.upkeep.age_from;
        if log.upkeep.age_due {
            self.look_at_age(id, &page);
        }
        let log = &self.logs[&id];
        let (before, at_front) = (log.first, log.upkeep.front <= log.first);
        if at_front {
            let aged = log.upkeep.age_cut;
            // Gaps go with the records around them: a page may hold nothing else.
            let too_old = page.iter().take_while(|record| record.header.seq < aged).last();
            let too_old = too_old.map_or(0, |record| record.header.seq + 1);
            let mut left = log.too_many();
            let surplus = page.iter().take_while(|record| {
                let some = left > 0;
                left -= u64::from(some && record.header.kind == Kind::LOG);
                some
            });
            let surplus = surplus.last().map_or(0, |record| record.header.seq + 1);
            self.drop_page(id, &page, too_old, proto::GapReason::Expired);
            self.drop_page(id, &page, surplus, proto::GapReason::DropOldest);
        }
        // Each step leaves something behind it, or it is the last for now.
        let upkeep = &self.logs[&id].upkeep;
        let looked_on = upkeep.age_due && upkeep.age_from > looked;
        if !at_front || self.logs[&id].first > before || looked_on {
            self.begin_upkeep(id);
        }
    }

    /// Finds what is too old in a page, and says when to look again.
    fn look_at_age(&mut self, id: LogId, page: &[&Record]) {
        let now_us = self.now.wall_us;
        let log = self.logs.get_mut(&id).expect("a Log's id is valid");
        let limit_us = log.policy.age_limit().map_or(u128::MAX, |limit| limit.as_micros());
        let limit_us = u64::try_from(limit_us).unwrap_or(u64::MAX);
        let mut young = None;
        for record in page.iter().filter(|record| record.header.kind == Kind::LOG) {
            // A time that is not trusted says nothing; what is older than a record that must go, goes too.
            let Some(time_us) = trusted_time(record) else { continue };
            if time_us.saturating_add(limit_us) > now_us {
                young = Some(time_us);
                break;
            }
            log.upkeep.age_cut = record.header.seq + 1;
        }
        match (young, page.last()) {
            (None, Some(last)) => {
                log.upkeep.age_from = log.upkeep.age_from.max(last.header.seq + 1);
            }
            (None, None) => log.upkeep.age_due = false,
            (Some(time_us), _) => {
                log.upkeep.age_due = false;
                let left = Duration::from_micros(time_us.saturating_add(limit_us) - now_us);
                self.arm_age(id, left.clamp(Duration::from_secs(1), Duration::from_hours(1)));
            }
        }
    }

    /// Drops the entries of a page below `end`, which stands behind an entry.
    fn drop_page(&mut self, id: LogId, page: &[&Record], end: u64, reason: proto::GapReason) {
        let log = self.logs.get_mut(&id).expect("a Log's id is valid");
        let first = log.first;
        if end <= first {
            return;
        }
        let gone = page.iter().filter(|record| (first..end).contains(&log::range_of(record).0));
        let gone: Vec<Extent> = gone.map(|record| log::extent(record)).collect();
        log.kept.drop_front(&gone, end);
        log.raise(end, reason);
        log.write_table(&mut self.ledger);
        self.stats.gap(name_of(reason), gone.iter().map(|extent| extent.records).sum());
    }

    /// Marks or cursors of this Log were written: what everybody has acknowledged may have moved.
    pub(super) fn note_acknowledged(&mut self, id: LogId) {
        let policy = &self.logs[&id].policy;
        if policy.retain_acked.is_none() && policy.full == Full::DropOldest {
            return; // the oldest go first anyway
        }
        let floor = self.log_acknowledged_by_all(id);
        let now = self.now.mono;
        let Some(log) = self.logs.get_mut(&id) else { return };
        let hold = log.hold();
        log.acked.add(now, floor, hold);
        if log.policy.retain_acked.is_some() && floor >= log.first && !log.acked.armed {
            log.acked.armed = true;
            self.after(hold, Timer::FreeAcknowledged(id));
        }
    }

    /// What was acknowledged long enough ago goes, as the policy says.
    pub(super) fn on_free_acknowledged(&mut self, id: LogId) {
        let Some(log) = self.logs.get_mut(&id) else { return };
        log.acked.armed = false;
        let hold = log.hold();
        while self.free_acknowledged(id, hold) {}
        let log = self.logs.get_mut(&id).expect("looked at it");
        let next = log.acked.floors.iter().find(|(at, _)| *at + hold > self.now.mono);
        if let Some((at, _)) = next {
            let delay = *at + hold - self.now.mono;
            log.acked.armed = true;
            self.after(delay, Timer::FreeAcknowledged(id));
        }
    }

    /// The seq up to which every receiver and every durable cursor has acknowledged; 0 if there is none of them,
    /// because then nobody has.
    fn log_acknowledged_by_all(&self, id: LogId) -> u64 {
        let Some(log) = self.logs.get(&id) else { return 0 };
        // Who holds it passes it on, so it has arrived where one receiver has it.
        let receiver = self.is_exported(log).then(|| {
            let marks = self.marks_of(id).filter(|mark| log.epoch_at(mark.mark) == mark.epoch);
            marks.map(|mark| mark.mark).max().unwrap_or(0)
        });
        let cursors = self.clients.values().filter(|client| client.is_durable());
        let cursors = cursors.filter_map(|client| client.lowest(id, log.durable_next));
        receiver.into_iter().chain(cursors).min().unwrap_or(0)
    }

    /// Seconds until a stream is full at the rate it fills now.
    pub(super) fn seconds_to_full(&self, log: &Log) -> Option<u64> {
        let (held, draining) = if self.is_exported(log) {
            let linked = self.receivers_of(log).any(|link| link.logs.contains_key(&log.id));
            (log.bytes_after(self.passed_upto(log.id)), linked)
        } else {
            (log.kept.bytes(), false)
        };
        let mut room = log.policy.bytes_due().saturating_sub(held);
        if let Some(records_left) =
            log.policy.count_max.map(|_| log.policy.count_due().saturating_sub(log.kept.records()))
            && log.kept.records() > 0
            && held == log.kept.bytes()
        {
            room = room.min(records_left.saturating_mul(log.kept.bytes() / log.kept.records()));
        }
        log.forecast.seconds_to_fill(self.now.mono, room, draining)
    }
}

impl Log {
    /// Records beyond the quota, with some in advance so that not each one costs a read.
    fn too_many(&self) -> u64 {
        match self.policy.count_max {
            Some(max) if self.policy.full != Full::Reject && self.kept.records() > max => {
                self.kept.records() - (max - max / 16)
            }
            _ => 0,
        }
    }
}

fn trusted_time(record: &Record) -> Option<u64> {
    let view = FrameView::parse(&record.body).ok()?;
    view.time_trusted().then(|| view.time_us())
}

/// A reason's name in the metrics.
pub(super) fn name_of(reason: proto::GapReason) -> &'static str {
    match reason {
        proto::GapReason::DropOldest => "drop_oldest",
        proto::GapReason::Thinned => "thinned",
        proto::GapReason::Expired => "expired",
        proto::GapReason::EpochChange => "epoch_change",
        proto::GapReason::Corruption => "corruption",
        proto::GapReason::Acknowledged => "acknowledged",
        proto::GapReason::Refused => "refused",
        proto::GapReason::NotHere => "not_here",
        proto::GapReason::Unspecified => "unspecified",
    }
}
