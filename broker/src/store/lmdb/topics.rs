//! Which topics the records of a run have, so that a reader with a narrow filter does not read it for nothing.
//!
//! A set is a Bloom filter of the prefixes of whole levels of each topic: `a/b` stands as `a` and `a/b`. A filter
//! asks for each prefix in front of its first wildcard. A set may say yes for what it does not have (with 180
//! topics of four levels in a run about once in 11 times for one level, once in 130 for two), and says no only for
//! what no record of the run can match.
//!
//! Whoever appends pays for what only some readers need. So a set costs an append one pass over the topic, eight
//! bytes at a time, and some bits; and its run of 64 KiB at most 256 bytes of flash, few if its topics are few.
//!
//! A set is kept beside the index entry of its run and names the place and the seqs that it speaks of: groups may
//! hold records of several runs. Where there is no set, or one of something else, the run is read: so it is for
//! runs that still grow, for short ones, for what is not yet in the checkpoint, and for what a version without
//! sets wrote. A run that is cut keeps its set, which says too much then, never too little.

use std::collections::BTreeMap;

use bytes::{Buf, BufMut};
use codec::{Filter, FrameView, Record, topic::Level};

use super::index::Run;
use crate::store::journal::Place;

/// The topics of a run.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Topics {
    /// `None`: there are none.
    bits: Option<Box<[u64; WORDS]>>,
    /// A record could not be read: the set says nothing.
    is_any: bool,
}

impl Topics {
    /// Takes in a record that the run claims.
    pub(super) fn add(&mut self, record: &Record) {
        let Ok(view) = FrameView::parse(&record.body) else {
            self.is_any = true;
            return;
        };
        let bits = self.bits.get_or_insert_with(|| Box::new([0; WORDS]));
        each_prefix(view.topic().as_bytes(), |hash| {
            for bit in bits_of(hash) {
                bits[bit / 64] |= 1 << (bit % 64);
            }
        });
    }

    /// Takes in what another set has.
    pub(super) fn join(&mut self, other: &Self) {
        self.is_any |= other.is_any;
        if let Some(others) = &other.bits {
            let bits = self.bits.get_or_insert_with(|| Box::new([0; WORDS]));
            bits.iter_mut().zip(others.iter()).for_each(|(word, other)| *word |= other);
        }
    }

    /// Whether it pays to keep this set of the run. Of a gap, which stands in a group with records of its own
    /// start, there is none.
    pub(super) fn is_worth_keeping(&self, run: &Run) -> bool {
        let ones = self.bits.as_deref().map_or(0, |bits| ones(bits));
        !self.is_any && !run.gap && run.place.len >= PLACE_MIN && ones <= BITS - BITS / 4
    }

    /// Bytes of memory, about.
    pub(super) fn cost(&self) -> usize {
        self.bits.as_ref().map_or(0, |bits| size_of_val(&**bits))
    }

    /// As it stands in the checkpoint, with place and end of its run in front; the start is the key.
    pub(super) fn encode(&self, run: &Run) -> Vec<u8> {
        let mut bits = self.bits.as_deref().map_or_else(|| vec![0; WORDS], |bits| bits.to_vec());
        // A filter of half the size is one half over the other.
        while let [front, back] = bits.chunks_exact(bits.len().div_ceil(2)).collect::<Vec<_>>()[..] {
            let half: Vec<u64> = front.iter().zip(back).map(|(front, back)| front | back).collect();
            if ones(&half) > half.len() * 64 / 4 {
                break;
            }
            bits = half;
        }
        let mut raw = Vec::with_capacity(HEAD_LEN + size_of_val(&*bits));
        raw.put_u64_le(run.place.segment);
        raw.put_u64_le(run.place.offset);
        raw.put_u64_le(run.place.len);
        raw.put_u64_le(run.last);
        bits.iter().for_each(|word| raw.put_u64_le(*word));
        raw
    }
}

fn ones(bits: &[u64]) -> usize {
    bits.iter().map(|word| word.count_ones() as usize).sum()
}

/// What a set speaks of: records of seqs from a start, that of its key, to `last`, in the groups at `place`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Scope {
    place: Place,
    last: u64,
}

impl Scope {
    pub(super) fn decode(raw: &[u8]) -> Option<Self> {
        let mut head = raw.get(..HEAD_LEN)?;
        let place = Place { segment: head.get_u64_le(), offset: head.get_u64_le(), len: head.get_u64_le() };
        Some(Self { place, last: head.get_u64_le() })
    }

    /// Whether all records of a run, which starts where the set does or later, are among them.
    pub(super) fn covers(&self, run: &Run) -> bool {
        let same = (self.place.segment, self.place.offset) == (run.place.segment, run.place.offset);
        same && run.place.len <= self.place.len && run.last <= self.last && !run.gap
    }
}

/// The scopes of sets that have nothing of what is wanted, by start.
#[derive(Debug, Default)]
pub(super) struct RuledOut(pub(super) BTreeMap<u64, Scope>);

impl RuledOut {
    /// Whether nothing in the run is wanted.
    pub(super) fn has(&self, start: u64, run: &Run) -> bool {
        self.0.range(..=start).next_back().is_some_and(|(_, scope)| scope.covers(run))
    }
}

/// What a reader asks sets for: for each filter the hashes of all prefixes that what it matches has.
#[derive(Debug)]
pub(super) struct Probes(Vec<Vec<u64>>);

impl Probes {
    /// `None` if some filter has a wildcard for its first level: every set would say yes.
    pub(super) fn new(filters: &[Filter]) -> Option<Self> {
        filters.iter().map(probe).collect::<Option<_>>().map(Self)
    }

    /// Whether records of the run of this encoded set may be wanted.
    pub(super) fn may_match(&self, raw: &[u8]) -> bool {
        let Some((words, [])) = raw.get(HEAD_LEN..).map(<[u8]>::as_chunks::<8>) else { return true };
        if !words.len().is_power_of_two() || words.len() > WORDS {
            return true;
        }
        let has = |hash: &u64| {
            bits_of(*hash).into_iter().all(|bit| {
                let bit = bit % (words.len() * 64);
                u64::from_le_bytes(words[bit / 64]) >> (bit % 64) & 1 == 1
            })
        };
        self.0.iter().any(|hashes| hashes.iter().all(has))
    }
}

fn probe(filter: &Filter) -> Option<Vec<u64>> {
    let literal = filter.levels().take_while(|level| matches!(level, Level::Name(_)));
    let names: Vec<&str> =
        literal.filter_map(|level| if let Level::Name(name) = level { Some(name) } else { None }).collect();
    let mut hashes = Vec::new();
    if !names.is_empty() {
        each_prefix(names.join("/").as_bytes(), |hash| hashes.push(hash));
    }
    (!hashes.is_empty()).then_some(hashes)
}

/// Gives a hash of each prefix of whole levels. It is the same on every machine: sets are on disk.
///
/// It is that of the prefix's words of eight bytes, the last filled up with zeros, so that one pass gives all.
fn each_prefix(topic: &[u8], mut take: impl FnMut(u64)) {
    let mut front = 0;
    let mut levels = |word: u64| {
        let mut ends = slashes(word);
        while ends != 0 {
            let level_end = ends.trailing_zeros() & !7;
            take(mix(front, word & ((1 << level_end) - 1)));
            ends &= ends - 1;
        }
        front = mix(front, word);
        front
    };
    let (words, rest) = topic.as_chunks::<8>();
    for word in words {
        levels(u64::from_le_bytes(*word));
    }
    let mut last = [0; 8];
    last[..rest.len()].copy_from_slice(rest);
    let whole = levels(u64::from_le_bytes(last));
    take(whole);
}

/// The highest bit of each byte that is a `/`.
fn slashes(word: u64) -> u64 {
    const LOW: u64 = u64::from_ne_bytes([0x7f; 8]);
    let differs = word ^ u64::from_ne_bytes([b'/'; 8]);
    !(((differs & LOW) + LOW) | differs | LOW)
}

fn mix(front: u64, word: u64) -> u64 {
    // Odd, with bits in no order: those of the golden ratio.
    let product = u128::from(front.rotate_left(29) ^ word ^ SEED) * 0x9e37_79b9_7f4a_7c15;
    (product >> 64) as u64 ^ product as u64
}

/// Where a hash stands in a set of the full size.
fn bits_of(hash: u64) -> [usize; 2] {
    [(hash >> 48) as usize % BITS, (hash >> 32) as usize % BITS]
}

/// An empty name has a hash too.
const SEED: u64 = 0x2545_f491_4f6c_dd1d;
/// Of a set of the full size.
const WORDS: usize = 32;
const BITS: usize = WORDS * 64;
/// Shorter runs are read sooner than their sets. Tests write little.
const PLACE_MIN: u64 = if cfg!(test) { 128 } else { 4 << 10 };
const HEAD_LEN: usize = 32;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::store::facts::samples::*;

    const RUN: Run =
        Run { place: Place { segment: 1, offset: 64, len: 4 << 10 }, last: 9, bytes: 4000, gap: false };

    fn record_of(topic: &str) -> Record {
        record(codec::Kind::LOG, 1, 1, frame(topic, b""))
    }

    fn set_of<'a>(topics: impl IntoIterator<Item = &'a str>) -> Topics {
        let mut set = Topics::default();
        topics.into_iter().for_each(|topic| set.add(&record_of(topic)));
        set
    }

    fn may_match(filters: &[&str], topics: &[&str]) -> bool {
        let filters: Vec<Filter> = filters.iter().map(|filter| Filter::parse(filter).unwrap()).collect();
        let raw = set_of(topics.iter().copied()).encode(&RUN);
        Probes::new(&filters).is_none_or(|probes| probes.may_match(&raw))
    }

    #[test]
    fn a_set_tells_topics_and_levels_apart() {
        assert!(may_match(&["a/b/#"], &["a/b"]));
        assert!(may_match(&["a/b/+"], &["a/b/c"]));
        assert!(may_match(&["x", "a/b"], &["q", "a/b"]));
        for (filter, topic) in
            [("a/b/c", "a/b"), ("a/b/#", "a/bc"), ("a/#", "b/a"), ("a/b/#", "a"), ("ab", "a/b")]
        {
            assert!(!may_match(&[filter], &[topic]), "{filter} {topic}");
        }
    }

    #[test]
    fn a_filter_that_begins_with_a_wildcard_finds_every_set() {
        assert!(may_match(&["+/x"], &["a"]));
        assert!(may_match(&["#"], &["a"]));
        assert!(may_match(&["b", "+/x"], &["a"]));
    }

    #[test]
    fn a_set_is_as_large_as_its_topics_are_many() {
        let topics = |range: std::ops::Range<usize>| -> Vec<String> {
            range.map(|n| format!("plant/line-{}/machine-{n}/temperature", n % 10)).collect()
        };
        let of = |topics: &[String]| set_of(topics.iter().map(String::as_str));
        let (few, many, all) = (topics(0..1), topics(0..180), topics(0..2000));
        assert_eq!(of(&few).encode(&RUN).len(), HEAD_LEN + 8);
        let set = of(&many);
        assert_eq!(set.encode(&RUN).len(), HEAD_LEN + 256);
        assert!(set.is_worth_keeping(&RUN));
        assert!(!of(&all).is_worth_keeping(&RUN), "it would say yes to nearly everything");

        let raw = set.encode(&RUN);
        let wrong = |filters: Vec<String>| {
            let of_set =
                |filter: &&String| Probes::new(&[Filter::parse(filter).unwrap()]).unwrap().may_match(&raw);
            filters.iter().filter(of_set).count()
        };
        assert!(wrong((0..1000).map(|n| format!("alarms-{n}/#")).collect()) < 150);
        assert!(wrong((0..1000).map(|n| format!("alarms/pump-{n}/#")).collect()) < 100);
        assert!(wrong(topics(1000..2000)) < 20);
        assert_eq!(wrong(many), 180);
    }

    #[test]
    fn a_set_of_a_record_that_cannot_be_read_is_not_kept() {
        let mut set = set_of(["t"]);
        assert!(set.is_worth_keeping(&RUN));
        assert!(!set.is_worth_keeping(&Run { gap: true, ..RUN }));
        let mut unreadable = Topics::default();
        unreadable.add(&record(codec::Kind::LOG, 1, 1, &b"\xff"[..]));
        assert!(!unreadable.is_worth_keeping(&RUN));
        set.join(&unreadable);
        assert!(!set.is_worth_keeping(&RUN));
    }

    #[test]
    fn a_joined_set_has_the_topics_of_both() {
        let mut set = Topics::default();
        set.join(&set_of(["a/b"]));
        set.join(&set_of(["c"]));
        assert_eq!(set, set_of(["c", "a/b"]));
    }

    #[test]
    fn a_set_speaks_of_its_own_place_and_seqs() {
        let ruled_out = RuledOut([(5, Scope::decode(&Topics::default().encode(&RUN)).unwrap())].into());
        assert!(ruled_out.has(5, &RUN));
        assert!(ruled_out.has(7, &Run { last: 8, ..RUN }), "cut at both ends");
        assert!(!ruled_out.has(4, &RUN));
        assert!(!ruled_out.has(5, &Run { last: 10, ..RUN }), "another run in the same group");
        for place in [
            Place { segment: 2, ..RUN.place },
            Place { offset: 0, ..RUN.place },
            Place { len: 5 << 10, ..RUN.place },
        ] {
            assert!(!ruled_out.has(5, &Run { place, ..RUN }));
        }
        assert!(!ruled_out.has(5, &Run { gap: true, ..RUN }));
    }

    /// They are in checkpoints.
    #[test]
    fn hashes_stay_what_they_are() {
        let mut hashes = Vec::new();
        each_prefix(b"plant/line-3/", |hash| hashes.push(hash));
        assert_eq!(hashes, [0x3023_686b_aee5_399f, 0x0f74_568d_38ab_6cae, 0x709a_575a_5582_b385]);
    }

    proptest! {
        #[test]
        fn a_prefix_has_one_hash_whatever_follows_it(topic in "[ab/]{0,40}") {
            let (mut hashes, mut alone) = (Vec::new(), Vec::new());
            each_prefix(topic.as_bytes(), |hash| hashes.push(hash));
            for (end, _) in topic.match_indices('/').chain([(topic.len(), "")]) {
                let mut last = None;
                each_prefix(&topic.as_bytes()[..end], |hash| last = Some(hash));
                alone.extend(last);
            }
            prop_assert_eq!(hashes, alone);
        }

        #[test]
        fn no_set_denies_what_a_filter_matches(
            topics in proptest::collection::vec("[ab]{0,9}(/[ab]{0,9}){0,3}", 1..6),
            filter in "([ab]{0,2}|\\+)(/([ab]{0,2}|\\+)){0,3}(/#)?",
            own in any::<proptest::sample::Index>(),
            wild in 0..4usize,
        ) {
            prop_assume!(topics.iter().all(|topic| codec::topic::validate_topic(topic).is_ok()));
            let topics: Vec<&str> = topics.iter().map(String::as_str).collect();
            // A filter that matches one of them, and one that perhaps does.
            let mut levels: Vec<&str> = own.get(&topics).split('/').collect();
            if let Some(level) = levels.get_mut(wild) {
                *level = "+";
            }
            for filter in [&filter, &levels.join("/")] {
                let Ok(parsed) = Filter::parse(filter) else { continue };
                if topics.iter().any(|topic| parsed.matches(topic, true)) {
                    prop_assert!(may_match(&[filter], &topics));
                }
            }
        }
    }
}
