//! Pins the promise of State from a hub to its nodes, on real processes: a node gets what it must have, and
//! keeps it while its hub is wiped or put back to an older copy, until the hub has listed everything anew.

use std::{fs, path::Path, time::Duration};

use octobus_tests::{
    clock,
    octobus::{NODE, Octobus, Pair, Running, create_token, folder, octobus},
};
use serde_json::Value;

const SOON: Duration = Duration::from_secs(30);
const PODS: [&str; 3] = ["obj/core/pods/default/a", "obj/core/pods/default/b", "obj/core/pods/default/c"];

/// Runs a command at this process.
fn at(running: &Running, args: &[&str]) -> Vec<String> {
    let admin = running.admin();
    octobus(&[args, &["--admin", admin.to_str().unwrap()]].concat()).ok()
}

fn put(hub: &Running, keys: &[&str]) {
    for key in keys {
        at(hub, &["put", "fleet", key, "spec"]);
    }
}

/// Keys of objects that a process holds in `fleet`.
fn held(running: &Running) -> Vec<String> {
    let text = at(running, &["get", "state", "--space", "fleet", "--prefix", "obj/", "-o", "json"]);
    let rows: Vec<Value> = serde_json::from_str(&text.join("\n")).unwrap();
    rows.iter().map(|row| row["key"].as_str().unwrap().to_owned()).collect()
}

fn has(node: &Running, keys: &[&str]) {
    clock::wait_for(&format!("the node to hold {keys:?}"), SOON, || (held(node) == keys).then_some(()));
}

/// Waits until the node has taken everything that the hub said, by an entry that is sent after it.
fn told(hub: &Running, node: &Running, mark: &str) {
    at(hub, &["put", "fleet", "obj/core/configmaps/default/mark", mark]);
    at(hub, &["want", "add", NODE, "obj/core/configmaps/default/mark"]);
    clock::wait_for("the node to hear of it", SOON, || {
        let rows =
            at(node, &["get", "state", "--space", "fleet", "--prefix", "obj/core/configmaps", "-o", "json"]);
        let expected = base64::Engine::encode(&base64::prelude::BASE64_STANDARD, mark);
        rows.join("").contains(&format!("\"value\":\"{expected}\"")).then_some(())
    });
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &target);
        } else if entry.file_type().unwrap().is_file() {
            fs::copy(entry.path(), &target).unwrap();
        }
    }
}

/// The hub's store is lost; its authority (which every node trusts) is not.
fn wipe(hub: &Octobus) {
    for name in ["journal", "checkpoint"] {
        fs::remove_dir_all(hub.data().join(name)).unwrap();
    }
}

#[test]
fn a_node_keeps_what_it_has_while_its_hub_is_wiped_or_put_back_to_an_older_copy() {
    let folder = folder();
    let pair = Pair::joined(folder.path(), |quic| quic);
    let hub = pair.hub.start();
    let node = pair.node.start();

    // An object is put at the hub, wanted on the node, seen on the node; a watch says when that is all.
    put(&hub, &PODS[..2]);
    at(&hub, &[&["want", "set", NODE], &PODS[..2]].concat());
    at(&hub, &["barrier"]);
    has(&node, &PODS[..2]);
    clock::wait_for("the node to be told that this is all", SOON, || {
        let admin = node.admin();
        let three = ["watch", "fleet", "obj/", "--count", "3", "--admin", admin.to_str().unwrap()];
        octobus(&three).ok().last().is_some_and(|line| line.ends_with("synced")).then_some(())
    });
    // The node asks for a change of what it has, and gets it.
    at(&node, &["ask", "fleet", PODS[0], "from the node"]);
    at(&hub, &["get", "state", "--space", "fleet", "--prefix", PODS[0]]);
    hub.stop();

    // A copy from before the third pod.
    let older = folder.path().join("older");
    copy(pair.hub.data(), &older);
    let hub = pair.hub.start();
    put(&hub, &PODS[2..]);
    at(&hub, &["want", "add", NODE, PODS[2]]);
    has(&node, &PODS);
    hub.stop();
    for name in ["journal", "checkpoint", "instance.json"] {
        let (from, to) = (older.join(name), pair.hub.data().join(name));
        if from.is_dir() {
            fs::remove_dir_all(&to).unwrap();
            copy(&from, &to);
        } else {
            fs::copy(&from, &to).unwrap();
        }
    }
    let hub = pair.hub.start();
    told(&hub, &node, "after the older copy");
    let kept = held(&node);
    assert!(PODS.iter().all(|pod| kept.contains(&(*pod).to_owned())), "{kept:?}");
    put(&hub, &PODS[2..]);
    at(&hub, &["want", "add", NODE, PODS[2]]);
    at(&hub, &["barrier"]);
    hub.stop();

    // Now everything is lost. The node has to join again, for the hub does not know it.
    wipe(&pair.hub);
    let hub = pair.hub.start();
    let token = create_token(&hub.admin(), NODE);
    let bootstrap = format!("https://{}", pair.hub.address("--bootstrap"));
    node.stop();
    let data = pair.node.data().to_str().unwrap();
    octobus(&["join", "--again", "--hub", &bootstrap, "--token", &token, "--data", data]).ok();
    let node = pair.node.start();
    told(&hub, &node, "after the loss");
    let kept = held(&node);
    assert!(PODS.iter().all(|pod| kept.contains(&(*pod).to_owned())), "{kept:?}");
    // Two of three pods are not known any more: most of what the node runs, so it asks back.
    put(&hub, &PODS[..1]);
    at(&hub, &["want", "set", NODE, PODS[0]]);
    at(&hub, &["barrier"]);
    clock::wait_for("the node to hold the removal back", SOON, || {
        let conditions = at(&node, &["get", "conditions"]);
        conditions.iter().any(|line| line.starts_with("RemovalHeld")).then_some(())
    });
    let kept = held(&node);
    assert!(PODS.iter().all(|pod| kept.contains(&(*pod).to_owned())), "{kept:?}");
    at(&hub, &["accept-removal", "--node", NODE]);
    has(&node, &PODS[..1]);
    node.stop();
    hub.stop();
}
