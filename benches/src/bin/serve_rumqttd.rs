//! rumqttd in a process of its own: `serve_rumqttd ADDRESS`. Started by p13.
//!
//! Settings are those of the `rumqttd.toml` that it ships, except for what would get in the way of the
//! comparison: no pause between accepts, and room for the payloads and windows of the driver.

use anyhow::Context;
use serde_json::json;

fn main() -> anyhow::Result<()> {
    let address = std::env::args().nth(1).context("usage: serve_rumqttd ADDRESS")?;
    let config = json!({
        "id": 0,
        "router": {
            "max_connections": 20_000,
            "max_outgoing_packet_count": 200,
            "max_segment_size": 104_857_600,
            "max_segment_count": 10,
        },
        "v4": { "1": {
            "name": "bench",
            "listen": address,
            "next_connection_delay_ms": 0,
            "connections": {
                "connection_timeout_ms": 60_000,
                "max_payload_size": 20_480,
                "max_inflight_count": 100,
                "dynamic_filters": true,
            },
        } },
    });
    let config: rumqttd::Config = serde_json::from_value(config)?;
    rumqttd::Broker::new(config).start()?;
    Ok(())
}
