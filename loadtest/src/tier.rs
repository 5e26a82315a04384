//! A tier's NATS servers: what arrived is read from their streams, because no replica has all of it.

use std::{
    collections::HashMap,
    io,
    path::{Path, PathBuf},
};

use cloudhub::fabric::nats::{
    connection::{Access, Connection, NatsError, Tls},
    follow::{Follow, Followed, Start},
    names,
};
use codec::{Kind, batch};
use tokio::{
    sync::mpsc,
    task::JoinSet,
    time::{Instant, timeout_at},
};

use crate::{
    check::{Found, Judge},
    mark::Mark,
};

/// What the followers of all streams have read and nobody has judged yet.
const READ_WAITING: usize = 16;

/// Why the servers cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum TierError {
    /// The password.
    #[error("{path}: {source}")]
    File { path: PathBuf, source: io::Error },
    /// Nobody lets us in.
    #[error("no nats-server of {servers} lets this in: {what}")]
    Connect { servers: String, what: String },
    /// No Logs.
    #[error("the tier's streams cannot be looked at: {0}")]
    Nats(#[from] NatsError),
    /// While it was read.
    #[error("the servers lost acknowledged messages of Logs, shard {0}")]
    Lost(usize),
}

/// How to reach them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Servers {
    /// `nats://HOST:PORT`.
    pub addresses: Vec<String>,
    /// User of account OCTOBUS, and the file with its password.
    pub login: Option<(String, PathBuf)>,
}

impl Servers {
    /// As a hub's `--fabric` takes them.
    #[must_use]
    pub fn list(&self) -> String {
        self.addresses.join(",")
    }

    /// Copies of each message that they can keep, as far as more help.
    #[must_use]
    pub fn copies(&self) -> usize {
        if self.addresses.len() >= 3 { 3 } else { 1 }
    }

    /// Connects.
    ///
    /// # Errors
    /// See [`TierError`].
    pub async fn connect(&self) -> Result<Connection, TierError> {
        let login = match &self.login {
            Some((user, file)) => Some((user.clone(), password(file)?)),
            None => None,
        };
        let access = Access {
            servers: self.addresses.clone(),
            name: "octobus loadtest".to_owned(),
            login,
            tls: Tls::default(),
        };
        let failed = |error: &dyn std::fmt::Display| TierError::Connect {
            servers: self.list(),
            what: error.to_string(),
        };
        Connection::open(&access, 1).await.map_err(|error| failed(&error))
    }
}

fn password(file: &Path) -> Result<String, TierError> {
    let text =
        std::fs::read_to_string(file).map_err(|source| TierError::File { path: file.to_owned(), source })?;
    Ok(text.trim_end_matches(['\r', '\n']).to_owned())
}

/// Reads all Logs of a tier until every node's messages of this run are there, or the time is over: what is there
/// of each node. Beyond `wanted` it reads on to where the streams end then, so that nothing that is twice is missed.
///
/// # Errors
/// The servers cannot be read at all.
pub async fn read(
    connection: &Connection,
    run: u64,
    wanted: &HashMap<String, u64>,
    until: Instant,
) -> Result<HashMap<String, Found>, TierError> {
    let mut judges: HashMap<String, Judge> = HashMap::new();
    let mut missing: u64 = wanted.values().sum();
    let (sender, mut news) = mpsc::channel(READ_WAITING);
    let (mut followers, mut ends) = (JoinSet::new(), Vec::new());
    for shard in 0.. {
        let stream = names::log_stream(shard);
        match connection.info(&stream).await {
            Ok(info) => ends.push(info.state.last_sequence),
            Err(NatsError::Missing) if shard > 0 => break,
            Err(error) => return Err(error.into()),
        }
        let mut follow = Follow::new(connection.clone(), stream, Start::Everything);
        let (sender, shard) = (sender.clone(), shard as usize);
        followers.spawn(async move { while sender.send((shard, follow.next().await)).await.is_ok() {} });
    }
    let mut read = vec![0; ends.len()];
    let mut all_there = false;
    while !(all_there && read.iter().zip(&ends).all(|(read, end)| read >= end)) {
        // Nobody ends the followers but the end of this.
        let Ok(Some((shard, followed))) = timeout_at(until, news.recv()).await else { break };
        match followed {
            Followed::Entries { entries, upto } => {
                read[shard] = upto;
                for entry in entries {
                    let Ok((node, _stream)) = names::log_of_subject(&entry.subject) else { continue };
                    let Some(left) = wanted.get(&node) else { continue };
                    let judge = judges.entry(node).or_default();
                    for number in numbers(entry.value.unwrap_or_default(), run) {
                        let before = judge.found.arrived;
                        judge.message(number);
                        missing -= u64::from(judge.found.arrived > before && judge.found.arrived <= *left);
                    }
                }
            }
            Followed::CaughtUp { upto } => read[shard] = upto,
            Followed::Began { .. } => {}
            // What was judged is not there any more.
            Followed::WentBack { .. } | Followed::Gone => return Err(TierError::Lost(shard)),
        }
        if missing == 0 && !all_there {
            all_there = true;
            for (shard, end) in (0..).zip(&mut ends) {
                *end = connection.info(&names::log_stream(shard)).await?.state.last_sequence;
            }
        }
    }
    Ok(judges.into_iter().map(|(node, judge)| (node, judge.found)).collect())
}

/// Numbers of this run's messages in a message of a Log's stream.
fn numbers(payload: bytes::Bytes, run: u64) -> Vec<u32> {
    let Some(prefix) = payload.first_chunk::<{ batch::Prefix::LEN }>() else { return Vec::new() };
    let Ok(prefix) = batch::Prefix::decode(prefix) else { return Vec::new() };
    let records = batch::decode(&prefix, payload.slice(batch::Prefix::LEN..)).unwrap_or_default();
    let log = records.iter().filter(|record| record.header.kind == Kind::LOG);
    log.filter_map(|record| Some(Mark::of_frame(&record.body, run)?.number)).collect()
}
