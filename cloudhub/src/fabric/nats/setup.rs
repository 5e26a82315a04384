//! What the servers must offer, checked at start; buckets and streams, created if they are not there.
//!
//! Every refusal names the line of nats-server.conf to change.
//!
//! The **incarnation** of a bucket or stream stands in its description, so that it comes and goes with it: who
//! creates one writes a greater one than any before, and nobody can take a new bucket for the old. One that
//! was created by hand has none and counts from when it was created.

use std::time::Duration;

use async_nats::{
    ServerInfo,
    jetstream::stream::{Config, DiscardPolicy, Info, RetentionPolicy, StorageType},
};
use broker::{clock, limits};
use serde::Deserialize;

use super::{
    connection::{ApiError, Connection, NatsError},
    names::{self, Bucket},
};

/// What a message takes beside a frame: record and batch headers, NATS headers, its subject.
const MESSAGE_OVERHEAD: usize = 64 << 10;
/// How long what the tier sends a node is kept for it.
pub const DOWNLOG_TTL: Duration = Duration::from_secs(24 * 60 * 60);
/// How long servers may take to elect who leads, at start.
const PATIENCE: Duration = Duration::from_secs(30);
const RETRY: Duration = Duration::from_millis(250);
/// Bytes of dead letters.
const LETTERS_BYTES: i64 = 64 << 20;

/// How the tier's buckets and streams are made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// Servers that keep each message.
    pub copies: usize,
    /// Streams that Logs are sharded into.
    pub shards: u32,
    /// Bytes of all Logs together, on each server.
    pub log_bytes: u64,
    /// How long a record of a Log is kept.
    pub log_age: Duration,
    /// Bytes of what the tier sends nodes, on each server.
    pub downlog_bytes: u64,
}

/// Why a hub cannot run on these servers.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// None of the servers runs JetStream.
    #[error(
        "nats-server {server} runs without JetStream: add `jetstream {{ store_dir: /var/lib/nats }}` to its \
         nats-server.conf"
    )]
    NoJetStream { server: String },
    /// The account has none.
    #[error(
        "this account of nats-server has no JetStream: add `jetstream: enabled` to `accounts {{ OCTOBUS {{ ... }} \
         }}` in nats-server.conf, and connect as a user of it"
    )]
    NoAccount,
    /// Requests get no answer.
    #[error(
        "nats-server does not answer at `$JS.API.>` ({0}): give this user of account OCTOBUS `publish: \">\"` and \
         `subscribe: \">\"` in nats-server.conf, or wait until its cluster has a leader"
    )]
    NoAnswer(String),
    /// A frame does not fit a message.
    #[error(
        "nats-server takes messages of {found} bytes, a frame needs {needed}: set `max_payload: 4MB` in nats-server.conf"
    )]
    MaxPayload { found: usize, needed: usize },
    /// It lacks what claims and Logs rest on.
    #[error("nats-server {version} is too old: 2.9 or later is needed")]
    Version { version: String },
    /// The operator says what cannot be.
    #[error(
        "nats-server {version} cannot flush before it acknowledges, which fabric.sync_always says: 2.10 or later with \
         `jetstream {{ sync_interval: always }}` in nats-server.conf can"
    )]
    SyncAlways { version: String },
    /// Not enough servers.
    #[error(
        "{copies} copies of each message (fabric.copies) need as many nats-servers with `jetstream` and one \
         `cluster {{ name: ... }}` in nats-server.conf: {reason}"
    )]
    Copies { copies: usize, reason: String },
    /// Not enough room.
    #[error(
        "{stream} does not fit ({reason}): raise `max_file_store` in `jetstream {{ ... }}` of nats-server.conf, or \
         lower fabric.log_bytes"
    )]
    Room { stream: String, reason: String },
    /// A stream of that name is something else.
    #[error("{stream} exists and takes subjects {found:?} instead of {wanted}: rename or remove it")]
    Foreign { stream: String, found: Vec<String>, wanted: String },
    /// NATS refuses for another reason.
    #[error("cannot create {stream}: {source}")]
    Create { stream: String, source: NatsError },
}

/// Checks the servers, and creates what is not there.
///
/// # Errors
/// See [`SetupError`].
pub async fn prepare(connection: &Connection, layout: &Layout, sync_always: bool) -> Result<(), SetupError> {
    let server = connection.client().server_info();
    check_server(&server, connection.max_payload(), sync_always)?;
    check_account(connection).await?;
    for config in configs(layout) {
        ensure(connection, config).await?;
    }
    Ok(())
}

fn check_server(server: &ServerInfo, max_payload: usize, sync_always: bool) -> Result<(), SetupError> {
    let mut numbers = server.version.split('.').map(|number| number.parse::<u32>().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if version < (2, 9) {
        return Err(SetupError::Version { version: server.version.clone() });
    }
    if sync_always && version < (2, 10) {
        return Err(SetupError::SyncAlways { version: server.version.clone() });
    }
    if !server.jetstream {
        return Err(SetupError::NoJetStream { server: server.server_name.clone() });
    }
    let needed = limits::FRAME_MAX + MESSAGE_OVERHEAD;
    if max_payload < needed {
        return Err(SetupError::MaxPayload { found: max_payload, needed });
    }
    Ok(())
}

async fn check_account(connection: &Connection) -> Result<(), SetupError> {
    #[derive(Deserialize)]
    struct Answer {
        error: Option<ApiError>,
    }
    let deadline = tokio::time::Instant::now() + PATIENCE;
    loop {
        match connection.ask::<Answer>("INFO", &serde_json::json!({})).await {
            Ok(Answer { error: None }) => return Ok(()),
            Ok(Answer { error: Some(error) }) if NO_ACCOUNT.contains(&error.err_code) => {
                return Err(SetupError::NoAccount);
            }
            Err(NatsError::Unavailable) => return Err(SetupError::NoAccount),
            Ok(Answer { error: Some(error) }) if tokio::time::Instant::now() > deadline => {
                return Err(SetupError::NoAnswer(error.description));
            }
            Err(error) if tokio::time::Instant::now() > deadline => {
                return Err(SetupError::NoAnswer(error.to_string()));
            }
            _ => tokio::time::sleep(RETRY).await,
        }
    }
}

const NO_ACCOUNT: [u64; 3] = [10039, 10076, 10035];
const REPLICAS_NOT_SUPPORTED: u64 = 10074;
const NO_PEERS: u64 = 10005;
const NO_ROOM: [u64; 5] = [10047, 10002, 10023, 10028, 10122];
const EXISTS: u64 = 10058;

/// Creates a stream if it is not there. Several replicas may do so at once: one of them creates it.
///
/// # Errors
/// See [`SetupError`].
pub async fn ensure(connection: &Connection, config: Config) -> Result<(), SetupError> {
    #[derive(Deserialize)]
    struct Answer {
        error: Option<ApiError>,
    }
    let deadline = tokio::time::Instant::now() + PATIENCE;
    let request = serde_json::to_value(&config).expect("a stream's configuration is JSON");
    let name = config.name.clone();
    loop {
        let error = match connection.info(&name).await {
            Ok(info) => return check_existing(&config, &info),
            Err(NatsError::Missing) => {
                match connection.ask::<Answer>(&format!("STREAM.CREATE.{name}"), &request).await {
                    Ok(Answer { error: None }) => {
                        tracing::info!(stream = %name, copies = config.num_replicas, "created a stream");
                        return Ok(());
                    }
                    // Another replica was faster: it is looked at.
                    Ok(Answer { error: Some(error) }) if error.err_code == EXISTS => continue,
                    Ok(Answer { error: Some(error) }) => {
                        let reason = error.description.clone();
                        match error.err_code {
                            REPLICAS_NOT_SUPPORTED => {
                                return Err(SetupError::Copies { copies: config.num_replicas, reason });
                            }
                            // Also while servers of the cluster are still starting.
                            NO_PEERS if tokio::time::Instant::now() > deadline => {
                                return Err(SetupError::Copies { copies: config.num_replicas, reason });
                            }
                            code if NO_ROOM.contains(&code) => {
                                return Err(SetupError::Room { stream: name, reason });
                            }
                            _ => error.into(),
                        }
                    }
                    Err(error) => error,
                }
            }
            Err(error) => error,
        };
        let passes = matches!(error, NatsError::Unavailable | NatsError::Unknown(_) | NatsError::Missing);
        if !passes || tokio::time::Instant::now() > deadline {
            return Err(SetupError::Create { stream: name, source: error });
        }
        tokio::time::sleep(RETRY).await;
    }
}

fn check_existing(wanted: &Config, found: &Info) -> Result<(), SetupError> {
    if found.config.subjects != wanted.subjects {
        return Err(SetupError::Foreign {
            stream: wanted.name.clone(),
            found: found.config.subjects.clone(),
            wanted: wanted.subjects.join(", "),
        });
    }
    if found.config.num_replicas != wanted.num_replicas {
        tracing::warn!(
            stream = %wanted.name, found = found.config.num_replicas, wanted = wanted.num_replicas,
            "this stream has another number of copies than configured: change it with `nats stream edit --replicas`"
        );
    }
    Ok(())
}

/// Everything that is made, as it is made.
pub fn configs(layout: &Layout) -> Vec<Config> {
    let mut configs: Vec<Config> = Bucket::ALL.iter().map(|bucket| of_bucket(*bucket, layout)).collect();
    configs.extend((0..layout.shards).map(|shard| of_logs(shard, layout)));
    configs.push(of_downlog(layout));
    configs.push(of_letters(layout));
    configs
}

/// A bucket as `nats kv add` makes it, except that it is read from the server that leads it.
pub fn of_bucket(bucket: Bucket, layout: &Layout) -> Config {
    Config {
        name: bucket.stream().to_owned(),
        subjects: vec![bucket.all()],
        max_messages_per_subject: 1,
        max_bytes: -1,
        max_messages: -1,
        max_message_size: -1,
        max_consumers: -1,
        discard: DiscardPolicy::New,
        allow_rollup: true,
        deny_delete: true,
        ..base(layout)
    }
}

fn of_logs(shard: u32, layout: &Layout) -> Config {
    Config {
        name: names::log_stream(shard),
        subjects: vec![names::log_subjects(shard)],
        max_bytes: i64::try_from(layout.log_bytes / u64::from(layout.shards.max(1))).unwrap_or(i64::MAX),
        max_age: layout.log_age,
        discard: DiscardPolicy::New,
        allow_rollup: true,
        ..base(layout)
    }
}

fn of_downlog(layout: &Layout) -> Config {
    Config {
        name: names::DOWNLOG.to_owned(),
        subjects: vec![names::DOWNLOG_ALL.to_owned()],
        max_bytes: i64::try_from(layout.downlog_bytes).unwrap_or(i64::MAX),
        max_age: DOWNLOG_TTL,
        discard: DiscardPolicy::New,
        ..base(layout)
    }
}

/// Of records that cannot be kept, the newest are.
fn of_letters(layout: &Layout) -> Config {
    Config {
        name: names::LETTERS.to_owned(),
        subjects: vec![names::LETTERS_ALL.to_owned()],
        max_bytes: LETTERS_BYTES,
        discard: DiscardPolicy::Old,
        ..base(layout)
    }
}

fn base(layout: &Layout) -> Config {
    Config {
        retention: RetentionPolicy::Limits,
        storage: StorageType::File,
        num_replicas: layout.copies,
        description: Some(description(mint(0))),
        max_messages: -1,
        max_message_size: -1,
        max_consumers: -1,
        max_messages_per_subject: -1,
        ..Config::default()
    }
}

/// A new incarnation: greater than `above`, and later than the clock.
pub fn mint(above: u64) -> u64 {
    let now = (clock::wall_us() / 1_000) << 20;
    now.max(above + 1)
}

const INCARNATION: &str = "octobus incarnation=";

/// The description that says it.
pub fn description(incarnation: u64) -> String {
    format!("{INCARNATION}{incarnation}")
}

/// The incarnation of a bucket or stream.
pub fn incarnation(info: &Info) -> u64 {
    let said =
        info.config.description.as_deref().and_then(|text| text.strip_prefix(INCARNATION)?.parse().ok());
    said.unwrap_or_else(|| (super::connection::micros(info.created) / 1_000) << 20)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_names_the_line_to_change() {
        let server = ServerInfo { version: "2.9.10".to_owned(), jetstream: true, ..ServerInfo::default() };
        let small = check_server(&server, 1 << 20, false).unwrap_err().to_string();
        assert!(small.contains("max_payload: 4MB"), "{small}");
        let off = ServerInfo { jetstream: false, ..server.clone() };
        let off = check_server(&off, 4 << 20, false).unwrap_err().to_string();
        assert!(off.contains("jetstream {"), "{off}");
        let old = ServerInfo { version: "2.8.4".to_owned(), ..server.clone() };
        assert!(check_server(&old, 4 << 20, false).is_err());
        assert!(check_server(&server, 4 << 20, false).is_ok());
        let promised = check_server(&server, 4 << 20, true).unwrap_err().to_string();
        assert!(promised.contains("sync_interval: always"), "{promised}");
    }

    #[test]
    fn a_later_incarnation_is_greater_whatever_the_clock_says() {
        let far = u64::MAX - 1;
        assert_eq!(mint(far), u64::MAX);
        assert!(mint(0) >= (clock::TRUSTED_FROM_US / 1_000) << 20);
    }
}
