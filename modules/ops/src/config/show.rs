//! The effective configuration as TOML that reads back as itself.

use std::net::SocketAddr;

use broker::{core::Full, link::dial::Hub};
use toml::{Table, Value};

use super::{Config, Exchange, LogFormat, units};

pub(super) fn effective(config: &Config) -> String {
    let mut root = Table::new();
    let mut put = |name: &str, value: Value| {
        root.insert(name.to_owned(), value);
    };
    put("data", text(config.data.display()));
    if let Some(file) = &config.ready_file {
        put("ready_file", text(file.display()));
    }
    if let Some(node) = &config.node {
        put("node", text(node));
    }
    if let Some(tier) = &config.tier {
        put("tier", text(tier));
    }
    put("hub", list(config.hubs.iter().flat_map(Hub::addresses)));
    if let Some(relay) = &config.relay {
        put("relay", text(relay));
    }
    if let Some(proxy) = &config.proxy {
        put("proxy", text(format_args!("http://{proxy}")));
    }
    if let Some(fabric) = &config.fabric {
        put("fabric", Value::Table(super::fabric::show(fabric)));
    }
    put("kubernetes", Value::Table(super::kubernetes::show(&config.kubernetes)));
    put("edged", Value::Table(super::edged::show(&config.edged)));
    put("listen", Value::Table(listen(config)));
    put("auth", Value::Table(auth(config)));
    put("stream", Value::Array(config.streams.iter().map(stream).collect()));
    put("budget", Value::Array(config.budgets.iter().map(super::budgets::show).collect()));
    put("export", Value::Table(exchange(&config.export)));
    put("import", Value::Table(exchange(&config.import)));
    put("limits", Value::Table(limits(config)));
    let format = match config.log.format {
        LogFormat::Auto => "auto",
        LogFormat::Text => "text",
        LogFormat::Json => "json",
    };
    put("log", Value::Table(table([("level", text(&config.log.level)), ("format", text(format))])));
    root.to_string()
}

fn listen(config: &Config) -> Table {
    let listen = &config.listen;
    let address = |addr: Option<SocketAddr>| addr.map_or_else(|| text("off"), text);
    table([
        ("mqtt", address(listen.mqtt)),
        ("nats", address(listen.nats)),
        ("node_nats", address(listen.node_nats)),
        ("quic", address(listen.quic)),
        ("websocket", address(listen.websocket)),
        ("bootstrap", address(listen.bootstrap)),
        ("kubernetes", address(listen.kubernetes)),
        ("kubelet", address(listen.kubelet)),
        ("api", address(listen.api)),
        ("metrics", address(listen.metrics)),
        ("admin", text(listen.admin.display())),
    ])
}

fn auth(config: &Config) -> Table {
    let mut auth = table([("anonymous", Value::Boolean(config.auth.anonymous))]);
    if let Some(users) = &config.auth.users {
        auth.insert("users".to_owned(), text(users.display()));
    }
    auth
}

fn stream(stream: &super::StreamConfig) -> Value {
    let policy = &stream.policy;
    let mut fields = table([
        ("name", text(&stream.name)),
        ("class", text(stream.class.as_str())),
        ("max_bytes", text(units::show_size(policy.bytes_max))),
        ("full", text(super::streams::full_name(policy.full))),
    ]);
    let window = match policy.full {
        Full::Thin { window } => Some(window),
        _ => None,
    };
    let times = [
        ("thin_window", window),
        ("max_age", policy.age_max),
        ("ttl", policy.ttl),
        ("retain_acked", policy.retain_acked),
    ];
    for (name, time) in times {
        if let Some(time) = time {
            fields.insert(name.to_owned(), text(units::show_duration(time)));
        }
    }
    if let Some(count) = policy.count_max {
        fields.insert("max_count".to_owned(), Value::Integer(i64::try_from(count).unwrap_or(i64::MAX)));
    }
    if &*stream.name != super::DEFAULT_STREAM {
        fields.insert("filters".to_owned(), list(stream.filters.iter().map(codec::Filter::as_str)));
    }
    Value::Table(fields)
}

fn exchange(exchange: &Exchange) -> Table {
    table([
        ("logs", list(&exchange.logs)),
        ("live", list(exchange.live.iter().map(codec::Filter::as_str))),
        ("state", list(&exchange.state)),
    ])
}

fn limits(config: &Config) -> Table {
    let limits = &config.limits;
    let size = |bytes: usize| text(units::show_size(bytes as u64));
    let count = |n: usize| Value::Integer(i64::try_from(n).expect("at most a million"));
    let duration = |duration| text(units::show_duration(duration));
    table([
        ("mqtt_connections", count(limits.mqtt_connections)),
        ("nats_connections", count(limits.nats_connections)),
        ("links", count(limits.links)),
        ("mqtt_packet", size(limits.mqtt_packet)),
        ("nats_payload", size(limits.nats_payload)),
        ("connect_timeout", duration(limits.connect_timeout)),
        ("heartbeat", duration(limits.heartbeat)),
        ("drain", duration(limits.drain)),
        ("session_expiry", duration(limits.session_expiry)),
    ])
}

fn table<const N: usize>(fields: [(&str, Value); N]) -> Table {
    fields.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}

fn text(value: impl ToString) -> Value {
    Value::String(value.to_string())
}

fn list<T: ToString>(items: impl IntoIterator<Item = T>) -> Value {
    Value::Array(items.into_iter().map(text).collect())
}
