//! Segments that are rewritten, and crashes and readers on the way.

use super::{super::topics::Probes, *};

/// A step of a rewriting, after which a test ends the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) enum Crash {
    /// The new segment is there, and no entry points to it.
    Named,
    /// The entries point to it, and the old segments are still there.
    Moved,
}

/// True if the store is to end like a killed process after this step.
pub(in super::super) fn crashes_at(shared: &Shared, step: Crash) -> bool {
    let mut gathering = lock_of(&shared.gathering);
    let crashes = gathering.crash_at == Some(step);
    if crashes {
        gathering.abandoned = true;
        gathering.stop = true;
    }
    crashes
}

/// Alarms of Log 1, each among telemetry of Log 2 that fills about a segment, and then telemetry is dropped.
fn mostly_dead(store: &mut LmdbStore, alarms: u64) -> Vec<Record> {
    let mut kept = Vec::new();
    let mut groups = Vec::new();
    for alarm in 1..=alarms {
        for part in 0..4 {
            let lsn = (alarm - 1) * 4 + part + 1;
            let mut records = vec![log(2, lsn, &[2; 900]), put(3, "key", lsn, b"v")];
            if part == 1 {
                records.insert(1, log(1, alarm, &alarm.to_be_bytes()));
                kept.push(records[1].clone());
            }
            groups.push(group(lsn, records));
        }
    }
    persist(store, groups);
    persist(store, vec![group(alarms * 4 + 1, vec![table(2, alarms * 4 + 1)])]);
    kept
}

fn is_rewritten(name: impl AsRef<str>) -> bool {
    name.as_ref().starts_with("old-")
}

/// Gives the keeper a reason to look: checkpoints come with changes.
fn until(store: &mut LmdbStore, lsn: &mut u64, mut done: impl FnMut() -> bool) {
    for _ in 0..10_000 {
        if done() {
            return;
        }
        *lsn += 1;
        persist(store, vec![group(*lsn, vec![put(3, "tick", *lsn, b"")])]);
    }
    panic!("it never happened");
}

#[test]
fn segments_that_are_mostly_dead_become_one_with_what_lives() {
    let dir = tempfile::tempdir().unwrap();
    let (mut store, _) = open(dir.path(), options(Duration::ZERO)).unwrap();
    let kept = mostly_dead(&mut store, 40);
    let mut lsn = 161;
    until(&mut store, &mut lsn, || names(dir.path()).iter().filter(|name| !is_rewritten(name)).count() <= 2);
    let names = names(dir.path());
    assert!(names.iter().any(is_rewritten) && names.len() <= 12, "{names:?}");
    assert_eq!(read(&mut store, 1, 0, usize::MAX), kept);
    assert!(read(&mut store, 2, 0, usize::MAX).is_empty());
    drop(store);
    let (mut store, recovered) = open(dir.path(), options(NEVER)).unwrap();
    assert_eq!(read(&mut store, 1, 0, usize::MAX), kept);
    assert_eq!(read(&mut store, 1, 20, 1), kept[19..20]);
    let bytes: usize = kept.iter().map(Record::wire_len).sum();
    let held: u64 = recovered.logs[0].kept.bytes();
    assert_eq!(held, bytes as u64);
}

#[test]
fn whatever_step_of_a_rewriting_a_crash_follows_nothing_is_lost_and_no_file_is_left() {
    for crash in [Crash::Named, Crash::Moved] {
        let dir = tempfile::tempdir().unwrap();
        let (mut store, _) = open(dir.path(), options(NEVER)).unwrap();
        let kept = mostly_dead(&mut store, 10);
        drop(store);
        let before = names(dir.path());
        let (mut store, _) = open(dir.path(), options(Duration::ZERO)).unwrap();
        lock_of(&store.shared.gathering).crash_at = Some(crash);
        persist(&mut store, vec![group(42, vec![put(3, "tick", 42, b"")])]);
        store.keeper.take().unwrap().join().unwrap();
        let crashed = names(dir.path());
        assert_eq!(crashed.iter().filter(|name| is_rewritten(name)).count(), 1, "{crash:?}");
        assert!(before.iter().all(|name| crashed.contains(name)), "the old ones are there as well");
        drop(store);

        std::fs::write(dir.path().join("journal/old.tmp"), b"as a crash before the name leaves it").unwrap();
        let (mut store, recovered) = open(dir.path(), options(NEVER)).unwrap();
        assert_eq!(recovered.last_lsn, 42);
        assert_eq!(read(&mut store, 1, 0, usize::MAX), kept);
        drop(store);
        let after = names(dir.path());
        match crash {
            Crash::Named => {
                assert_eq!(after.iter().filter(|name| is_rewritten(name)).count(), 0, "{after:?}")
            }
            Crash::Moved => assert!(after.len() <= 2, "{after:?}"),
        }
        assert!(!after.contains(&"old.tmp".to_owned()));
    }
}

#[test]
fn a_rewriting_that_fails_leaves_everything_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let (mut store, _) = open(dir.path(), options(NEVER)).unwrap();
    let kept = mostly_dead(&mut store, 10);
    drop(store);
    let before = names(dir.path());
    // No file can have this name.
    std::fs::create_dir(dir.path().join("journal/old-0000000000000001.seg")).unwrap();
    std::fs::write(dir.path().join("journal/old-0000000000000001.seg/x"), b"").unwrap();
    let held = Options { rewrite_after: u32::MAX, ..options(NEVER) };
    assert!(open(dir.path(), held).is_err(), "a folder is no segment");
    std::fs::remove_dir_all(dir.path().join("journal/old-0000000000000001.seg")).unwrap();
    let (mut store, _) = open(dir.path(), options(Duration::ZERO)).unwrap();
    std::fs::create_dir(dir.path().join("journal/old-0000000000000001.seg")).unwrap();
    let mut lsn = 41;
    for _ in 0..3 {
        lsn += 1;
        persist(&mut store, vec![group(lsn, vec![put(3, "tick", lsn, b"")])]);
    }
    assert_eq!(read(&mut store, 1, 0, usize::MAX), kept);
    drop(store);
    std::fs::remove_dir(dir.path().join("journal/old-0000000000000001.seg")).unwrap();
    assert!(before.iter().all(|name| names(dir.path()).contains(name)));
    let (mut store, _) = open(dir.path(), options(NEVER)).unwrap();
    assert_eq!(read(&mut store, 1, 0, usize::MAX), kept);
}

#[test]
fn a_run_that_is_cut_in_the_middle_keeps_what_it_claims_through_a_rewriting() {
    let dir = tempfile::tempdir().unwrap();
    let (mut store, _) = open(dir.path(), options(Duration::ZERO)).unwrap();
    // One run of one group, thinned in its interior.
    let records = (1..=30).map(|seq| log(1, seq, &vec![seq as u8; 10 * seq as usize])).collect();
    persist(&mut store, vec![group(1, records), group(2, vec![log(2, 1, &[0; 4000])])]);
    persist(&mut store, vec![group(3, vec![gap(1, 2, 14), gap(1, 16, 29), table(2, 2)])]);
    let mut lsn = 3;
    until(&mut store, &mut lsn, || names(dir.path()).iter().any(is_rewritten));
    let expected = vec![
        log(1, 1, &[1; 10]),
        gap(1, 2, 14),
        log(1, 15, &[15; 150]),
        gap(1, 16, 29),
        log(1, 30, &[30; 300]),
    ];
    assert_eq!(read(&mut store, 1, 0, usize::MAX), expected);
    drop(store);
    let (mut store, recovered) = open(dir.path(), options(NEVER)).unwrap();
    assert_eq!(read(&mut store, 1, 0, usize::MAX), expected);
    let bytes: usize = expected.iter().map(Record::wire_len).sum();
    assert_eq!(recovered.logs[0].kept.bytes(), bytes as u64, "what is kept is counted, not estimated");
}

#[test]
fn a_reader_that_races_rewriting_sees_every_record_once() {
    let dir = tempfile::tempdir().unwrap();
    let (mut store, _) = open(dir.path(), options(Duration::ZERO)).unwrap();
    let mut kept = Vec::new();
    let (mut lsn, mut telemetry) = (0, 0);
    for alarm in 1..=120u64 {
        let mut groups = Vec::new();
        for part in 0..4 {
            (lsn, telemetry) = (lsn + 1, telemetry + 1);
            let mut records = vec![log(2, telemetry, &[2; 900])];
            if part == 2 {
                records.push(log(1, alarm, &alarm.to_be_bytes()));
                kept.push(records[1].clone());
            }
            groups.push(group(lsn, records));
        }
        lsn += 1;
        groups.push(group(lsn, vec![table(2, telemetry)]));
        persist(&mut store, groups);
        for from in [0, alarm / 2] {
            let records = read(&mut store, 1, from, usize::MAX);
            assert_eq!(records, kept[from.saturating_sub(1) as usize..], "after {alarm} alarms");
        }
    }
    assert!(names(dir.path()).iter().any(is_rewritten));
}

#[test]
fn what_is_copied_keeps_its_topics() {
    let dir = tempfile::tempdir().unwrap();
    let (mut store, _) = open(dir.path(), options(Duration::ZERO)).unwrap();
    let kept = mostly_dead(&mut store, 24);
    let mut lsn = 24 * 4 + 1;
    until(&mut store, &mut lsn, || names(dir.path()).iter().any(is_rewritten));
    drop(store);
    let (mut store, _) = open(dir.path(), options(NEVER)).unwrap();
    let (_, runs, _) = store.shared.checkpoint.runs(1, 0, usize::MAX).unwrap();
    let moved: Vec<_> = runs.iter().filter(|(_, run)| run.place.segment > REWRITTEN).collect();
    let ruled_out = |filter| {
        let probes = Probes::new(&[codec::Filter::parse(filter).unwrap()]).unwrap();
        let ruled_out = store.shared.checkpoint.ruled_out(1, &runs, &probes).unwrap();
        moved.iter().filter(|((start, _), run)| ruled_out.has(*start, run)).count()
    };
    assert!(!moved.is_empty());
    assert_eq!((ruled_out("none"), ruled_out("t")), (moved.len(), 0));
    assert_eq!(read(&mut store, 1, 0, usize::MAX), kept);
}
