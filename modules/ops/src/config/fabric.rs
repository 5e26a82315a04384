//! `[fabric]`: the NATS servers that the replicas of one tier share.

use std::{path::PathBuf, sync::Arc, time::Duration};

use super::{
    Role, as_usize, folder,
    layers::{Key, Layers},
    node_name, path, units,
};

/// What an acknowledgement of this hub must survive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Durability {
    /// The end of a process, not the loss of power of every server that holds it: what JetStream promises unless
    /// told to flush before it acknowledges.
    Process,
    /// Also the loss of power.
    PowerLoss,
}

impl Durability {
    /// As configuration and metrics write it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Process => "process",
            Self::PowerLoss => "power-loss",
        }
    }
}

/// How this hub is one replica of a tier.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fabric {
    /// Addresses of the servers, `nats://` or `tls://`.
    pub servers: Vec<String>,
    /// Name of this replica: no two that run have the same.
    pub replica: Arc<str>,
    /// User of account OCTOBUS; `None`: by certificate.
    pub user: Option<String>,
    /// File with the user's password.
    pub password_file: Option<PathBuf>,
    /// CA of the servers; `None`: the system's.
    pub ca: Option<PathBuf>,
    /// Certificate for mutual TLS.
    pub certificate: Option<PathBuf>,
    /// Its key.
    pub key: Option<PathBuf>,
    /// Folder with the tier's CA, id and secret, the same on every replica; `None`: `tier` in the data folder.
    pub authority: Option<PathBuf>,
    /// Where other replicas dial this one by QUIC, `host:port`; `None`: where it listens.
    pub advertise: Option<String>,
    /// Servers that keep each message.
    pub copies: usize,
    /// Streams that the Logs of nodes are sharded into; fixed by the first replica that starts.
    pub shards: u32,
    /// Room of all Logs together, bytes on each server.
    pub log_bytes: u64,
    /// Older records of Logs go.
    pub log_age: Duration,
    /// Room of what is sent to nodes, bytes on each server.
    pub downlog_bytes: u64,
    /// The operator says that every server flushes before it acknowledges.
    pub sync_always: bool,
    /// Refuse to run with less.
    pub require_durability: Durability,
}

impl Fabric {
    /// What an acknowledgement survives.
    #[must_use]
    pub const fn durability(&self) -> Durability {
        if self.sync_always { Durability::PowerLoss } else { Durability::Process }
    }
}

const SERVERS: Key = Key { path: "fabric.servers", env: "OCTOBUS_FABRIC", flag: "--fabric" };
const REPLICA: Key = Key { path: "fabric.replica", env: "OCTOBUS_REPLICA", flag: "--replica" };
const USER: Key = Key { path: "fabric.user", env: "OCTOBUS_FABRIC_USER", flag: "" };
const PASSWORD: Key = Key { path: "fabric.password_file", env: "OCTOBUS_FABRIC_PASSWORD_FILE", flag: "" };
const CA: Key = Key { path: "fabric.ca", env: "OCTOBUS_FABRIC_CA", flag: "" };
const CERTIFICATE: Key = Key { path: "fabric.certificate", env: "OCTOBUS_FABRIC_CERTIFICATE", flag: "" };
const KEY: Key = Key { path: "fabric.key", env: "OCTOBUS_FABRIC_KEY", flag: "" };
const AUTHORITY: Key = Key { path: "fabric.authority", env: "OCTOBUS_FABRIC_AUTHORITY", flag: "" };
const ADVERTISE: Key = Key { path: "fabric.advertise", env: "OCTOBUS_FABRIC_ADVERTISE", flag: "" };
const COPIES: Key = Key { path: "fabric.copies", env: "OCTOBUS_FABRIC_COPIES", flag: "" };
const SHARDS: Key = Key { path: "fabric.shards", env: "OCTOBUS_FABRIC_SHARDS", flag: "" };
const LOG_BYTES: Key = Key { path: "fabric.log_bytes", env: "OCTOBUS_FABRIC_LOG_BYTES", flag: "" };
const LOG_AGE: Key = Key { path: "fabric.log_age", env: "OCTOBUS_FABRIC_LOG_AGE", flag: "" };
const DOWNLOG_BYTES: Key =
    Key { path: "fabric.downlog_bytes", env: "OCTOBUS_FABRIC_DOWNLOG_BYTES", flag: "" };
const SYNC_ALWAYS: Key = Key { path: "fabric.sync_always", env: "OCTOBUS_FABRIC_SYNC_ALWAYS", flag: "" };
const REQUIRE: Key =
    Key { path: "fabric.require_durability", env: "OCTOBUS_FABRIC_REQUIRE_DURABILITY", flag: "" };

/// Flags that only a hub knows.
pub(super) const FLAGS: [Key; 2] = [SERVERS, REPLICA];

/// Reads the section; `None` without servers, or where the role is no hub of a tier.
pub(super) fn read(role: Role, layers: &mut Layers) -> Option<Fabric> {
    let servers = layers.take_list(SERVERS, server).unwrap_or_default();
    let replica = layers.take(REPLICA, node_name);
    let fabric = Fabric {
        user: layers.take(USER, |text| Ok(text.to_owned())),
        password_file: layers.take(PASSWORD, path),
        ca: layers.take(CA, path),
        certificate: layers.take(CERTIFICATE, path),
        key: layers.take(KEY, path),
        authority: layers.take(AUTHORITY, folder),
        advertise: layers.take(ADVERTISE, advertised),
        copies: layers.take(COPIES, |text| units::count(text, 1, 5).and_then(as_usize)).unwrap_or(1),
        shards: layers.take(SHARDS, shards).unwrap_or(8),
        log_bytes: layers.take(LOG_BYTES, room).unwrap_or(16 << 30),
        log_age: layers.take(LOG_AGE, log_age).unwrap_or(Duration::from_hours(7 * 24)),
        downlog_bytes: layers.take(DOWNLOG_BYTES, room).unwrap_or(1 << 30),
        sync_always: layers.take(SYNC_ALWAYS, units::boolean).unwrap_or(false),
        require_durability: layers.take(REQUIRE, durability).unwrap_or(Durability::Process),
        replica: replica.clone().unwrap_or_else(|| Arc::from("hub")),
        servers,
    };
    if role != Role::Cloud || fabric.servers.is_empty() {
        return None;
    }
    check(&fabric, replica.is_some(), layers);
    Some(fabric)
}

fn check(fabric: &Fabric, named: bool, layers: &mut Layers) {
    let mut mistake = |key: Key, what: &str| {
        let place = layers.name(key);
        layers.mistake(place, what.to_owned());
    };
    if !named {
        mistake(
            REPLICA,
            "is missing: with fabric.servers every replica needs a name of its own; in Kubernetes, its pod's",
        );
    }
    if fabric.user.is_some() != fabric.password_file.is_some() {
        mistake(PASSWORD, "user and password_file belong together; give both or none");
    }
    if fabric.certificate.is_some() != fabric.key.is_some() {
        mistake(KEY, "certificate and key belong together; give both or none");
    }
    if fabric.require_durability == Durability::PowerLoss && !fabric.sync_always {
        mistake(
            REQUIRE,
            "JetStream acknowledges before it flushes: set `jetstream { sync_interval: always }` on every \
             nats-server (2.10 or later) and fabric.sync_always = true, or require \"process\"",
        );
    }
}

fn server(text: &str) -> Result<String, String> {
    let (scheme, address) = text.split_once("://").unwrap_or(("nats", text));
    if !matches!(scheme, "nats" | "tls") {
        return Err("not the address of a nats-server; write nats://HOST:PORT or tls://HOST:PORT".to_owned());
    }
    if address.contains('@') {
        return Err("holds a user: write it in fabric.user, and the password in a file".to_owned());
    }
    Ok(format!("{scheme}://{}", units::HostPort::parse(address, 4222)?))
}

fn advertised(text: &str) -> Result<String, String> {
    Ok(units::HostPort::parse(text, 10001)?.to_string())
}

fn shards(text: &str) -> Result<u32, String> {
    let count = units::count(text, 1, 256)?;
    u32::try_from(count).map_err(|_| "too many".to_owned())
}

fn room(text: &str) -> Result<u64, String> {
    match units::size(text)? {
        bytes if bytes >= 1 << 20 => Ok(bytes),
        _ => Err("less than 1MiB".to_owned()),
    }
}

fn durability(text: &str) -> Result<Durability, String> {
    match text {
        "process" => Ok(Durability::Process),
        "power-loss" => Ok(Durability::PowerLoss),
        _ => Err("not a durability; write \"process\" or \"power-loss\"".to_owned()),
    }
}

/// Not less than nodes keep for a tier that lost what it had not flushed.
fn log_age(text: &str) -> Result<Duration, String> {
    match units::duration(text)? {
        age if age < Duration::from_hours(1) => Err("less than 1h: nothing could be read in time".to_owned()),
        age => Ok(age),
    }
}

/// As it stands in the file.
pub(super) fn show(fabric: &Fabric) -> toml::Table {
    let text = |text: &str| toml::Value::String(text.to_owned());
    let count = |count: u64| toml::Value::Integer(i64::try_from(count).unwrap_or(i64::MAX));
    let mut table = toml::Table::new();
    let mut put = |name: &str, value: toml::Value| table.insert(name.to_owned(), value);
    put("servers", toml::Value::Array(fabric.servers.iter().map(|server| text(server)).collect()));
    put("replica", text(&fabric.replica));
    if let Some(user) = &fabric.user {
        put("user", text(user));
    }
    let files = [
        ("password_file", &fabric.password_file),
        ("ca", &fabric.ca),
        ("certificate", &fabric.certificate),
        ("key", &fabric.key),
        ("authority", &fabric.authority),
    ];
    for (name, file) in files {
        if let Some(file) = file {
            put(name, text(&file.display().to_string()));
        }
    }
    if let Some(address) = &fabric.advertise {
        put("advertise", text(address));
    }
    put("copies", count(fabric.copies as u64));
    put("shards", count(fabric.shards.into()));
    put("log_bytes", text(&units::show_size(fabric.log_bytes)));
    put("log_age", text(&units::show_duration(fabric.log_age)));
    put("downlog_bytes", text(&units::show_size(fabric.downlog_bytes)));
    put("sync_always", toml::Value::Boolean(fabric.sync_always));
    put("require_durability", text(fabric.require_durability.as_str()));
    table
}
