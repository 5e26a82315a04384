//! What a simulated disk durably holds, read from the groups themselves as they become durable.
//!
//! It is the oracle's own memory of a store: nothing here asks the core. It travels with the disk, so that a
//! copy put aside has the memory of that time. Each record is checked against the rules of its kind.

use std::collections::{BTreeMap, BTreeSet};

use broker::core::event::Group;
use codec::{Flags, FrameView, Kind, Record, proto};

/// A rule is broken: the run ends, and the rule's name is what a failing run is known by.
macro_rules! broken {
    ($rule:literal, $($what:tt)*) => { panic!("[{}] {}", $rule, format_args!($($what)*)) };
}
/// As `assert!`, with the name of the rule.
macro_rules! rule {
    ($holds:expr, $rule:literal, $($what:tt)*) => {
        if !$holds { $crate::shadow::broken!($rule, $($what)*) }
    };
}
pub(crate) use {broken, rule};

/// (incarnation, revision), or (epoch, seq).
pub(crate) type Pair = (u64, u64);

/// See the module's documentation.
#[derive(Debug, Default, Clone)]
pub(crate) struct Shadow {
    /// What each number stands for: (kind, origin, name).
    sources: BTreeMap<u32, (u32, String, String)>,
    pub(crate) logs: BTreeMap<u32, LogShadow>,
    pub(crate) state: BTreeMap<(u32, String), Held>,
    marks: BTreeMap<Vec<u8>, proto::Mark>,
    /// Tags that ever were on this disk.
    ever: BTreeSet<String>,
    /// Where each tag stands.
    tags: BTreeMap<String, BTreeSet<(u32, u64)>>,
    /// What a receiver ever held at (origin, stream, epoch, seq), and at (origin, space, pair).
    places: BTreeMap<(String, String, u64, u64), u32>,
    pairs: BTreeMap<(String, String, Pair), (String, u32)>,
    /// What has become durable and nobody has looked at.
    pub(crate) news: Vec<News>,
}

/// A Log on a disk.
#[derive(Debug, Default, Clone)]
pub(crate) struct LogShadow {
    pub(crate) origin: String,
    pub(crate) stream: String,
    /// Seq of what is appended next; 0 before the table is there.
    pub(crate) next: u64,
    pub(crate) first: u64,
    /// (first seq, epoch).
    pub(crate) epochs: Vec<(u64, u64)>,
    /// By first seq.
    pub(crate) entries: BTreeMap<u64, Entry>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Entry {
    Record { crc: u32, tag: String },
    Gap { to: u64, reason: i32 },
}

/// A key on a disk.
#[derive(Debug, Clone)]
pub(crate) struct Held {
    pub(crate) pair: Pair,
    pub(crate) tombstone: bool,
    pub(crate) crc: u32,
    /// It went because a want no longer lists it; it comes back as it was.
    unlisted: bool,
    /// Of a want: what it lists.
    listed: BTreeSet<String>,
}

/// What a disk has just learned.
#[derive(Debug, Clone)]
pub(crate) enum News {
    /// A message of a Log is durable.
    Logged { tag: String, imported: bool },
    /// A Log of a peer goes on under another epoch.
    EpochChanged { origin: String, stream: String },
    /// Records were replaced by a gap in a Log of this host's own.
    Dropped { tags: Vec<String> },
    /// A key has another value.
    State { origin: String, space: String, key: String, pair: Pair, tombstone: bool, imported: bool },
}

impl LogShadow {
    pub(crate) fn epoch(&self) -> u64 {
        self.epochs.last().map_or(0, |(_, epoch)| *epoch)
    }

    pub(crate) fn epoch_at(&self, seq: u64) -> u64 {
        self.epochs.iter().rev().find(|(from, _)| *from <= seq).map_or(0, |(_, epoch)| *epoch)
    }

    /// Seq and tag of each message, in order.
    pub(crate) fn messages(&self) -> impl Iterator<Item = (u64, &str)> {
        self.entries.iter().filter_map(|(seq, entry)| match entry {
            Entry::Record { tag, .. } => Some((*seq, tag.as_str())),
            Entry::Gap { .. } => None,
        })
    }
}

/// The tag in a payload: what stands before the padding.
pub(crate) fn tag_of(payload: &[u8]) -> String {
    let text = String::from_utf8_lossy(payload);
    text.split('|').next().expect("split yields one").to_owned()
}

impl Shadow {
    /// A group has become durable.
    pub(crate) fn apply(&mut self, group: &Group) {
        for record in &group.records {
            let source = record.header.source;
            match record.header.kind {
                Kind::DECLARE => self.declare(source, record),
                Kind::LOG | Kind::GAP => self.append(source, record),
                Kind::PUT | Kind::TOMBSTONE => self.put(source, record),
                Kind::TABLE => self.table(source, record),
                Kind::MARK => self.mark(record),
                _ => {}
            }
        }
    }

    fn declare(&mut self, source: u32, record: &Record) {
        let declare: proto::Declare = codec::decode(record.body.clone()).expect("a declare");
        let named = (declare.kind, declare.origin, declare.name);
        let held = self.sources.entry(source).or_insert_with(|| named.clone());
        rule!(*held == named, "a_source_number_is_bound_once", "{source}: {held:?}, then {named:?}");
    }

    fn named(&self, source: u32) -> (String, String) {
        let Some((_, origin, name)) = self.sources.get(&source) else {
            broken!("a_record_has_a_declared_source", "source {source} is on disk without one")
        };
        (origin.clone(), name.clone())
    }

    fn table(&mut self, source: u32, record: &Record) {
        let local: proto::Local = codec::decode(record.body.clone()).expect("a local fact");
        let Some(value) = local.value else {
            self.logs.remove(&source);
            return;
        };
        let table: proto::LogTable = codec::decode(value).expect("a table");
        let (origin, stream) = self.named(source);
        let log =
            self.logs.entry(source).or_insert_with(|| LogShadow { origin, stream, ..LogShadow::default() });
        rule!(
            table.first >= log.first,
            "a_log_never_gets_back_what_it_dropped",
            "{} of {}",
            log.stream,
            log.origin
        );
        log.first = table.first;
        log.epochs = table.epochs.iter().map(|range| (range.from, range.epoch)).collect();
        if log.next == 0 {
            log.next = table.first;
        }
        let kept = log.entries.split_off(&table.first);
        let dropped = std::mem::replace(&mut log.entries, kept);
        // A gap that reaches over the new beginning still says what became of what went.
        if let Some((from, Entry::Gap { to, reason })) = dropped.last_key_value()
            && *to + 1 >= table.first
        {
            log.entries.insert(*from, Entry::Gap { to: *to, reason: *reason });
        }
        self.forget(source, dropped);
    }

    fn forget(&mut self, source: u32, dropped: BTreeMap<u64, Entry>) {
        let mut tags = Vec::new();
        for (seq, entry) in dropped {
            if let Entry::Record { tag, .. } = entry {
                if let Some(places) = self.tags.get_mut(&tag) {
                    places.remove(&(source, seq));
                }
                tags.push(tag);
            }
        }
        if !tags.is_empty() {
            self.news.push(News::Dropped { tags });
        }
    }

    fn append(&mut self, source: u32, record: &Record) {
        let (seq, epoch) = (record.header.seq, record.header.epoch);
        let imported = record.header.flags.contains(Flags::IMPORTED);
        if !self.logs.contains_key(&source) {
            broken!("a_log_has_a_table", "source {source} has records and no table");
        }
        let entry = if record.header.kind == Kind::LOG {
            let view = FrameView::parse(&record.body).expect("a frame");
            (seq, Entry::Record { crc: crc32c::crc32c(&record.body), tag: tag_of(view.payload()) })
        } else {
            let gap: proto::Gap = codec::decode(record.body.clone()).expect("a gap");
            (gap.from, Entry::Gap { to: seq, reason: gap.reason })
        };
        self.check_place(source, seq, epoch, imported, &entry.1);
        self.stand(source, seq, imported, entry);
    }

    /// Puts an entry at its place: at the end, or as a gap over what it replaces.
    fn stand(&mut self, source: u32, seq: u64, imported: bool, (from, entry): (u64, Entry)) {
        let log = self.logs.get_mut(&source).expect("it has a table");
        let name = format!("{} of {:?}", log.stream, log.origin);
        let empty = seq < from;
        if matches!(entry, Entry::Gap { .. }) && !empty && seq < log.next {
            let within: BTreeMap<u64, Entry> =
                log.entries.range(from..=seq).map(|(at, held)| (*at, held.clone())).collect();
            for at in within.keys() {
                log.entries.remove(at);
            }
            log.entries.insert(from, entry);
            self.forget(source, within);
            return;
        }
        rule!(
            from == log.next,
            "a_log_has_no_hole_and_no_overlap",
            "{name}: seq {from} after {}",
            log.next - 1
        );
        log.next = seq + 1;
        let (origin, stream) = (log.origin.clone(), log.stream.clone());
        match &entry {
            Entry::Record { tag, .. } => {
                self.ever.insert(tag.clone());
                self.tags.entry(tag.clone()).or_default().insert((source, seq));
                self.news.push(News::Logged { tag: tag.clone(), imported });
            }
            Entry::Gap { reason, .. } if imported && *reason == proto::GapReason::EpochChange as i32 => {
                self.news.push(News::EpochChanged { origin, stream });
            }
            Entry::Gap { .. } => {}
        }
        if !empty {
            let log = self.logs.get_mut(&source).expect("it has a table");
            log.entries.insert(from, entry);
        }
    }

    /// At a receiver, (epoch, seq) stands for one frame for ever.
    fn check_place(&mut self, source: u32, seq: u64, epoch: u64, imported: bool, entry: &Entry) {
        let log = &self.logs[&source];
        let Entry::Record { crc, .. } = entry else { return };
        if !imported {
            return;
        }
        rule!(
            epoch == log.epoch(),
            "a_record_arrives_under_the_announced_epoch",
            "{} of {:?}: seq {seq} under {epoch:x}, not {:x}",
            log.stream,
            log.origin,
            log.epoch()
        );
        let place = (log.origin.clone(), log.stream.clone(), epoch, seq);
        let held = *self.places.entry(place.clone()).or_insert(*crc);
        rule!(held == *crc, "an_epoch_and_seq_mean_one_frame", "{place:?} was {held:x} and is {crc:x}");
    }

    fn put(&mut self, source: u32, record: &Record) {
        let (origin, space) = self.named(source);
        let view = FrameView::parse(&record.body).expect("a frame");
        let key = view.topic().to_owned();
        let pair = (record.header.epoch, record.header.seq);
        let tombstone = record.header.kind == Kind::TOMBSTONE;
        let imported = record.header.flags.contains(Flags::IMPORTED);
        let unlisted = record.header.flags.contains(Flags::UNLISTED);
        let crc = crc32c::crc32c(&record.body);
        if let Some(held) = self.state.get(&(source, key.clone())) {
            rule!(
                held.pair < pair || (held.pair == pair && (unlisted || held.unlisted)),
                "the_pair_of_a_key_never_decreases",
                "{space} of {origin:?}: {key} went from {:?} to {pair:?}",
                held.pair
            );
        }
        // Revision 0 is a barrier's: it stands for many keys.
        if imported && !unlisted && pair.1 != 0 {
            let place = (origin.clone(), space.clone(), pair);
            let now = (key.clone(), crc);
            let held = self.pairs.entry(place).or_insert_with(|| now.clone());
            rule!(
                *held == now,
                "a_pair_means_one_value",
                "{space} of {origin:?} at {pair:?}: {held:?}, {now:?}"
            );
        }
        if unlisted {
            self.check_unlisted(source, &key, pair);
        }
        let want = key.starts_with("want/") && !tombstone;
        let want =
            want.then(|| codec::decode::<proto::Want>(view.payload().to_vec().into()).expect("a want"));
        let listed = want.map(|want| want.keys.into_iter().collect()).unwrap_or_default();
        self.state.insert((source, key.clone()), Held { pair, tombstone, crc, unlisted, listed });
        if unlisted {
            return;
        }
        self.news.push(News::State { origin, space, key, pair, tombstone, imported });
    }

    /// Absence alone removes nothing: a want that does not list a key does, or a barrier of a newer
    /// incarnation that has not named it.
    fn check_unlisted(&self, source: u32, key: &str, pair: Pair) {
        let held = |key: &str| self.state.get(&(source, key.to_owned())).filter(|held| !held.tombstone);
        let barrier = held("barrier").is_some_and(|barrier| barrier.pair.0 > pair.0);
        let mut wants = self
            .state
            .range((source, "want/".to_owned())..)
            .take_while(|((at, key), _)| *at == source && key.starts_with("want/"));
        let delisted = wants.any(|(_, want)| want.tombstone || !want.listed.contains(key));
        rule!(barrier || delisted, "nothing_is_removed_before_a_barrier", "{key} at {pair:?}");
    }

    fn mark(&mut self, record: &Record) {
        let local: proto::Local = codec::decode(record.body.clone()).expect("a local fact");
        let Some(value) = local.value else {
            self.marks.remove(&local.key[..]);
            return;
        };
        let mark: proto::Mark = codec::decode(value).expect("a mark");
        if let Some(held) = self.marks.get(&local.key[..]) {
            rule!(
                held.epoch != mark.epoch || held.mark <= mark.mark,
                "a_mark_never_goes_back",
                "of {:?} from {} to {}",
                local.key,
                held.mark,
                mark.mark
            );
        }
        self.marks.insert(local.key.to_vec(), mark);
    }

    /// The current Log of this name, with its number.
    pub(crate) fn log(&self, origin: &str, stream: &str) -> Option<(u32, &LogShadow)> {
        let found = self.logs.iter().rev().find(|(_, log)| log.origin == origin && log.stream == stream);
        found.map(|(source, log)| (*source, log))
    }

    /// The history of a Log that has this epoch.
    pub(crate) fn history(&self, origin: &str, stream: &str, epoch: u64) -> Option<&LogShadow> {
        let named = |log: &&LogShadow| log.origin == origin && log.stream == stream;
        let mut logs = self.logs.values().rev().filter(named);
        logs.find(|log| log.epochs.iter().any(|(_, held)| *held == epoch))
    }

    /// True if a message with this tag is on the disk.
    pub(crate) fn has(&self, tag: &str) -> bool {
        self.tags.get(tag).is_some_and(|places| !places.is_empty())
    }

    /// True if a message with this tag was on the disk, though policy may have dropped it since.
    pub(crate) fn had(&self, tag: &str) -> bool {
        self.ever.contains(tag)
    }

    /// Where a tag first stands: its Log's number and its seq.
    pub(crate) fn place_of(&self, tag: &str) -> Option<(u32, u64)> {
        self.tags.get(tag)?.first().copied()
    }

    /// What the disk holds of a key.
    pub(crate) fn key(&self, origin: &str, space: &str, key: &str) -> Option<&Held> {
        let number =
            self.sources.iter().find(|(_, (kind, of, name))| *kind == 3 && of == origin && name == space)?.0;
        self.state.get(&(*number, key.to_owned()))
    }

    /// The live keys of a space, with their pair and the crc of their frame.
    pub(crate) fn live(&self, origin: &str, space: &str) -> BTreeMap<&str, (Pair, u32)> {
        let number =
            self.sources.iter().find(|(_, (kind, of, name))| *kind == 3 && of == origin && name == space);
        let Some((number, _)) = number else { return BTreeMap::new() };
        self.state
            .range((*number, String::new())..)
            .take_while(|((source, _), _)| source == number)
            .filter(|(_, held)| !held.tombstone)
            .map(|((_, key), held)| (key.as_str(), (held.pair, held.crc)))
            .collect()
    }
}
