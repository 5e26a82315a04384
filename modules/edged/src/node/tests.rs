use serde_json::Value;

use super::*;

fn node() -> Node {
    Node {
        name: "edge-1".to_owned(),
        max_pods: 110,
        reserved: serde_json::from_value(json!({"cpu": "100m", "memory": "200Mi"})).expect("resources"),
        labels: [("site".to_owned(), "plant-1".to_owned())].into(),
        version: "0.1.0".to_owned(),
    }
}

fn machine() -> Machine {
    Machine {
        cpus: 4,
        memory: 8 << 30,
        architecture: "arm64".to_owned(),
        kernel: "6.1.0".to_owned(),
        os_image: "Debian 12".to_owned(),
        machine_id: "m".to_owned(),
        boot_id: "b".to_owned(),
        system_uuid: "u".to_owned(),
        ..Machine::default()
    }
}

fn observed() -> Observed {
    let version = cri::VersionResponse {
        runtime_name: "containerd".to_owned(),
        runtime_version: "1.6.20".to_owned(),
        ..cri::VersionResponse::default()
    };
    Observed {
        runtime: Ok((version, said(&[("RuntimeReady", true), ("NetworkReady", true)]))),
        images: Vec::new(),
        load: Load {
            memory_available: 4 << 30,
            disk: Disk { bytes: 100_000_000, bytes_free: 50_000_000, inodes: 1_000, inodes_free: 500 },
            images: None,
            pids: 100,
            pids_max: 32_000,
        },
        clock_trusted: Some(true),
        addresses: vec!["192.0.2.7".parse().expect("an address")],
    }
}

fn said(conditions: &[(&str, bool)]) -> cri::RuntimeStatus {
    let conditions = conditions.iter().map(|(kind, status)| cri::RuntimeCondition {
        r#type: (*kind).to_owned(),
        status: *status,
        reason: "Because".to_owned(),
        message: "so it is".to_owned(),
    });
    cri::RuntimeStatus { conditions: conditions.collect() }
}

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(1_800_000_000 + second).expect("a time")
}

fn told(report: &mut Report, second: i64, observed: &Observed) -> Option<Value> {
    report.changed(at(second), observed).map(|bytes| serde_json::from_slice(&bytes).expect("JSON"))
}

/// Status, reason and message of a condition.
fn condition(value: &Value, kind: &str) -> (String, String, String) {
    let all = value["status"]["conditions"].as_array().expect("conditions");
    let found = all.iter().find(|condition| condition["type"] == kind).expect(kind);
    let text = |field: &str| found[field].as_str().unwrap_or_default().to_owned();
    (text("status"), text("reason"), text("message"))
}

#[test]
fn a_node_tells_what_it_is() {
    let mut report = Report::new(node(), machine());
    let value = told(&mut report, 0, &observed()).expect("told");
    let status = &value["status"];
    assert_eq!(
        status["capacity"],
        json!({"cpu": "4", "memory": "8388608Ki", "ephemeral-storage": "97656Ki", "pods": "110"})
    );
    assert_eq!(
        status["allocatable"],
        json!({"cpu": "3900m", "memory": "8081408Ki", "ephemeral-storage": "89999770", "pods": "110"})
    );
    let info = &status["nodeInfo"];
    assert_eq!(info["kubeletVersion"], "v1.33.0-octobus-0.1.0");
    assert_eq!(info["containerRuntimeVersion"], "containerd://1.6.20");
    assert_eq!(info["architecture"], "arm64");
    assert_eq!(info["osImage"], "Debian 12");
    assert_eq!(info["systemUUID"], "u");
    assert_eq!(value["addresses"], json!(["192.0.2.7"]));
    let labels = json!({
        "kubernetes.io/os": "linux", "kubernetes.io/arch": "arm64", "kubernetes.io/hostname": "edge-1", "site": "plant-1",
    });
    assert_eq!(value["labels"], labels);
    assert_eq!(
        condition(&value, "Ready"),
        ("True".into(), "KubeletReady".into(), "kubelet is posting ready status".into())
    );
    for (kind, status) in [
        ("MemoryPressure", "False"),
        ("DiskPressure", "False"),
        ("PIDPressure", "False"),
        ("ClockTrusted", "True"),
    ] {
        assert_eq!(condition(&value, kind).0, status, "{kind}");
    }
    assert!(status.get("addresses").is_none() && status.get("daemonEndpoints").is_none());
}

#[test]
fn nothing_is_told_while_nothing_changes() {
    let mut report = Report::new(node(), machine());
    let mut observed = observed();
    told(&mut report, 0, &observed).expect("told");
    observed.load.memory_available -= 1 << 20;
    observed.load.disk.bytes_free -= 1 << 20;
    assert_eq!(
        told(&mut report, 10, &observed),
        None,
        "what is left is told only where it turns a condition"
    );
    observed.clock_trusted = Some(false);
    let value = told(&mut report, 20, &observed).expect("told");
    assert_eq!(condition(&value, "ClockTrusted").0, "False");
    assert_eq!(told(&mut report, 30, &observed), None);
}

#[test]
fn without_a_runtime_or_its_network_it_is_not_ready_and_says_why() {
    for (runtime, reason, message) in [
        (
            Err("no socket: install containerd".to_owned()),
            "RuntimeUnavailable",
            "container runtime is down: no socket: install containerd",
        ),
        (
            Ok(said(&[("RuntimeReady", true), ("NetworkReady", false)])),
            "NetworkNotReady",
            "container runtime network not ready: NetworkReady=false reason:Because message:so it is",
        ),
        (
            Ok(said(&[("NetworkReady", true)])),
            "RuntimeNotReady",
            "container runtime status check not ready: RuntimeReady is not told",
        ),
    ] {
        let mut report = Report::new(node(), machine());
        let runtime = runtime.map(|status| (cri::VersionResponse::default(), status));
        let value = told(&mut report, 0, &Observed { runtime, ..observed() }).expect("told");
        assert_eq!(condition(&value, "Ready"), ("False".into(), "KubeletNotReady".into(), message.into()));
        assert_eq!(condition(&value, "RuntimeReady"), ("False".into(), reason.into(), message.into()));
    }
}

#[test]
fn pressure_begins_at_once_and_ends_a_while_after_it_was_last_seen() {
    let calm = observed();
    let mut short = observed();
    short.load.memory_available = 99 << 20;
    let mut report = Report::new(node(), machine());
    let is = |value: Option<Value>| condition(&value.expect("told"), "MemoryPressure").0;
    assert_eq!(is(told(&mut report, 0, &calm)), "False");
    assert_eq!(is(told(&mut report, 10, &short)), "True");
    assert_eq!(told(&mut report, 20, &calm), None);
    assert_eq!(told(&mut report, 309, &calm), None);
    let value = told(&mut report, 310, &calm).expect("told");
    assert_eq!(condition(&value, "MemoryPressure").0, "False");
    let all = value["status"]["conditions"].as_array().expect("conditions");
    let since = |kind: &str| {
        all.iter().find(|found| found["type"] == kind).expect(kind)["lastTransitionTime"].clone()
    };
    assert_eq!(since("MemoryPressure"), json!(at(310).to_string()));
    assert_eq!(since("Ready"), json!(at(0).to_string()), "what did not turn keeps its time");
}

#[test]
fn full_disks_and_many_processes_are_pressure() {
    let of = |change: fn(&mut Load), kind: &str| {
        let mut observed = observed();
        change(&mut observed.load);
        let value = told(&mut Report::new(node(), machine()), 0, &observed).expect("told");
        condition(&value, kind).0
    };
    assert_eq!(of(|load| load.disk.bytes_free = 9_999_999, "DiskPressure"), "True");
    assert_eq!(of(|load| load.disk.bytes_free = 10_000_000, "DiskPressure"), "False");
    assert_eq!(of(|load| load.disk.inodes_free = 49, "DiskPressure"), "True");
    let of_images: fn(&mut Load) = |load| {
        load.images = Some(Disk { bytes: 1_000_000, bytes_free: 149_000, inodes: 0, inodes_free: 0 });
    };
    assert_eq!(of(of_images, "DiskPressure"), "True");
    assert_eq!(of(|load| load.disk.inodes = 0, "DiskPressure"), "False", "a file system without inodes");
    assert_eq!(of(|load| load.pids = 30_000, "PIDPressure"), "True");
}

#[test]
fn the_largest_images_are_told_with_a_few_names_each() {
    let image = |number: u64| cri::Image {
        id: format!("sha256:{number}"),
        repo_tags: (0..10).map(|tag| format!("web:{number}.{tag}")).collect(),
        repo_digests: vec![format!("web@sha256:{number}")],
        size: number,
        ..cri::Image::default()
    };
    let all: Vec<_> = (0..60).map(image).collect();
    let told = images(&all);
    assert_eq!(told.len(), 50);
    assert_eq!(told[0].size_bytes, Some(59));
    let names = told[0].names.as_ref().expect("names");
    assert_eq!((names.len(), names[0].as_str(), names[1].as_str()), (5, "web@sha256:59", "web:59.0"));
}

#[test]
fn huge_pages_are_no_ordinary_memory() {
    let mut machine = machine();
    machine.huge_pages.insert("2Mi".to_owned(), 1 << 30);
    let capacity = capacity(&machine, Disk::default(), &node());
    assert_eq!(capacity["hugepages-2Mi"].0, "1048576Ki");
    let left = allocatable(&capacity, &node());
    assert_eq!(left["memory"].0, format!("{}Ki", 8_388_608 - 300 * 1024 - 1_048_576));
    assert_eq!(left["hugepages-2Mi"].0, "1073741824");
}
