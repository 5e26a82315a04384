//! The flags of every role, and reading the process's environment: the only place that does.

use std::path::{Path, PathBuf};

use super::{ConfigError, Mistake, Sources};

/// Flags shared by `octobus dev`, `octobus cloud` and `octobus edge`. Each overrides its environment
/// variable, which overrides the file. Values are checked together with the other layers, so that
/// every mistake is reported at once.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(next_help_heading = "Configuration (flag over environment over file)")]
pub struct Flags {
    /// Configuration file; docs/octobus.toml explains every key [env: OCTOBUS_CONFIG]
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Folder that holds everything this process keeps [env: OCTOBUS_DATA]
    #[arg(long, value_name = "DIR")]
    pub data: Option<String>,
    /// Write one JSON object with all endpoints here, once everything serves [env: OCTOBUS_READY_FILE]
    #[arg(long, value_name = "FILE")]
    pub ready_file: Option<String>,
    /// Name of this node [env: OCTOBUS_NODE]
    #[arg(long, value_name = "NAME")]
    pub node: Option<String>,
    /// Hub to dial over QUIC; several separated by commas [env: OCTOBUS_HUB]
    #[arg(long, value_name = "HOST[:PORT]")]
    pub hub: Option<String>,
    /// Relay that may answer where --hub says, instead of a hub [env: OCTOBUS_RELAY]
    #[arg(long, value_name = "NAME")]
    pub relay: Option<String>,
    /// NATS servers that this hub shares with the other replicas of its tier [env: OCTOBUS_FABRIC]
    #[arg(long, value_name = "NATS-URL[,...]")]
    pub fabric: Option<String>,
    /// Name of this replica of the tier [env: OCTOBUS_REPLICA]
    #[arg(long, value_name = "NAME")]
    pub replica: Option<String>,
    /// MQTT front of the node, or "off" [env: OCTOBUS_MQTT]
    #[arg(long, value_name = "HOST:PORT")]
    pub mqtt: Option<String>,
    /// NATS front: the hub's in dev and cloud, the node's in edge; or "off" [env: OCTOBUS_NATS]
    #[arg(long, value_name = "HOST:PORT")]
    pub nats: Option<String>,
    /// NATS front of dev's node; off by default [env: OCTOBUS_NODE_NATS]
    #[arg(long, value_name = "HOST:PORT")]
    pub node_nats: Option<String>,
    /// Where nodes link by QUIC (UDP); on a node: makes it a relay [env: OCTOBUS_QUIC]
    #[arg(long, value_name = "HOST:PORT")]
    pub quic: Option<String>,
    /// Where nodes link by WebSocket; only "off" for now [env: OCTOBUS_WEBSOCKET]
    #[arg(long, value_name = "HOST:PORT")]
    pub websocket: Option<String>,
    /// Where nodes enrol by HTTPS [env: OCTOBUS_BOOTSTRAP]
    #[arg(long, value_name = "HOST:PORT")]
    pub bootstrap: Option<String>,
    /// Kubernetes API of a single hub, or "off" [env: OCTOBUS_KUBERNETES]
    #[arg(long, value_name = "HOST:PORT")]
    pub kubernetes: Option<String>,
    /// Cluster whose pods nodes run, or "in-cluster" [env: OCTOBUS_KUBECONFIG]
    #[arg(long, value_name = "FILE")]
    pub kubeconfig: Option<String>,
    /// The node's own Kubernetes API, which needs no hub; or "off" [env: OCTOBUS_API]
    #[arg(long, value_name = "HOST:PORT")]
    pub api: Option<String>,
    /// Health and metrics by HTTP, or "off" [env: OCTOBUS_METRICS]
    #[arg(long, value_name = "HOST:PORT")]
    pub metrics: Option<String>,
    /// Unix socket for administration; default DATA/admin.sock [env: OCTOBUS_ADMIN]
    #[arg(long, value_name = "SOCKET")]
    pub admin: Option<String>,
    /// File of users for the MQTT and NATS fronts [env: OCTOBUS_USERS]
    #[arg(long, value_name = "FILE")]
    pub users: Option<String>,
    /// Let clients in without a password; only where the fronts listen on loopback [env: OCTOBUS_ANONYMOUS]
    #[arg(long, value_name = "true|false", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub anonymous: Option<String>,
    /// Log level: error, warn, info, debug, trace; RUST_LOG overrides [env: OCTOBUS_LOG_LEVEL]
    #[arg(long, value_name = "LEVEL")]
    pub log_level: Option<String>,
    /// Log format: auto, text, json [env: OCTOBUS_LOG_FORMAT]
    #[arg(long, value_name = "FORMAT")]
    pub log_format: Option<String>,
}

impl Flags {
    /// Adds the process's environment and the configuration file to the flags.
    ///
    /// # Errors
    /// The file that was asked for cannot be read.
    pub fn sources(&self) -> Result<Sources, ConfigError> {
        let env: Vec<(String, String)> = std::env::vars_os()
            .filter_map(|(name, value)| {
                Some((name.into_string().ok()?, value.to_string_lossy().into_owned()))
            })
            .collect();
        self.sources_with(env)
    }

    fn sources_with(&self, mut env: Vec<(String, String)>) -> Result<Sources, ConfigError> {
        let asked = env.iter().position(|(name, _)| name == "OCTOBUS_CONFIG").map(|at| env.swap_remove(at).1);
        let file = match self.config.as_deref().or_else(|| asked.as_deref().map(Path::new)) {
            Some(path) => Some((path.to_owned(), read(path)?)),
            None => None,
        };
        Ok(Sources { file, env, flags: self.given() })
    }

    fn given(&self) -> Vec<(&'static str, String)> {
        let all = [
            ("--data", &self.data),
            ("--ready-file", &self.ready_file),
            ("--node", &self.node),
            ("--hub", &self.hub),
            ("--relay", &self.relay),
            ("--fabric", &self.fabric),
            ("--replica", &self.replica),
            ("--mqtt", &self.mqtt),
            ("--nats", &self.nats),
            ("--node-nats", &self.node_nats),
            ("--quic", &self.quic),
            ("--websocket", &self.websocket),
            ("--bootstrap", &self.bootstrap),
            ("--kubernetes", &self.kubernetes),
            ("--kubeconfig", &self.kubeconfig),
            ("--api", &self.api),
            ("--metrics", &self.metrics),
            ("--admin", &self.admin),
            ("--users", &self.users),
            ("--anonymous", &self.anonymous),
            ("--log-level", &self.log_level),
            ("--log-format", &self.log_format),
        ];
        all.into_iter().filter_map(|(name, value)| Some((name, value.clone()?))).collect()
    }
}

fn read(path: &Path) -> Result<String, ConfigError> {
    std::fs::read_to_string(path).map_err(|error| ConfigError {
        mistakes: vec![Mistake {
            place: path.display().to_string(),
            what: format!("the configuration file cannot be read: {error}"),
        }],
    })
}

/// `${XDG_STATE_HOME:-~/.local/state}/octobus/dev`: where `octobus dev` keeps its data.
pub(super) fn dev_data(env: &[(String, String)]) -> PathBuf {
    let var = |wanted: &str| {
        env.iter()
            .find(|(name, value)| name == wanted && !value.is_empty())
            .map(|(_, value)| PathBuf::from(value))
    };
    var("XDG_STATE_HOME")
        .or_else(|| var("HOME").map(|home| home.join(".local/state")))
        .unwrap_or_else(|| PathBuf::from("."))
        .join("octobus/dev")
}
