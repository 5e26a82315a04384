//! Metrics of the broker's parts that count for themselves: links and fronts.
//!
//! Each `register_*` adds one part to an [`Exporter`]; nothing is computed between scrapes.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering::Relaxed},
};

use broker::{
    front::{mqtt, nats},
    link::{self, counters::Traffic},
};
use codec::Class;

use crate::metrics::{Exporter, Kind, Text};

/// Links: traffic by class and direction, ends by reason, round trip.
pub fn register_links(exporter: &Exporter, counters: &Arc<link::Counters>) {
    let counters = Arc::clone(counters);
    exporter.register(Arc::new(move |text| links(text, &counters)));
}

/// The MQTT front: connections, packets, bytes, refusals, ends by cause.
pub fn register_mqtt(exporter: &Exporter, counters: &Arc<mqtt::Counters>) {
    let counters = Arc::clone(counters);
    exporter.register(Arc::new(move |text| mqtt_front(text, &counters)));
}

/// The NATS front: connections, messages, bytes, refusals.
pub fn register_nats(exporter: &Exporter, counters: &Arc<nats::Counters>) {
    let counters = Arc::clone(counters);
    exporter.register(Arc::new(move |text| nats_front(text, &counters)));
}

fn links(text: &mut Text, counters: &link::Counters) {
    gauge(text, "octobus_links_up", "Links that are up.", &counters.up);
    const FAILED: &str = "Handshakes that failed, were refused or took too long.";
    counter(text, "octobus_link_handshakes_failed_total", FAILED, &counters.handshakes_failed);

    text.family("octobus_link_ends_total", Kind::Counter, "Links that ended, by reason.");
    for (reason, count) in counters.ended() {
        text.sample("octobus_link_ends_total", &[("reason", reason)], count);
    }
    type Field = fn(&Traffic) -> &AtomicU64;
    let families: [(&str, &str, Field); 4] = [
        ("octobus_link_batches_total", "Batches over links.", |traffic| &traffic.batches),
        ("octobus_link_records_total", "Records over links.", |traffic| &traffic.records),
        ("octobus_link_raw_bytes_total", "Bytes of records over links.", |traffic| &traffic.raw_bytes),
        ("octobus_link_wire_bytes_total", "The same as they travelled.", |traffic| &traffic.wire_bytes),
    ];
    for (name, help, field) in families {
        text.family(name, Kind::Counter, help);
        for (direction, classes) in [("sent", &counters.sent), ("received", &counters.received)] {
            for (class, traffic) in Class::ALL.iter().zip(classes) {
                let labels = [("direction", direction), ("class", class.as_str())];
                text.sample(name, &labels, field(traffic).load(Relaxed));
            }
        }
    }
    let rtt = counters.rtt_us.load(Relaxed) as f64 / 1e6;
    text.family("octobus_link_rtt_seconds", Kind::Gauge, "Last round trip measured by a heartbeat.");
    text.sample("octobus_link_rtt_seconds", &[], rtt);
}

fn mqtt_front(text: &mut Text, counters: &mqtt::Counters) {
    gauge(text, "octobus_mqtt_connections", "MQTT clients connected.", &counters.connections);
    let plain = [
        ("octobus_mqtt_accepted_total", "Connections accepted.", &counters.accepted),
        ("octobus_mqtt_accept_errors_total", "Times that accepting failed.", &counters.accept_errors),
        ("octobus_mqtt_packets_in_total", "Packets received.", &counters.packets_in),
        ("octobus_mqtt_packets_out_total", "Packets sent.", &counters.packets_out),
        ("octobus_mqtt_bytes_in_total", "Bytes received.", &counters.bytes_in),
        ("octobus_mqtt_bytes_out_total", "Bytes sent.", &counters.bytes_out),
        ("octobus_mqtt_publishes_denied_total", "Publishes not permitted.", &counters.publishes_denied),
        ("octobus_mqtt_subscriptions_denied_total", "Filters not permitted.", &counters.subscriptions_denied),
    ];
    for (name, help, value) in plain {
        counter(text, name, help, value);
    }
}

fn nats_front(text: &mut Text, counters: &nats::Counters) {
    gauge(text, "octobus_nats_connections", "NATS clients connected.", &counters.connections);
    let plain = [
        ("octobus_nats_accepted_total", "Connections accepted.", &counters.accepted),
        ("octobus_nats_refused_total", "Connections over the limit.", &counters.refused),
        ("octobus_nats_accept_errors_total", "Times that accepting failed.", &counters.accept_errors),
        ("octobus_nats_auth_failures_total", "Wrong or missing credentials.", &counters.auth_failures),
        ("octobus_nats_messages_in_total", "Messages from clients.", &counters.messages_in),
        ("octobus_nats_messages_out_total", "Messages to clients.", &counters.messages_out),
        ("octobus_nats_bytes_in_total", "Bytes of these messages.", &counters.bytes_in),
        ("octobus_nats_bytes_out_total", "Bytes of these messages.", &counters.bytes_out),
        ("octobus_nats_slow_consumers_total", "Clients that did not read.", &counters.slow_consumers),
        (
            "octobus_nats_closed_for_cause_total",
            "Connections ended with an error.",
            &counters.closed_for_cause,
        ),
    ];
    for (name, help, value) in plain {
        counter(text, name, help, value);
    }
}

fn counter(text: &mut Text, name: &str, help: &str, value: &AtomicU64) {
    text.family(name, Kind::Counter, help);
    text.sample(name, &[], value.load(Relaxed));
}

fn gauge(text: &mut Text, name: &str, help: &str, value: &AtomicU64) {
    text.family(name, Kind::Gauge, help);
    text.sample(name, &[], value.load(Relaxed));
}
