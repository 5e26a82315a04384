//! Which protocols a client may go on with, once its connection is no longer HTTP.

use hyper::{
    HeaderMap,
    header::{HeaderName, HeaderValue},
};

use crate::status::Status;

/// Subprotocols of WebSockets that runtimes speak. A client that offers newer ones alone is refused before the node
/// is asked; kubectl then falls back to SPDY.
const CHANNELS: [&str; 4] =
    ["v4.channel.k8s.io", "v4.base64.channel.k8s.io", "channel.k8s.io", "base64.channel.k8s.io"];

/// What of a request's headers the other end of an upgrade needs, and nothing else.
const OF_UPGRADES: [&str; 5] =
    ["connection", "upgrade", "sec-websocket-key", "sec-websocket-version", "x-stream-protocol-version"];

/// The headers with which a node is asked to upgrade.
pub(crate) fn headers(of: &HeaderMap) -> Result<HeaderMap, Status> {
    let wanted = of.get("upgrade").and_then(|to| to.to_str().ok()).unwrap_or_default();
    if !is_asked_for(of) {
        return Err(Status::bad_request("Upgrade request required"));
    }
    let mut headers = HeaderMap::new();
    for name in OF_UPGRADES.map(HeaderName::from_static) {
        for value in of.get_all(&name) {
            headers.append(name.clone(), value.clone());
        }
    }
    if wanted.eq_ignore_ascii_case("websocket") {
        let offered = || {
            let lines = of.get_all("sec-websocket-protocol").iter().filter_map(|line| line.to_str().ok());
            lines.flat_map(|line| line.split(',')).map(str::trim).filter(|name| !name.is_empty())
        };
        let known: Vec<&str> = offered().filter(|name| CHANNELS.contains(name)).collect();
        if known.is_empty() && offered().next().is_some() {
            // A token may stand among them: what was offered is not repeated.
            return Err(Status::bad_request(format!(
                "unable to upgrade: none of the offered WebSocket subprotocols is served; known are {}",
                CHANNELS.join(", ")
            )));
        }
        if !known.is_empty() {
            let known = HeaderValue::from_str(&known.join(", ")).expect("plain text");
            headers.insert("sec-websocket-protocol", known);
        }
    }
    Ok(headers)
}

/// Whether a client wants to go on with something else than HTTP that is known here.
pub(crate) fn is_asked_for(headers: &HeaderMap) -> bool {
    let connection = headers.get_all("connection").iter().filter_map(|line| line.to_str().ok());
    let mut tokens = connection.flat_map(|line| line.split(','));
    let to = headers.get("upgrade").and_then(|to| to.to_str().ok()).unwrap_or_default();
    tokens.any(|token| token.trim().eq_ignore_ascii_case("upgrade"))
        && ["spdy/3.1", "websocket"].contains(&to.to_ascii_lowercase().as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(pairs: &[(&'static str, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(*name, value.parse().unwrap());
        }
        headers
    }

    #[test]
    fn what_is_newer_than_the_runtimes_is_refused_so_that_clients_fall_back() {
        let web = |protocols: &str| {
            headers(&asked(&[
                ("connection", "Upgrade"),
                ("upgrade", "websocket"),
                ("sec-websocket-protocol", protocols),
            ]))
        };
        assert_eq!(web("v5.channel.k8s.io").unwrap_err().code, 400);
        assert_eq!(web("SPDY/3.1+portforward.k8s.io").unwrap_err().code, 400);
        let passed = web("v5.channel.k8s.io, v4.channel.k8s.io").unwrap();
        assert_eq!(passed["sec-websocket-protocol"], "v4.channel.k8s.io");
    }

    #[test]
    fn a_node_never_sees_the_clients_credentials() {
        let web = asked(&[
            ("connection", "keep-alive, Upgrade"),
            ("upgrade", "websocket"),
            ("authorization", "Bearer secret"),
            ("cookie", "secret"),
            ("impersonate-user", "root"),
            ("sec-websocket-protocol", "base64url.bearer.authorization.k8s.io.c2VjcmV0, v4.channel.k8s.io"),
        ]);
        let passed = headers(&web).unwrap();
        assert!(!format!("{passed:?}").contains("ecret") && !passed.contains_key("impersonate-user"));
    }

    #[test]
    fn a_plain_request_is_no_upgrade() {
        assert_eq!(
            headers(&asked(&[("upgrade", "SPDY/3.1")])).unwrap_err().message,
            "Upgrade request required"
        );
        let spdy = asked(&[
            ("connection", "Upgrade"),
            ("upgrade", "SPDY/3.1"),
            ("x-stream-protocol-version", "v4.channel.k8s.io"),
            ("x-stream-protocol-version", "v3.channel.k8s.io"),
        ]);
        assert_eq!(headers(&spdy).unwrap().get_all("x-stream-protocol-version").iter().count(), 2);
    }
}
