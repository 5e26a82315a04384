//! A simulated fleet measures what it says, aims where it was told, and checks what it did.

use std::{fs, process::Command, time::Duration};

use octobus_tests::{
    octobus::{binary, folder},
    process::{Finished, run_command},
};
use serde_json::Value;

/// Longest run of a small fleet on a busy machine.
const RUN: Duration = Duration::from_secs(120);

fn loadtest(args: &[&str]) -> Finished {
    let mut command = Command::new(binary("loadtest"));
    command.args(args).env_remove("RUST_LOG");
    run_command(RUN, &mut command)
}

/// Runs a scenario with a hub of its own; its line, once it has passed its own checks.
fn passes(args: &[&str]) -> Value {
    let ran = loadtest(&[args, &["--self-hosted", "-o", "json"]].concat());
    assert!(ran.status.success(), "{args:?}:\n{:?}\n{:?}", ran.stdout, ran.stderr);
    let last = ran.stdout.last().expect("a line");
    serde_json::from_str(last).unwrap_or_else(|error| panic!("{error}: {last}"))
}

#[test]
fn steady_counts_every_heartbeat() {
    let line = passes(&["steady", "--nodes", "200", "--heartbeat", "1s", "--hold", "4s", "--processes", "2"]);
    assert_eq!((line["connected"].as_u64(), line["failed"].as_u64()), (Some(200), Some(0)));
    // Four rounds of 200; one more or less may fall into the watch.
    let heartbeats = line["heartbeats"].as_u64().unwrap();
    assert!((400..=1200).contains(&heartbeats), "{heartbeats} heartbeats");
    for key in ["hub_rss_bytes_per_node", "node_rss_bytes", "heartbeat_p50_us", "hub_cpu_us_per_heartbeat"] {
        assert!(line[key].is_number(), "{key} of {line}");
    }
    let watched: Vec<_> = line["cpu"].as_array().unwrap().iter().map(|cpu| &cpu["what"]).collect();
    assert_eq!(watched, ["hub", "worker", "worker"]);
}

#[test]
fn certificates_and_enrolments_serve_the_next_run() {
    let data = folder();
    let data = data.path().to_str().unwrap();
    let run = || passes(&["connect", "--nodes", "20", "--hold", "1s", "--data", data]);
    assert!(run()["hub_rss_bytes_per_enrolment"].is_number());
    assert!(run()["hub_rss_bytes_per_enrolment"].is_null(), "all were enrolled");
}

#[test]
fn it_aims_at_nobody_by_itself_and_names_every_mistake() {
    let ran = loadtest(&["steady"]);
    assert_eq!(ran.status.code(), Some(2));
    let said = ran.stderr.join("\n");
    assert!(said.contains("--self-hosted") && said.contains("--hub"), "{said}");

    let files = folder();
    let path = files.path().join("bad.toml");
    fs::write(&path, "kind = \"steady\"\nnodes = \"many\"\nhodl = \"1s\"\n").unwrap();
    let ran = loadtest(&[path.to_str().unwrap(), "--self-hosted", "--set", "rate=fast"]);
    assert_eq!(ran.status.code(), Some(2));
    for word in ["bad.toml", "nodes = \"many\"", "hodl: unknown", "rate = \"fast\""] {
        assert!(ran.stderr.join("\n").contains(word), "{word} is not in: {:?}", ran.stderr);
    }
}
