//! Who asks: client certificates, static tokens, and tokens of service accounts.

pub(crate) mod certificate;
pub(crate) mod token;

use std::{collections::BTreeMap, fmt};

use hyper::HeaderMap;

use self::token::{BoundTo, TokenKey};
use crate::{
    authz::{self, Attributes},
    cache::Cache,
    clock,
    status::Status,
    user::{AUTHENTICATED, User},
};

/// Decides who asks.
pub(crate) struct Authenticator {
    /// User by token.
    tokens: BTreeMap<String, User>,
    key: TokenKey,
    /// Whether somebody without credentials is anonymous, or refused.
    anonymous: bool,
}

impl fmt::Debug for Authenticator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authenticator").field("tokens", &self.tokens.len()).finish_non_exhaustive()
    }
}

impl Authenticator {
    pub(crate) fn new(key: TokenKey, tokens: BTreeMap<String, User>, anonymous: bool) -> Self {
        Self { tokens, key, anonymous }
    }

    /// Who asks. A certificate was verified in the handshake and counts before a token.
    pub(crate) fn user(
        &self,
        cache: &Cache,
        certificate: Option<&User>,
        headers: &HeaderMap,
    ) -> Result<User, Status> {
        let mut user = match (certificate, bearer(headers)) {
            (Some(user), _) => user.clone(),
            (None, Some(token)) => self.of_token(cache, token, &[]).ok_or_else(Status::unauthorized)?,
            (None, None) if self.anonymous && !headers.contains_key("authorization") => {
                return Ok(User::anonymous());
            }
            (None, None) => return Err(Status::unauthorized()),
        };
        if !user.is_in(AUTHENTICATED) {
            user.groups.push(AUTHENTICATED.to_owned());
        }
        Ok(user)
    }

    /// Whose token this is, if it is anybody's, for one of the audiences.
    pub(crate) fn of_token(&self, cache: &Cache, token: &str, audiences: &[String]) -> Option<User> {
        // A map lookup shows by its time how far a guess is right; the digests compared are not guessable.
        if let Some(user) = self.tokens.get(&token::digest(token)) {
            return Some(user.clone());
        }
        self.key.verify(cache, token, audiences, clock::unix())
    }

    /// A token for a service account: the token, its audiences, when it expires.
    pub(crate) fn issue(
        &self,
        namespace: &str,
        name: &str,
        uid: &str,
        audiences: &[String],
        seconds: i64,
        bound: Option<&BoundTo>,
    ) -> Result<(String, Vec<String>, i64), token::IssueError> {
        let now = clock::unix();
        let audiences =
            if audiences.is_empty() { vec![token::ISSUER.to_owned()] } else { audiences.to_vec() };
        let token = self.key.issue(namespace, name, uid, &audiences, (now, now + seconds), bound)?;
        Ok((token, audiences, now + seconds))
    }
}

/// The token that a request shows.
pub(crate) fn bearer(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get("authorization")?.to_str().ok()?;
    let (scheme, token) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
}

/// As whom somebody wants to act, and may.
pub(crate) fn acting_as(cache: &Cache, user: User, headers: &HeaderMap) -> Result<User, Status> {
    let texts = |name: &str| -> Vec<String> {
        let values = headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
        values.map(str::to_owned).collect()
    };
    let (names, groups, uids) =
        (texts("impersonate-user"), texts("impersonate-group"), texts("impersonate-uid"));
    let extra = headers.keys().any(|name| name.as_str().starts_with("impersonate-extra-"));
    if names.is_empty() && groups.is_empty() && uids.is_empty() && !extra {
        return Ok(user);
    }
    let ([name], 0..=1, false) = (&names[..], uids.len(), extra) else {
        return Err(Status::bad_request(
            "impersonation names one user, any groups, at most one uid, and no extra fields",
        ));
    };
    let check = |group: &str, resource: &str, namespace: &str, name: &str| {
        let wanted = Attributes {
            verb: "impersonate".to_owned(),
            group: group.to_owned(),
            resource: resource.to_owned(),
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            ..Attributes::default()
        };
        if authz::allows(cache, &user, &wanted) {
            return Ok(());
        }
        Err(Status::forbidden(group, resource, name, &wanted.refusal(&user)))
    };
    for group in &groups {
        check("", "groups", "", group)?;
    }
    let mut acting = User { name: name.clone(), groups, ..User::default() };
    match name.strip_prefix("system:serviceaccount:").and_then(|account| account.split_once(':')) {
        Some((namespace, account)) => {
            check("", "serviceaccounts", namespace, account)?;
            // The groups of an account come with it.
            if acting.groups.is_empty() {
                acting.groups =
                    vec!["system:serviceaccounts".to_owned(), format!("system:serviceaccounts:{namespace}")];
            }
        }
        None => check("", "users", "", name)?,
    }
    for uid in uids {
        check("authentication.k8s.io", "uids", "", &uid)?;
        acting.uid = uid;
    }
    let group = if name == "system:anonymous" { "system:unauthenticated" } else { AUTHENTICATED };
    if !acting.is_in(group) {
        acting.groups.push(group.to_owned());
    }
    Ok(acting)
}
