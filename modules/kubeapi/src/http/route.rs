//! From a request to an answer: who, may they, what, in which form.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Limited};
use hyper::{
    HeaderMap, Method, Request, Response, StatusCode,
    body::Incoming,
    header::{HeaderName, HeaderValue},
};
use serde_json::{Value, json as value};
use tokio::{
    sync::{Semaphore, mpsc},
    time::timeout,
};

use super::{
    body::{Answer, Events},
    negotiate::{self, Shaper},
    protobuf,
    request::{self, Asked},
};
use crate::{
    api::{
        Api, Ask, Done,
        delete::Options,
        list::{Continue, Query},
        update::Patch,
        watch::WatchQuery,
    },
    audit::Audit,
    auth, authz, discovery, json, limits,
    local::Local,
    metrics::Metrics,
    nodes::{forward::Forwarder, parts::Part},
    openapi, reviews,
    selector::{Fields, Labels},
    status::Status,
    user::User,
};

/// Everything that an answer needs.
#[derive(Debug)]
pub(crate) struct Server {
    pub(crate) api: Arc<Api>,
    pub(crate) audit: Audit,
    pub(crate) tasks: broker::Tasks,
    /// The way to nodes, if there is one.
    pub(super) nodes: Option<Forwarder>,
    /// What nodes and pods use, if there is a way to nodes.
    metrics: Option<Arc<Metrics>>,
    /// Of a node's own API.
    local: Option<Arc<Local>>,
    requests: Semaphore,
    watches: Arc<Semaphore>,
}

/// An answer on its way out.
pub(crate) type Reply = Response<Answer>;

impl Server {
    pub(crate) fn new(api: Arc<Api>, audit: Audit, nodes: Option<Forwarder>, tasks: broker::Tasks) -> Self {
        Self {
            api,
            audit,
            tasks,
            metrics: nodes.clone().map(|nodes| Arc::new(Metrics::new(nodes))),
            nodes,
            local: None,
            requests: Semaphore::new(limits::REQUESTS_MAX),
            watches: Arc::new(Semaphore::new(limits::WATCHES_MAX)),
        }
    }

    /// As a node's own API.
    pub(crate) fn with_local(self, local: Arc<Local>) -> Self {
        Self { local: Some(local), ..self }
    }

    /// Who asks, and as whom.
    fn user(&self, certificate: Option<&User>, headers: &HeaderMap) -> (String, Result<User, Status>) {
        let proven = match &self.local {
            Some(local) => local.user(certificate, headers),
            None => self.api.authenticator.user(&self.api.cache, certificate, headers),
        };
        let who = proven.as_ref().map_or_else(|_| String::new(), |user| user.name.clone());
        (who, proven.and_then(|user| auth::acting_as(&self.api.cache, user, headers)))
    }

    /// Answers a request.
    pub(crate) async fn answer(
        &self,
        request: Request<Incoming>,
        certificate: Option<&User>,
        from: SocketAddr,
    ) -> Reply {
        let asked = request::read(request.method(), request.uri());
        let path = request.uri().to_string();
        let head = request.method() == Method::HEAD;
        let (who, user) = self.user(certificate, request.headers());
        let answered = match user {
            Ok(user) => {
                match timeout(limits::REQUEST_MAX, Box::pin(self.authorized(request, &asked, user))).await {
                    Ok(answered) => answered,
                    Err(_elapsed) => Err(Status::new(
                        504,
                        "Timeout",
                        "Timeout: request did not complete within the allotted timeout",
                    )),
                }
            }
            Err(status) => Err(status),
        };
        let mut reply = answered.unwrap_or_else(|status| refused(&status));
        self.audit.note(&who, from, &asked, &path, reply.status());
        if head {
            *reply.body_mut() = Answer::Whole(None);
        }
        reply
    }

    async fn authorized(
        &self,
        request: Request<Incoming>,
        asked: &Asked,
        user: User,
    ) -> Result<Reply, Status> {
        let attributes = &asked.attributes;
        let resources = self.api.registry.now();
        // A node's API knows the built-in resources, and asks the hub for others.
        if attributes.path.is_empty()
            && self.local.is_none()
            && resources.get(&attributes.group, &asked.version, &attributes.resource).is_none()
        {
            // Whether it is there is no secret of the discovery.
            return Ok(text(StatusCode::NOT_FOUND, "404 page not found\n"));
        }
        let too_many = || Status::too_many("Too many requests, please try again later.");
        if let Some(local) = &self.local {
            let _place = self.requests.try_acquire().map_err(|_full| too_many())?;
            if !local.is_here(&user, attributes) {
                return Box::pin(local.ask_hub(request, asked)).await;
            }
            local.ready().await;
        } else if !authz::allows(&self.api.cache, &user, attributes) {
            let why = attributes.refusal(&user);
            return Err(if attributes.path.is_empty() {
                Status::forbidden(&attributes.group, &attributes.resource, &attributes.name, &why)
            } else {
                let message = format!("forbidden: {why}");
                Status { details: Some(value!({})), ..Status::new(403, "Forbidden", message) }
            });
        }
        let _place = self.requests.try_acquire().map_err(|_full| too_many())?;
        if let Some(part) = Part::of(attributes) {
            return self.at_node(request, asked, part, &user).await;
        }
        if attributes.path.is_empty() {
            return self.resource(request, asked, user).await;
        }
        self.other(&request, asked)
    }

    /// What is no resource.
    fn other(&self, request: &Request<Incoming>, asked: &Asked) -> Result<Reply, Status> {
        if ![Method::GET, Method::HEAD].contains(request.method()) {
            return Err(Status::method_not_allowed());
        }
        let resources = self.api.registry.now();
        let path = request.uri().path().trim_end_matches('/');
        match path {
            "/healthz" | "/livez" | "/readyz" => {
                // What is a node's waited until it is.
                let ready = self.local.is_some() || self.api.cache.revision() > 0;
                return Ok(match (path, ready) {
                    ("/readyz" | "/healthz", false) => {
                        text(StatusCode::INTERNAL_SERVER_ERROR, "[-]objects failed: not listed yet\n")
                    }
                    _ if asked.query.truth("verbose") => {
                        let check = &path[1..];
                        text(StatusCode::OK, &format!("[+]ping ok\n[+]objects ok\n{check} check passed\n"))
                    }
                    _ => text(StatusCode::OK, "ok"),
                });
            }
            "/version" => return Ok(json_reply(StatusCode::OK, &discovery::version())),
            _ => {}
        }
        if let Some(document) = openapi::document(&resources, path) {
            return Ok(json_reply(StatusCode::OK, &document));
        }
        let aggregated = discovery::wants_aggregated(request.headers());
        match discovery::document(&resources, path, aggregated) {
            Some(document) => {
                let mut reply = json_reply(StatusCode::OK, &document);
                if aggregated && ["/api", "/apis"].contains(&path) {
                    let form = HeaderValue::from_static(discovery::AGGREGATED);
                    reply.headers_mut().insert("content-type", form);
                }
                Ok(reply)
            }
            None => Ok(text(StatusCode::NOT_FOUND, "404 page not found\n")),
        }
    }

    async fn resource(&self, request: Request<Incoming>, asked: &Asked, user: User) -> Result<Reply, Status> {
        let (parts, body) = request.into_parts();
        let attributes = &asked.attributes;
        let resources = self.api.registry.now();
        let found = resources.get(&attributes.group, &asked.version, &attributes.resource);
        let resource = Arc::clone(found.ok_or_else(Status::resource_not_found)?);
        let namespaced = resource.namespaced;
        let ask = Ask {
            user,
            resource,
            namespace: if namespaced { attributes.namespace.clone() } else { String::new() },
            name: attributes.name.clone(),
            subresource: attributes.subresource.clone(),
            manager: request::manager(&asked.query, &parts.headers)?,
            dry_run: asked.query.dry_run()?,
            validation: asked.query.validation()?,
        };
        if !namespaced && !attributes.namespace.is_empty() && ask.resource.plural != "namespaces" {
            return Ok(text(StatusCode::NOT_FOUND, "404 page not found\n"));
        }
        let reads_list = ["list", "watch"].contains(&attributes.verb.as_str());
        let wanted = negotiate::wanted(&parts.headers, reads_list)?;
        let shaper = Shaper {
            resource: Arc::clone(&ask.resource),
            form: wanted.form,
            beside: asked.query.text("includeObject").to_owned(),
            columns_told: false,
        };
        if reads_list && !ask.resource.review {
            return self.read_many(ask, asked, shaper).await;
        }
        let sent = Sent { headers: &parts.headers, bytes: whole(body).await? };
        let done = self.act(&ask, asked, &sent).await?;
        let whole_object = ask.subresource.is_empty() || ask.subresource == "status";
        let object =
            if whole_object && !ask.resource.review { shaper.object(done.object) } else { done.object };
        let code = StatusCode::from_u16(done.code).unwrap_or(StatusCode::OK);
        let mut reply = json_reply(code, &object);
        if wanted.yaml {
            reply.headers_mut().insert("content-type", HeaderValue::from_static("application/yaml"));
        }
        for warning in &done.warnings {
            let header = format!("299 - \"{}\"", warning.replace('\\', "\\\\").replace('"', "\\\""));
            if let Ok(header) = HeaderValue::from_str(&header) {
                reply.headers_mut().append(HeaderName::from_static("warning"), header);
            }
        }
        Ok(reply)
    }

    async fn act(&self, ask: &Ask, asked: &Asked, sent: &Sent<'_>) -> Result<Done, Status> {
        let api = &self.api;
        let verb = asked.attributes.verb.as_str();
        if ask.resource.review {
            return match verb {
                "create" if ask.name.is_empty() => reviews::answer(api, ask, sent.object(ask)?),
                _ => Err(Status::method_not_allowed()),
            };
        }
        if ask.name.is_empty() && ask.resource.namespaced && ask.namespace.is_empty() {
            return Err(Status::method_not_allowed());
        }
        if ask.resource.measured {
            return match (ask.subresource.as_str(), verb, &self.metrics) {
                ("", "get", Some(metrics)) => metrics.get(api, ask).await,
                ("", "get", None) => Err(ask.not_found()),
                _ => Err(Status::method_not_allowed()),
            };
        }
        match (ask.subresource.as_str(), verb) {
            ("", "get") => api.get(ask).await,
            ("", "create") if ask.name.is_empty() => api.create(ask, sent.object(ask)?).await,
            ("", "update") => api.replace(ask, sent.object(ask)?).await,
            ("", "patch") if !ask.name.is_empty() => api.patch(ask, &sent.patch(asked, ask)?).await,
            ("", "delete") => api.delete(&sent.dry(ask)?, &sent.options(asked)?).await,
            ("", "deletecollection") => {
                if ask.resource.is("", "namespaces") {
                    return Err(Status::method_not_allowed());
                }
                let query = query_of(ask, asked)?;
                let (ask, options) = (sent.dry(ask)?, sent.options(asked)?);
                api.delete_collection(&ask, &query.labels, &query.fields, &options).await
            }
            ("status", _) if !ask.resource.status => Err(Status::resource_not_found()),
            ("status", "get") => api.get(ask).await,
            ("status", "update") => api.replace(ask, sent.object(ask)?).await,
            ("status", "patch") => api.patch(ask, &sent.patch(asked, ask)?).await,
            ("scale", _) if ask.resource.scale.is_none() => Err(Status::resource_not_found()),
            ("scale", "get") => api.get_scale(ask).await,
            ("scale", "update") => api.put_scale(ask, None, &sent.value()?).await,
            ("scale", "patch") => api.put_scale(ask, Some(&sent.patch(asked, ask)?), &Value::Null).await,
            (part, verb) => {
                let known = ask.resource.subresources.iter().find(|held| held.name == part);
                match known {
                    None if part.is_empty() => Err(Status::method_not_allowed()),
                    None => Err(Status::resource_not_found()),
                    Some(known) if !known.verbs.contains(&verb) => Err(Status::method_not_allowed()),
                    Some(_) => self.part(ask, asked, sent, verb).await,
                }
            }
        }
    }

    async fn part(&self, ask: &Ask, asked: &Asked, sent: &Sent<'_>, verb: &str) -> Result<Done, Status> {
        let api = &self.api;
        match (ask.subresource.as_str(), verb) {
            ("binding", _) => api.bind(ask, &sent.value()?).await,
            ("eviction", _) => api.evict(ask, &sent.value()?).await,
            ("token", _) => api.request_token(ask, sent.value()?).await,
            ("finalize", _) => api.finalize(ask, sent.object(ask)?).await,
            ("ephemeralcontainers", "get") => api.get(ask).await,
            ("ephemeralcontainers", "update") => api.replace(ask, sent.object(ask)?).await,
            ("ephemeralcontainers", "patch") => api.patch(ask, &sent.patch(asked, ask)?).await,
            _ => Err(Status::resource_not_found()),
        }
    }

    async fn read_many(&self, ask: Ask, asked: &Asked, shaper: Shaper) -> Result<Reply, Status> {
        let query = query_of(&ask, asked)?;
        if ask.resource.measured {
            return match (asked.attributes.verb.as_str(), &self.metrics) {
                ("list", Some(metrics)) => {
                    let list = metrics.list(&self.api, &ask, &query).await;
                    Ok(json_reply(StatusCode::OK, &shaper.list(&ask, &list)))
                }
                ("list", None) => Err(Status::new(503, "ServiceUnavailable", super::nodes::NO_NODES)),
                _ => Err(Status::method_not_allowed()),
            };
        }
        if asked.attributes.verb == "list" {
            let list = self.api.list(&ask, &query).await?;
            return Ok(json_reply(StatusCode::OK, &shaper.list(&ask, &list)));
        }
        let initial = asked.query.truth("sendInitialEvents");
        if initial && asked.query.text("resourceVersionMatch") != "NotOlderThan" {
            let cause = crate::status::Cause::forbidden(
                "resourceVersionMatch",
                "sendInitialEvents requires setting resourceVersionMatch to NotOlderThan",
            );
            return Err(Status::invalid("meta.k8s.io", "ListOptions", "", &[cause]));
        }
        let asked_for = asked.query.number("timeoutSeconds").filter(|seconds| *seconds > 0);
        let lasts = asked_for.map_or_else(some_while, Duration::from_secs);
        let watch = WatchQuery {
            listed: initial || query.revision == 0,
            tells_end: initial,
            bookmarks: asked.query.truth("allowWatchBookmarks"),
            query: Query { limit: 0, next: None, exact: false, ..query },
            lasts,
        };
        let too_many = || Status::too_many("Too many watches, please try again later.");
        let place = Arc::clone(&self.watches).try_acquire_owned().map_err(|_full| too_many())?;
        let (out, events) = mpsc::channel(limits::WATCH_LINES_MAX);
        let watching = Arc::clone(&self.api).watch(ask, watch, out, self.tasks.stopped());
        self.tasks.spawn("kubernetes watch", watching);
        let mut reply = Response::new(Answer::Watch(Box::new(Events { events, shaper, _place: place })));
        reply.headers_mut().insert("content-type", HeaderValue::from_static("application/json"));
        Ok(reply)
    }
}

/// What a client sent.
struct Sent<'a> {
    headers: &'a HeaderMap,
    bytes: Bytes,
}

impl Sent<'_> {
    fn media(&self) -> &str {
        let media =
            self.headers.get("content-type").and_then(|media| media.to_str().ok()).unwrap_or_default();
        media.split(';').next().unwrap_or_default().trim()
    }

    /// A JSON or YAML value.
    fn value(&self) -> Result<Value, Status> {
        let read = match self.media() {
            "application/json" | "" => json::read(&self.bytes),
            "application/yaml" => json::read_yaml(&self.bytes),
            "application/vnd.kubernetes.protobuf" => {
                let known = "application/json, application/yaml";
                return protobuf::read(&self.bytes).ok_or_else(|| unsupported(known));
            }
            _ => {
                return Err(unsupported("application/json, application/yaml"));
            }
        };
        read.map_err(|error| Status::bad_request(error.to_string()))
    }

    /// The same as an object of the resource.
    fn object(&self, ask: &Ask) -> Result<Value, Status> {
        self.value().map_err(|status| match status.code {
            400 => {
                let shown: String = String::from_utf8_lossy(&self.bytes).chars().take(200).collect();
                Status::bad_request(format!(
                    "the object provided is unrecognized (must be of type {}): couldn't get version/kind; {} ({shown})",
                    ask.resource.kind, status.message
                ))
            }
            _ => status,
        })
    }

    fn patch(&self, asked: &Asked, ask: &Ask) -> Result<Patch, Status> {
        let bad = |error: json::ReadError| Status::bad_request(format!("error decoding patch: {error}"));
        let read = || json::read(&self.bytes).map_err(bad);
        Ok(match self.media() {
            "application/json-patch+json" => Patch::Json(read()?),
            "application/merge-patch+json" => Patch::Merge(read()?),
            "application/strategic-merge-patch+json" => Patch::Strategic(read()?),
            "application/apply-patch+yaml" | "application/apply-patch+json" => {
                if asked.query.text("fieldManager").is_empty() {
                    let cause = crate::status::Cause::required("fieldManager", "is required for apply patch");
                    return Err(Status::invalid("meta.k8s.io", "PatchOptions", "", &[cause]));
                }
                Patch::Apply {
                    config: json::read_yaml(&self.bytes).map_err(bad)?,
                    force: asked.query.truth("force"),
                }
            }
            _ => {
                return Err(unsupported(if ask.resource.custom.is_some() {
                    "application/json-patch+json, application/merge-patch+json, application/apply-patch+yaml"
                } else {
                    "application/json-patch+json, application/merge-patch+json, \
                     application/strategic-merge-patch+json, application/apply-patch+yaml"
                }));
            }
        })
    }

    /// DeleteOptions of body and query.
    fn options(&self, asked: &Asked) -> Result<Options, Status> {
        let mut body = if self.bytes.is_empty() { value!({}) } else { self.value()? };
        if let Some(grace) =
            asked.query.number("gracePeriodSeconds").and_then(|grace| i64::try_from(grace).ok())
        {
            json::set(&mut body, "gracePeriodSeconds", grace);
        }
        let policy = asked.query.text("propagationPolicy");
        if !policy.is_empty() {
            json::set(&mut body, "propagationPolicy", policy);
        }
        if asked.query.truth("orphanDependents") {
            json::set(&mut body, "orphanDependents", true);
        }
        Options::read(&body)
    }

    /// DeleteOptions can say that it is a dry run.
    fn dry(&self, ask: &Ask) -> Result<Ask, Status> {
        let body = if self.bytes.is_empty() { Value::Null } else { self.value()? };
        let dry = json::list(&body, "dryRun").iter().any(|what| what == "All");
        Ok(Ask { dry_run: ask.dry_run || dry, ..ask.clone() })
    }
}

fn unsupported(known: &str) -> Status {
    Status::new(
        415,
        "UnsupportedMediaType",
        format!("the body of the request was in an unknown format - accepted media types include: {known}"),
    )
}

fn query_of(ask: &Ask, asked: &Asked) -> Result<Query, Status> {
    let query = &asked.query;
    let bad = |error: crate::selector::SelectorError| Status::bad_request(error.to_string());
    let known: Vec<&str> = ask.resource.fields.iter().map(String::as_str).collect();
    let revision = match query.text("resourceVersion") {
        "" => 0,
        text => text.parse().map_err(|_| {
            let message = format!(
                "resourceVersion: Invalid value: \"{text}\": strconv.ParseUint: parsing \"{text}\": invalid syntax"
            );
            Status::new(500, "", message)
        })?,
    };
    let next = match query.text("continue") {
        "" => None,
        text => Some(Continue::read(text)?),
    };
    Ok(Query {
        labels: Labels::parse(query.text("labelSelector")).map_err(bad)?,
        fields: Fields::parse(query.text("fieldSelector"), &known).map_err(bad)?,
        limit: usize::try_from(query.number("limit").unwrap_or(0)).unwrap_or(usize::MAX),
        next,
        revision,
        exact: query.text("resourceVersionMatch") == "Exact",
    })
}

/// Between once and twice the time, so that watches do not all begin anew at once.
fn some_while() -> Duration {
    let share = f64::from(u16::from_le_bytes(crate::names::random())) / f64::from(u16::MAX);
    limits::WATCH_FOR + limits::WATCH_FOR.mul_f64(share)
}

async fn whole(body: Incoming) -> Result<Bytes, Status> {
    let collected = Limited::new(body, limits::BODY_MAX).collect().await;
    Ok(collected.map_err(too_large_or_broken)?.to_bytes())
}

/// Why a body could not be read.
pub(crate) fn too_large_or_broken(error: Box<dyn std::error::Error + Send + Sync>) -> Status {
    if error.is::<http_body_util::LengthLimitError>() {
        return Status::too_large(limits::BODY_MAX);
    }
    Status::bad_request(format!("the body could not be read: {error}"))
}

fn refused(status: &Status) -> Reply {
    let mut reply = json_reply(status.status_code(), &status.to_value());
    if let Some(seconds) = status.retry_after() {
        reply.headers_mut().insert("retry-after", HeaderValue::from(seconds));
    }
    reply
}

fn json_reply(code: StatusCode, object: &Value) -> Reply {
    let mut reply = Response::new(Answer::whole(object.to_string()));
    *reply.status_mut() = code;
    reply.headers_mut().insert("content-type", HeaderValue::from_static("application/json"));
    reply.headers_mut().insert("cache-control", HeaderValue::from_static("no-cache, private"));
    reply
}

pub(super) fn text(code: StatusCode, body: &str) -> Reply {
    let mut reply = Response::new(Answer::whole(body.to_owned()));
    *reply.status_mut() = code;
    reply.headers_mut().insert("content-type", HeaderValue::from_static("text/plain; charset=utf-8"));
    reply
}
