//! Text to runtime types: sizes, durations, addresses. Every error says what to write instead.

use std::{
    fmt,
    net::{SocketAddr, ToSocketAddrs},
    str::FromStr,
    time::Duration,
};

use broker::link::{
    dial::{Hub, Way},
    websocket::Proxy,
};

use super::{QUIC_PORT, WEBSOCKET_PORT};

/// A host and a port to dial. The name is resolved at each attempt, never stored resolved.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct HostPort {
    /// DNS name or IP address; an IPv6 address without brackets.
    pub host: String,
    /// Port.
    pub port: u16,
}

impl HostPort {
    /// Reads `HOST`, `HOST:PORT`, `[V6]` or `[V6]:PORT`.
    ///
    /// # Errors
    /// What is wrong, and what to write.
    pub fn parse(text: &str, default_port: u16) -> Result<Self, String> {
        let wrong = || format!("not HOST or HOST:PORT; write for example \"hub.example:{default_port}\"");
        let (host, port) = match text.strip_prefix('[') {
            Some(rest) => {
                let (host, rest) = rest.split_once(']').ok_or_else(wrong)?;
                (host, if rest.is_empty() { None } else { Some(rest.strip_prefix(':').ok_or_else(wrong)?) })
            }
            None => match text.split_once(':') {
                Some((_, rest)) if rest.contains(':') => (text, None), // a bare IPv6 address
                Some((host, port)) => (host, Some(port)),
                None => (text, None),
            },
        };
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_' | ':' | '%');
        if host.is_empty() || host.len() > 253 || !host.chars().all(plain) {
            return Err(wrong());
        }
        let port = match port {
            Some(port) => port.parse().ok().filter(|port| *port != 0).ok_or_else(wrong)?,
            None => default_port,
        };
        Ok(Self { host: host.to_owned(), port })
    }
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

/// A hub to dial: `HOST` or `HOST:PORT` (QUIC there, and WebSocket at its default port), or one way alone:
/// `quic://HOST:PORT`, `wss://HOST:PORT`. Addresses of one host complete each other ([`Hub::merged`]).
///
/// # Errors
/// What is wrong, and what to write.
pub fn hub(text: &str) -> Result<Hub, String> {
    let (way, rest) = match text.split_once("://") {
        None => (None, text),
        Some(("quic", rest)) => (Some(Way::Quic), rest),
        Some(("wss", rest)) => (Some(Way::WebSocket), rest),
        Some(_) => return Err("not quic:// or wss://; without either, both ways are tried".to_owned()),
    };
    let default_port = if way == Some(Way::WebSocket) { WEBSOCKET_PORT } else { QUIC_PORT };
    let HostPort { host, port } = HostPort::parse(rest, default_port)?;
    Ok(match way {
        None => Hub { host, quic: Some(port), websocket: Some(WEBSOCKET_PORT) },
        Some(Way::Quic) => Hub { host, quic: Some(port), websocket: None },
        Some(Way::WebSocket) => Hub { host, quic: None, websocket: Some(port) },
    })
}

/// A proxy: `http://HOST:PORT`.
///
/// # Errors
/// What is wrong, and what to write.
pub fn proxy(text: &str) -> Result<Proxy, String> {
    let wrong = || "not a proxy; write \"http://HOST:PORT\" (without user and password)".to_owned();
    let rest = text.strip_prefix("http://").ok_or_else(wrong)?;
    let HostPort { host, port } =
        HostPort::parse(rest.strip_suffix('/').unwrap_or(rest), PROXY_PORT).map_err(|_| wrong())?;
    Ok(Proxy { host, port })
}

/// Where proxies usually are.
const PROXY_PORT: u16 = 3128;

/// An address to listen on, or `off`. Port 0 picks a free one.
///
/// # Errors
/// What is wrong, and what to write.
pub fn listen(text: &str) -> Result<Option<SocketAddr>, String> {
    const HINT: &str =
        "write \"127.0.0.1:PORT\", \"0.0.0.0:PORT\", \"[::]:PORT\" or \"off\"; port 0 picks a free one";
    if text == "off" {
        return Ok(None);
    }
    if let Ok(addr) = text.parse() {
        return Ok(Some(addr));
    }
    if !text.contains(':') || text.starts_with(':') {
        return Err(format!("not HOST:PORT; {HINT}"));
    }
    match text.to_socket_addrs() {
        Ok(mut addrs) => addrs.next().map(Some).ok_or_else(|| format!("has no address; {HINT}")),
        Err(error) => Err(format!("not HOST:PORT, or its name does not resolve ({error}); {HINT}")),
    }
}

/// A size: bytes, or a number with KiB, MiB, GiB, TiB (1024) or kB, MB, GB (1000).
///
/// # Errors
/// What is wrong, and what to write.
pub fn size(text: &str) -> Result<u64, String> {
    const UNITS: [(&str, u64); 9] = [
        ("", 1),
        ("B", 1),
        ("KiB", 1 << 10),
        ("MiB", 1 << 20),
        ("GiB", 1 << 30),
        ("TiB", 1 << 40),
        ("kB", 1_000),
        ("MB", 1_000_000),
        ("GB", 1_000_000_000),
    ];
    let (number, unit) = split_unit(text);
    let factor = UNITS.iter().find(|(name, _)| *name == unit).map(|(_, factor)| *factor);
    factor
        .zip(number.parse::<u64>().ok())
        .and_then(|(factor, number)| number.checked_mul(factor))
        .ok_or_else(|| "not a size; write for example \"64MiB\", \"2GiB\" or a number of bytes".to_owned())
}

/// A duration: a number with ms, s, m, h or d.
///
/// # Errors
/// What is wrong, and what to write.
pub fn duration(text: &str) -> Result<Duration, String> {
    let (number, unit) = split_unit(text);
    let millis = match unit {
        "ms" => Some(1),
        "s" => Some(1_000),
        "m" => Some(60_000),
        "h" => Some(3_600_000),
        "d" => Some(86_400_000),
        _ => None,
    };
    millis
        .zip(number.parse::<u64>().ok())
        .and_then(|(unit, number)| number.checked_mul(unit))
        .map(Duration::from_millis)
        .ok_or_else(|| "not a duration; write for example \"500ms\", \"15s\", \"5m\" or \"24h\"".to_owned())
}

/// A whole number within bounds.
///
/// # Errors
/// What is wrong, and what to write.
pub fn count(text: &str, min: u64, max: u64) -> Result<u64, String> {
    let wrong = || format!("not a whole number from {min} to {max}");
    text.parse::<u64>().ok().filter(|n| (min..=max).contains(n)).ok_or_else(wrong)
}

/// `true` or `false`.
///
/// # Errors
/// What is wrong, and what to write.
pub fn boolean(text: &str) -> Result<bool, String> {
    bool::from_str(text).map_err(|_| "not true or false".to_owned())
}

/// The shortest exact text of a size, which [`size`] reads back.
#[must_use]
pub fn show_size(bytes: u64) -> String {
    for (name, factor) in [("TiB", 1u64 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)] {
        if bytes != 0 && bytes.is_multiple_of(factor) {
            return format!("{}{name}", bytes / factor);
        }
    }
    format!("{bytes}B")
}

/// The shortest exact text of a duration, which [`duration`] reads back.
#[must_use]
pub fn show_duration(duration: Duration) -> String {
    let millis = duration.as_millis();
    for (name, factor) in [("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1_000)] {
        if millis != 0 && millis.is_multiple_of(factor) {
            return format!("{}{name}", millis / factor);
        }
    }
    format!("{millis}ms")
}

fn split_unit(text: &str) -> (&str, &str) {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    (number, unit.trim_start())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_binary_and_decimal_units() {
        assert_eq!(size("64MiB"), Ok(64 << 20));
        assert_eq!(size("1 GiB"), Ok(1 << 30));
        assert_eq!(size("5MB"), Ok(5_000_000));
        assert_eq!(size("17"), Ok(17));
        for wrong in ["", "MiB", "-1", "1.5GiB", "64mib", "99999999999TiB"] {
            assert!(size(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_duration_without_a_unit_is_refused() {
        assert_eq!(duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(duration("24h"), Ok(Duration::from_secs(86_400)));
        for wrong in ["10", "", "s", "10 years", "-5s"] {
            assert!(duration(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_is_shown_reads_back() {
        for bytes in [0, 1, 1023, 1024, 3 << 20, (3 << 20) + 1, 1 << 40] {
            assert_eq!(size(&show_size(bytes)), Ok(bytes));
        }
        for millis in [0, 1, 999, 1000, 60_000, 61_000, 86_400_000] {
            let wanted = Duration::from_millis(millis);
            assert_eq!(duration(&show_duration(wanted)), Ok(wanted));
        }
    }

    #[test]
    fn a_listener_is_an_address_or_off() {
        assert_eq!(listen("off"), Ok(None));
        assert_eq!(listen("127.0.0.1:0").unwrap().unwrap().port(), 0);
        assert!(listen("[::]:1883").unwrap().unwrap().is_ipv6());
        for wrong in ["", "1883", ":1883", "127.0.0.1", "127.0.0.1:99999"] {
            assert!(listen(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_hub_is_dialled_both_ways_unless_it_is_said_which() {
        let at = |quic, websocket| Ok(Hub { host: "hub".into(), quic, websocket });
        assert_eq!(hub("hub"), at(Some(10001), Some(10000)));
        assert_eq!(hub("hub:7"), at(Some(7), Some(10000)));
        assert_eq!(hub("quic://hub"), at(Some(10001), None));
        assert_eq!(hub("wss://hub:443"), at(None, Some(443)));
        assert!(hub("http://hub").is_err() && hub("wss://").is_err() && hub("wss://hub/x").is_err());
        assert_eq!(proxy("http://proxy:8080/"), Ok(Proxy { host: "proxy".into(), port: 8080 }));
        assert!(proxy("https://proxy:1").is_err() && proxy("http://me:secret@proxy:1").is_err());
    }

    #[test]
    fn a_hub_may_be_named_with_or_without_port_and_in_ipv6() {
        let at = |host: &str, port| HostPort { host: host.to_owned(), port };
        assert_eq!(HostPort::parse("hub", 10001), Ok(at("hub", 10001)));
        assert_eq!(HostPort::parse("hub:7", 10001), Ok(at("hub", 7)));
        assert_eq!(HostPort::parse("::1", 10001), Ok(at("::1", 10001)));
        assert_eq!(HostPort::parse("[::1]:7", 10001), Ok(at("::1", 7)));
        assert_eq!(at("::1", 7).to_string(), "[::1]:7");
        for wrong in ["", ":7", "hub:0", "hub:x", "[::1", "a b", "http://hub"] {
            assert!(HostPort::parse(wrong, 1).is_err(), "{wrong}");
        }
    }
}
