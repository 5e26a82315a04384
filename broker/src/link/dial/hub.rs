//! Where a hub is dialled, and by what.

use std::fmt;

/// By what a link is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Way {
    /// QUIC, over UDP.
    #[default]
    Quic,
    /// WebSocket, over TLS and TCP.
    WebSocket,
}

impl Way {
    /// The word for logs, metrics and files.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Quic => "quic",
            Self::WebSocket => "websocket",
        }
    }
}

/// One hub: a name, and at which ports it is dialled. At least one is there.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Hub {
    /// DNS name or IP address; an IPv6 address without brackets. Resolved at each attempt.
    pub host: String,
    /// UDP port of QUIC.
    pub quic: Option<u16>,
    /// TCP port of WebSocket.
    pub websocket: Option<u16>,
}

impl Hub {
    /// Addresses of one host that complete each other are one hub: `quic://h:1` and `wss://h:2`.
    #[must_use]
    pub fn merged(hubs: impl IntoIterator<Item = Self>) -> Vec<Self> {
        let mut merged: Vec<Self> = Vec::new();
        for hub in hubs {
            let free = |old: &&mut Self| {
                let clash = |a: Option<u16>, b: Option<u16>| a.is_some() && b.is_some();
                old.host == hub.host && !clash(old.quic, hub.quic) && !clash(old.websocket, hub.websocket)
            };
            match merged.iter_mut().find(free) {
                Some(old) => {
                    old.quic = old.quic.or(hub.quic);
                    old.websocket = old.websocket.or(hub.websocket);
                }
                None => merged.push(hub),
            }
        }
        merged
    }

    /// As they are configured: one address for each way.
    #[must_use]
    pub fn addresses(&self) -> Vec<String> {
        let quic = self.quic.map(|port| self.address("quic", port));
        quic.into_iter().chain(self.websocket.map(|port| self.address("wss", port))).collect()
    }

    fn address(&self, scheme: &str, port: u16) -> String {
        if self.host.contains(':') {
            format!("{scheme}://[{}]:{port}", self.host)
        } else {
            format!("{scheme}://{}:{port}", self.host)
        }
    }
}

impl fmt::Display for Hub {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.addresses().join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_one_host_are_one_hub_as_long_as_they_complete_each_other() {
        let hub = |host: &str, quic, websocket| Hub { host: host.into(), quic, websocket };
        let given = [
            hub("a", Some(1), None),
            hub("b", None, Some(2)),
            hub("a", None, Some(3)),
            hub("a", Some(4), None),
            hub("::1", Some(5), Some(6)),
        ];
        let merged = Hub::merged(given);
        assert_eq!(
            merged,
            [
                hub("a", Some(1), Some(3)),
                hub("b", None, Some(2)),
                hub("a", Some(4), None),
                hub("::1", Some(5), Some(6))
            ]
        );
        assert_eq!(merged[0].to_string(), "quic://a:1, wss://a:3");
        assert_eq!(merged[3].addresses(), ["quic://[::1]:5", "wss://[::1]:6"]);
    }
}
