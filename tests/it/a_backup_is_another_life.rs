//! Pins that a backup of a running process can be restored and used: it is whole, it opens, nodes link again,
//! and what a restored node says is not mistaken for what the original said after the backup was made.

use std::{
    collections::BTreeSet,
    path::Path,
    sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    time::Duration,
};

use octobus_tests::{
    clock, log, mqtt,
    octobus::{NODE, Pair, Running, folder, octobus},
};

const SOON: Duration = Duration::from_secs(60);

#[test]
fn what_a_backup_under_load_restores_links_again_and_is_not_mistaken_for_the_original() {
    let folder = folder();
    let pair = Pair::joined(folder.path(), |quic| quic);
    let (hub, node) = (pair.hub.start(), pair.node.start());
    let backups = folder.path().join("backups");
    let (said, enough) = (AtomicU64::new(0), AtomicBool::new(false));
    let monday = std::thread::scope(|scope| {
        let _ended = Ended(&enough);
        let device = scope.spawn(|| say_until(&node, "monday", &said, &enough));
        wait_for_said(&said, 200);
        back_up(&node.admin(), &backups.join("node"));
        back_up(&hub.admin(), &backups.join("hub"));
        let at = said.load(Relaxed);
        wait_for_said(&said, at + 200);
        enough.store(true, Relaxed);
        device.join().unwrap()
    });
    arrives(&hub, &[("monday", monday)]);
    node.stop();
    hub.stop();
    for name in ["node", "hub"] {
        let (backup, data) = (backups.join(name), folder.path().join(format!("restored-{name}")));
        fsck(&backup);
        octobus(&["restore", text(&backup), text(&data)]).ok();
        let again = octobus(&["restore", text(&backup), text(&data)]);
        assert!(!again.status.success(), "a folder that is in use is never overwritten");
    }

    // The hub as of the backup: the node sends again what the hub does not know any more.
    let (restored_hub, node) = (pair.hub.on(&folder.path().join("restored-hub")).start(), pair.node.start());
    arrives(&restored_hub, &[("monday", monday)]);
    node.stop();
    restored_hub.stop();

    // The node as of the backup: its numbers begin again where the hub has others.
    let (hub, restored) = (pair.hub.start(), pair.node.on(&folder.path().join("restored-node")).start());
    let tuesday = say(&restored, "tuesday", 10);
    let lines = arrives(&hub, &[("tuesday", tuesday), ("monday", monday)]);
    let epochs: BTreeSet<_> = log::records(&lines).into_iter().map(|record| record.epoch).collect();
    assert!(epochs.len() > 1, "another life has another epoch");
    let conditions = octobus(&["get", "conditions", "--admin", text(&hub.admin())]).ok();
    assert!(conditions.iter().any(|line| line.contains("EpochChanged")), "{conditions:?}");
    restored.stop();
    hub.stop();
}

/// Lets the device end when the test fails while it runs.
struct Ended<'a>(&'a AtomicBool);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

fn say_until(node: &Running, word: &str, said: &AtomicU64, enough: &AtomicBool) -> u64 {
    let mut client = mqtt::Client::connect(node.endpoint("mqtt"), &mqtt::Options::new(word)).unwrap();
    while !enough.load(Relaxed) {
        let number = said.load(Relaxed);
        client.publish_acked("diary", format!("{word} {number}").as_bytes(), false).unwrap();
        said.store(number + 1, Relaxed);
    }
    client.disconnect();
    said.load(Relaxed)
}

fn say(node: &Running, word: &str, count: u64) -> u64 {
    let mut client = mqtt::Client::connect(node.endpoint("mqtt"), &mqtt::Options::new(word)).unwrap();
    for number in 0..count {
        client.publish_acked("diary", format!("{word} {number}").as_bytes(), false).unwrap();
    }
    client.disconnect();
    count
}

fn wait_for_said(said: &AtomicU64, count: u64) {
    clock::wait_for("the device to go on", SOON, || (said.load(Relaxed) >= count).then_some(()));
}

fn back_up(admin: &Path, to: &Path) {
    octobus(&["backup", "--admin", text(admin), text(to)]).ok();
}

fn fsck(folder: &Path) {
    octobus(&["fsck", text(folder)]).ok();
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Waits until all of each word is at the hub, once in each history: a new one begins behind what the backup
/// knew of the hub, and repeats under its own epoch what the hub had got since.
fn arrives(hub: &Running, words: &[(&str, u64)]) -> Vec<log::Line> {
    let admin = hub.admin();
    clock::wait_for(&format!("{words:?} at the hub"), SOON, || {
        let lines = log::read(log::From::Admin(&admin), NODE, &[]);
        let records = log::records(&lines);
        let entries: BTreeSet<_> = records.iter().map(|record| (&record.epoch, &record.payload)).collect();
        assert_eq!(entries.len(), records.len(), "something is there twice in one history");
        let payloads: BTreeSet<_> = records.iter().map(|record| &record.payload).collect();
        let all = words.iter().all(|(word, count)| {
            (0..*count).all(|number| payloads.contains(&format!("{word} {number}").into_bytes()))
        });
        clock::pause(Duration::from_millis(100));
        all.then_some(lines)
    })
}
