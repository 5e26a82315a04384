//! Join tokens: how they are made, and how one is turned into an enrolment, once.
//!
//! Using a token is a compare-and-set over `token/<id>` and then `identity/<node>`:
//!
//! ```text
//! token      unused ──(key K)──> used by K for generation g ──(key K again)──> the same answer
//!                                                           └─(another key)──> refused
//! identity   absent      ──> generation 1, key K
//!            generation g ──> refused, or with --replace: generation g+1, key K; live sessions end
//! ```
//!
//! One hub writes both at once. A tier writes the token first: it decides for one key, and says for which
//! generation, so that whoever finds the enrolment missing, a crash in between, writes it when K asks again.
//!
//! So a reply that was lost can be asked for again with the same key, at any time as long as the
//! enrolment it made is the one in force: whoever holds that key could renew as well.

use std::{collections::BTreeSet, fmt, hint, time::Duration};

use broker::{
    clock,
    enroll::{self, Token, TokenId},
    event::Expect,
};
use codec::topic::validate_node_name;

use crate::{
    ca::{Authority, ProvenKey},
    registry::{Conflict, Enrolment, Registry, RegistryError, TokenRecord, Versioned},
};

/// How long a token is good for unless told otherwise.
pub const DEFAULT_TTL: Duration = Duration::from_secs(24 * 60 * 60);
/// A token is short-lived.
pub const TTL_MAX: Duration = Duration::from_secs(30 * 24 * 60 * 60);

/// Expired tokens are kept this long, so that lost replies can be asked for again.
const KEPT_EXPIRED: Duration = Duration::from_secs(7 * 24 * 60 * 60);
/// Tokens looked at for removal at each creation.
const PRUNED_AT_ONCE: usize = 64;
/// A conflict means that somebody else made progress; more than a few in a row means a bug.
const ATTEMPTS: usize = 8;

/// What to make a token for.
#[derive(Debug, Clone)]
pub struct TokenRequest {
    /// The one node name it enrols.
    pub node: String,
    /// May take over a name that is enrolled.
    pub replace: bool,
    /// Good for this long.
    pub ttl: Duration,
    /// The node becomes a relay, which may forward for these names.
    pub forwards: Vec<String>,
}

impl TokenRequest {
    /// For a plain node of a name that is free, for [`DEFAULT_TTL`].
    #[must_use]
    pub fn new(node: &str) -> Self {
        Self { node: node.to_owned(), replace: false, ttl: DEFAULT_TTL, forwards: Vec::new() }
    }
}

/// Names that one relay may forward for.
pub const FORWARDS_MAX: usize = 1024;

/// Why a token is not made.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// The name cannot be a node's.
    #[error("{0}")]
    Name(#[from] codec::topic::TopicError),
    /// A relay of itself, or of too many.
    #[error("--forwards takes at most {FORWARDS_MAX} names of other nodes, each once")]
    Forwards,
    /// It would not be short-lived.
    #[error("a token is good for at least a second and at most 30 days")]
    Ttl,
    /// It could never be used.
    #[error(
        "a node {0} is enrolled already; to give its name to a new machine use --replace, which ends the \
         old machine's access when the token is used"
    )]
    NameTaken(String),
    /// No randomness.
    #[error("the system gives no random bytes: {0}")]
    Random(#[from] getrandom::Error),
    /// State cannot be read or written.
    #[error(transparent)]
    Registry(#[from] RegistryError),
}

/// Makes a token. Its text is shown once: the hub keeps a hash.
///
/// # Errors
/// See [`CreateError`].
pub async fn create(
    registry: &Registry,
    authority: &Authority,
    request: &TokenRequest,
) -> Result<Token, CreateError> {
    validate_node_name(&request.node)?;
    check_forwards(&request.node, &request.forwards)?;
    if !(Duration::from_secs(1)..=TTL_MAX).contains(&request.ttl) {
        return Err(CreateError::Ttl);
    }
    if !request.replace && registry.enrolment(&request.node).await?.is_some() {
        return Err(CreateError::NameTaken(request.node.clone()));
    }
    let mut id = TokenId([0; 8]);
    let mut secret = [0; 20];
    getrandom::fill(&mut id.0)?;
    getrandom::fill(&mut secret)?;
    prune(registry, &id.to_string()).await?;
    let token = Token { ca_sha256: authority.certificate_sha256(), id, secret };
    let record = TokenRecord {
        node: request.node.clone(),
        secret_sha256: enroll::hex(&token.secret_sha256()),
        expires_us: clock::wall_us().saturating_add(micros(request.ttl)),
        replace: request.replace,
        forwards: request.forwards.clone(),
        used_by: None,
        generation: None,
    };
    let op = registry.put_token(&id.to_string(), &record, Expect::Absent);
    match registry.write(vec![op]).await? {
        Ok(()) => {
            tracing::info!(node = %request.node, token = %id, replace = request.replace, "created a join token");
            Ok(token)
        }
        Err(Conflict) => Err(RegistryError::Refused("two tokens of one random id".into()).into()),
    }
}

fn check_forwards(relay: &str, forwards: &[String]) -> Result<(), CreateError> {
    for name in forwards {
        validate_node_name(name)?;
    }
    let different: BTreeSet<&str> = forwards.iter().map(String::as_str).collect();
    if forwards.len() > FORWARDS_MAX || different.len() < forwards.len() || different.contains(relay) {
        return Err(CreateError::Forwards);
    }
    Ok(())
}

/// Who a token made its user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Enrolled {
    /// The node's name.
    pub node: String,
    /// The generation that its certificates carry.
    pub generation: u32,
    /// Its certificates permit others to link to it.
    pub relay: bool,
}

/// Why a token does not enrol. Each says what to do.
#[derive(Debug, thiserror::Error)]
pub enum JoinRefusal {
    /// Made by another tier.
    #[error("this token was made by another hub (its CA differs): use it there, or make one here")]
    OtherTier,
    /// No such token, or a wrong secret; which of the two is not said.
    #[error("the hub does not know this token: make one with `octobus token create --node NAME`")]
    Unknown,
    /// Too late.
    #[error("this token has expired: make another with `octobus token create --node {node}`")]
    Expired { node: String },
    /// Another key was enrolled with it.
    #[error(
        "this token has been used by another key: if that was not you, find out who; make another with \
         `octobus token create --node {node} --replace`"
    )]
    Used { node: String },
    /// The name is enrolled.
    #[error(
        "a node {node} is enrolled already: to replace it by this machine use a token made with `octobus \
         token create --node {node} --replace`"
    )]
    NameTaken { node: String },
    /// The enrolment that this token made is not in force any more.
    #[error(
        "node {node} has been enrolled anew since: make a token with `octobus token create --node {node} --replace`"
    )]
    Superseded { node: String },
    /// State cannot be read or written.
    #[error(transparent)]
    Registry(#[from] RegistryError),
}

/// A token whose secret was right: the cheap check, made before any signature is verified.
pub struct Authenticated {
    id: String,
    record: Versioned<TokenRecord>,
}

/// Looks the token up and compares its secret, in constant time.
///
/// # Errors
/// It is of another tier or not known.
pub async fn authenticate(
    registry: &Registry,
    authority: &Authority,
    token: &Token,
) -> Result<Authenticated, JoinRefusal> {
    if token.ca_sha256 != authority.certificate_sha256() {
        return Err(JoinRefusal::OtherTier);
    }
    let id = token.id.to_string();
    let record = registry.token(&id).await?.ok_or(JoinRefusal::Unknown)?;
    let presented = enroll::hex(&token.secret_sha256());
    if equal(presented.as_bytes(), record.value.secret_sha256.as_bytes()) {
        Ok(Authenticated { id, record })
    } else {
        Err(JoinRefusal::Unknown)
    }
}

/// Uses the token for this key: enrols, or finds that it did so before.
///
/// Dropping the future may leave the enrolment done; asking again with the same key then succeeds.
///
/// # Errors
/// See [`JoinRefusal`].
pub async fn redeem(
    registry: &Registry,
    authenticated: Authenticated,
    key: &ProvenKey,
) -> Result<Enrolled, JoinRefusal> {
    let Authenticated { id, mut record } = authenticated;
    let key = key.hash();
    for _attempt in 0..ATTEMPTS {
        let node = record.value.node.clone();
        let relay = !record.value.forwards.is_empty();
        let enrolment = registry.enrolment(&node).await?;
        let decision = decide(clock::wall_us(), &record.value, enrolment.as_ref().map(|e| &e.value), &key)?;
        let generation = match decision {
            Decision::Again { generation } => {
                // Whoever asked first may have gone away before this was done.
                registry.close_sessions(&node, generation).await?;
                return Ok(Enrolled { node, generation, relay });
            }
            Decision::Enrol { generation } => generation,
        };
        let enrolled = Enrolment {
            generation,
            key: key.clone(),
            revoked: Vec::new(),
            enrolled_us: clock::wall_us(),
            forwards: record.value.forwards.clone(),
        };
        let used = TokenRecord { used_by: Some(key.clone()), generation: Some(generation), ..record.value };
        let before = enrolment.map_or(Expect::Absent, |enrolment| Expect::Revision(enrolment.revision));
        let ops = vec![
            registry.put_token(&id, &used, Expect::Revision(record.revision)),
            registry.put_enrolment(&node, &enrolled, before),
        ];
        match registry.write(ops).await? {
            Ok(()) => {
                if before != Expect::Absent {
                    registry.close_sessions(&node, generation).await?;
                }
                tracing::info!(%node, generation, token = %id, "enrolled a node");
                return Ok(Enrolled { node, generation, relay });
            }
            Err(Conflict) => record = registry.token(&id).await?.ok_or(JoinRefusal::Unknown)?,
        }
    }
    Err(RegistryError::Refused("the token keeps changing; try again".into()).into())
}

impl fmt::Debug for Authenticated {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authenticated").field("id", &self.id).finish_non_exhaustive()
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Decision {
    /// This key used this token before and is in force: only the reply is repeated.
    Again { generation: u32 },
    /// Write the enrolment of this generation.
    Enrol { generation: u32 },
}

fn decide(
    now_us: u64,
    token: &TokenRecord,
    enrolment: Option<&Enrolment>,
    key: &str,
) -> Result<Decision, JoinRefusal> {
    let node = token.node.clone();
    match (&token.used_by, enrolment) {
        (Some(user), _) if user != key => Err(JoinRefusal::Used { node }),
        (Some(_), Some(now)) if now.key == key => Ok(Decision::Again { generation: now.generation }),
        // The token was used and what follows from it was not written, or another token was faster with that
        // generation. What was in force once is never brought back: then there would be a later generation.
        (Some(_), now) if token.generation.is_some() && now_us < token.expires_us => {
            let (meant, held) = (token.generation.unwrap_or(0), now.map_or(0, |now| now.generation));
            if held > meant {
                return Err(JoinRefusal::Superseded { node });
            }
            if held > 0 && !token.replace {
                return Err(JoinRefusal::NameTaken { node });
            }
            next_generation(&node, held)
        }
        (Some(_), _) => Err(JoinRefusal::Superseded { node }),
        (None, _) if now_us >= token.expires_us => Err(JoinRefusal::Expired { node }),
        (None, None) => Ok(Decision::Enrol { generation: 1 }),
        (None, Some(_)) if !token.replace => Err(JoinRefusal::NameTaken { node }),
        (None, Some(now)) => next_generation(&node, now.generation),
    }
}

fn next_generation(node: &str, held: u32) -> Result<Decision, JoinRefusal> {
    match held.checked_add(1) {
        Some(generation) => Ok(Decision::Enrol { generation }),
        None => Err(RegistryError::Refused(format!("{node} has no generation left")).into()),
    }
}

/// Removes tokens that expired long ago, from a random place on, so that all have their turn. A conflict
/// is left to the next time.
async fn prune(registry: &Registry, from: &str) -> Result<(), RegistryError> {
    let horizon = clock::wall_us().saturating_sub(micros(KEPT_EXPIRED));
    for (id, token) in registry.tokens(Some(from), PRUNED_AT_ONCE).await? {
        if token.value.expires_us < horizon {
            let op = registry.delete_token(&id, Expect::Revision(token.revision));
            if registry.write(vec![op]).await? == Err(Conflict) {
                tracing::debug!(token = %id, "an expired token changed while it was being removed");
            }
        }
    }
    Ok(())
}

/// Equality in time that does not depend on where they differ.
fn equal(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len() && a.iter().zip(b).fold(0, |sum, (x, y)| hint::black_box(sum | (x ^ y))) == 0
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: u64 = 1_000;

    fn token(replace: bool, used_by: Option<&str>) -> TokenRecord {
        TokenRecord {
            node: "edge-1".into(),
            secret_sha256: String::new(),
            expires_us: NOW + 1,
            replace,
            forwards: Vec::new(),
            used_by: used_by.map(str::to_owned),
            generation: None,
        }
    }

    fn used(replace: bool, generation: u32) -> TokenRecord {
        TokenRecord { generation: Some(generation), ..token(replace, Some("k")) }
    }

    fn enrolment(generation: u32, key: &str) -> Enrolment {
        Enrolment { generation, key: key.into(), revoked: Vec::new(), enrolled_us: 0, forwards: Vec::new() }
    }

    #[test]
    fn a_new_name_is_enrolled_at_generation_one() {
        assert_eq!(decide(NOW, &token(false, None), None, "k").unwrap(), Decision::Enrol { generation: 1 });
    }

    #[test]
    fn a_lost_reply_is_repeated_for_the_same_key_even_after_expiry() {
        let (token, now) = (token(false, Some("k")), enrolment(3, "k"));
        let again = Decision::Again { generation: 3 };
        assert_eq!(decide(NOW, &token, Some(&now), "k").unwrap(), again);
        assert_eq!(decide(NOW * 9, &token, Some(&now), "k").unwrap(), again);
    }

    #[test]
    fn another_key_never_uses_a_used_token() {
        let now = enrolment(1, "k");
        for replace in [false, true] {
            let refused = decide(NOW, &token(replace, Some("k")), Some(&now), "other");
            assert!(matches!(refused, Err(JoinRefusal::Used { .. })));
        }
    }

    #[test]
    fn a_used_token_does_not_bring_back_an_enrolment_that_was_replaced() {
        let refused = decide(NOW, &token(true, Some("k")), Some(&enrolment(2, "newer")), "k");
        assert!(matches!(refused, Err(JoinRefusal::Superseded { .. })));
        assert!(matches!(
            decide(NOW, &token(true, Some("k")), None, "k"),
            Err(JoinRefusal::Superseded { .. })
        ));
    }

    #[test]
    fn a_token_whose_use_was_cut_off_before_the_enrolment_is_used_to_its_end() {
        assert_eq!(decide(NOW, &used(false, 1), None, "k").unwrap(), Decision::Enrol { generation: 1 });
        let before = enrolment(2, "old");
        let completed = decide(NOW, &used(true, 3), Some(&before), "k").unwrap();
        assert_eq!(completed, Decision::Enrol { generation: 3 });
        // Another token was faster: this one was never in force.
        let other = enrolment(3, "other");
        assert_eq!(
            decide(NOW, &used(true, 3), Some(&other), "k").unwrap(),
            Decision::Enrol { generation: 4 }
        );
        let refused = decide(NOW, &used(false, 1), Some(&enrolment(1, "other")), "k");
        assert!(matches!(refused, Err(JoinRefusal::NameTaken { .. })));
        // It was in force, and was replaced.
        let later = enrolment(4, "newer");
        let refused = decide(NOW, &used(true, 3), Some(&later), "k");
        assert!(matches!(refused, Err(JoinRefusal::Superseded { .. })));
        let late = decide(NOW + 1, &used(false, 1), None, "k");
        assert!(matches!(late, Err(JoinRefusal::Superseded { .. })), "an expired token begins nothing");
    }

    #[test]
    fn an_existing_name_needs_replace_which_raises_the_generation() {
        let now = enrolment(4, "old");
        let refused = decide(NOW, &token(false, None), Some(&now), "new");
        assert!(matches!(refused, Err(JoinRefusal::NameTaken { .. })));
        let raised = decide(NOW, &token(true, None), Some(&now), "new").unwrap();
        assert_eq!(raised, Decision::Enrol { generation: 5 });
        let last = enrolment(u32::MAX, "old");
        assert!(decide(NOW, &token(true, None), Some(&last), "new").is_err(), "it never wraps");
    }

    #[test]
    fn an_expired_token_enrols_nobody() {
        let refused = decide(NOW + 1, &token(true, None), None, "k");
        assert!(matches!(refused, Err(JoinRefusal::Expired { .. })));
    }

    #[test]
    fn secrets_compare_whole() {
        assert!(equal(b"abc", b"abc") && equal(b"", b""));
        assert!(!equal(b"abc", b"abd") && !equal(b"abc", b"ab") && !equal(b"bbc", b"abc"));
    }
}
