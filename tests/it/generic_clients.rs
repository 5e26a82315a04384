//! Pins what client libraries build on: lists, watches, preconditions and deletions of the hub's API mean what they
//! mean everywhere, also while it is killed and started again. The client is the official one for Python.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    process::Stdio,
};

use octobus_tests::{
    octobus::{Octobus, Role, folder, free_port},
    stock::{Place, python},
};

#[test]
fn the_python_client_sees_no_event_missed_or_invented() {
    let folder = folder();
    let port = free_port().to_string();
    let octobus = Octobus::new(Role::Cloud, &folder.path().join("data")).args(&["--kubernetes", &port]);
    let mut hub = octobus.start();
    let mut client = python(Place::Here, "kube_semantics.py")
        .env("KUBECONFIG", hub.text("kubeconfig"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = client.stdin.take().unwrap();
    let mut held = Vec::new();
    for line in BufReader::new(client.stdout.take().unwrap()).lines().map(Result::unwrap) {
        match line.strip_prefix("holds ") {
            Some(case) => held.push(case.to_owned()),
            None => {
                assert_eq!(line, "restart");
                hub.process.kill();
                hub = octobus.start();
                input.write_all(b"\n").unwrap();
            }
        }
    }
    let status = client.wait().unwrap();
    assert!(status.success(), "{status}; held: {held:?}");
    assert_eq!(held.len(), 10, "{held:?}");
    hub.stop();
}
