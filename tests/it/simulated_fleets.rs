//! A simulated fleet measures what it says, aims where it was told, and checks what it did.

use std::{fs, net::UdpSocket, path::Path, process::Command, time::Duration};

use octobus_tests::{
    clock,
    octobus::{binary, folder},
    process::{Finished, Process, run_command},
    servers::NatsServers,
};
use serde_json::Value;

/// Longest run of a small fleet on a busy machine.
const RUN: Duration = Duration::from_secs(180);

fn loadtest(args: &[&str]) -> Finished {
    let mut command = Command::new(binary("loadtest"));
    // Its hubs have its environment; the servers of the tests have less room than a tier's.
    command.args(args).env_remove("RUST_LOG").env("OCTOBUS_FABRIC_LOG_BYTES", "1GiB");
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
fn telemetry_arrives_once_and_in_order() {
    let line = passes(&["telemetry", "--nodes", "200", "--hold", "2s", "--set", "per_s=2"]);
    assert_eq!((line["missing"].as_u64(), line["twice"].as_u64()), (Some(0), Some(0)));
    assert!(line["published"].as_u64().unwrap() > 0, "{line}");
    assert_eq!(line["arrived"], line["published"]);
    assert!(line["message_p99_us"].is_number(), "{line}");
}

#[test]
fn a_change_reaches_every_node() {
    let line = passes(&["fan-out", "--nodes", "200", "--set", "times=2"]);
    assert!(line["change_p99_us"].is_number(), "{line}");
}

#[test]
fn a_killed_hub_loses_nothing_and_everybody_comes_back() {
    for (kind, down) in [("storm", "down=500ms"), ("rolling-restart", "down=0s")] {
        let fast = ["--heartbeat", "3s", "--hold", "1s", "--set", "per_s=1"];
        let line = passes(&[&[kind, "--nodes", "200", "--set", down], &fast[..]].concat());
        assert_eq!(line["return_s"].as_array().unwrap().len(), 1, "{line}");
        assert_eq!(line["arrived"], line["published"], "{line}");
    }
}

#[test]
fn replicas_are_killed_and_restarted_in_order_and_lose_nothing() {
    let servers = NatsServers::start(1);
    let (list, password) = (servers.list(), servers.password_file());
    let (user, _password) = servers.hub_user();
    let tier = ["--replicas", "2", "--fabric", &list, "--fabric-user", user, "--fabric-password-file"];
    // The second run is of the same tier.
    let data = folder();
    let tier = [&tier[..], &[password.to_str().unwrap(), "--data", data.path().to_str().unwrap()]].concat();
    let fast = ["--nodes", "40", "--heartbeat", "1s", "--hold", "1s", "--set", "per_s=1"];
    for (run, times) in [(&["storm", "--set", "killed=1"][..], 1), (&["rolling-restart"][..], 2)] {
        let line = passes(&[run, &fast[..], &tier].concat());
        assert_eq!(line["return_s"].as_array().unwrap().len(), times, "{line}");
        assert_eq!((line["missing"].as_u64(), line["twice"].as_u64()), (Some(0), Some(0)), "{line}");
        assert!(line["published"].as_u64().unwrap() > 0, "{line}");
    }
}

#[test]
fn a_run_that_is_killed_leaves_no_hub() {
    let folder = folder();
    let mut command = Command::new(binary("loadtest"));
    command.args(["steady", "--self-hosted", "--nodes", "1", "--hold", "10m", "--data"]).arg(folder.path());
    let mut run = Process::spawn("loadtest", &mut command);
    let endpoints: Value = clock::wait_for("its hub", RUN, || {
        serde_json::from_slice(&fs::read(folder.path().join("loadtest-ready.json")).ok()?).ok()
    });
    let port = endpoints["quic"].as_str().unwrap();
    assert!(UdpSocket::bind(port).is_err(), "the hub has its port");
    run.kill();
    clock::wait_for("the hub's port to be free", Duration::from_secs(10), || UdpSocket::bind(port).ok());
}

#[test]
fn nodes_come_and_go() {
    let line = passes(&["churn", "--nodes", "200", "--hold", "2s", "--set", "per_s=100"]);
    assert!(line["resumed"].as_u64().unwrap() > 0, "{line}");
}

#[test]
fn windows_beat_one_message_in_flight() {
    let line = passes(&["downlink", "--set", "messages=2000"]);
    let rate = |key: &str| line[key].as_f64().unwrap();
    assert!(rate("windows_per_s") > 10.0 * rate("one_in_flight_per_s"), "{line}");
}

#[test]
fn the_commands_of_the_documentation_run() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let text = fs::read_to_string(root.join("docs/loadtest.md")).unwrap();
    let blocks = text.split("```sh\n").skip(1).filter_map(|block| block.split("```").next());
    let commands: Vec<_> = blocks.flat_map(str::lines).collect();
    assert!(commands.len() >= 4, "{commands:?}");
    let here = folder();
    for line in commands {
        let mut command = Command::new(binary("loadtest"));
        let args = line.strip_prefix("loadtest ").unwrap_or_else(|| panic!("not a loadtest: {line}"));
        command.args(args.split_whitespace()).current_dir(here.path()).env_remove("RUST_LOG");
        let ran = run_command(RUN, &mut command);
        assert!(ran.status.success(), "{line}:\n{:?}\n{:?}", ran.stdout, ran.stderr);
    }
    let picture = fs::read_to_string(here.path().join("storm.svg")).unwrap();
    assert!(picture.starts_with("<svg") && picture.matches("<polyline").count() == 5);
}

#[test]
fn a_hub_that_is_restarted_in_order_under_its_nodes_loses_nothing_that_it_acknowledged() {
    let rolling = ["rolling-restart", "--nodes", "200", "--hold", "3s", "--set", "times=2"];
    let line = passes(&rolling);
    let count = |key: &str| line[key].as_u64().unwrap_or_else(|| panic!("{key} of {line}"));
    assert_eq!((count("missing"), count("twice"), count("disordered")), (0, 0, 0), "{line}");
    assert!(count("published") > 0 && count("arrived") >= count("published"), "{line}");
}

#[test]
fn certificates_and_enrolments_serve_the_next_run() {
    let folder = folder();
    let data = folder.path().join("hub");
    let data = data.to_str().unwrap();
    let run = || passes(&["connect", "--nodes", "20", "--hold", "1s", "--data", data]);
    assert!(run()["hub_rss_bytes_per_enrolment"].is_number());
    assert!(run()["hub_rss_bytes_per_enrolment"].is_null(), "all were enrolled");
}

#[test]
fn it_aims_at_nobody_by_itself_and_names_every_mistake() {
    let mut command = Command::new(binary("octobus"));
    let ran = run_command(RUN, command.args(["loadtest", "steady"]));
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
