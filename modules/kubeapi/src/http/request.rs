//! What a request asks for, from its method, path and query.

use std::collections::BTreeMap;

use hyper::{HeaderMap, Method, Uri};

use crate::{api::Validation, authz::Attributes, status::Status};

/// What a request asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Asked {
    /// What is to be authorized.
    pub(crate) attributes: Attributes,
    /// Version of the resource; empty if it is none.
    pub(crate) version: String,
    /// Parameters.
    pub(crate) query: Params,
}

/// Parameters of a query. Of one that is given twice the first counts.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Params(BTreeMap<String, String>);

impl Params {
    fn read(query: &str) -> Self {
        let mut params = BTreeMap::new();
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            params.entry(decoded(name, true)).or_insert_with(|| decoded(value, true));
        }
        Self(params)
    }

    /// A parameter; empty if it is not there.
    pub(crate) fn text(&self, name: &str) -> &str {
        self.0.get(name).map_or("", String::as_str)
    }

    /// Whether a parameter says yes.
    pub(crate) fn truth(&self, name: &str) -> bool {
        self.0
            .get(name)
            .is_some_and(|value| ["", "1", "t", "T", "true", "TRUE", "True"].contains(&value.as_str()))
    }

    /// A number, if the parameter is one.
    pub(crate) fn number(&self, name: &str) -> Option<u64> {
        self.text(name).parse().ok()
    }

    /// `dryRun=All`.
    pub(crate) fn dry_run(&self) -> Result<bool, Status> {
        match self.text("dryRun") {
            "" => Ok(false),
            "All" => Ok(true),
            other => Err(Status::bad_request(format!(
                "dryRun: Unsupported value: \"{other}\": supported values: \"All\""
            ))),
        }
    }

    /// `fieldValidation`: unknown fields are told by default.
    pub(crate) fn validation(&self) -> Result<Validation, Status> {
        match self.text("fieldValidation") {
            "" | "Warn" => Ok(Validation::Warn),
            "Ignore" => Ok(Validation::Ignore),
            "Strict" => Ok(Validation::Strict),
            other => Err(Status::bad_request(format!(
                "fieldValidation: Unsupported value: \"{other}\": supported values: \"Ignore\", \"Strict\", \"Warn\""
            ))),
        }
    }
}

/// Reads what is asked for. Anything that is not a path of resources is asked for by its path.
pub(crate) fn read(method: &Method, uri: &Uri) -> Asked {
    let query = Params::read(uri.query().unwrap_or_default());
    let parts: Vec<String> =
        uri.path().split('/').filter(|part| !part.is_empty()).map(|part| decoded(part, false)).collect();
    let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
    let by_path = || Asked {
        attributes: Attributes {
            verb: method.as_str().to_ascii_lowercase(),
            path: uri.path().to_owned(),
            ..Attributes::default()
        },
        version: String::new(),
        query: query.clone(),
    };
    let (group, version, rest) = match parts.as_slice() {
        ["api", version, rest @ ..] => ("", *version, rest),
        ["apis", group, version, rest @ ..] => (*group, *version, rest),
        _ => return by_path(),
    };
    let (namespace, rest) = match rest {
        // A namespace itself, or a part of it, is a resource in itself.
        ["namespaces", name] => (*name, rest),
        ["namespaces", name, "status" | "finalize"] => (*name, rest),
        ["namespaces", namespace, rest @ ..] => (*namespace, rest),
        rest => ("", rest),
    };
    let (resource, name, subresource) = match rest {
        [] => return by_path(),
        [resource] => (*resource, "", ""),
        [resource, name] => (*resource, *name, ""),
        [resource, name, subresource, ..] => (*resource, *name, *subresource),
    };
    let watch = query.truth("watch");
    let verb = match (method.as_str(), name.is_empty()) {
        ("GET" | "HEAD", _) if watch && subresource.is_empty() => "watch",
        ("GET" | "HEAD", true) => "list",
        ("GET" | "HEAD", false) => "get",
        ("POST", _) => "create",
        ("PUT", _) => "update",
        ("PATCH", _) => "patch",
        ("DELETE", true) => "deletecollection",
        ("DELETE", false) => "delete",
        _ => "",
    };
    // A list by name is authorized as a look at that name.
    let selected =
        query.text("fieldSelector").split(',').find_map(|part| part.strip_prefix("metadata.name="));
    let name = if name.is_empty() && ["list", "watch"].contains(&verb) {
        selected.unwrap_or_default()
    } else {
        name
    };
    let attributes = Attributes {
        verb: verb.to_owned(),
        group: group.to_owned(),
        resource: resource.to_owned(),
        subresource: subresource.to_owned(),
        namespace: namespace.to_owned(),
        name: name.to_owned(),
        path: String::new(),
    };
    Asked { attributes, version: version.to_owned(), query }
}

/// Every value of a parameter, in order.
pub(crate) fn values<'a>(query: &'a str, name: &'a str) -> impl Iterator<Item = String> + 'a {
    let pairs = query.split('&').map(|pair| pair.split_once('=').unwrap_or((pair, "")));
    pairs.filter(move |(held, _)| decoded(held, true) == name).map(|(_, value)| decoded(value, true))
}

/// The manager of a write: as named, or the program that asks.
pub(crate) fn manager(query: &Params, headers: &HeaderMap) -> Result<String, Status> {
    let named = query.text("fieldManager");
    if named.len() > 128 || named.chars().any(char::is_control) {
        return Err(Status::bad_request("fieldManager: at most 128 printable characters"));
    }
    if !named.is_empty() {
        return Ok(named.to_owned());
    }
    let agent = headers.get("user-agent").and_then(|agent| agent.to_str().ok()).unwrap_or_default();
    let program: String = agent.split('/').next().unwrap_or_default().chars().take(128).collect();
    Ok(if program.is_empty() { "unknown".to_owned() } else { program })
}

/// Percent-decoded; what is not UTF-8 then is replaced.
fn decoded(text: &str, plus_is_space: bool) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((byte, after)) = rest.split_first() {
        rest = after;
        match byte {
            b'+' if plus_is_space => bytes.push(b' '),
            b'%' => {
                let hex = after.get(..2).and_then(|hex| std::str::from_utf8(hex).ok());
                match hex.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
                    Some(byte) => {
                        bytes.push(byte);
                        rest = &after[2..];
                    }
                    None => bytes.push(b'%'),
                }
            }
            byte => bytes.push(*byte),
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(method: &str, uri: &str) -> Attributes {
        read(&method.parse().unwrap(), &uri.parse().unwrap()).attributes
    }

    #[test]
    fn paths_say_verb_resource_and_part() {
        let status = of("PATCH", "/apis/apps/v1/namespaces/fx/deployments/d/status");
        assert_eq!((&*status.verb, &*status.group, &*status.namespace), ("patch", "apps", "fx"));
        assert_eq!((&*status.resource, &*status.name, &*status.subresource), ("deployments", "d", "status"));
        let namespace = of("DELETE", "/api/v1/namespaces/fx");
        assert_eq!(
            (&*namespace.resource, &*namespace.name, &*namespace.namespace),
            ("namespaces", "fx", "fx")
        );
        assert_eq!(of("GET", "/api/v1/namespaces/fx/pods").verb, "list");
        assert_eq!(of("GET", "/api/v1/pods?watch=1").verb, "watch");
        assert_eq!(of("GET", "/api/v1/pods?watch=0").verb, "list");
        assert_eq!(of("GET", "/api/v1/secrets?fieldSelector=metadata.name%3Da").name, "a");
        assert_eq!(of("GET", "/apis/apps/v1").path, "/apis/apps/v1");
        assert_eq!(of("GET", "/healthz").path, "/healthz");
    }
}
