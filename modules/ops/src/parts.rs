//! Metrics of the fronts, which count for themselves.
//!
//! Each `register_*` adds one part to an [`Exporter`]; nothing is computed between scrapes.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering::Relaxed},
};

use broker::front::{mqtt, nats};

use crate::metrics::{Exporter, Kind, Text};

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
        (
            "octobus_mqtt_deliveries_denied_total",
            "Deliveries no longer permitted.",
            &counters.deliveries_denied,
        ),
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
