//! One configuration schema for every role: file, then environment, then flags.
//!
//! [`Config`] holds runtime types only; it is the result of [`Config::load`], which reports every
//! mistake of every layer at once and refuses unknown keys, variables and flags. Nothing else in
//! Octobus reads the environment. `docs/octobus.toml` is the sample: each field with unit, default and
//! reason, held equal to this file by a test.

mod budgets;
pub mod edged;
pub mod fabric;
mod flags;
pub mod kubernetes;
mod layers;
pub mod streams;
pub mod units;

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use broker::{
    limits,
    link::{dial::Hub, websocket::Proxy},
};
use codec::Filter;

use self::layers::{Key, Layers};
pub use self::{
    flags::Flags,
    layers::{ConfigError, Mistake, Sources},
    streams::StreamConfig,
    units::HostPort,
};

/// TCP port of nodes' WebSocket links.
pub const WEBSOCKET_PORT: u16 = broker::link::websocket::PORT;
/// UDP port of nodes' QUIC links.
pub const QUIC_PORT: u16 = 10001;
/// Port of HTTPS enrolment.
pub const BOOTSTRAP_PORT: u16 = 10002;
/// Port of the Kubernetes API of a single hub.
pub const KUBERNETES_PORT: u16 = 6443;
/// Port of a node's own Kubernetes API.
pub const API_PORT: u16 = 10550;
/// Port of a hub's health and metrics.
pub const HUB_METRICS_PORT: u16 = 10003;
/// Port of a node's health and metrics: not the hub's, so that both run on one machine.
pub const NODE_METRICS_PORT: u16 = 10004;
/// MQTT front of a node.
pub const MQTT_PORT: u16 = 1883;
/// NATS front of a hub.
pub const HUB_NATS_PORT: u16 = 4222;
/// NATS front of a node: not the hub's, so that both run on one machine.
pub const NODE_NATS_PORT: u16 = 4223;
/// Name of the stream that takes what no other stream's filters match.
pub const DEFAULT_STREAM: &str = "default";

/// What this process is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// A hub and a node in one process, on loopback.
    Dev,
    /// A hub.
    Cloud,
    /// A node.
    Edge,
}

impl Role {
    /// The subcommand that starts it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Dev => "dev",
            Self::Cloud => "cloud",
            Self::Edge => "edge",
        }
    }
}

/// The effective configuration of one process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// What this process is.
    pub role: Role,
    /// Folder that holds everything this process keeps.
    pub data: PathBuf,
    /// Name of this node. `None` on a node: the name in its certificate.
    pub node: Option<Arc<str>>,
    /// Name of the tier. `None` on a hub: minted at the first start. `None` on a node: as pinned at join.
    pub tier: Option<String>,
    /// Hubs to dial, in order. Empty on a node: those that `join` stored.
    pub hubs: Vec<Hub>,
    /// Of a node: the relay that may answer at one of `hubs`, instead of a hub.
    pub relay: Option<Arc<str>>,
    /// Proxy for links by WebSocket.
    pub proxy: Option<Proxy>,
    /// The servers that replicas of this hub share; `None`: a single hub.
    pub fabric: Option<fabric::Fabric>,
    /// The API server whose pods nodes run.
    pub kubernetes: kubernetes::Kubernetes,
    /// The pods of a node (dev, edge).
    pub edged: edged::Edged,
    /// Listening addresses.
    pub listen: Listen,
    /// Who may use the fronts.
    pub auth: Auth,
    /// Streams in order of precedence; [`DEFAULT_STREAM`] is always there and last.
    pub streams: Vec<StreamConfig>,
    /// What may be spent on links above (edge).
    pub budgets: Vec<broker::core::Budget>,
    /// What this broker sends over links.
    pub export: Exchange,
    /// What this broker takes from links, within what the peer's certificate permits.
    pub import: Exchange,
    /// Bounds.
    pub limits: Limits,
    /// Logging.
    pub log: Log,
    /// Where to write the endpoints once everything serves.
    pub ready_file: Option<PathBuf>,
}

/// Listening addresses; `None` is off, port 0 picks a free one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listen {
    /// MQTT 3.1.1 and 5 over TCP (dev, edge).
    pub mqtt: Option<SocketAddr>,
    /// NATS client protocol: the hub's in dev and cloud, the node's in edge.
    pub nats: Option<SocketAddr>,
    /// NATS client protocol of dev's node.
    pub node_nats: Option<SocketAddr>,
    /// Links of nodes by QUIC (dev, cloud). On a node (edge) it makes the node a relay.
    pub quic: Option<SocketAddr>,
    /// Links of nodes by WebSocket, where UDP is blocked (dev, cloud).
    pub websocket: Option<SocketAddr>,
    /// Enrolment by HTTPS (dev, cloud).
    pub bootstrap: Option<SocketAddr>,
    /// The Kubernetes API of a single hub (dev, cloud).
    pub kubernetes: Option<SocketAddr>,
    /// What a kubelet serves, for all nodes of a hub: logs, exec, metrics (dev, cloud).
    pub kubelet: Option<SocketAddr>,
    /// The node's own API: what it has of Kubernetes, with or without a hub (dev, edge).
    pub api: Option<SocketAddr>,
    /// Health and metrics by plain HTTP: no secrets there, nothing can be changed.
    pub metrics: Option<SocketAddr>,
    /// Unix socket of administration.
    pub admin: PathBuf,
}

/// Who may use the fronts. Without users and without `anonymous` they refuse everybody.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Auth {
    /// File of users with their filters.
    pub users: Option<PathBuf>,
    /// Let clients in without a password. Accepted only if every front listens on loopback.
    pub anonymous: bool,
}

impl Auth {
    /// True if no client can get in: a front that starts says so.
    #[must_use]
    pub const fn refuses_everybody(&self) -> bool {
        self.users.is_none() && !self.anonymous
    }
}

/// What crosses links in one direction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exchange {
    /// Names of streams; `*` is all.
    pub logs: Vec<String>,
    /// Topics of Live messages.
    pub live: Vec<Filter>,
    /// Names of State spaces; `*` is all.
    pub state: Vec<String>,
}

impl Exchange {
    /// As the core takes it.
    #[must_use]
    pub fn policy(&self) -> broker::core::Exchange {
        let chosen = |names: &[String]| {
            let all = names.iter().any(|name| name == "*");
            (!all).then(|| names.iter().map(|name| Arc::from(name.as_str())).collect())
        };
        broker::core::Exchange {
            streams: chosen(&self.logs),
            live: self.live.clone(),
            spaces: chosen(&self.state),
        }
    }
}

/// Bounds on what peers can make this process hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// MQTT clients at a time.
    pub mqtt_connections: usize,
    /// NATS clients at a time.
    pub nats_connections: usize,
    /// Links at a time (hub).
    pub links: usize,
    /// Largest MQTT packet, bytes.
    pub mqtt_packet: usize,
    /// Largest NATS payload, bytes.
    pub nats_payload: usize,
    /// A client must have authenticated within this.
    pub connect_timeout: Duration,
    /// A link sends a heartbeat when this long idle; after two without answer it is dead.
    pub heartbeat: Duration,
    /// From the signal to stop to the end of the process (hub).
    pub drain: Duration,
    /// Longest that an MQTT session outlives its connection, whatever the client asks.
    pub session_expiry: Duration,
}

/// Logging.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Log {
    /// A level, or directives as in RUST_LOG (which overrides it).
    pub level: String,
    /// How lines look.
    pub format: LogFormat,
}

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// Text on a terminal, JSON otherwise.
    Auto,
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

const DATA: Key = Key { path: "data", env: "OCTOBUS_DATA", flag: "--data" };
const READY_FILE: Key = Key { path: "ready_file", env: "OCTOBUS_READY_FILE", flag: "--ready-file" };
const NODE: Key = Key { path: "node", env: "OCTOBUS_NODE", flag: "--node" };
const TIER: Key = Key { path: "tier", env: "OCTOBUS_TIER", flag: "" };
const RELAY: Key = Key { path: "relay", env: "OCTOBUS_RELAY", flag: "--relay" };
const HUB: Key = Key { path: "hub", env: "OCTOBUS_HUB", flag: "--hub" };
const PROXY: Key = Key { path: "proxy", env: "OCTOBUS_PROXY", flag: "" };
const MQTT: Key = Key { path: "listen.mqtt", env: "OCTOBUS_MQTT", flag: "--mqtt" };
const NATS: Key = Key { path: "listen.nats", env: "OCTOBUS_NATS", flag: "--nats" };
const NODE_NATS: Key = Key { path: "listen.node_nats", env: "OCTOBUS_NODE_NATS", flag: "--node-nats" };
const QUIC: Key = Key { path: "listen.quic", env: "OCTOBUS_QUIC", flag: "--quic" };
const WEBSOCKET: Key = Key { path: "listen.websocket", env: "OCTOBUS_WEBSOCKET", flag: "--websocket" };
const BOOTSTRAP: Key = Key { path: "listen.bootstrap", env: "OCTOBUS_BOOTSTRAP", flag: "--bootstrap" };
const KUBERNETES: Key = Key { path: "listen.kubernetes", env: "OCTOBUS_KUBERNETES", flag: "--kubernetes" };
const API: Key = Key { path: "listen.api", env: "OCTOBUS_API", flag: "--api" };
const KUBELET: Key = Key { path: "listen.kubelet", env: "OCTOBUS_KUBELET", flag: "" };
const METRICS: Key = Key { path: "listen.metrics", env: "OCTOBUS_METRICS", flag: "--metrics" };
const ADMIN: Key = Key { path: "listen.admin", env: "OCTOBUS_ADMIN", flag: "--admin" };
const USERS: Key = Key { path: "auth.users", env: "OCTOBUS_USERS", flag: "--users" };
const ANONYMOUS: Key = Key { path: "auth.anonymous", env: "OCTOBUS_ANONYMOUS", flag: "--anonymous" };
const EXPORT: [Key; 3] = [
    Key { path: "export.logs", env: "OCTOBUS_EXPORT_LOGS", flag: "" },
    Key { path: "export.live", env: "OCTOBUS_EXPORT_LIVE", flag: "" },
    Key { path: "export.state", env: "OCTOBUS_EXPORT_STATE", flag: "" },
];
const IMPORT: [Key; 3] = [
    Key { path: "import.logs", env: "OCTOBUS_IMPORT_LOGS", flag: "" },
    Key { path: "import.live", env: "OCTOBUS_IMPORT_LIVE", flag: "" },
    Key { path: "import.state", env: "OCTOBUS_IMPORT_STATE", flag: "" },
];
const MQTT_CONNECTIONS: Key =
    Key { path: "limits.mqtt_connections", env: "OCTOBUS_LIMITS_MQTT_CONNECTIONS", flag: "" };
const NATS_CONNECTIONS: Key =
    Key { path: "limits.nats_connections", env: "OCTOBUS_LIMITS_NATS_CONNECTIONS", flag: "" };
const LINKS: Key = Key { path: "limits.links", env: "OCTOBUS_LIMITS_LINKS", flag: "" };
const MQTT_PACKET: Key = Key { path: "limits.mqtt_packet", env: "OCTOBUS_LIMITS_MQTT_PACKET", flag: "" };
const NATS_PAYLOAD: Key = Key { path: "limits.nats_payload", env: "OCTOBUS_LIMITS_NATS_PAYLOAD", flag: "" };
const CONNECT_TIMEOUT: Key =
    Key { path: "limits.connect_timeout", env: "OCTOBUS_LIMITS_CONNECT_TIMEOUT", flag: "" };
const HEARTBEAT: Key = Key { path: "limits.heartbeat", env: "OCTOBUS_LIMITS_HEARTBEAT", flag: "" };
const DRAIN: Key = Key { path: "limits.drain", env: "OCTOBUS_LIMITS_DRAIN", flag: "" };
const SESSION_EXPIRY: Key =
    Key { path: "limits.session_expiry", env: "OCTOBUS_LIMITS_SESSION_EXPIRY", flag: "" };
const LOG_LEVEL: Key = Key { path: "log.level", env: "OCTOBUS_LOG_LEVEL", flag: "--log-level" };
const LOG_FORMAT: Key = Key { path: "log.format", env: "OCTOBUS_LOG_FORMAT", flag: "--log-format" };

impl Config {
    /// Reads flags, environment and the file they name.
    ///
    /// # Errors
    /// Every mistake, with its place and what to do.
    pub fn load(role: Role, flags: &Flags) -> Result<Self, ConfigError> {
        Self::resolve(role, flags.sources()?)
    }

    /// The pure part of [`load`](Self::load).
    ///
    /// # Errors
    /// Every mistake, with its place and what to do.
    pub fn resolve(role: Role, sources: Sources) -> Result<Self, ConfigError> {
        let default_data = default_data(role, &sources);
        let mut layers = Layers::new(sources);
        refuse_foreign_flags(role, &mut layers);
        let data = layers.take(DATA, folder).unwrap_or(default_data);
        let fabric = fabric::read(role, &mut layers);
        let kubernetes = kubernetes::read(role, &mut layers);
        let config = Self {
            role,
            ready_file: layers.take(READY_FILE, path),
            node: layers.take(NODE, node_name).or_else(|| (role == Role::Dev).then(|| Arc::from("edge-1"))),
            tier: layers.take(TIER, |text| name(text).map(str::to_owned)),
            hubs: Hub::merged(layers.take_list(HUB, units::hub).unwrap_or_default()),
            relay: layers.take(RELAY, node_name),
            proxy: layers.take(PROXY, units::proxy),
            listen: read_listen(role, &data, fabric.is_some(), kubernetes.cluster.is_some(), &mut layers),
            fabric,
            kubernetes,
            edged: edged::read(role, &data, &mut layers),
            auth: read_auth(role, &mut layers),
            streams: streams::read(&mut layers),
            budgets: budgets::read(&mut layers),
            export: read_exchange(EXPORT, default_export(role), &mut layers),
            import: read_exchange(IMPORT, default_import(role), &mut layers),
            limits: read_limits(&mut layers),
            log: read_log(role, &mut layers),
            data,
        };
        config.check_anonymous(&mut layers);
        if config.fabric.is_some() && config.listen.nats.is_some() {
            let what = "with fabric.servers, NATS clients speak to those servers: leave it out".to_owned();
            let place = layers.name(NATS);
            layers.mistake(place, what);
        }
        if config.fabric.is_some() && config.listen.kubernetes.is_some() {
            let what =
                "is of a single hub: with fabric.servers, use a Kubernetes cluster; leave it out".to_owned();
            let place = layers.name(KUBERNETES);
            layers.mistake(place, what);
        }
        let serves = config.listen.kubernetes.is_some();
        if config.listen.kubelet.is_some() && !serves && config.kubernetes.cluster.is_none() {
            let what =
                "an API server decides who may ask there: name a cluster (kubernetes.kubeconfig), or leave \
                        this out"
                    .to_owned();
            let place = layers.name(KUBELET);
            layers.mistake(place, what);
        }
        kubernetes::check(&config.kubernetes, serves, config.fabric.is_some(), &mut layers);
        layers.finish()?;
        Ok(config)
    }

    /// The hub's half of a dev configuration: data in `DATA/hub`, everything else as configured.
    #[must_use]
    pub fn dev_hub(&self) -> Self {
        let data = self.data.join("hub");
        let listen = Listen {
            mqtt: None,
            node_nats: None,
            api: None,
            admin: self.listen.admin.clone(),
            ..self.listen.clone()
        };
        let export = default_export(Role::Cloud);
        let import = default_import(Role::Cloud);
        Self {
            role: Role::Cloud,
            node: None,
            hubs: Vec::new(),
            data,
            listen,
            export,
            import,
            ready_file: None,
            ..self.clone()
        }
    }

    /// The node's half of a dev configuration: data in `DATA/node`, linked to this hub.
    #[must_use]
    pub fn dev_node(&self, hub: Hub) -> Self {
        let data = self.data.join("node");
        let listen = Listen {
            mqtt: self.listen.mqtt,
            nats: self.listen.node_nats,
            node_nats: None,
            quic: None,
            websocket: None,
            bootstrap: None,
            kubernetes: None,
            kubelet: None,
            api: self.listen.api,
            metrics: None,
            admin: data.join("admin.sock"),
        };
        Self {
            role: Role::Edge,
            hubs: vec![hub],
            proxy: None,
            data,
            listen,
            ready_file: None,
            ..self.clone()
        }
    }

    /// The effective configuration as TOML, for the log at start. It holds no secrets: those stand in
    /// files, of which only the names are configuration.
    #[must_use]
    pub fn effective(&self) -> String {
        show::effective(self)
    }

    fn check_anonymous(&self, layers: &mut Layers) {
        if !self.auth.anonymous {
            return;
        }
        for (key, addr) in
            [(MQTT, self.listen.mqtt), (NATS, self.listen.nats), (NODE_NATS, self.listen.node_nats)]
        {
            if let Some(addr) = addr.filter(|addr| !addr.ip().is_loopback()) {
                let what = format!(
                    "would let anybody in at {addr}, because auth.anonymous is on: listen on 127.0.0.1, or \
                     name a file of users (auth.users, --users)"
                );
                let place = layers.name(key);
                layers.mistake(place, what);
            }
        }
    }
}

/// A flag that a role does nothing with is a mistake; a key is not, so that one file serves all roles.
fn refuse_foreign_flags(role: Role, layers: &mut Layers) {
    let foreign: &[Key] = match role {
        Role::Dev => &[HUB, RELAY],
        Role::Cloud => &[NODE, HUB, RELAY, MQTT, NODE_NATS, API],
        Role::Edge => &[NODE_NATS, WEBSOCKET, BOOTSTRAP, KUBERNETES],
    };
    let of_tier: &[Key] = if role == Role::Cloud { &[] } else { &fabric::FLAGS };
    let of_hub: &[Key] = if role == Role::Edge { &kubernetes::FLAGS } else { &[] };
    for key in foreign
        .iter()
        .chain(of_tier)
        .chain(of_hub)
        .filter(|key| layers.has_flag(**key))
        .copied()
        .collect::<Vec<_>>()
    {
        let what = format!("has no meaning for `octobus {}`; leave it out", role.as_str());
        layers.mistake(key.flag.to_owned(), what);
    }
}

fn default_data(role: Role, sources: &Sources) -> PathBuf {
    match role {
        Role::Dev => flags::dev_data(&sources.env),
        Role::Cloud => PathBuf::from("/var/lib/octobus/hub"),
        Role::Edge => PathBuf::from("/var/lib/octobus/node"),
    }
}

/// In a tier, users speak to its NATS servers and not to a hub.
fn read_listen(role: Role, data: &Path, in_tier: bool, in_cluster: bool, layers: &mut Layers) -> Listen {
    const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
    const ANY: IpAddr = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
    let (hub, node) = (role != Role::Edge, role != Role::Cloud);
    let open = if role == Role::Dev { LOOPBACK } else { ANY };
    let nats = if hub { HUB_NATS_PORT } else { NODE_NATS_PORT };
    let metrics = if hub { HUB_METRICS_PORT } else { NODE_METRICS_PORT };
    let admin = if role == Role::Dev { data.join("hub/admin.sock") } else { data.join("admin.sock") };

    let mut address = |key, serves: bool, ip, port: Option<u16>| {
        let default = port.map(|port| SocketAddr::new(ip, port));
        layers.take(key, units::listen).unwrap_or(default).filter(|_| serves)
    };
    let nats = address(NATS, true, LOOPBACK, (!in_tier).then_some(nats));
    Listen {
        mqtt: address(MQTT, node, LOOPBACK, Some(MQTT_PORT)),
        nats,
        node_nats: address(NODE_NATS, role == Role::Dev, LOOPBACK, None),
        quic: address(QUIC, true, open, hub.then_some(QUIC_PORT)),
        bootstrap: address(BOOTSTRAP, hub, open, Some(BOOTSTRAP_PORT)),
        kubernetes: address(
            KUBERNETES,
            hub,
            LOOPBACK,
            (role == Role::Dev && !in_cluster).then_some(KUBERNETES_PORT),
        ),
        kubelet: address(KUBELET, hub, open, None),
        api: address(API, node, LOOPBACK, Some(API_PORT)),
        metrics: address(METRICS, true, LOOPBACK, Some(metrics)),
        websocket: address(WEBSOCKET, hub, open, Some(WEBSOCKET_PORT)),
        admin: layers.take(ADMIN, path).unwrap_or(admin),
    }
}

fn read_auth(role: Role, layers: &mut Layers) -> Auth {
    let users = layers.take(USERS, path);
    let anonymous =
        layers.take(ANONYMOUS, units::boolean).unwrap_or_else(|| role == Role::Dev && users.is_none());
    Auth { users, anonymous }
}

fn read_exchange(keys: [Key; 3], default: Exchange, layers: &mut Layers) -> Exchange {
    let [logs, live, state] = keys;
    Exchange {
        logs: layers.take_list(logs, selector).unwrap_or(default.logs),
        live: layers.take_list(live, filter).unwrap_or(default.live),
        state: layers.take_list(state, selector).unwrap_or(default.state),
    }
}

fn default_export(role: Role) -> Exchange {
    match role {
        Role::Cloud => {
            Exchange { logs: names(&["down"]), live: streams::all_topics(), state: names(&["fleet"]) }
        }
        Role::Dev | Role::Edge => Exchange {
            logs: names(&["*"]),
            live: streams::all_topics(),
            state: names(&["retained", "status", "twin"]),
        },
    }
}

/// A side imports by default what the other exports by default.
fn default_import(role: Role) -> Exchange {
    default_export(if role == Role::Cloud { Role::Edge } else { Role::Cloud })
}

fn names(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

fn read_limits(layers: &mut Layers) -> Limits {
    let connections = |text: &str| units::count(text, 1, 1_000_000).and_then(as_usize);
    let packet = |text: &str| match units::size(text)? {
        bytes @ 1_024..=FRONT_PACKET_MAX => as_usize(bytes),
        _ => Err(format!("not within 1KiB and {}", units::show_size(FRONT_PACKET_MAX))),
    };
    Limits {
        mqtt_connections: layers.take(MQTT_CONNECTIONS, connections).unwrap_or(10_000),
        nats_connections: layers.take(NATS_CONNECTIONS, connections).unwrap_or(10_000),
        links: layers.take(LINKS, connections).unwrap_or(100_000),
        mqtt_packet: layers.take(MQTT_PACKET, packet).unwrap_or(limits::MQTT_PACKET_MAX),
        nats_payload: layers.take(NATS_PAYLOAD, packet).unwrap_or(limits::MQTT_PACKET_MAX),
        connect_timeout: layers.take(CONNECT_TIMEOUT, within(SECOND, MINUTE)).unwrap_or(10 * SECOND),
        heartbeat: layers.take(HEARTBEAT, within(SECOND, 10 * MINUTE)).unwrap_or(15 * SECOND),
        drain: layers.take(DRAIN, within(SECOND, 10 * MINUTE)).unwrap_or(10 * SECOND),
        session_expiry: layers.take(SESSION_EXPIRY, within(SECOND, 3_650 * DAY)).unwrap_or(7 * DAY),
    }
}

/// A packet, its topic and headers together must fit a Frame.
const FRONT_PACKET_MAX: u64 = limits::FRAME_MAX as u64 - (64 << 10);
const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);
const DAY: Duration = Duration::from_secs(86_400);

fn within(min: Duration, max: Duration) -> impl Fn(&str) -> Result<Duration, String> {
    move |text| {
        let value = units::duration(text)?;
        if (min..=max).contains(&value) {
            Ok(value)
        } else {
            Err(format!("not within {} and {}", units::show_duration(min), units::show_duration(max)))
        }
    }
}

/// In dev the terminal belongs to the lines to try: only what needs attention is logged there.
fn read_log(role: Role, layers: &mut Layers) -> Log {
    let level = if role == Role::Dev { "warn" } else { "info" };
    let format = |text: &str| match text {
        "auto" => Ok(LogFormat::Auto),
        "text" => Ok(LogFormat::Text),
        "json" => Ok(LogFormat::Json),
        _ => Err("not a format; write \"auto\", \"text\" or \"json\"".to_owned()),
    };
    Log {
        level: layers.take(LOG_LEVEL, crate::logging::check_level).unwrap_or_else(|| level.to_owned()),
        format: layers.take(LOG_FORMAT, format).unwrap_or(LogFormat::Auto),
    }
}

fn path(text: &str) -> Result<PathBuf, String> {
    if text.is_empty() { Err("is empty; name a file".to_owned()) } else { Ok(PathBuf::from(text)) }
}

fn folder(text: &str) -> Result<PathBuf, String> {
    if text.is_empty() { Err("is empty; name a folder".to_owned()) } else { Ok(PathBuf::from(text)) }
}

fn node_name(text: &str) -> Result<Arc<str>, String> {
    codec::topic::validate_node_name(text).map_err(|error| format!("not a node's name: {error}"))?;
    Ok(Arc::from(text))
}

fn filter(text: &str) -> Result<Filter, String> {
    Filter::parse(text).map_err(|error| format!("not a topic filter: {error}"))
}

fn name(text: &str) -> Result<&str, String> {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '_';
    if (1..=63).contains(&text.len()) && text.chars().all(plain) {
        Ok(text)
    } else {
        Err("not a name; write 1 to 63 of a-z, 0-9, - and _".to_owned())
    }
}

fn selector(text: &str) -> Result<String, String> {
    if text == "*" { Ok(text.to_owned()) } else { name(text).map(str::to_owned) }
}

fn as_usize(n: u64) -> Result<usize, String> {
    usize::try_from(n).map_err(|_| "more than this machine can count".to_owned())
}

mod show;
#[cfg(test)]
mod tests;
