//! What a run found: text for people, and one JSON line whose keys stay what they are.

use std::{collections::BTreeMap, fmt::Write as _};

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

use crate::wire::histogram;

/// A run's results. Every key is always there; what a scenario does not measure is `null`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// The kind of scenario.
    pub scenario: String,
    /// Nodes asked for, in this part of the fleet.
    pub nodes: u32,
    /// Processes that they ran in.
    pub processes: u32,
    /// Nodes linked when the ramp was over.
    pub connected: u64,
    /// Nodes that were not.
    pub failed: u64,
    /// Dials that came to nothing, those that a later one made good included.
    pub failed_dials: u64,
    /// Welcomes by a session ticket.
    pub resumed: u64,
    /// From the first dial to the last Welcome, seconds.
    pub ramp_s: f64,
    /// Nodes linked per second of it.
    pub handshakes_per_s: f64,
    /// Dial to Welcome, microseconds.
    pub welcome_p50_us: Option<u64>,
    /// Dial to Welcome, microseconds.
    pub welcome_p99_us: Option<u64>,
    /// The hub's resident memory for each linked node: what it grew by from before the first dial to the end of
    /// the hold.
    pub hub_rss_bytes_per_node: Option<f64>,
    /// The hub's resident memory for each enrolment: what it grew by during them.
    pub hub_rss_bytes_per_enrolment: Option<f64>,
    /// Memory of a simulated node, all in.
    pub node_rss_bytes: Option<f64>,
    /// Seconds that the fleet was watched, linked.
    pub hold_s: f64,
    /// Heartbeats answered in that time.
    pub heartbeats: u64,
    /// Their round trips, microseconds.
    pub heartbeat_p50_us: Option<u64>,
    /// Their round trips, microseconds.
    pub heartbeat_p99_us: Option<u64>,
    /// The hub's CPU in that time for each heartbeat, microseconds.
    pub hub_cpu_us_per_heartbeat: Option<f64>,
    /// A node's, the worker's machinery included.
    pub node_cpu_us_per_heartbeat: Option<f64>,
    /// Messages that nodes published.
    pub published: u64,
    /// Of these, in the hub's Log at the end.
    pub arrived: Option<u64>,
    /// Published and not there.
    pub missing: Option<u64>,
    /// There more than once.
    pub twice: Option<u64>,
    /// There before one that was published earlier.
    pub disordered: Option<u64>,
    /// Publish to a NATS subscriber of the hub, microseconds.
    pub message_p50_us: Option<u64>,
    /// Publish to a NATS subscriber of the hub, microseconds.
    pub message_p99_us: Option<u64>,
    /// Writing of State at the hub to its arrival at a node, microseconds.
    pub change_p50_us: Option<u64>,
    /// Writing of State at the hub to its arrival at a node, microseconds.
    pub change_p99_us: Option<u64>,
    /// Changes of State that a hub took.
    pub changes_written: Option<u64>,
    /// Changes of State that no hub took.
    pub changes_refused: Option<u64>,
    /// Nodes that do not have the last State in the end.
    pub behind: Option<u64>,
    /// Times that a key went back to an older revision at a node.
    pub backwards: Option<u64>,
    /// From a hub's end to the last node that noticed, seconds, for each time.
    pub detection_s: Vec<f64>,
    /// From the hub's readiness to the last node's Welcome, seconds, for each time.
    pub return_s: Vec<f64>,
    /// Messages a second of a downlink with windows.
    pub windows_per_s: Option<f64>,
    /// Messages a second of a downlink with one in flight.
    pub one_in_flight_per_s: Option<f64>,
    /// CPU of each process that was watched, seconds: while nodes linked, and while they were watched.
    pub cpu: Vec<Cpu>,
    /// How links ended and dials failed.
    pub ends: BTreeMap<String, u64>,
    /// Load average of the machine at the end.
    pub load: f64,
    /// What was checked and is not so. Empty: the run passed.
    pub violations: Vec<String>,
    /// No violation.
    pub passed: bool,
}

/// A process's CPU.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Cpu {
    /// `hub`, `worker`, or `watched`.
    pub what: String,
    /// Process.
    pub pid: u32,
    /// While nodes linked, seconds.
    pub ramp_s: f64,
    /// While they were watched, seconds.
    pub hold_s: f64,
    /// Resident memory at the end, bytes.
    pub rss: u64,
}

impl Report {
    /// One line of JSON.
    #[must_use]
    pub fn line(&self) -> String {
        serde_json::to_string(self).expect("a report has string keys")
    }

    /// For a person.
    #[must_use]
    pub fn text(&self) -> String {
        let mut out = String::new();
        let mut line = |name: &str, value: String| {
            writeln!(out, "  {name:<28}{value}").expect("a String takes everything");
        };
        let per_s = format!("{} of {} in {:.2} s", self.connected, self.nodes, self.ramp_s);
        line("linked", format!("{per_s}: {:.0} a second, {} failed", self.handshakes_per_s, self.failed));
        let two = |p50: Option<u64>, p99: Option<u64>| {
            Some(format!("p50 {}, p99 {}", show_us(p50?), show_us(p99?)))
        };
        let rows = [
            ("dial to Welcome", two(self.welcome_p50_us, self.welcome_p99_us)),
            ("hub memory per node", self.hub_rss_bytes_per_node.map(show_bytes)),
            ("hub memory per enrolment", self.hub_rss_bytes_per_enrolment.map(show_bytes)),
            ("memory of a simulated node", self.node_rss_bytes.map(show_bytes)),
            ("heartbeat", two(self.heartbeat_p50_us, self.heartbeat_p99_us)),
            ("hub CPU per heartbeat", self.hub_cpu_us_per_heartbeat.map(|us| format!("{us:.1} us"))),
            ("node CPU per heartbeat", self.node_cpu_us_per_heartbeat.map(|us| format!("{us:.1} us"))),
            ("message to subscriber", two(self.message_p50_us, self.message_p99_us)),
            ("change to node", two(self.change_p50_us, self.change_p99_us)),
            ("downlink, windows", self.windows_per_s.map(|rate| format!("{rate:.0} messages/s"))),
            ("downlink, one in flight", self.one_in_flight_per_s.map(|rate| format!("{rate:.0} messages/s"))),
        ];
        for (name, value) in rows {
            value.into_iter().for_each(|value| line(name, value));
        }
        if self.published > 0 {
            let show = |count: Option<u64>| count.map_or_else(|| "?".to_owned(), |count| count.to_string());
            let arrived = format!("{} published, {} arrived", self.published, show(self.arrived));
            let wrong = (show(self.missing), show(self.twice), show(self.disordered));
            line(
                "messages",
                format!("{arrived}; {} missing, {} twice, {} out of order", wrong.0, wrong.1, wrong.2),
            );
        }
        if let (Some(written), Some(refused)) = (self.changes_written, self.changes_refused) {
            let count = |count: Option<u64>| count.unwrap_or_default();
            let wrong = format!("{} nodes behind, {} backwards", count(self.behind), count(self.backwards));
            line("changes of State", format!("{written} written, {refused} refused; {wrong}"));
        }
        for (detection, back) in self.detection_s.iter().zip(&self.return_s) {
            line(
                "hub gone",
                format!("noticed by all after {detection:.2} s, all back {back:.2} s after it served"),
            );
        }
        for cpu in &self.cpu {
            let used = format!("{:.2} s linking, {:.2} s watched", cpu.ramp_s, cpu.hold_s);
            line(
                &format!("CPU of {} {}", cpu.what, cpu.pid),
                format!("{used}; {}", show_bytes(cpu.rss as f64)),
            );
        }
        for (end, count) in &self.ends {
            line(&format!("{count} x"), end.clone());
        }
        for violation in &self.violations {
            line("NOT SO", violation.clone());
        }
        out
    }
}

/// Median and 99th percentile; nothing of an empty histogram.
#[must_use]
pub fn quantiles(times: &Histogram<u64>) -> (Option<u64>, Option<u64>) {
    let at = |quantile| (!times.is_empty()).then(|| times.value_at_quantile(quantile));
    (at(0.5), at(0.99))
}

/// The sum of several histograms.
#[must_use]
pub fn merged<'a>(times: impl Iterator<Item = &'a crate::wire::Times>) -> Histogram<u64> {
    let mut all = histogram();
    times.for_each(|times| times.add_to(&mut all));
    all
}

fn show_us(us: u64) -> String {
    match us {
        0..1_000 => format!("{us} us"),
        1_000..1_000_000 => format!("{:.1} ms", us as f64 / 1e3),
        _ => format!("{:.2} s", us as f64 / 1e6),
    }
}

fn show_bytes(bytes: f64) -> String {
    match bytes.abs() {
        few if few < 1024.0 * 1024.0 => format!("{:.1} KiB", bytes / 1024.0),
        _ => format!("{:.1} MiB", bytes / 1024.0 / 1024.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_keys_of_the_line_are_what_scripts_rely_on() {
        let line: serde_json::Value = serde_json::from_str(&Report::default().line()).unwrap();
        let mut keys: Vec<&str> = line.as_object().unwrap().keys().map(String::as_str).collect();
        keys.sort_unstable();
        assert_eq!(
            keys,
            [
                "arrived",
                "backwards",
                "behind",
                "change_p50_us",
                "change_p99_us",
                "changes_refused",
                "changes_written",
                "connected",
                "cpu",
                "detection_s",
                "disordered",
                "ends",
                "failed",
                "failed_dials",
                "handshakes_per_s",
                "heartbeat_p50_us",
                "heartbeat_p99_us",
                "heartbeats",
                "hold_s",
                "hub_cpu_us_per_heartbeat",
                "hub_rss_bytes_per_enrolment",
                "hub_rss_bytes_per_node",
                "load",
                "message_p50_us",
                "message_p99_us",
                "missing",
                "node_cpu_us_per_heartbeat",
                "node_rss_bytes",
                "nodes",
                "one_in_flight_per_s",
                "passed",
                "processes",
                "published",
                "ramp_s",
                "resumed",
                "return_s",
                "scenario",
                "twice",
                "violations",
                "welcome_p50_us",
                "welcome_p99_us",
                "windows_per_s",
            ]
        );
    }
}
