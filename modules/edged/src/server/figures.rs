//! What pods use, in kubelet's two forms.

use std::fmt::Write as _;

use serde_json::{Value, json};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use crate::stats::{ContainerUse, Cpu, Disk, Memory, Use};

/// `/stats/summary`.
pub(super) fn summary(used: &Use) -> Value {
    let at = used.at;
    let pods = used.pods.iter().map(|of| {
        let containers: Vec<Value> = of.containers.iter().map(container).collect();
        let mut pod = json!({
            "podRef": {
                "name": of.pod.name, "namespace": of.pod.namespace, "uid": of.pod.uid,
            },
            "startTime": stamp(of.pod.started_at),
            "containers": containers,
        });
        let (cpu, memory) = sums(&of.containers);
        put(&mut pod, "cpu", cpu.map(|cpu| cpu_value(at, cpu)));
        put(&mut pod, "memory", memory.map(|memory| memory_value(at, memory)));
        pod
    });
    let pods: Vec<Value> = pods.collect();
    let mut node = json!({ "nodeName": used.node });
    put(&mut node, "startTime", used.booted.map(|nanos| Value::from(stamp(nanos))));
    put(&mut node, "cpu", used.cpu.map(|cpu| cpu_value(at, cpu)));
    put(&mut node, "memory", used.memory.map(|memory| memory_value(at, memory)));
    put(&mut node, "fs", used.disk.map(|disk| disk_value(at, disk)));
    json!({ "node": node, "pods": pods })
}

fn container(of: &ContainerUse) -> Value {
    let mut value = json!({ "name": of.name });
    put(&mut value, "cpu", of.cpu.map(|cpu| cpu_value(of.at, cpu)));
    put(&mut value, "memory", of.memory.map(|memory| memory_value(of.at, memory)));
    let written = of.written.map(|used| json!({ "time": stamp(of.at), "usedBytes": used }));
    put(&mut value, "rootfs", written);
    value
}

/// Of a pod: what all its containers use, where all of them say it.
fn sums(containers: &[ContainerUse]) -> (Option<Cpu>, Option<Memory>) {
    if containers.is_empty() {
        return (None, None);
    }
    let cpus: Option<Vec<Cpu>> = containers.iter().map(|of| of.cpu).collect();
    let cpu = cpus.map(|cpus| Cpu {
        core_nanos: cpus.iter().map(|cpu| cpu.core_nanos).sum(),
        nano_cores: cpus.iter().map(|cpu| cpu.nano_cores).sum(),
    });
    let memories: Option<Vec<Memory>> = containers.iter().map(|of| of.memory).collect();
    let memory = memories.map(|memories| Memory {
        working_set: memories.iter().map(|memory| memory.working_set).sum(),
        usage: memories.iter().map(|memory| memory.usage).sum(),
        rss: memories.iter().map(|memory| memory.rss).sum(),
        // What is left to each does not add up.
        available: None,
    });
    (cpu, memory)
}

fn put(into: &mut Value, name: &str, value: Option<Value>) {
    if let Some(value) = value {
        into[name] = value;
    }
}

fn cpu_value(at: i64, cpu: Cpu) -> Value {
    let mut value = json!({ "time": stamp(at), "usageCoreNanoSeconds": cpu.core_nanos });
    put(&mut value, "usageNanoCores", cpu.nano_cores.map(Value::from));
    value
}

fn memory_value(at: i64, memory: Memory) -> Value {
    let mut value = json!({ "time": stamp(at) });
    for (name, bytes) in [
        ("availableBytes", memory.available),
        ("usageBytes", memory.usage),
        ("workingSetBytes", memory.working_set),
        ("rssBytes", memory.rss),
    ] {
        put(&mut value, name, bytes.map(Value::from));
    }
    value
}

fn disk_value(at: i64, disk: Disk) -> Value {
    json!({
        "time": stamp(at),
        "capacityBytes": disk.capacity,
        "availableBytes": disk.available,
        "usedBytes": disk.used,
        "inodes": disk.inodes,
        "inodesFree": disk.inodes_free,
        "inodesUsed": disk.inodes.saturating_sub(disk.inodes_free),
    })
}

fn stamp(nanos: i64) -> String {
    let time = OffsetDateTime::from_unix_timestamp_nanos(i128::from(nanos)).ok();
    // Years beyond four digits have no such form.
    time.and_then(|time| time.format(&Rfc3339).ok()).unwrap_or_default()
}

/// `/metrics/resource`, in Prometheus' text format.
pub(super) fn metrics(used: &Use) -> String {
    let mut text = String::new();
    let millis = |nanos: i64| nanos / 1_000_000;
    let each =
        || used.pods.iter().flat_map(|of| of.containers.iter().map(move |container| (&of.pod, container)));
    let labels = |pod: &super::PodView, container: Option<&str>| {
        let container = container.map(|name| format!("container=\"{}\",", escaped(name))).unwrap_or_default();
        format!("{{{container}namespace=\"{}\",pod=\"{}\"}}", escaped(&pod.namespace), escaped(&pod.name))
    };

    head(
        &mut text,
        "container_cpu_usage_seconds_total",
        "counter",
        "Cumulative cpu time consumed by the container in core-seconds",
    );
    for (pod, container) in each() {
        if let Some(cpu) = container.cpu {
            let labels = labels(pod, Some(&container.name));
            line(
                &mut text,
                "container_cpu_usage_seconds_total",
                &labels,
                seconds(cpu.core_nanos),
                millis(container.at),
            );
        }
    }
    head(
        &mut text,
        "container_memory_working_set_bytes",
        "gauge",
        "Current working set of the container in bytes",
    );
    for (pod, container) in each() {
        if let Some(bytes) = container.memory.and_then(|memory| memory.working_set) {
            let labels = labels(pod, Some(&container.name));
            line(&mut text, "container_memory_working_set_bytes", &labels, bytes, millis(container.at));
        }
    }
    head(
        &mut text,
        "node_cpu_usage_seconds_total",
        "counter",
        "Cumulative cpu time consumed by the node in core-seconds",
    );
    if let Some(cpu) = used.cpu {
        line(&mut text, "node_cpu_usage_seconds_total", "", seconds(cpu.core_nanos), millis(used.at));
    }
    head(&mut text, "node_memory_working_set_bytes", "gauge", "Current working set of the node in bytes");
    if let Some(bytes) = used.memory.and_then(|memory| memory.working_set) {
        line(&mut text, "node_memory_working_set_bytes", "", bytes, millis(used.at));
    }
    head(
        &mut text,
        "pod_cpu_usage_seconds_total",
        "counter",
        "Cumulative cpu time consumed by the pod in core-seconds",
    );
    for of in &used.pods {
        if let (Some(cpu), _) = sums(&of.containers) {
            line(
                &mut text,
                "pod_cpu_usage_seconds_total",
                &labels(&of.pod, None),
                seconds(cpu.core_nanos),
                millis(used.at),
            );
        }
    }
    head(&mut text, "pod_memory_working_set_bytes", "gauge", "Current working set of the pod in bytes");
    for of in &used.pods {
        if let Some(bytes) = sums(&of.containers).1.and_then(|memory| memory.working_set) {
            line(&mut text, "pod_memory_working_set_bytes", &labels(&of.pod, None), bytes, millis(used.at));
        }
    }
    head(
        &mut text,
        "resource_scrape_error",
        "gauge",
        "1 if there was an error while getting container metrics, 0 otherwise",
    );
    text.push_str(if used.incomplete { "resource_scrape_error 1\n" } else { "resource_scrape_error 0\n" });
    text
}

fn head(text: &mut String, name: &str, kind: &str, help: &str) {
    writeln!(text, "# HELP {name} [STABLE] {help}\n# TYPE {name} {kind}").expect("a string takes it");
}

fn line(text: &mut String, name: &str, labels: &str, value: impl std::fmt::Display, millis: i64) {
    writeln!(text, "{name}{labels} {value} {millis}").expect("a string takes it");
}

/// Exactly, where a float would lose nanoseconds after some months.
fn seconds(nanos: u64) -> String {
    format!("{}.{:09}", nanos / 1_000_000_000, nanos % 1_000_000_000)
}

fn escaped(label: &str) -> String {
    label.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{server::PodView, stats::PodUse};

    fn used() -> Use {
        let at = 1_700_000_000_000_000_000;
        let container = |name: &str| ContainerUse {
            name: name.to_owned(),
            at,
            cpu: Some(Cpu { core_nanos: 1_500_000_000, nano_cores: Some(250_000_000) }),
            memory: Some(Memory { working_set: Some(1 << 20), ..Memory::default() }),
            written: Some(4096),
        };
        let pod = PodView {
            namespace: "ns".into(),
            name: "web".into(),
            uid: "u".into(),
            started_at: at,
            ..PodView::default()
        };
        Use {
            node: "edge-1".to_owned(),
            at,
            booted: Some(at),
            cpu: Some(Cpu { core_nanos: 2_000_000_001, nano_cores: None }),
            memory: None,
            disk: None,
            pods: vec![PodUse { pod, containers: vec![container("a"), container("b")] }],
            incomplete: false,
        }
    }

    #[test]
    fn a_summary_has_what_is_known_and_sums_pods() {
        let summary = summary(&used());
        let pod = &summary["pods"][0];
        assert_eq!(pod["podRef"], json!({ "name": "web", "namespace": "ns", "uid": "u" }));
        assert_eq!(pod["cpu"]["usageNanoCores"], 500_000_000);
        assert_eq!(pod["memory"]["workingSetBytes"], 2 << 20);
        assert_eq!(pod["containers"][1]["name"], "b");
        assert_eq!(summary["node"]["cpu"]["time"], "2023-11-14T22:13:20Z");
        assert!(
            summary["node"].get("memory").is_none() && summary["node"]["cpu"].get("usageNanoCores").is_none()
        );
    }

    #[test]
    fn metrics_are_lines_that_prometheus_reads() {
        let text = metrics(&used());
        for line in [
            "container_cpu_usage_seconds_total{container=\"a\",namespace=\"ns\",pod=\"web\"} 1.500000000 1700000000000",
            "pod_memory_working_set_bytes{namespace=\"ns\",pod=\"web\"} 2097152 1700000000000",
            "node_cpu_usage_seconds_total 2.000000001 1700000000000",
            "resource_scrape_error 0",
        ] {
            assert!(text.lines().any(|has| has == line), "{line}\nin\n{text}");
        }
    }
}
