//! A store whose disk or map comes to an end.

use std::process::Command;

use super::*;

/// A Log of ten, of which each is this large.
fn fill(lsn: u64) -> Group {
    group(lsn, vec![log(1, lsn, &[lsn as u8; 3000])])
}

fn fact_of(lsn: u64, value: Option<&[u8]>) -> Group {
    group(lsn, vec![fact(Kind::CURSOR, b"cursor", value)])
}

/// The next event that is not [`StoreEvent::Persisted`].
fn turn(store: &mut LmdbStore) -> StoreEvent {
    loop {
        match next_of_all(store) {
            StoreEvent::Persisted(_) => {}
            event => return event,
        }
    }
}

#[test]
fn a_full_disk_is_said_a_segment_early_and_room_is_found_again_by_itself() {
    let dir = tempfile::tempdir().unwrap();
    let tape = Tape::default();
    let mut disk = Disk::new(JournalIo::Plain).unwrap();
    disk.tape = Some(tape.clone());
    let (mut store, _) = open_on(dir.path(), options(NEVER), disk).unwrap();
    persist(&mut store, vec![fill(1)]);
    tape.set_full(true);
    // It goes on in the segment that was held back, and there is no other after that one.
    tape.allow_one();
    store.submit(fill(2));
    assert!(matches!(turn(&mut store), StoreEvent::Low { reason } if reason.contains("segment")));
    for lsn in 3..10 {
        persist(&mut store, vec![fact_of(lsn, Some(b"moves on"))]);
    }
    store.submit(fill(10));
    assert!(matches!(turn(&mut store), StoreEvent::Refused { lsn: 10, .. }), "the end of what was held back");
    tape.set_full(false);
    assert!(matches!(turn(&mut store), StoreEvent::Ample));
    persist(&mut store, vec![fill(10)]);
    drop(store);
    let (_store, recovered) = open(dir.path(), options(NEVER)).unwrap();
    assert_eq!((recovered.last_lsn, recovered.logs[0].last), (10, 10));
}

#[test]
fn a_map_that_cannot_grow_is_an_error_and_no_end() {
    let dir = tempfile::tempdir().unwrap();
    let small = Options { map_bytes: 256 << 10, map_bytes_max: 64 << 20, ..options(Duration::ZERO) };
    let (mut store, _) = open(dir.path(), small.clone()).unwrap();
    store.shared.checkpoint.growth_fails.store(true, std::sync::atomic::Ordering::Relaxed);
    let mut lsn = 0;
    let reason = loop {
        lsn += 1;
        store.submit(group(lsn, vec![put(1, &format!("key/{lsn}"), lsn, &[7; 6000])]));
        match next(&mut store) {
            StoreEvent::Persisted(_) => {}
            StoreEvent::Refused { reason, .. } => break reason,
            other => panic!("{other:?}"),
        }
    };
    assert!(reason.contains("cannot grow"), "{reason}");
    // The file was opened anew: it can be read, and goes on once growing works.
    assert!(read(&mut store, 9, 0, 1).is_empty());
    store.shared.checkpoint.growth_fails.store(false, std::sync::atomic::Ordering::Relaxed);
    loop {
        store.submit(group(lsn, vec![put(1, &format!("key/{lsn}"), lsn, &[7; 6000])]));
        if matches!(next(&mut store), StoreEvent::Persisted(_)) {
            break;
        }
    }
    drop(store);
    let (_store, recovered) = open(dir.path(), small).unwrap();
    assert_eq!(recovered.state.len() as u64, lsn);
}

#[test]
fn a_map_that_is_nearly_full_is_said_and_deleting_makes_room() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = 2 << 20;
    let small = Options { map_bytes: bytes, map_bytes_max: bytes, ..options(Duration::ZERO) };
    let (mut store, _) = open(dir.path(), small).unwrap();
    let key = |number: u64| number.to_be_bytes();
    let mut lsn = 0;
    loop {
        lsn += 1;
        store.submit(group(lsn, vec![fact(Kind::SESSION, &key(lsn), Some(&[7; 3000]))]));
        match next_of_all(&mut store) {
            StoreEvent::Persisted(_) => {}
            StoreEvent::Low { reason } => {
                assert!(reason.contains("map"), "{reason}");
                break;
            }
            other => panic!("{other:?}"),
        }
    }
    let all = lsn;
    let deletes =
        (1..all / 2).map(|number| group(all + number, vec![fact(Kind::SESSION, &key(number), None)]));
    deletes.for_each(|group| store.submit(group));
    assert!(matches!(turn(&mut store), StoreEvent::Ample));
}

/// Set for the test below when it runs again where its disk is small.
const SMALL_DISK: &str = "OCTOBUS_TEST_SMALL_DISK";

#[test]
fn on_a_disk_that_is_really_full_retention_makes_room_and_nothing_is_lost() {
    if let Ok(dir) = std::env::var(SMALL_DISK) {
        return on_a_small_disk(Path::new(&dir));
    }
    let dir = tempfile::tempdir().unwrap();
    let test =
        "store::lmdb::tests::room::on_a_disk_that_is_really_full_retention_makes_room_and_nothing_is_lost";
    let script = "mount -t tmpfs -o size=6m none \"$0\" && exec \"$1\" --exact \"$2\" --nocapture";
    let mut run = Command::new("unshare");
    run.args(["--mount", "sh", "-c", script]).arg(dir.path()).arg(std::env::current_exe().unwrap()).arg(test);
    let output = run.env(SMALL_DISK, dir.path()).output();
    let output = match output {
        Ok(output) if String::from_utf8_lossy(&output.stderr).contains("not permitted") => {
            return eprintln!("not permitted to mount a small file system: not tested here");
        }
        Ok(output) => output,
        Err(error) => return eprintln!("no unshare ({error}): not tested here"),
    };
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains("1 passed"), "{output:?}");
}

/// Two rounds of: telemetry until there is no room; then only what moves positions and frees space, as the
/// core does it, until there is room again.
fn on_a_small_disk(dir: &Path) {
    let options = Options {
        segment_bytes: 512 << 10,
        checkpoint_bytes: 128 << 10,
        checkpoint_every: Duration::from_millis(10),
        ..Options::node()
    };
    let (mut store, _) = open(dir, options.clone()).unwrap();
    let mut model = MemStore::auto();
    let (mut lsn, mut seq) = (0, 0);
    for _ in 0..2 {
        loop {
            (lsn, seq) = (lsn + 1, seq + 1);
            let next = group(lsn, vec![log(1, seq, &[seq as u8; 8000]), put(2, "key", seq, &[1; 100])]);
            model.submit(next.clone());
            store.submit(next);
            match next_of_all(&mut store) {
                StoreEvent::Persisted(_) => {}
                StoreEvent::Low { .. } => break,
                other => panic!("{other:?}"),
            }
        }
        for round in 0..100u64 {
            lsn += 1;
            let next = fact_of(lsn, Some(&round.to_be_bytes()));
            model.submit(next.clone());
            persist(&mut store, vec![next]);
        }
        lsn += 1;
        let trim = group(lsn, vec![table(1, seq - 50)]);
        model.submit(trim.clone());
        store.submit(trim);
        assert!(matches!(turn(&mut store), StoreEvent::Ample));
    }
    drop(store);
    assert!(matches!(
        model.poll_event(&mut Context::from_waker(Waker::noop())),
        Poll::Ready(StoreEvent::Persisted(last)) if last == lsn
    ));
    let (mut store, recovered) = open(dir, options).unwrap();
    assert_eq!(comparable(recovered), comparable(model.recover()));
    assert_eq!(read(&mut store, 1, 0, usize::MAX), read(&mut model, 1, 0, usize::MAX));
}
