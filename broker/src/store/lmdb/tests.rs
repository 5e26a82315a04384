//! The store on disk against the store in memory, and what only a disk can do wrong.

use std::{os::unix::fs::FileExt, task::Waker};

use proptest::prelude::*;

use super::{super::mem::MemStore, *};
use crate::store::{
    SourceKind,
    facts::samples::*,
    journal::{format::SOURCES, tests::Tape},
};

mod compaction;
mod copies;
mod damage;
mod room;
mod wanted;

pub(super) use self::compaction::{Crash, crashes_at};

const NEVER: Duration = Duration::from_secs(3600);

fn options(checkpoint_every: Duration) -> Options {
    Options {
        segment_bytes: 4096,
        checkpoint_bytes: 64 << 10,
        checkpoint_every,
        rewrite_after: 0,
        ..Options::node()
    }
}

/// Blocks until the store says something, except how much room it has and what is damaged.
fn next(store: &mut LmdbStore) -> StoreEvent {
    loop {
        match next_of_all(store) {
            StoreEvent::Low { .. } | StoreEvent::Ample | StoreEvent::Damaged(_) => {}
            event => return event,
        }
    }
}

fn next_of_all(store: &mut LmdbStore) -> StoreEvent {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(std::future::poll_fn(|cx| store.poll_event(cx)))
}

fn persist(store: &mut LmdbStore, groups: Vec<Group>) {
    let last = groups.last().map_or(0, |group| group.lsn);
    for group in groups {
        store.submit(group);
    }
    loop {
        match next(store) {
            StoreEvent::Persisted(lsn) if lsn == last => return,
            StoreEvent::Persisted(_) => {}
            other => panic!("{other:?}"),
        }
    }
}

fn read<S: Store>(store: &mut S, source: u32, from: u64, bytes_max: usize) -> Vec<Record> {
    store.read(ReadRequest { read: 5, source, from, bytes_max, wanted: None });
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    loop {
        match runtime.block_on(std::future::poll_fn(|cx| store.poll_event(cx))) {
            StoreEvent::Read { read: 5, records, .. } => return records,
            StoreEvent::Low { .. } | StoreEvent::Ample | StoreEvent::Damaged(_) => {}
            other => panic!("{other:?}"),
        }
    }
}

fn seqs(records: &[Record]) -> Vec<u64> {
    records.iter().map(|record| record.header.seq).collect()
}

fn segments(path: &Path) -> usize {
    names(path).iter().filter(|name| name.ends_with(".seg")).count()
}

/// What both kinds of store must say alike. Stretches are estimates after cuts.
fn comparable(mut recovered: Recovered) -> String {
    for log in &mut recovered.logs {
        assert_eq!(log.kept.is_empty(), log.first == 0, "{log:?}");
        log.kept = Stretches::default();
    }
    format!("{recovered:#?}")
}

#[derive(Debug, Clone)]
enum Change {
    Log { source: u32, len: usize },
    Again { source: u32, back: u64 },
    Gap { source: u32, from: u64, len: u64 },
    NewEpoch { source: u32, back: u64 },
    Table { source: u32, keep: u64 },
    Put { key: u8, len: usize },
    Fact { key: u8, value: Option<u8> },
    Declare { source: u32 },
}

#[derive(Debug, Clone)]
enum Step {
    Groups(Vec<Vec<Change>>),
    Restart { clean: bool },
    Read { source: u32, from: u64, bytes_max: usize },
}

fn change() -> impl Strategy<Value = Change> {
    let source = || 1..3u32;
    prop_oneof![
        12 => (source(), 0..400usize).prop_map(|(source, len)| Change::Log { source, len }),
        1 => (source(), 0..6u64).prop_map(|(source, back)| Change::Again { source, back }),
        1 => (source(), 1..30u64, 0..8u64).prop_map(|(source, from, len)| Change::Gap { source, from, len }),
        1 => (source(), 0..4u64).prop_map(|(source, back)| Change::NewEpoch { source, back }),
        1 => (source(), 0..20u64).prop_map(|(source, keep)| Change::Table { source, keep }),
        3 => (0..6u8, 0..300usize).prop_map(|(key, len)| Change::Put { key, len }),
        2 => (0..4u8, any::<Option<u8>>()).prop_map(|(key, value)| Change::Fact { key, value }),
        1 => source().prop_map(|source| Change::Declare { source }),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let group = proptest::collection::vec(change(), 0..6);
    prop_oneof![
        6 => proptest::collection::vec(group, 1..12).prop_map(Step::Groups),
        1 => any::<bool>().prop_map(|clean| Step::Restart { clean }),
        3 => (1..3u32, 0..60u64, 0..3000usize)
            .prop_map(|(source, from, bytes_max)| Step::Read { source, from, bytes_max }),
    ]
}

/// Turns changes into records. Seqs of the two Logs go on where they were; a gap is only ever replaced by
/// one that covers all of it, as the core does it.
#[derive(Default)]
struct History {
    lsn: u64,
    last: [u64; 3],
    gaps: Vec<(u32, u64, u64)>,
}

impl History {
    fn group(&mut self, changes: Vec<Change>) -> Group {
        self.lsn += 1;
        let records = changes.into_iter().map(|change| self.record(change)).collect();
        group(self.lsn, records)
    }

    fn record(&mut self, change: Change) -> Record {
        let in_gap = |gaps: &[(u32, u64, u64)], source, at| {
            gaps.iter().any(|(of, from, to)| *of == source && (*from..=*to).contains(&at))
        };
        match change {
            Change::Again { source, back } if self.last[source as usize] > 0 => {
                let seq = self.last[source as usize].saturating_sub(back).max(1);
                if !in_gap(&self.gaps, source, seq) {
                    return log(source, seq, b"again");
                }
                self.record(Change::Log { source, len: 1 })
            }
            Change::Gap { source, from, len } => {
                let to = from + len;
                let torn = |gap: &&(u32, u64, u64)| {
                    let (of, start, end) = **gap;
                    of == source && start <= to && end >= from && (start < from || end > to)
                };
                if self.gaps.iter().any(|gap| torn(&gap)) {
                    return self.record(Change::Log { source, len: 2 });
                }
                self.gaps.push((source, from, to));
                let last = &mut self.last[source as usize];
                *last = to.max(*last);
                gap(source, from, to)
            }
            Change::NewEpoch { source, back } => {
                let to = self.last[source as usize].saturating_sub(back);
                if in_gap(&self.gaps, source, to + 1) {
                    return self.record(Change::Log { source, len: 3 });
                }
                gap(source, to + 1, to)
            }
            Change::Log { source, len } => self.next(source, len),
            Change::Again { source, .. } => self.next(source, 0),
            Change::Table { source, keep } => {
                table(source, self.last[source as usize].saturating_sub(keep) + 1)
            }
            Change::Put { key, len } => put(3, &format!("k/{key}"), self.lsn, &vec![key; len]),
            Change::Fact { key, value } => {
                fact(Kind::SESSION, &[key], value.as_ref().map(std::slice::from_ref))
            }
            Change::Declare { source } => declare(source, SourceKind::Log, "telemetry"),
        }
    }

    fn next(&mut self, source: u32, len: usize) -> Record {
        let last = &mut self.last[source as usize];
        *last += 1;
        log(source, *last, &vec![self.lsn as u8; len])
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn any_history_reads_and_recovers_as_in_memory(
        steps in proptest::collection::vec(step(), 1..14), every in prop_oneof![Just(Duration::ZERO), Just(NEVER)],
    ) {
        let dir = tempfile::tempdir().unwrap();
        let mut model = MemStore::auto();
        let (mut store, _) = open(dir.path(), options(every)).unwrap();
        let mut history = History::default();
        for step in steps {
            match step {
                Step::Groups(groups) => {
                    let groups: Vec<Group> =
                        groups.into_iter().map(|changes| history.group(changes)).collect();
                    for group in &groups {
                        model.submit(group.clone());
                    }
                    let event = model.poll_event(&mut Context::from_waker(Waker::noop()));
                    prop_assert!(matches!(event, Poll::Ready(StoreEvent::Persisted(last)) if last == history.lsn));
                    persist(&mut store, groups);
                }
                Step::Restart { clean } => {
                    if clean { drop(store) } else { store.kill() }
                    let recovered;
                    (store, recovered) = open(dir.path(), options(every)).unwrap();
                    prop_assert_eq!(comparable(recovered), comparable(model.recover()));
                }
                Step::Read { source, from, bytes_max } => {
                    let expected = read(&mut model, source, from, bytes_max);
                    prop_assert_eq!(read(&mut store, source, from, bytes_max), expected);
                }
            }
        }
        for source in 1..3 {
            let expected = read(&mut model, source, 0, usize::MAX);
            prop_assert_eq!(read(&mut store, source, 0, usize::MAX), expected);
        }
    }
}

#[test]
fn a_store_has_one_process() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path(), options(NEVER)).unwrap();
    assert!(matches!(open(dir.path(), options(NEVER)), Err(OpenError::Locked(path)) if path == dir.path()));
    drop(store);
    open(dir.path(), options(NEVER)).unwrap();
}

#[test]
fn a_new_folder_is_synced_up_to_the_first_that_was_there() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (dir.path().join("a"), dir.path().join("a/b"));
    assert_eq!(new_parents(&b.join("c")), [b.as_path(), a.as_path(), dir.path()]);
    assert_eq!(new_parents(&a), [dir.path()]);
    assert_eq!(new_parents(Path::new("no such folder")), [Path::new(".")]);
    make_dir(&b.join("c")).unwrap();
    assert!(b.join("c").is_dir());
}

#[test]
fn segments_are_freed_when_nothing_in_them_is_alive() {
    let dir = tempfile::tempdir().unwrap();
    let (mut store, _) = open(dir.path(), options(NEVER)).unwrap();
    let groups = (1..=60).map(|lsn| group(lsn, vec![log(1, lsn, &[1; 900]), put(2, "key", lsn, b"v")]));
    persist(&mut store, groups.collect());
    drop(store);
    assert!(segments(dir.path()) > 10, "the Log keeps them");

    let (mut store, _) = open(dir.path(), options(NEVER)).unwrap();
    persist(&mut store, vec![group(61, vec![table(1, 59)])]);
    drop(store);
    assert!(segments(dir.path()) <= 2, "one with the last records, one being written");

    let (mut store, recovered) = open(dir.path(), options(NEVER)).unwrap();
    assert_eq!(recovered.state, [put(2, "key", 60, b"v")]);
    assert_eq!(seqs(&read(&mut store, 1, 0, usize::MAX)), [59, 60]);
}

#[test]
fn a_refused_store_goes_on_with_the_refused_lsn_once_there_is_room() {
    let dir = tempfile::tempdir().unwrap();
    let tape = Tape::default();
    let mut disk = Disk::new(JournalIo::Plain).unwrap();
    disk.tape = Some(tape.clone());
    let (mut store, _) = open_on(dir.path(), options(NEVER), disk).unwrap();
    tape.set_full(true);
    store.submit(group(1, vec![log(1, 1, b"refused")]));
    assert!(matches!(next(&mut store), StoreEvent::Refused { lsn: 1, .. }));
    tape.set_full(false);
    store.submit(group(2, vec![log(1, 2, b"submitted before the refusal was seen")]));
    persist(&mut store, vec![group(1, vec![log(1, 1, b"again")])]);
    assert_eq!(read(&mut store, 1, 0, usize::MAX), [log(1, 1, b"again")]);
    tape.fail_after(40);
    store.submit(group(2, vec![log(1, 2, b"torn")]));
    assert!(matches!(next(&mut store), StoreEvent::Refused { lsn: 2, .. }));
    store.kill();
    let (_store, recovered) = open(dir.path(), options(NEVER)).unwrap();
    assert_eq!(recovered.last_lsn, 1);
}

#[test]
fn a_full_map_refuses_groups_and_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let small = Options { map_bytes: 256 << 10, map_bytes_max: 256 << 10, ..options(Duration::ZERO) };
    let (mut store, _) = open(dir.path(), small.clone()).unwrap();
    let mut lsn = 0;
    let reason = loop {
        lsn += 1;
        store.submit(group(lsn, vec![put(1, &format!("key/{lsn}"), lsn, &[7; 6000])]));
        match next(&mut store) {
            StoreEvent::Persisted(persisted) => assert_eq!(persisted, lsn),
            StoreEvent::Refused { lsn: refused, reason } => {
                assert_eq!(refused, lsn);
                break reason;
            }
            other => panic!("{other:?}"),
        }
    };
    assert!(reason.contains("full"), "{reason}");
    drop(store);
    let (_store, recovered) = open(dir.path(), Options { map_bytes_max: 4 << 20, ..small }).unwrap();
    assert_eq!((recovered.last_lsn, recovered.state.len() as u64), (lsn - 1, lsn - 1));
}

#[test]
fn a_map_grows_between_transactions() {
    let dir = tempfile::tempdir().unwrap();
    let small = Options { map_bytes: 256 << 10, map_bytes_max: 64 << 20, ..options(NEVER) };
    let (mut store, _) = open(dir.path(), small.clone()).unwrap();
    let groups = (1..=200).map(|lsn| group(lsn, vec![put(1, &format!("key/{lsn}"), lsn, &[7; 6000])]));
    persist(&mut store, groups.collect());
    drop(store);
    let (store, recovered) = open(dir.path(), small).unwrap();
    assert_eq!(recovered.state.len(), 200);
    assert_eq!(lock_of(&store.shared.gathering).overlay.active.last_lsn, 0, "all was in the checkpoint");
}

#[test]
fn keys_longer_than_the_checkpoint_takes_are_kept_apart() {
    let dir = tempfile::tempdir().unwrap();
    let (mut store, _) = open(dir.path(), options(NEVER)).unwrap();
    let (mut a, mut b) = (vec![b'x'; 60_000], vec![b'x'; 60_000]);
    a.push(b'a');
    b.push(b'b');
    let facts = vec![fact(Kind::SESSION, &a, Some(b"1")), fact(Kind::SESSION, &b, Some(b"2"))];
    persist(&mut store, vec![group(1, facts)]);
    drop(store);
    let (_store, recovered) = open(dir.path(), options(NEVER)).unwrap();
    let found: Vec<_> = recovered.locals.into_iter().map(|fact| (fact.key, fact.value)).collect();
    assert_eq!(found, [(a.into(), "1".into()), (b.into(), "2".into())]);
}

#[test]
fn damaged_records_are_told_as_a_gap_and_the_read_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let (mut store, _) = open(dir.path(), options(NEVER)).unwrap();
    persist(&mut store, (1..=12).map(|seq| group(seq, vec![log(1, seq, &[1; 900])])).collect());
    let first = dir.path().join("journal").join(segment_name(1));
    OpenOptions::new().write(true).open(first).unwrap().write_all_at(&[9], 200).unwrap();
    let records = read(&mut store, 1, 0, usize::MAX);
    assert_eq!((records[0].header.kind, records[1].header.kind), (Kind::GAP, Kind::LOG));
    assert_eq!(records[0].header.seq + 1, records[1].header.seq);
    assert_eq!(records.last().unwrap().header.seq, 12);
}

#[test]
fn a_missing_segment_is_told_as_a_gap() {
    let dir = tempfile::tempdir().unwrap();
    let (mut store, _) = open(dir.path(), options(NEVER)).unwrap();
    persist(&mut store, (1..=12).map(|seq| group(seq, vec![log(1, seq, &[1; 900])])).collect());
    std::fs::remove_file(dir.path().join("journal").join(segment_name(1))).unwrap();
    let records = read(&mut store, 1, 0, usize::MAX);
    assert_eq!(records[0].header.kind, Kind::GAP);
    assert_eq!(records.last().unwrap().header.seq, 12);
}

#[test]
fn a_read_that_fails_for_now_is_tried_again_and_tells_no_gap() {
    let dir = tempfile::tempdir().unwrap();
    let (mut store, _) = open(dir.path(), options(NEVER)).unwrap();
    persist(&mut store, vec![group(1, vec![log(1, 1, b"x")])]);
    let (name, aside) = (dir.path().join("journal").join(segment_name(1)), dir.path().join("aside"));
    std::fs::rename(&name, &aside).unwrap();
    std::os::unix::fs::symlink(&name, &name).unwrap();
    store.read(ReadRequest { read: 4, source: 1, from: 0, bytes_max: usize::MAX, wanted: None });
    assert!(store.poll_event(&mut Context::from_waker(Waker::noop())).is_pending());
    std::fs::rename(&aside, &name).unwrap();
    assert!(
        matches!(next(&mut store), StoreEvent::Read { read: 4, records, .. } if records == [log(1, 1, b"x")])
    );
}

#[test]
fn a_read_that_cannot_succeed_does_not_keep_the_store_from_ending() {
    let dir = tempfile::tempdir().unwrap();
    let (mut store, _) = open(dir.path(), options(NEVER)).unwrap();
    persist(&mut store, vec![group(1, vec![log(1, 1, b"x")])]);
    let name = dir.path().join("journal").join(segment_name(1));
    std::fs::remove_file(&name).unwrap();
    std::os::unix::fs::symlink(&name, &name).unwrap();
    store.read(ReadRequest { read: 4, source: 1, from: 0, bytes_max: usize::MAX, wanted: None });
    drop(store);
}

#[test]
fn long_logs_are_read_in_pages_across_segments_and_the_checkpoint_boundary() {
    let dir = tempfile::tempdir().unwrap();
    let (mut store, _) = open(dir.path(), options(NEVER)).unwrap();
    let groups = |lsns: std::ops::RangeInclusive<u64>| {
        // Far apart, so that each record has an entry of its own.
        lsns.map(|lsn| group(lsn, vec![log(1, lsn, b"x"), log(2, lsn, &[2; 6000])])).collect()
    };
    persist(&mut store, groups(1..=150));
    drop(store);
    let (mut store, _) = open(dir.path(), options(NEVER)).unwrap();
    persist(&mut store, groups(151..=300));
    assert_eq!(seqs(&read(&mut store, 1, 0, usize::MAX)), Vec::from_iter(1..=300));
    assert_eq!(seqs(&read(&mut store, 1, 100, 43 * 60)).first(), Some(&100));
    store.kill();
    let (mut store, _) = open(dir.path(), options(NEVER)).unwrap();
    assert_eq!(seqs(&read(&mut store, 1, 140, usize::MAX)), Vec::from_iter(140..=300));
}

fn names(path: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(path.join("journal")).unwrap();
    let mut names: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.retain(|name| name != "spare" && *name != segment_name(SOURCES));
    names.sort();
    names
}

/// Prints appends per second; run with `--release -- --ignored --nocapture`.
#[test]
#[ignore = "a measurement"]
#[allow(clippy::disallowed_methods)] // it measures
fn appends_per_second() {
    for io in [JournalIo::Uring, JournalIo::Plain] {
        let dir = tempfile::tempdir_in(".").unwrap();
        let mut store = match open(dir.path(), Options { io, ..Options::hub() }) {
            Ok((store, _)) => store,
            Err(error) => {
                println!("{io:?}: {error}");
                continue;
            }
        };
        let start = std::time::Instant::now();
        let mut lsn = 0;
        while start.elapsed() < Duration::from_secs(3) {
            let batch = (1..=256).map(|n| group(lsn + n, vec![log(1, lsn + n, &[1; 250])])).collect();
            lsn += 256;
            persist(&mut store, batch);
        }
        println!("{io:?}: {:.0} appends/s", lsn as f64 / start.elapsed().as_secs_f64());
    }
}

#[test]
fn a_forgotten_key_is_gone_before_and_after_the_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let forget = |source, key: &[u8]| {
        let mut record = fact(Kind::FORGET, key, None);
        record.header.source = source;
        record
    };
    let (mut store, _) = open(dir.path(), options(NEVER)).unwrap();
    let kept = put(2, "kept", 2, b"v");
    persist(&mut store, vec![group(1, vec![put(2, "key", 1, b"v"), kept.clone()])]);
    drop(store);
    // The put is in the checkpoint now, the forget in the journal alone, then in the checkpoint too.
    let (mut store, _) = open(dir.path(), options(NEVER)).unwrap();
    persist(&mut store, vec![group(2, vec![forget(2, b"key")])]);
    lock_of(&store.shared.gathering).abandoned = true;
    drop(store);
    for _ in 0..2 {
        let (store, recovered) = open(dir.path(), options(NEVER)).unwrap();
        assert_eq!(recovered.state, std::slice::from_ref(&kept));
        drop(store);
    }
}
