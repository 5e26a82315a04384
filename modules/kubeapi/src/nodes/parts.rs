//! Parts of pods and nodes that only the node has: what is asked for, checked, as a path of the node.

use hyper::{Method, Uri};
use serde_json::Value;

use crate::{
    authz::Attributes,
    clock,
    http::request::{Asked, values},
    json,
    status::{Cause, Status},
};

/// A part that the node has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    /// What a container has written.
    Log,
    /// A command in a container.
    Exec,
    /// The first process of a container.
    Attach,
    /// Ports of a pod.
    PortForward,
    /// Any path of the node.
    NodeProxy,
}

impl Part {
    /// Which part a request is about, if it is about one.
    pub(crate) fn of(attributes: &Attributes) -> Option<Self> {
        let core = attributes.group.is_empty() && !attributes.name.is_empty();
        Some(match (attributes.resource.as_str(), attributes.subresource.as_str()) {
            _ if !core => return None,
            ("pods", "log") => Self::Log,
            ("pods", "exec") => Self::Exec,
            ("pods", "attach") => Self::Attach,
            ("pods", "portforward") => Self::PortForward,
            ("nodes", "proxy") => Self::NodeProxy,
            _ => return None,
        })
    }

    /// Whether the verb fits.
    pub(crate) fn takes(self, verb: &str) -> bool {
        match self {
            Self::Log => verb == "get",
            Self::Exec | Self::Attach | Self::PortForward => ["get", "create"].contains(&verb),
            Self::NodeProxy => ["get", "create", "update", "patch", "delete"].contains(&verb),
        }
    }

    /// Whether an answer is always a switch of protocols.
    pub(crate) const fn upgrades(self) -> bool {
        matches!(self, Self::Exec | Self::Attach | Self::PortForward)
    }

    /// Path and query at the node, for a part of this pod.
    pub(crate) fn path(self, asked: &Asked, uri: &Uri, pod: &Value) -> Result<String, Status> {
        let query = uri.query().unwrap_or_default();
        let mut params = Params::default();
        let place = place(pod, self == Self::Log);
        if self == Self::PortForward {
            let ports: Vec<String> = values(query, "ports").collect();
            if !ports.is_empty() {
                params.add("port", &ports.join(","));
            }
            return Ok(params.after(format!("/portForward/{place}")));
        }
        let container = container(asked.query.text("container"), pod)?;
        match self {
            Self::Log => log_params(asked, json::text(pod, "metadata.name"), &mut params)?,
            _ => {
                for (name, param) in
                    [("stdin", "input"), ("stdout", "output"), ("stderr", "error"), ("tty", "tty")]
                {
                    if asked.query.truth(name) {
                        params.add(param, "1");
                    }
                }
                if self == Self::Exec {
                    values(query, "command").for_each(|command| params.add("command", &command));
                }
            }
        }
        let what = match self {
            Self::Log => "containerLogs",
            Self::Exec => "exec",
            _ => "attach",
        };
        Ok(params.after(format!("/{what}/{place}/{container}")))
    }
}

/// `namespace/pod`, and the uid behind it where the node is to check it. A mirror pod's uid is not the node's.
fn place(pod: &Value, without_uid: bool) -> String {
    let text = |path| json::text(pod, path);
    let place = format!("{}/{}", text("metadata.namespace"), text("metadata.name"));
    let annotations = json::map(pod, "metadata.annotations");
    let mirror = annotations.is_some_and(|held| held.contains_key("kubernetes.io/config.mirror"));
    match text("metadata.uid") {
        "" => place,
        _ if mirror || without_uid => place,
        uid => format!("{place}/{uid}"),
    }
}

/// The container that is meant: as named, or the only one.
fn container(named: &str, pod: &Value) -> Result<String, Status> {
    let pod_name = json::text(pod, "metadata.name");
    let names = |path: &str| -> Vec<&str> {
        json::list(pod, path).iter().map(|container| json::text(container, "name")).collect()
    };
    let (containers, init) = (names("spec.containers"), names("spec.initContainers"));
    if !named.is_empty() {
        let ephemeral = names("spec.ephemeralContainers");
        let mut all = containers.iter().chain(&init).chain(&ephemeral);
        return if all.any(|held| *held == named) {
            Ok(named.to_owned())
        } else {
            Err(Status::bad_request(format!("container {named} is not valid for pod {pod_name}")))
        };
    }
    match containers.as_slice() {
        [one] => Ok((*one).to_owned()),
        [] => Err(Status::bad_request(format!("a container name must be specified for pod {pod_name}"))),
        many => {
            let mut why = format!(
                "a container name must be specified for pod {pod_name}, choose one of: [{}]",
                many.join(" ")
            );
            if !init.is_empty() {
                why += &format!(" or one of the init containers: [{}]", init.join(" "));
            }
            Err(Status::bad_request(why))
        }
    }
}

fn log_params(asked: &Asked, pod: &str, params: &mut Params) -> Result<(), Status> {
    for name in ["follow", "previous", "timestamps"] {
        if asked.query.truth(name) {
            params.add(name, "true");
        }
    }
    let number = |name: &str| match asked.query.text(name) {
        "" => Ok(None),
        text => text
            .parse::<i64>()
            .map(Some)
            .map_err(|_| Status::bad_request(format!("strconv.ParseInt: parsing {text:?}: invalid syntax"))),
    };
    let (seconds, tail, limit) = (number("sinceSeconds")?, number("tailLines")?, number("limitBytes")?);
    let time = asked.query.text("sinceTime");
    let mut causes = Vec::new();
    if let Some(tail) = tail.filter(|tail| *tail < 0) {
        causes.push(Cause::invalid("tailLines", &tail.into(), "must be greater than or equal to 0"));
    }
    if let Some(limit) = limit.filter(|limit| *limit < 1) {
        causes.push(Cause::invalid("limitBytes", &limit.into(), "must be greater than 0"));
    }
    match seconds {
        Some(_) if !time.is_empty() => {
            causes
                .push(Cause::forbidden("", "at most one of `sinceTime` or `sinceSeconds` may be specified"));
        }
        Some(seconds) if seconds < 1 => {
            causes.push(Cause::invalid("sinceSeconds", &seconds.into(), "must be greater than 0"));
        }
        _ => {}
    }
    if !causes.is_empty() {
        return Err(Status::invalid("", "PodLogOptions", pod, &causes));
    }
    for (name, value) in [("sinceSeconds", seconds), ("tailLines", tail), ("limitBytes", limit)] {
        if let Some(value) = value {
            params.add(name, &value.to_string());
        }
    }
    if !time.is_empty() {
        let time = clock::normalized(time, false).ok_or_else(|| {
            Status::bad_request(format!("sinceTime: {time:?} is not a time as RFC 3339 writes it"))
        })?;
        params.add("sinceTime", &time);
    }
    Ok(())
}

/// The node of a request to `nodes/NAME/proxy`, whose name may have a scheme and a port, as kubelets are asked.
pub(crate) fn node_of(name: &str) -> &str {
    let mut parts = name.split(':');
    match (parts.next(), parts.next(), parts.next()) {
        (Some("http" | "https"), Some(node), _) => node,
        (Some(node), ..) => node,
        (None, ..) => name,
    }
}

/// What follows `/proxy` in a path, with the query.
pub(crate) fn proxied(uri: &Uri) -> String {
    // /api/v1/nodes/NAME/proxy/...
    let path = uri.path().splitn(7, '/').nth(6).unwrap_or_default();
    match uri.query() {
        Some(query) => format!("/{path}?{query}"),
        None => format!("/{path}"),
    }
}

/// The method with which a node is asked for a part.
pub(crate) fn method(part: Part, method: &Method) -> Method {
    match part {
        Part::Log => Method::GET,
        _ => method.clone(),
    }
}

/// A query that is being written.
#[derive(Debug, Default)]
struct Params(String);

impl Params {
    fn add(&mut self, name: &str, value: &str) {
        self.0.push(if self.0.is_empty() { '?' } else { '&' });
        self.0 += name;
        self.0.push('=');
        for byte in value.bytes() {
            if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
                self.0.push(char::from(byte));
            } else {
                self.0 += &format!("%{byte:02X}");
            }
        }
    }

    fn after(self, path: String) -> String {
        path + &self.0
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json as value;

    use super::*;
    use crate::http::request;

    fn pod() -> Value {
        value!({
            "metadata": {"namespace": "fx", "name": "web", "uid": "u-1"},
            "spec": {"containers": [{"name": "a"}, {"name": "b"}], "initContainers": [{"name": "i"}]},
        })
    }

    fn path(method: Method, part: &str, pod: &Value) -> Result<String, Status> {
        let uri: Uri = format!("/api/v1/namespaces/fx/pods/web/{part}").parse().unwrap();
        let asked = request::read(&method, &uri);
        Part::of(&asked.attributes).unwrap().path(&asked, &uri, pod)
    }

    #[test]
    fn a_container_is_named_or_the_only_one() {
        let why = path(Method::GET, "log", &pod()).unwrap_err();
        assert_eq!((why.code, why.reason), (400, "BadRequest"));
        assert_eq!(
            why.message,
            "a container name must be specified for pod web, choose one of: [a b] or one of the init containers: [i]"
        );
        let why = path(Method::GET, "log?container=x", &pod()).unwrap_err();
        assert_eq!(why.message, "container x is not valid for pod web");
        assert_eq!(path(Method::GET, "log?container=i", &pod()).unwrap(), "/containerLogs/fx/web/i");
        let mut one = pod();
        one["spec"]["containers"] = value!([{"name": "only"}]);
        assert_eq!(
            path(Method::POST, "attach?stdout=true", &one).unwrap(),
            "/attach/fx/web/u-1/only?output=1"
        );
    }

    #[test]
    fn every_word_of_a_command_reaches_the_node_as_it_is() {
        let asked =
            "exec?container=a&command=sh&command=-c&command=echo+%26+%C3%BC%0A&stdin=true&stdout=1&tty=false";
        assert_eq!(
            path(Method::POST, asked, &pod()).unwrap(),
            "/exec/fx/web/u-1/a?input=1&output=1&command=sh&command=-c&command=echo%20%26%20%C3%BC%0A"
        );
    }

    #[test]
    fn options_of_logs_are_checked_as_the_api_server_does() {
        let log = |query: &str| path(Method::GET, &format!("log?container=a&{query}"), &pod());
        let good =
            log("follow=true&tailLines=0&sinceTime=2026-01-02T03:04:05%2B01:00&timestamps=true&limitBytes=9");
        assert_eq!(
            good.unwrap(),
            "/containerLogs/fx/web/a?follow=true&timestamps=true&tailLines=0&limitBytes=9&sinceTime=2026-01-02T02%3A04%3A05Z"
        );
        for bad in [
            "tailLines=-1",
            "limitBytes=0",
            "sinceSeconds=0",
            "sinceSeconds=1&sinceTime=2026-01-02T03:04:05Z",
        ] {
            assert_eq!(log(bad).unwrap_err().code, 422, "{bad}");
        }
        for bad in ["tailLines=x", "sinceTime=yesterday"] {
            assert_eq!(log(bad).unwrap_err().code, 400, "{bad}");
        }
    }

    #[test]
    fn the_uid_goes_along_but_for_mirror_pods() {
        let forward = |pod: &Value| path(Method::POST, "portforward?ports=80&ports=81", pod).unwrap();
        assert_eq!(forward(&pod()), "/portForward/fx/web/u-1?port=80%2C81");
        let mut mirror = pod();
        mirror["metadata"]["annotations"] = value!({"kubernetes.io/config.mirror": "h"});
        assert_eq!(forward(&mirror), "/portForward/fx/web?port=80%2C81");
    }

    #[test]
    fn a_nodes_path_is_passed_on_as_it_was_written() {
        let uri: Uri = "/api/v1/nodes/https:edge-1:10250/proxy/stats/summary?a=%2F".parse().unwrap();
        assert_eq!(proxied(&uri), "/stats/summary?a=%2F");
        assert_eq!(proxied(&"/api/v1/nodes/edge-1/proxy".parse().unwrap()), "/");
        assert_eq!(
            (node_of("https:edge-1:10250"), node_of("edge-1:10250"), node_of("edge-1")),
            ("edge-1", "edge-1", "edge-1")
        );
    }
}
