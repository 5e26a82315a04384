//! Who may ask a node for what: decided by the API server, as kubelets have it decided.
//!
//! A client is who its certificate says (verified in the handshake), or who the API server says its token is
//! (TokenReview). Whether it may is a SubjectAccessReview of a part of `nodes`. Answers are remembered for as long as
//! kubelets do; while the API server does not answer, what is not remembered is refused.

use std::{collections::HashMap, hash::Hash, sync::Mutex, time::Duration};

use hyper::{HeaderMap, Method};
use rustls_pki_types::CertificateDer;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tokio::time::Instant;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use crate::bridge::Cluster;

/// How long a token is believed to be whose it was.
const TOKEN_FOR: Duration = Duration::from_secs(120);
/// How long a permission lasts.
const ALLOWED_FOR: Duration = Duration::from_secs(300);
/// How long a refusal lasts.
const REFUSED_FOR: Duration = Duration::from_secs(30);
/// Answers that are remembered, of each kind.
const REMEMBERED_MAX: usize = 4096;

/// Somebody who has proven who it is.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub(super) struct User {
    name: String,
    uid: String,
    groups: Vec<String>,
    /// As the API server wrote it; empty if there is nothing.
    extra: String,
}

/// Why a request is not passed on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum Refused {
    /// Nobody proved anything.
    #[error("Unauthorized")]
    Unknown,
    /// It may not.
    #[error("Forbidden ({0})")]
    Forbidden(String),
    /// The API server does not answer.
    #[error("cannot ask the Kubernetes API: {0}")]
    Undecided(String),
}

/// Decides, with the help of an API server.
#[derive(Debug)]
pub(crate) struct Access {
    cluster: Cluster,
    /// By the token's digest: a token itself is not kept.
    tokens: Remembered<[u8; 32], Option<User>>,
    decisions: Remembered<(User, &'static str, &'static str, String), bool>,
}

impl Access {
    /// As this API server decides.
    pub(crate) fn new(cluster: Cluster) -> Self {
        Self { cluster, tokens: Remembered::default(), decisions: Remembered::default() }
    }

    /// Who asks.
    pub(super) async fn user(
        &self,
        certificate: Option<&User>,
        headers: &HeaderMap,
    ) -> Result<User, Refused> {
        if let Some(user) = certificate {
            return Ok(user.clone());
        }
        let header = headers.get("authorization").and_then(|header| header.to_str().ok()).unwrap_or_default();
        let token = header.strip_prefix("Bearer ").map(str::trim).filter(|token| !token.is_empty());
        let token = token.ok_or(Refused::Unknown)?;
        let digest: [u8; 32] = Sha256::digest(token).into();
        if let Some(known) = self.tokens.get(&digest) {
            return known.ok_or(Refused::Unknown);
        }
        let review = json!({
            "apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": {"token": token},
        });
        let answer =
            self.cluster.review("tokenreviews", "/apis/authentication.k8s.io/v1/tokenreviews", &review);
        let answer = answer.await.map_err(|error| Refused::Undecided(error.to_string()))?;
        let user = user_of(&answer);
        self.tokens.put(digest, user.clone(), if user.is_some() { TOKEN_FOR } else { REFUSED_FOR });
        user.ok_or(Refused::Unknown)
    }

    /// Whether it may ask this node for this path.
    pub(super) async fn may(
        &self,
        user: &User,
        method: &Method,
        path: &str,
        node: &str,
    ) -> Result<(), Refused> {
        let (verb, part) = (verb(method), part(path));
        let forbidden = || {
            Refused::Forbidden(format!("user={}, verb={verb}, resource=nodes, subresource={part}", user.name))
        };
        let key = (user.clone(), verb, part, node.to_owned());
        if let Some(known) = self.decisions.get(&key) {
            return if known { Ok(()) } else { Err(forbidden()) };
        }
        let mut spec = json!({
            "user": user.name,
            "groups": user.groups,
            "resourceAttributes":
                {"verb": verb, "group": "", "version": "v1", "resource": "nodes", "subresource": part, "name": node},
        });
        if !user.uid.is_empty() {
            spec["uid"] = json!(user.uid);
        }
        if let Ok(extra) = serde_json::from_str::<Value>(&user.extra) {
            spec["extra"] = extra;
        }
        let review =
            json!({"apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview", "spec": spec});
        let path = "/apis/authorization.k8s.io/v1/subjectaccessreviews";
        let answer = self.cluster.review("subjectaccessreviews", path, &review).await;
        let answer = answer.map_err(|error| Refused::Undecided(error.to_string()))?;
        let allowed = answer.pointer("/status/allowed").and_then(Value::as_bool).unwrap_or(false);
        self.decisions.put(key, allowed, if allowed { ALLOWED_FOR } else { REFUSED_FOR });
        if allowed { Ok(()) } else { Err(forbidden()) }
    }
}

impl User {
    /// Whom a certificate names whose chain the handshake has verified: CN is the user, each O a group.
    pub(super) fn of_certificate(certificate: &CertificateDer<'_>) -> Option<Self> {
        let (_rest, parsed) = X509Certificate::from_der(certificate).ok()?;
        let subject = parsed.subject();
        let name = subject.iter_common_name().next()?.as_str().ok()?.to_owned();
        let groups = subject.iter_organization().filter_map(|group| group.as_str().ok()).map(str::to_owned);
        let mut groups: Vec<String> = groups.collect();
        groups.push("system:authenticated".to_owned());
        (!name.is_empty()).then(|| Self { name, groups, ..Self::default() })
    }
}

/// Whom a TokenReview names; `None`: the token is nobody's.
fn user_of(review: &Value) -> Option<User> {
    if review.pointer("/status/authenticated")? != true {
        return None;
    }
    let user = review.pointer("/status/user")?;
    let text = |name: &str| user.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
    let groups = user.get("groups").and_then(Value::as_array).into_iter().flatten();
    let groups = groups.filter_map(Value::as_str).map(str::to_owned).collect();
    let extra = user.get("extra").map(Value::to_string).unwrap_or_default();
    let user = User { name: text("username"), uid: text("uid"), groups, extra };
    (!user.name.is_empty()).then_some(user)
}

/// The verb of a request, as the API server takes it.
fn verb(method: &Method) -> &'static str {
    match method.as_str() {
        "POST" => "create",
        "PUT" => "update",
        "PATCH" => "patch",
        "DELETE" => "delete",
        _ => "get",
    }
}

/// The part of a node that a path is: what is none of the harmless ones is as good as the node itself.
fn part(path: &str) -> &'static str {
    let path = path.split('?').next().unwrap_or_default();
    let is =
        |name: &str| path.strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
    // As a server may read it, not as it is written.
    if path.contains("..") || path.contains('%') || path.contains("//") {
        "proxy"
    } else if is("/stats") {
        "stats"
    } else if is("/metrics") {
        "metrics"
    } else if is("/logs") {
        "log"
    } else {
        "proxy"
    }
}

/// Answers for a while, a bounded number of them.
#[derive(Debug)]
struct Remembered<K, V>(Mutex<HashMap<K, (V, Instant)>>);

impl<K, V> Default for Remembered<K, V> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<K: Eq + Hash, V: Clone> Remembered<K, V> {
    fn get(&self, key: &K) -> Option<V> {
        let held = self.0.lock().expect("no panic under this lock");
        held.get(key).filter(|(_, until)| Instant::now() < *until).map(|(value, _)| value.clone())
    }

    fn put(&self, key: K, value: V, lasts: Duration) {
        let mut held = self.0.lock().expect("no panic under this lock");
        let now = Instant::now();
        if held.len() >= REMEMBERED_MAX {
            held.retain(|_, (_, until)| now < *until);
        }
        if held.len() >= REMEMBERED_MAX {
            held.clear();
        }
        held.insert(key, (value, now + lasts));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_plainly_harmless_is_less_than_the_node_itself() {
        assert_eq!(
            (part("/stats/summary?x=/y"), part("/metrics"), part("/metrics/resource")),
            ("stats", "metrics", "metrics")
        );
        for whole in
            ["/exec/a/b/c", "/metricsx", "/stats/../exec/a/b/c", "/stats/%2e%2e/exec", "/stats//x", "/"]
        {
            assert_eq!(part(whole), "proxy", "{whole}");
        }
    }

    #[test]
    fn a_token_is_whose_the_api_server_says_it_is() {
        let answer = json!({"status": {"authenticated": true, "user":
            {"username": "system:serviceaccount:a:b", "uid": "u", "groups": ["g"], "extra": {"k": ["v"]}}}});
        let user = user_of(&answer).unwrap();
        assert_eq!((&*user.name, &*user.extra), ("system:serviceaccount:a:b", r#"{"k":["v"]}"#));
        assert_eq!(user_of(&json!({"status": {"authenticated": false, "user": {"username": "x"}}})), None);
        assert_eq!(user_of(&json!({"status": {"user": {"username": "x"}}})), None);
    }

    #[tokio::test(start_paused = true)]
    async fn answers_are_forgotten_in_time_and_are_never_many() {
        let held = Remembered::default();
        held.put(0, true, Duration::from_secs(5));
        assert_eq!(held.get(&0), Some(true));
        tokio::time::advance(Duration::from_secs(6)).await;
        assert_eq!(held.get(&0), None);
        for key in 0..10 * REMEMBERED_MAX {
            held.put(key, true, Duration::from_secs(60));
        }
        assert!(held.0.lock().unwrap().len() <= REMEMBERED_MAX);
    }
}
