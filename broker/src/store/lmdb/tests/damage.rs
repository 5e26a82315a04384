//! Bits that rot: what is damaged is told and kept, and everything else goes on.

use codec::proto::{Gap, GapReason};
use rand::{Rng, SeedableRng, rngs::StdRng};

use super::*;

/// Flips a bit of this file.
fn flip(path: &Path, at: u64) {
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1 << (at % 8)], at).unwrap();
}

fn segment(path: &Path, number: u64) -> std::path::PathBuf {
    path.join("journal").join(segment_name(number))
}

fn quarantined(path: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(path.join("quarantine")) else { return Vec::new() };
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

/// The seqs that a gap of reason corruption stands for.
fn corrupted(record: &Record) -> std::ops::RangeInclusive<u64> {
    assert_eq!(record.header.kind, Kind::GAP);
    let gap: Gap = codec::decode(record.body.clone()).unwrap();
    assert_eq!(gap.reason(), GapReason::Corruption);
    gap.from..=gap.to
}

#[test]
fn a_damaged_group_above_the_checkpoint_is_told_and_what_follows_is_applied() {
    let dir = tempfile::tempdir().unwrap();
    let (mut store, _) = open(dir.path(), options(NEVER)).unwrap();
    for lsn in 1..=9 {
        persist(&mut store, vec![group(lsn, vec![log(1, lsn, &[1; 900]), put(2, "key", lsn, &[lsn as u8])])]);
    }
    store.kill();
    flip(&segment(dir.path(), 1), 64 + 24 + 40 + 20);
    let (mut store, recovered) = open(dir.path(), options(NEVER)).unwrap();
    assert!(recovered.uncertain, "nobody knows what the group did");
    assert_eq!(recovered.damage.len(), 1, "{:?}", recovered.damage);
    assert_eq!(
        (&*recovered.damage[0].file, recovered.damage[0].offset),
        ("journal/0000000000000001.seg", 64)
    );
    assert_eq!(recovered.last_lsn, 9);
    assert_eq!(recovered.state, [put(2, "key", 9, &[9])]);
    assert_eq!(quarantined(dir.path()), ["0000000000000001.seg"]);
    assert_eq!(seqs(&read(&mut store, 1, 0, usize::MAX)), Vec::from_iter(2..=9));
    persist(&mut store, vec![group(10, vec![log(1, 10, b"goes on")])]);
}

#[test]
fn seqs_that_were_in_a_damaged_group_are_told_as_a_gap() {
    let dir = tempfile::tempdir().unwrap();
    let (mut store, _) = open(dir.path(), options(NEVER)).unwrap();
    for lsn in 1..=9 {
        persist(&mut store, vec![group(lsn, vec![log(1, lsn, &[1; 900])])]);
    }
    store.kill();
    flip(&segment(dir.path(), 2), 64 + 30);
    for _ in 0..2 {
        let (mut store, recovered) = open(dir.path(), options(NEVER)).unwrap();
        let records = read(&mut store, 1, 0, usize::MAX);
        let gap = records.iter().position(|record| record.header.kind == Kind::GAP).unwrap();
        assert_eq!(corrupted(&records[gap]), 5..=5);
        assert_eq!(seqs(&records), Vec::from_iter(1..=9));
        assert_eq!(recovered.last_lsn, 9);
        // Once with all of it in the overlay, once out of the checkpoint.
        drop(store);
    }
}

#[test]
fn a_damaged_group_behind_the_checkpoint_costs_its_records_alone_and_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let (mut store, _) = open(dir.path(), options(NEVER)).unwrap();
    let groups = (1..=60).map(|lsn| group(lsn, vec![log(1, lsn, &[1; 900])]));
    persist(&mut store, groups.collect());
    drop(store);
    flip(&segment(dir.path(), 2), 64 + 30);
    let (mut store, recovered) = open(dir.path(), options(NEVER)).unwrap();
    assert!(!recovered.uncertain && recovered.damage.is_empty(), "old segments are not read at a start");
    store.read(ReadRequest { read: 1, source: 1, from: 0, bytes_max: usize::MAX, wanted: None });
    let StoreEvent::Damaged(damage) = next_of_all(&mut store) else { panic!() };
    assert_eq!(damage.file, "journal/0000000000000002.seg");
    let StoreEvent::Read { records, .. } = next(&mut store) else { panic!() };
    assert_eq!(corrupted(&records[4]), 5..=8);
    assert_eq!(records.len(), 60 - 3);
    assert_eq!(quarantined(dir.path()), ["0000000000000002.seg"]);

    // It is not rewritten, and freed with its last record; what is in quarantine stays.
    persist(&mut store, vec![group(61, vec![table(1, 60)])]);
    drop(store);
    assert!(!segment(dir.path(), 2).exists());
    assert_eq!(quarantined(dir.path()), ["0000000000000002.seg"]);
}

#[test]
fn a_journal_that_is_gone_is_told_and_its_numbers_are_not_given_again() {
    let dir = tempfile::tempdir().unwrap();
    let (mut store, _) = open(dir.path(), options(NEVER)).unwrap();
    persist(&mut store, (1..=9).map(|lsn| group(lsn, vec![log(1, lsn, &[1; 900])])).collect());
    drop(store);
    for number in 1..=3 {
        std::fs::remove_file(segment(dir.path(), number)).unwrap();
    }
    let (mut store, recovered) = open(dir.path(), options(NEVER)).unwrap();
    assert!(recovered.uncertain && !recovered.damage.is_empty());
    assert_eq!((recovered.last_lsn, recovered.logs[0].last), (9, 9));
    persist(&mut store, vec![group(10, vec![log(1, 10, b"another history")])]);
    let records = read(&mut store, 1, 0, usize::MAX);
    assert_eq!(corrupted(&records[0]).start(), &1);
    assert_eq!(records.last(), Some(&log(1, 10, b"another history")));
    assert!(records[..records.len() - 1].iter().all(|record| record.header.kind == Kind::GAP));
}

#[test]
fn whatever_bits_of_segments_rot_no_payload_is_wrong_and_what_is_whole_is_there() {
    for seed in 0..60 {
        let mut rng = StdRng::seed_from_u64(seed);
        let dir = tempfile::tempdir().unwrap();
        let every = if seed % 2 == 0 { NEVER } else { Duration::ZERO };
        let (mut store, _) = open(dir.path(), options(every)).unwrap();
        let content = |lsn: u64| log(1, lsn, &vec![lsn as u8; 37 * lsn as usize % 1500]);
        for lsn in 1..=40 {
            persist(&mut store, vec![group(lsn, vec![content(lsn), put(2, "key", lsn, &[lsn as u8])])]);
        }
        if seed % 3 == 0 {
            drop(store)
        } else {
            store.kill()
        }
        let flips: Vec<(std::path::PathBuf, u64)> = (0..rng.random_range(1..4))
            .map(|_| {
                let names = names(dir.path());
                let file = dir.path().join("journal").join(&names[rng.random_range(0..names.len())]);
                let at = rng.random_range(0..std::fs::metadata(&file).unwrap().len());
                flip(&file, at);
                (file, at)
            })
            .collect();
        let (mut store, recovered) = match open(dir.path(), options(NEVER)) {
            Ok(opened) => opened,
            // The number of the format is looked at before anything else.
            Err(OpenError::Format { .. }) => continue,
            Err(error) => panic!("seed {seed}: {error}"),
        };
        let context = format!("seed {seed}, {flips:?}, {:?}", recovered.damage);
        let mut next_seq = 1;
        let records = read(&mut store, 1, 0, usize::MAX);
        for record in &records {
            if record.header.kind == Kind::GAP {
                next_seq = corrupted(record).end() + 1;
            } else {
                let seq = record.header.seq;
                let uncertain = next_seq == 1 && recovered.uncertain;
                assert!(seq == next_seq || uncertain, "{seq} follows {next_seq}: {context}");
                assert_eq!(*record, content(seq), "{context}");
                next_seq = seq + 1;
            }
        }
        // A group is no longer than 1 600 bytes, and a run of them that is read as one no longer than a segment.
        let lost = 40 - records.iter().filter(|record| record.header.kind == Kind::LOG).count();
        assert!(lost <= flips.len() * 20, "{lost} are lost: {context}");
        assert!(recovered.damage.is_empty() || !quarantined(dir.path()).is_empty(), "{context}");
        persist(&mut store, vec![group(recovered.last_lsn + 1, vec![put(2, "key", 99, b"goes on")])]);
    }
}

/// A store with alarms in rewritten segments, telemetry of which the old is trimmed, State and declared sources.
/// Returns what must be readable of Log 1, and the lsn of the last group.
fn lived_in(dir: &Path) -> (Vec<Record>, u64) {
    let (mut store, _) = open(dir, options(Duration::ZERO)).unwrap();
    let sources = (1..=2).map(|source| declare(source, SourceKind::Log, "telemetry"));
    persist(&mut store, vec![group(1, sources.collect())]);
    let (mut lsn, mut kept) = (1, Vec::new());
    for alarm in 1..=20u64 {
        lsn += 1;
        kept.push(log(1, alarm, &alarm.to_be_bytes()));
        let telemetry = (0..4).map(|part| log(2, alarm * 4 + part, &[2; 900]));
        let records = telemetry.chain([kept[kept.len() - 1].clone(), put(3, "key", lsn, &[lsn as u8])]);
        persist(&mut store, vec![group(lsn, records.collect())]);
    }
    persist(&mut store, vec![group(lsn + 1, vec![table(2, 80)])]);
    lsn += 1;
    for _ in 0..1000 {
        if names(dir).iter().any(|name| name.starts_with("old-")) {
            break;
        }
        lsn += 1;
        persist(&mut store, vec![group(lsn, vec![put(3, "tick", lsn, b"")])]);
    }
    (kept, lsn)
}

#[test]
fn a_checkpoint_that_is_lost_is_made_anew_from_the_journal() {
    for damage in ["removed", "zeroed", "shortened"] {
        let dir = tempfile::tempdir().unwrap();
        let (kept, lsn) = lived_in(dir.path());
        assert!(names(dir.path()).iter().any(|name| name.starts_with("old-")), "{:?}", names(dir.path()));
        let file = dir.path().join("checkpoint/data.mdb");
        match damage {
            "removed" => std::fs::remove_dir_all(dir.path().join("checkpoint")).unwrap(),
            "zeroed" => {
                let file = OpenOptions::new().write(true).open(&file).unwrap();
                file.write_all_at(&[0; 4096], 2 * 4096).unwrap();
                file.write_all_at(&[0; 4096], 3 * 4096).unwrap();
                file.write_all_at(&[0; 8192], 0).unwrap();
            }
            _ => OpenOptions::new().write(true).open(&file).unwrap().set_len(3 * 4096).unwrap(),
        }
        let (mut store, recovered) = open(dir.path(), options(NEVER)).unwrap();
        assert!(recovered.uncertain && !recovered.damage.is_empty(), "{damage}");
        assert_eq!(recovered.last_lsn, lsn);
        assert_eq!(recovered.sources.iter().take(2).map(|source| source.number).collect::<Vec<_>>(), [1, 2]);
        assert_eq!(&*recovered.sources[0].name, "telemetry");
        assert_eq!(read(&mut store, 1, 0, usize::MAX), kept, "{damage}");
        assert_eq!(quarantined(dir.path()).len(), usize::from(damage != "removed"));
        // Killed before the core has written what follows: it is still uncertain, and rewritten segments are there.
        store.kill();
        let (mut store, again) = open(dir.path(), options(NEVER)).unwrap();
        assert!(again.uncertain, "nothing was written since");
        assert_eq!(read(&mut store, 1, 0, usize::MAX), kept);
        persist(&mut store, vec![group(lsn + 1, vec![fact(Kind::META, b"minted", Some(b"1"))])]);
        drop(store);
        let (_store, later) = open(dir.path(), options(NEVER)).unwrap();
        assert!(!later.uncertain && later.damage.is_empty(), "{:?}", later.damage);
    }
}

#[test]
fn whatever_bits_of_a_checkpoint_rot_no_payload_is_wrong_and_no_log_loses_a_record_in_silence() {
    let original = tempfile::tempdir().unwrap();
    let (kept, lsn) = lived_in(original.path());
    let bytes = std::fs::read(original.path().join("checkpoint/data.mdb")).unwrap();
    let mut found = [0; 2];
    for seed in 0..120 {
        let mut rng = StdRng::seed_from_u64(seed);
        let dir = tempfile::tempdir().unwrap();
        for part in ["journal", "checkpoint"] {
            std::fs::create_dir(dir.path().join(part)).unwrap();
            for entry in std::fs::read_dir(original.path().join(part)).unwrap() {
                let entry = entry.unwrap();
                std::fs::copy(entry.path(), dir.path().join(part).join(entry.file_name())).unwrap();
            }
        }
        let at = loop {
            let at = rng.random_range(0..bytes.len());
            // Most of a page is unused, and flips there say nothing.
            if bytes[at] != 0 {
                break at;
            }
        };
        flip(&dir.path().join("checkpoint/data.mdb"), at as u64);
        let (mut store, recovered) = match open(dir.path(), options(NEVER)) {
            Ok(opened) => opened,
            Err(OpenError::Format { .. } | OpenError::Checkpoint { .. }) => continue,
            Err(error) => panic!("seed {seed}, byte {at}: {error}"),
        };
        found[usize::from(!recovered.damage.is_empty())] += 1;
        let context = format!("seed {seed}, byte {at}, {:?}", recovered.damage);
        assert_eq!(recovered.last_lsn, lsn, "{context}");
        for record in &recovered.state {
            let revision = record.header.seq;
            let right = [put(3, "key", revision, &[revision as u8]), put(3, "tick", revision, b"")];
            assert!(right.contains(record), "{context}");
        }
        let mut next_seq = 1;
        for record in read(&mut store, 1, 0, usize::MAX) {
            if record.header.kind == Kind::GAP {
                next_seq = corrupted(&record).end() + 1;
            } else {
                let seq = record.header.seq;
                assert!(seq == next_seq || !recovered.damage.is_empty() && next_seq == 1, "{context}");
                assert_eq!(record, kept[seq as usize - 1], "{context}");
                next_seq = seq + 1;
            }
        }
        assert_eq!(next_seq, 21, "{context}");
    }
    assert!(found.iter().all(|count| *count > 0), "{found:?}");
}
