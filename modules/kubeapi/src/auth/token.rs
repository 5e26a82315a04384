//! Tokens of service accounts: JWTs signed with ES256 by a key of this server.

use std::fmt;

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use ring::{
    rand::SystemRandom,
    signature::{
        ECDSA_P256_SHA256_FIXED, ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _,
        UnparsedPublicKey,
    },
};
use serde_json::{Value, json as value};
use sha2::{Digest as _, Sha256};

use crate::{
    cache::Cache,
    json,
    registry::built_in_resource,
    user::{AUTHENTICATED, User},
};

/// Who issues tokens, and their audience when none is named.
pub(crate) const ISSUER: &str = "https://kubernetes.default.svc.cluster.local";
/// Longer than any token of this server.
const TOKEN_MAX: usize = 8 << 10;

/// A key cannot be used, or a token not be made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum IssueError {
    #[error("the key of service accounts is not a P-256 key in PKCS#8")]
    Key,
    #[error("a token cannot be signed")]
    Sign,
}

/// What a token is bound to: it ends with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct BoundTo {
    /// "pod" or "secret".
    pub(crate) kind: String,
    pub(crate) name: String,
    pub(crate) uid: String,
}

/// The key that signs tokens.
pub(crate) struct TokenKey {
    pair: EcdsaKeyPair,
    random: SystemRandom,
    id: String,
}

impl fmt::Debug for TokenKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokenKey").field("id", &self.id).finish_non_exhaustive()
    }
}

impl TokenKey {
    /// Takes a key in PKCS#8.
    pub(crate) fn new(pkcs8: &[u8]) -> Result<Self, IssueError> {
        let random = SystemRandom::new();
        let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, pkcs8, &random)
            .map_err(|_rejected| IssueError::Key)?;
        let id = URL_SAFE_NO_PAD.encode(Sha256::digest(pair.public_key().as_ref()));
        Ok(Self { pair, random, id })
    }

    /// Makes a token that is good from and until these times.
    pub(super) fn issue(
        &self,
        namespace: &str,
        name: &str,
        uid: &str,
        audiences: &[String],
        (from, until): (i64, i64),
        bound: Option<&BoundTo>,
    ) -> Result<String, IssueError> {
        let header = value!({"alg": "ES256", "kid": self.id});
        let mut about = value!({"namespace": namespace, "serviceaccount": {"name": name, "uid": uid}});
        if let Some(bound) = bound {
            about[&bound.kind] = value!({"name": bound.name, "uid": bound.uid});
        }
        let claims = value!({
            "aud": audiences,
            "exp": until,
            "iat": from,
            "nbf": from,
            "iss": ISSUER,
            "sub": format!("system:serviceaccount:{namespace}:{name}"),
            "kubernetes.io": about,
        });
        let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let signed = format!("{}.{}", part(&header), part(&claims));
        let signature = self.pair.sign(&self.random, signed.as_bytes()).map_err(|_| IssueError::Sign)?;
        Ok(format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature)))
    }

    /// Whose token this is: it is signed, in time, for one of the audiences, and account and bound object
    /// are still there.
    pub(super) fn verify(&self, cache: &Cache, token: &str, audiences: &[String], now: i64) -> Option<User> {
        if token.len() > TOKEN_MAX {
            return None;
        }
        let (signed, signature) = token.rsplit_once('.')?;
        let signature = URL_SAFE_NO_PAD.decode(signature).ok()?;
        UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, self.pair.public_key().as_ref())
            .verify(signed.as_bytes(), &signature)
            .ok()?;
        let (header, claims) = signed.split_once('.')?;
        let read = |part: &str| json::read(&URL_SAFE_NO_PAD.decode(part).ok()?).ok();
        let (header, claims) = (read(header)?, read(claims)?);
        let in_time = json::int(&claims, "nbf") <= now && now < json::int(&claims, "exp");
        if json::text(&header, "alg") != "ES256" || json::text(&claims, "iss") != ISSUER || !in_time {
            return None;
        }
        let own = [ISSUER.to_owned()];
        let wanted = if audiences.is_empty() { &own } else { audiences };
        let held = json::list(&claims, "aud");
        if !held.iter().filter_map(Value::as_str).any(|audience| wanted.iter().any(|want| want == audience)) {
            return None;
        }
        // The claim's name has a dot in it.
        account(cache, claims.get("kubernetes.io")?)
    }
}

fn account(cache: &Cache, about: &Value) -> Option<User> {
    let (namespace, name) = (json::text(about, "namespace"), json::text(about, "serviceaccount.name"));
    let exists = |kind: &str, name: &str, uid: &str| {
        let object = cache.get(built_in_resource("", kind), namespace, name);
        object.is_some_and(|object| json::text(&object, "metadata.uid") == uid)
    };
    let uid = json::text(about, "serviceaccount.uid");
    if !exists("serviceaccounts", name, uid) {
        return None;
    }
    let mut user = User {
        name: format!("system:serviceaccount:{namespace}:{name}"),
        uid: uid.to_owned(),
        groups: vec![
            "system:serviceaccounts".to_owned(),
            format!("system:serviceaccounts:{namespace}"),
            AUTHENTICATED.to_owned(),
        ],
        ..User::default()
    };
    for (kind, plural) in [("pod", "pods"), ("secret", "secrets")] {
        let Some(bound) = about.get(kind) else { continue };
        let (name, uid) = (json::text(bound, "name"), json::text(bound, "uid"));
        if !exists(plural, name, uid) {
            return None;
        }
        let key = format!("authentication.kubernetes.io/{kind}-");
        user.extra.insert(format!("{key}name"), vec![name.to_owned()]);
        user.extra.insert(format!("{key}uid"), vec![uid.to_owned()]);
    }
    Some(user)
}

/// What of a static token is kept.
pub(crate) fn digest(token: &str) -> String {
    broker::enroll::hex(&Sha256::digest(token.as_bytes()))
}
