//! Tokens of service accounts that this node was given for its pods, and whose they are.
//!
//! Their signature is not checked, and need not be: a token counts if it is, byte for byte, one that the hub
//! sent for a pod that is to run here. That is also why one that has expired still counts: a pod cannot get a
//! newer one without a hub, and who else knows it could have used the pod itself.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::RwLock,
};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use serde_json::Value;

use crate::{auth::token, json, user::User};

/// Tokens of one volume that count: the newest, and those that a pod may still have in memory.
const OF_ONE_MAX: usize = 3;

/// See the module's documentation.
#[derive(Debug, Default)]
pub(super) struct Accounts {
    held: RwLock<Held>,
}

#[derive(Debug, Default)]
struct Held {
    /// Digests by the key of the token object, the newest last.
    keys: BTreeMap<String, VecDeque<String>>,
    users: BTreeMap<String, User>,
}

impl Accounts {
    /// Whose token this is.
    pub(super) fn user(&self, token: &str) -> Option<User> {
        let held = self.held.read().expect("no panic under this lock");
        held.users.get(&token::digest(token)).cloned()
    }

    /// This is at a key now; `None` for nothing.
    pub(super) fn set(&self, key: &str, object: Option<&Value>) {
        let mut guard = self.held.write().expect("no panic under this lock");
        let Held { keys, users } = &mut *guard;
        let Some(object) = object else {
            for digest in keys.remove(key).unwrap_or_default() {
                users.remove(&digest);
            }
            return;
        };
        let Some((digest, user)) = read(object) else { return };
        let of_key = keys.entry(key.to_owned()).or_default();
        if of_key.back() == Some(&digest) {
            return;
        }
        users.insert(digest.clone(), user);
        of_key.push_back(digest);
        if of_key.len() > OF_ONE_MAX
            && let Some(oldest) = of_key.pop_front()
        {
            users.remove(&oldest);
        }
    }

    /// The keys that are held.
    pub(super) fn keys(&self) -> Vec<String> {
        self.held.read().expect("no panic under this lock").keys.keys().cloned().collect()
    }
}

/// Digest and user of a token that is for API servers.
fn read(object: &Value) -> Option<(String, User)> {
    let token = json::text(object, "token");
    let claims = URL_SAFE_NO_PAD.decode(token.split('.').nth(1)?).ok()?;
    let claims = json::read(&claims).ok()?;
    // One for somebody else, say a vault, must not be good here.
    let audience = json::text(object, "audience");
    let issuer = json::text(&claims, "iss");
    if !audience.is_empty() && audience != token::ISSUER && audience != issuer {
        return None;
    }
    let name = json::text(&claims, "sub");
    let (namespace, _) = name.strip_prefix("system:serviceaccount:")?.split_once(':')?;
    let groups = vec!["system:serviceaccounts".to_owned(), format!("system:serviceaccounts:{namespace}")];
    // The claim's name has a dot in it.
    let uid = claims.get("kubernetes.io").map_or("", |about| json::text(about, "serviceaccount.uid"));
    let user = User { name: name.to_owned(), uid: uid.to_owned(), groups, ..User::default() };
    Some((token::digest(token), user))
}

#[cfg(test)]
mod tests {
    use serde_json::json as value;

    use super::*;

    fn token(sub: &str, mark: u32) -> String {
        let claims = value!({"sub": sub, "iss": "https://issuer", "exp": mark, "kubernetes.io": {"serviceaccount": {"uid": "u"}}});
        format!("e30.{}.c2ln", URL_SAFE_NO_PAD.encode(claims.to_string()))
    }

    #[test]
    fn a_token_counts_while_its_pod_is_to_run_here_and_as_it_was_given() {
        let accounts = Accounts::default();
        let given = token("system:serviceaccount:plant:reader", 1);
        accounts.set("k", Some(&value!({"token": given, "audience": ""})));
        let user = accounts.user(&given).expect("its user");
        assert_eq!((&*user.name, &*user.uid), ("system:serviceaccount:plant:reader", "u"));
        assert!(user.is_in("system:serviceaccounts:plant"));
        assert_eq!(accounts.user(&token("system:serviceaccount:plant:reader", 2)), None, "not one we gave");
        accounts.set("k", None);
        assert_eq!(accounts.user(&given), None);
    }

    #[test]
    fn the_token_before_counts_for_a_while_and_none_for_somebody_else() {
        let accounts = Accounts::default();
        let tokens: Vec<String> = (0..5).map(|n| token("system:serviceaccount:a:b", n)).collect();
        for token in &tokens {
            accounts.set("k", Some(&value!({"token": token, "audience": "https://issuer"})));
        }
        let count = tokens.iter().filter(|token| accounts.user(token).is_some()).count();
        assert_eq!(count, OF_ONE_MAX);
        accounts.set(
            "vault",
            Some(&value!({"token": token("system:serviceaccount:a:b", 9), "audience": "vault"})),
        );
        assert_eq!(accounts.user(&token("system:serviceaccount:a:b", 9)), None);
        accounts.set("x", Some(&value!({"token": token("system:node:n", 9), "audience": ""})));
        assert_eq!(accounts.user(&token("system:node:n", 9)), None, "only service accounts");
    }
}
