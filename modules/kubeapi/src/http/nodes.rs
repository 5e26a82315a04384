//! Requests whose answer a node has: from here to the node and back.

use http_body_util::{BodyExt as _, Either, Full, Limited};
use hyper::{HeaderMap, Request, Response, body::Incoming, header::HeaderValue};

use super::{
    body::Answer,
    request::Asked,
    route::{Reply, Server, text},
};
use crate::{
    api::Ask,
    authz::{self, Attributes},
    json, limits,
    nodes::{
        Unreachable,
        forward::{self, Forwarder, NodeBody},
        parts::{self, Part},
        upgrade,
    },
    registry::built_in_resource,
    status::Status,
    user::User,
};

impl Server {
    /// Answers a request for a part that the node has. That `user` may ask for it was decided.
    pub(super) async fn at_node(
        &self,
        mut request: Request<Incoming>,
        asked: &Asked,
        part: Part,
        user: &User,
    ) -> Result<Reply, Status> {
        let attributes = &asked.attributes;
        if !part.takes(&attributes.verb) {
            return Err(Status::method_not_allowed());
        }
        let upgrades = part.upgrades() || part == Part::NodeProxy && upgrade::is_asked_for(request.headers());
        // A WebSocket begins with GET, and can do what a POST can.
        if part.upgrades() && attributes.verb == "get" {
            let create = Attributes { verb: "create".to_owned(), ..attributes.clone() };
            if !authz::allows(&self.api.cache, user, &create) {
                let why = create.refusal(user);
                return Err(Status::forbidden("", &attributes.resource, &attributes.name, &why));
            }
        }
        let (node, path) = match part {
            Part::NodeProxy => (parts::node_of(&attributes.name).to_owned(), parts::proxied(request.uri())),
            _ => {
                let pods = built_in_resource("", "pods");
                let ask = Ask::internal(&user.name, pods, &attributes.namespace, &attributes.name);
                let pod = self.api.get(&ask).await?.object;
                let path = part.path(asked, request.uri(), &pod)?;
                match json::text(&pod, "spec.nodeName") {
                    "" if part == Part::Log => return Ok(text(hyper::StatusCode::OK, "")),
                    "" => {
                        let name = &attributes.name;
                        return Err(Status::bad_request(format!("pod {name} does not have a host assigned")));
                    }
                    node => (node.to_owned(), path),
                }
            }
        };
        let headers = match upgrades {
            true => upgrade::headers(request.headers())?,
            false => passed_on(request.headers(), part),
        };
        let forwarder =
            self.nodes.as_ref().ok_or_else(|| Status::new(503, "ServiceUnavailable", NO_NODES))?;
        let client = upgrades.then(|| hyper::upgrade::on(&mut request));
        let mut to_node = Request::builder().method(parts::method(part, request.method())).uri(path);
        if let Some(all) = to_node.headers_mut() {
            *all = headers;
            all.insert(
                "host",
                HeaderValue::from_str(&node).map_err(|_| Status::bad_request("no node has such a name"))?,
            );
        }
        let body = if upgrades || part == Part::Log {
            Either::Right(Full::default())
        } else {
            Either::Left(request.into_body())
        };
        let to_node = to_node.body(body).map_err(|error| Status::bad_request(error.to_string()))?;
        let response = ask_node(forwarder, &node, to_node, client).await?;
        if part == Part::Log && !response.status().is_success() {
            return Err(said(response, &attributes.name).await);
        }
        Ok(answered(response, part))
    }
}

/// What is said where there is none.
pub(super) const NO_NODES: &str = "this API server has no way to nodes";

async fn ask_node(
    forwarder: &Forwarder,
    node: &str,
    request: forward::ToNode,
    client: Option<hyper::upgrade::OnUpgrade>,
) -> Result<Response<NodeBody>, Status> {
    // Without a time to come again: clients would, silently, and nobody would see why.
    forwarder.forward(node, request, client).await.map_err(|error| match &error {
        Unreachable::Offline(_) | Unreachable::Refused { .. } => {
            Status::new(503, "ServiceUnavailable", error.to_string())
        }
        Unreachable::Slow(_) => Status::new(504, "Timeout", error.to_string()),
        Unreachable::Broken { .. } => Status::internal(error.to_string()),
        Unreachable::TooMany => Status::too_many(error.to_string()),
    })
}

fn passed_on(headers: &HeaderMap, part: Part) -> HeaderMap {
    if part == Part::NodeProxy { forward::passed_on(headers) } else { HeaderMap::new() }
}

/// A node's refusal of a log, as the API says it.
async fn said(response: Response<NodeBody>, pod: &str) -> Status {
    let code = response.status().as_u16();
    let said = match Limited::new(response.into_body(), limits::NODE_REFUSAL_MAX).collect().await {
        Ok(whole) => String::from_utf8_lossy(&whole.to_bytes()).trim().to_owned(),
        Err(error) => error.to_string(),
    };
    match code {
        400 => Status::bad_request(said),
        404 => Status {
            message: format!("the server could not find the requested resource ( pods/log {pod}): {said}"),
            ..Status::not_found("", "pods", pod)
        },
        500 => Status::internal(said),
        503 => Status::new(503, "ServiceUnavailable", said),
        _ => Status::internal(format!("the node answered {code}: {said}")),
    }
}

fn answered(response: Response<NodeBody>, part: Part) -> Reply {
    let (mut parts, body) = response.into_parts();
    if parts.status != hyper::StatusCode::SWITCHING_PROTOCOLS {
        for name in ["connection", "keep-alive", "transfer-encoding", "upgrade"] {
            parts.headers.remove(name);
        }
    }
    if part == Part::Log {
        parts.headers.entry("content-type").or_insert(HeaderValue::from_static("text/plain"));
    }
    let mut reply = Response::new(Answer::Node(Box::new(body)));
    *reply.status_mut() = parts.status;
    *reply.headers_mut() = parts.headers;
    reply
}
