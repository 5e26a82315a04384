//! Joining a tier, and staying in it.
//!
//! ```text
//! join    key on disk ──> TLS: does the hub's CA have the hash in the token? ──> token, CSR ──> identity on disk
//! renew   at 2/3 of the certificate's life, and ever after until it works: also with an expired one;
//!         and at once where the key of secrets is missing, because the node joined before there was one
//! ```

use std::{path::Path, sync::Arc, time::Duration};

use broker::{
    Tasks,
    enroll::{self, JoinRequest, Joined, RenewRequest, Token, TokenError},
};
use tokio::{
    sync::watch,
    time::{Instant, sleep_until},
};

use crate::{
    https::{self, Pin, RequestError, Server, UrlError},
    identity::{self, Identity, IdentityError},
};

/// Between attempts to renew: doubling, with jitter. A node that comes back after months is not kept
/// waiting for its first.
const RETRY_MIN: Duration = Duration::from_secs(4);
const RETRY_MAX: Duration = Duration::from_secs(60 * 60);
/// How often a node that has not joined looks whether it has.
const JOIN_POLL: Duration = Duration::from_secs(2);
/// How often a node that has joined looks whether it has joined anew.
const REJOIN_POLL: Duration = Duration::from_secs(60);
/// Wall clocks jump: due times are computed anew at least this often.
const LOOK_AGAIN: Duration = Duration::from_secs(60 * 60);

/// Why a node did not join.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// The token is not one.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// The address is not one.
    #[error(transparent)]
    Url(#[from] UrlError),
    /// This folder has joined.
    #[error(
        "{data} belongs to node {name} of tier {tier} already: choose another data folder, or say --again to \
         enrol this node anew under the same name"
    )]
    AlreadyJoined { data: String, name: String, tier: String },
    /// The token is for another name than this folder's.
    #[error(
        "the token enrolled this machine as {new}, but {data} holds the messages of node {old}: use another \
         data folder; a token made with `octobus token create --node {new} --replace` enrols it there"
    )]
    OtherName { data: String, old: String, new: String },
    /// The hub did not answer, or refused.
    #[error(transparent)]
    Request(#[from] RequestError),
    /// The identity could not be read or stored.
    #[error(transparent)]
    Identity(#[from] IdentityError),
}

/// What to join with.
#[derive(Debug, Clone)]
pub struct JoinOptions {
    /// `https://HOST[:PORT]`.
    pub hub: String,
    /// Text of a join token.
    pub token: String,
    /// Enrol anew although this folder has an identity; the name must stay.
    pub again: bool,
}

/// Joins: makes a key, has it certified, stores the identity in `data`.
///
/// May be repeated with the same token until it succeeds, also after a lost reply or a crash.
/// Not cancel safe as to the effect: the hub may have enrolled this node; repeating it is safe.
///
/// # Errors
/// See [`JoinError`]; nothing was stored.
pub async fn join(data: &Path, options: &JoinOptions) -> Result<Identity, JoinError> {
    let token: Token = options.token.parse()?;
    let server = Server::parse(&options.hub)?;
    let before = Identity::load(data)?;
    if let Some(before) = before.as_ref().filter(|_| !options.again) {
        return Err(JoinError::AlreadyJoined {
            data: data.display().to_string(),
            name: before.name().to_string(),
            tier: before.tier().to_owned(),
        });
    }
    let key = identity::joining_key(data)?;
    let csr = identity::csr(&key).map_err(IdentityError::Key)?;
    let request = JoinRequest { token: token.to_string(), csr };
    let pin = Pin { ca_sha256: token.ca_sha256, tier: None };
    let joined: Joined = https::post(&server, pin, enroll::PATH_JOIN, &request).await?;
    if let Some(before) = before.filter(|before| *before.name() != *joined.name) {
        return Err(JoinError::OtherName {
            data: data.display().to_string(),
            old: before.name().to_string(),
            new: joined.name,
        });
    }
    let identity = Identity::store(data, joined, &key, &server)?;
    identity::forget_joining_key(data)?;
    tracing::info!(node = %identity.name(), tier = identity.tier(), generation = identity.generation(), "joined");
    Ok(identity)
}

/// Gets a new certificate for the same key and generation, and stores it.
///
/// # Errors
/// The hub did not answer or refused, or the answer could not be stored; the old one stays.
pub async fn renew(data: &Path, identity: &Identity) -> Result<Identity, JoinError> {
    let key = identity.key_pair();
    let request = RenewRequest {
        certificate: identity.certificate_pem().to_owned(),
        csr: identity::csr(&key).map_err(IdentityError::Key)?,
    };
    let server = identity.bootstrap();
    let joined: Joined = https::post(&server, identity.pin(), enroll::PATH_RENEW, &request).await?;
    if *joined.name != *identity.name() || joined.generation != identity.generation() {
        return Err(IdentityError::Answer("it names another node or generation".into()).into());
    }
    Ok(Identity::store(data, joined, &key, &server)?)
}

/// Keeps `current` what is stored and good: waits for the node `name` to join, notices within a minute when
/// it has joined anew, and renews whenever it is due, until `tasks` are asked to stop.
pub async fn keep_current(
    data: Arc<Path>,
    name: Arc<str>,
    current: watch::Sender<Option<Arc<Identity>>>,
    tasks: Tasks,
) {
    let stopped = tasks.stopped();
    let mut retry = RETRY_MIN;
    // A hub that has no key of secrets is asked once: it gets one when it is upgraded, and so does this node then,
    // when it renews or starts.
    let mut asked_for_key = false;
    loop {
        let identity = current.borrow().clone();
        let lacks_key = |identity: &Identity| !asked_for_key && identity.secrets_key().is_none();
        let due = |identity: &Identity| identity.renew_in().is_zero() || lacks_key(identity);
        let wait = identity.as_deref().map_or(JOIN_POLL, |identity| match identity.renew_in() {
            _ if lacks_key(identity) => jitter(retry),
            Duration::ZERO => jitter(retry),
            due if due > LOOK_AGAIN => LOOK_AGAIN,
            // A fleet that was enrolled in one hour does not renew in one minute.
            due => due + jitter(LOOK_AGAIN),
        });
        let joined = tokio::select! {
            biased;
            () = stopped.cancelled() => return,
            joined = joined_within(wait, &data, &name, identity.as_deref()) => joined,
        };
        let renewed = match (joined, identity) {
            (Ok(None), Some(identity)) if due(&identity) => {
                let renewed = Box::pin(renew(&data, &identity)).await;
                asked_for_key |= renewed.is_ok();
                renewed.map(Some)
            }
            (joined, _) => joined,
        };
        match renewed {
            Ok(Some(identity)) => {
                tracing::info!(node = %identity.name(), "has a new certificate");
                current.send_replace(Some(Arc::new(identity)));
                retry = RETRY_MIN;
            }
            Ok(None) => {}
            Err(error) => {
                tracing::warn!(%error, "no new certificate; trying again later");
                retry = (retry * 2).min(RETRY_MAX);
            }
        }
    }
}

/// Waits, and meanwhile for another identity than the current one: that of `octobus join`, also `--again`,
/// whose generation ends this one. Cancel safe.
async fn joined_within(
    wait: Duration,
    data: &Path,
    name: &str,
    current: Option<&Identity>,
) -> Result<Option<Identity>, JoinError> {
    let until = Instant::now() + wait;
    loop {
        sleep_until(until.min(Instant::now() + REJOIN_POLL)).await;
        let stored = match joined_meanwhile(data, name) {
            // Renewing stores a good one; until then the one in memory serves.
            Err(JoinError::Identity(error)) if current.is_some() => {
                tracing::warn!(%error, "the stored identity cannot be read; going on with the current one");
                None
            }
            stored => stored?.filter(|stored| Some(stored) != current),
        };
        if stored.is_some() || Instant::now() >= until {
            return Ok(stored);
        }
    }
}

/// The identity, if `octobus join` has stored one since.
fn joined_meanwhile(data: &Path, name: &str) -> Result<Option<Identity>, JoinError> {
    match Identity::load(data)? {
        Some(identity) if *identity.name() != *name => Err(JoinError::OtherName {
            data: data.display().to_string(),
            old: name.to_owned(),
            new: identity.name().to_string(),
        }),
        identity => Ok(identity),
    }
}

/// Between half of `max` and `max`.
fn jitter(max: Duration) -> Duration {
    let mut random = [0; 4];
    if getrandom::fill(&mut random).is_err() {
        return max;
    }
    let share = f64::from(u32::from_le_bytes(random)) / f64::from(u32::MAX);
    max.mul_f64(0.5 + share / 2.0)
}
