//! What a node's API does not answer by itself: it is asked of the hub's, and the answer passed on as it comes.
//!
//! A client that changes an object names the resourceVersion that it has seen, and it has seen this API's. The
//! hub knows it by another: that stands beside each object here ([`Known`]) and takes its place on the way up.

use std::{collections::BTreeMap, sync::RwLock};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Either, Full, Limited};
use hyper::{
    HeaderMap, Request, Response,
    body::Incoming,
    header::{HeaderValue, USER_AGENT},
};

use super::{Local, life};
use crate::{
    http::{
        body::Answer,
        request::Asked,
        route::{Reply, too_large_or_broken},
    },
    json, limits,
    nodes::Unreachable,
    status::Status,
};

/// Headers that go up. What says who asks does not, but for the token of a pod.
const PASSED_ON: [&str; 5] = ["accept", "content-type", "user-agent", "kubectl-command", "kubectl-session"];

/// Under which revisions the objects that are shown here stand at the hub.
#[derive(Debug)]
pub(crate) struct Known {
    /// Revision here and there, by key.
    revisions: RwLock<BTreeMap<String, (u64, String)>>,
    /// The least revision that this start can have shown.
    first: u64,
}

impl Known {
    pub(super) fn new(life: u64) -> Self {
        Self { revisions: RwLock::default(), first: life::first_revision(life) }
    }

    pub(super) fn set(&self, key: &str, here: u64, there: &str) {
        let mut revisions = self.revisions.write().expect("no panic under this lock");
        revisions.insert(key.to_owned(), (here, there.to_owned()));
    }

    pub(super) fn forget(&self, key: &str) {
        self.revisions.write().expect("no panic under this lock").remove(key);
    }

    /// What a client that saw this revision here has seen of the hub's. `None`: it is not the newest any more.
    fn at_the_hub(&self, key: &str, seen: &str) -> Option<String> {
        // What the hub answered to an earlier write is a revision of the hub.
        let Some(seen) = seen.parse::<u64>().ok().filter(|seen| *seen >= self.first) else {
            return Some(seen.to_owned());
        };
        let revisions = self.revisions.read().expect("no panic under this lock");
        let (_, there) = revisions.get(key).filter(|(here, _)| *here == seen)?;
        Some(there.clone())
    }
}

impl Local {
    /// Asks the hub. A pod asks as itself, anybody else as this node.
    pub(crate) async fn ask_hub(&self, request: Request<Incoming>, asked: &Asked) -> Result<Reply, Status> {
        let (parts, body) = request.into_parts();
        if parts.headers.keys().any(|name| name.as_str().starts_with("impersonate-")) {
            return Err(Status::bad_request("a node's API asks the hub as the node, and as nobody else"));
        }
        let mut to_hub = Request::builder().method(parts.method).uri(parts.uri);
        if let Some(headers) = to_hub.headers_mut() {
            *headers = passed_on(&parts.headers);
        }
        let writes = ["create", "update", "patch", "delete", "deletecollection"];
        let body = if writes.contains(&asked.attributes.verb.as_str()) {
            let sent = Limited::new(body, limits::BODY_MAX).collect().await.map_err(too_large_or_broken)?;
            Either::Right(Full::new(self.with_hub_revision(asked, sent.to_bytes())?))
        } else {
            Either::Right(Full::default())
        };
        let to_hub = to_hub.body(body).map_err(|error| Status::bad_request(error.to_string()))?;
        let answered = self.hub.forward("hub", to_hub, None).await;
        let (mut parts, body) = answered.map_err(|error| unreachable(&error))?.into_parts();
        for name in ["connection", "keep-alive", "transfer-encoding"] {
            parts.headers.remove(name);
        }
        Ok(Response::from_parts(parts, Answer::Node(Box::new(body))))
    }

    /// The body with the hub's resourceVersion where the client named ours.
    fn with_hub_revision(&self, asked: &Asked, body: Bytes) -> Result<Bytes, Status> {
        let attributes = &asked.attributes;
        if !attributes.group.is_empty() || attributes.name.is_empty() {
            return Ok(body);
        }
        let place = if attributes.namespace.is_empty() || attributes.resource == "nodes" {
            "-"
        } else {
            &attributes.namespace
        };
        let key = format!("core/{}/{place}/{}", attributes.resource, attributes.name);
        let Ok(mut object) = json::read(&body) else { return Ok(body) };
        let mut changed = false;
        for path in ["metadata.resourceVersion", "preconditions.resourceVersion"] {
            let seen = json::text(&object, path).to_owned();
            if seen.is_empty() {
                continue;
            }
            let Some(there) = self.known.at_the_hub(&key, &seen) else {
                return Err(Status::modified("", &attributes.resource, &attributes.name));
            };
            json::set(&mut object, path, there);
            changed = true;
        }
        Ok(if changed { object.to_string().into() } else { body })
    }
}

fn passed_on(headers: &HeaderMap) -> HeaderMap {
    let named =
        PASSED_ON.iter().filter_map(|name| Some(((*name).try_into().ok()?, headers.get(*name)?.clone())));
    let mut passed: HeaderMap = named.collect();
    if let Some(token) = headers.get("authorization") {
        passed.insert("authorization", token.clone());
    }
    passed.entry(USER_AGENT).or_insert(HeaderValue::from_static("octobus"));
    passed.insert("host", HeaderValue::from_static("kubernetes"));
    passed
}

fn unreachable(error: &Unreachable) -> Status {
    let why = match error {
        Unreachable::Offline(_) => "this node has no link to its hub".to_owned(),
        Unreachable::Refused { why, .. } => format!("the hub refuses: {why}"),
        Unreachable::Slow(_) => "the hub does not answer in time".to_owned(),
        Unreachable::Broken { why, .. } => format!("the link to the hub broke: {why}"),
        Unreachable::TooMany => "too many requests are on their way to the hub".to_owned(),
    };
    let what = "what stands on this node can be read, everything else is the hub's to answer";
    Status::new(503, "ServiceUnavailable", format!("{why}; {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hub_is_named_its_own_revision_and_a_stale_one_is_told_here() {
        let known = Known::new(3);
        let here = life::first_revision(3) + 5;
        known.set("core/pods/default/p", here, "77");
        assert_eq!(known.at_the_hub("core/pods/default/p", &here.to_string()).as_deref(), Some("77"));
        assert_eq!(known.at_the_hub("core/pods/default/p", &(here - 1).to_string()), None);
        assert_eq!(known.at_the_hub("core/pods/default/p", "78").as_deref(), Some("78"), "one of the hub's");
        known.forget("core/pods/default/p");
        assert_eq!(known.at_the_hub("core/pods/default/p", &here.to_string()), None);
    }
}
