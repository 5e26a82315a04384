//! Where a process serves, for its log, for the ready file, and for whoever started it.

use std::{
    fs, io,
    net::SocketAddr,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

/// Bound addresses; what is off is left out.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoints {
    /// MQTT front of the node.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mqtt: Option<SocketAddr>,
    /// NATS front: the hub's in dev and cloud, the node's in edge.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nats: Option<SocketAddr>,
    /// NATS front of dev's node.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node_nats: Option<SocketAddr>,
    /// Links by QUIC (UDP).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub quic: Option<SocketAddr>,
    /// Links by WebSocket (TCP).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub websocket: Option<SocketAddr>,
    /// Enrolment by HTTPS.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bootstrap: Option<SocketAddr>,
    /// Kubernetes API of the hub.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kubernetes: Option<SocketAddr>,
    /// Kubeconfig of its administrator.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kubeconfig: Option<PathBuf>,
    /// What a kubelet serves, for all nodes of the hub.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kubelet: Option<SocketAddr>,
    /// The node's own Kubernetes API.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub api: Option<SocketAddr>,
    /// Kubeconfig of the administrator of the node's machine.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub api_kubeconfig: Option<PathBuf>,
    /// Health and metrics.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metrics: Option<SocketAddr>,
    /// Unix socket of administration.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub admin: Option<PathBuf>,
    /// Unix socket of dev's node.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node_admin: Option<PathBuf>,
}

impl Endpoints {
    /// Those of a hub and a node in one process.
    #[must_use]
    pub fn with_node(self, node: Self) -> Self {
        Self {
            mqtt: node.mqtt,
            node_nats: node.nats,
            node_admin: node.admin,
            api: node.api,
            api_kubeconfig: node.api_kubeconfig,
            ..self
        }
    }

    /// Writes them as one JSON object. Whoever waits for the file sees all of it or none.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        let mut text = serde_json::to_vec(self)?;
        text.push(b'\n');
        let mut new = path.as_os_str().to_owned();
        new.push(".new");
        fs::write(&new, text)?;
        fs::rename(&new, path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_off_is_left_out() {
        let hub = Endpoints { nats: "127.0.0.1:4222".parse().ok(), ..Endpoints::default() };
        let node = Endpoints { mqtt: "127.0.0.1:1883".parse().ok(), ..Endpoints::default() };
        let text = serde_json::to_string(&hub.with_node(node)).unwrap();
        assert_eq!(text, r#"{"mqtt":"127.0.0.1:1883","nats":"127.0.0.1:4222"}"#);
    }
}
