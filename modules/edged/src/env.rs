//! The environment of a container, as kubelet makes it.
//!
//! Order and rules: `envFrom` in order, then `env` in order; a later one of the same name wins; `$(NAME)` in a
//! value sees what came before it, then the variables of services; these are added at the end where nothing else
//! is named so.

use k8s_openapi::api::core::v1::{Container, EnvVarSource, ObjectFieldSelector, Pod, ResourceFieldSelector};

use crate::{
    make::{ConfigError, Settings},
    objects::Objects,
    quantity::{Milli, divide_up},
    runtime::cri,
};

/// The whole environment of a container. What it names and is not there makes it fail, with kubelet's words.
pub fn environment(
    pod: &Pod,
    container: &Container,
    objects: &Objects,
    settings: &Settings,
    pod_ips: &[String],
) -> Result<Vec<cri::KeyValue>, ConfigError> {
    let services = services(settings);
    let mut made = Made::default();
    for source in container.env_from.iter().flatten() {
        let prefix = source.prefix.as_deref().unwrap_or_default();
        if let Some(reference) = &source.config_map_ref {
            match objects.config_maps.get(&reference.name) {
                Some(map) => made.add_all(prefix, map.data.iter().flatten().map(|(k, v)| (k, v.clone()))),
                None if reference.optional == Some(true) => {}
                None => return Err(missing("configmap", &reference.name)),
            }
        }
        if let Some(reference) = &source.secret_ref {
            match objects.secrets.get(&reference.name) {
                Some(secret) => made.add_all(
                    prefix,
                    secret
                        .data
                        .iter()
                        .flatten()
                        .map(|(k, v)| (k, String::from_utf8_lossy(&v.0).into_owned())),
                ),
                None if reference.optional == Some(true) => {}
                None => return Err(missing("secret", &reference.name)),
            }
        }
    }
    for variable in container.env.iter().flatten() {
        let value = match (variable.value.as_deref(), &variable.value_from) {
            (Some(text), _) if !text.is_empty() => {
                Some(expand(text, |name| made.get(name).or_else(|| find(&services, name))))
            }
            (_, Some(source)) => from_source(source, pod, container, objects, settings, pod_ips)?,
            _ => Some(String::new()),
        };
        if let Some(value) = value {
            made.set(&variable.name, value);
        }
    }
    for (name, value) in services {
        if made.get(&name).is_none() {
            made.set(&name, value);
        }
    }
    Ok(made.0)
}

#[derive(Debug, Default)]
struct Made(Vec<cri::KeyValue>);

impl Made {
    fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|variable| variable.key == name).map(|variable| variable.value.as_str())
    }

    fn set(&mut self, name: &str, value: String) {
        match self.0.iter_mut().find(|variable| variable.key == name) {
            Some(variable) => variable.value = value,
            None => self.0.push(cri::KeyValue { key: name.to_owned(), value }),
        }
    }

    fn add_all<'a>(&mut self, prefix: &str, all: impl Iterator<Item = (&'a String, String)>) {
        for (key, value) in all {
            // What no process can be given: the rest of the map is given all the same.
            if !key.is_empty() && !key.contains(['=', '\0']) {
                self.set(&format!("{prefix}{key}"), value);
            }
        }
    }
}

fn find<'a>(list: &'a [(String, String)], name: &str) -> Option<&'a str> {
    list.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
}

fn missing(kind: &str, name: &str) -> ConfigError {
    ConfigError::container(format!("{kind} \"{name}\" not found"))
}

/// The variables of service `kubernetes`, which here is the node's own API.
fn services(settings: &Settings) -> Vec<(String, String)> {
    let Some((host, port)) = &settings.api else { return Vec::new() };
    let url_host = if host.contains(':') { format!("[{host}]") } else { host.clone() };
    let url = format!("tcp://{url_host}:{port}");
    let port = port.to_string();
    let of_port = |end: &str| format!("KUBERNETES_PORT_{port}_TCP{end}");
    vec![
        ("KUBERNETES_SERVICE_HOST".to_owned(), host.clone()),
        ("KUBERNETES_SERVICE_PORT".to_owned(), port.clone()),
        ("KUBERNETES_SERVICE_PORT_HTTPS".to_owned(), port.clone()),
        ("KUBERNETES_PORT".to_owned(), url.clone()),
        (of_port(""), url),
        (of_port("_PROTO"), "tcp".to_owned()),
        (of_port("_PORT"), port.clone()),
        (of_port("_ADDR"), host.clone()),
    ]
}

/// `None`: what it names is optional and not there, so there is no such variable.
fn from_source(
    source: &EnvVarSource,
    pod: &Pod,
    container: &Container,
    objects: &Objects,
    settings: &Settings,
    pod_ips: &[String],
) -> Result<Option<String>, ConfigError> {
    let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
    if let Some(field) = &source.field_ref {
        return field_value(field, pod, settings, pod_ips).map(Some);
    }
    if let Some(field) = &source.resource_field_ref {
        return resource_value(field, pod, Some(container), settings).map(Some);
    }
    let (kind, title, name, key, optional, found) = if let Some(reference) = &source.config_map_key_ref {
        let map = objects.config_maps.get(&reference.name);
        let value = map.map(|map| map.data.as_ref().and_then(|data| data.get(&reference.key)).cloned());
        ("configmap", "ConfigMap", &reference.name, &reference.key, reference.optional, value)
    } else if let Some(reference) = &source.secret_key_ref {
        let secret = objects.secrets.get(&reference.name);
        let text = |secret: &std::sync::Arc<k8s_openapi::api::core::v1::Secret>| {
            let value = secret.data.as_ref().and_then(|data| data.get(&reference.key));
            value.map(|value| String::from_utf8_lossy(&value.0).into_owned())
        };
        ("secret", "Secret", &reference.name, &reference.key, reference.optional, secret.map(text))
    } else {
        return Ok(Some(String::new()));
    };
    match found {
        Some(Some(value)) => Ok(Some(value)),
        _ if optional == Some(true) => Ok(None),
        Some(None) => {
            Err(ConfigError::container(format!("couldn't find key {key} in {title} {namespace}/{name}")))
        }
        None => Err(missing(kind, name)),
    }
}

/// What a field of the pod says, as text.
pub(crate) fn field_value(
    field: &ObjectFieldSelector,
    pod: &Pod,
    settings: &Settings,
    pod_ips: &[String],
) -> Result<String, ConfigError> {
    let metadata = &pod.metadata;
    let spec = pod.spec.as_ref();
    let owned = |text: Option<&String>| text.cloned().unwrap_or_default();
    let addresses = || settings.addresses.iter().map(ToString::to_string).collect::<Vec<_>>();
    Ok(match field.field_path.as_str() {
        "metadata.name" => owned(metadata.name.as_ref()),
        "metadata.namespace" => owned(metadata.namespace.as_ref()),
        "metadata.uid" => owned(metadata.uid.as_ref()),
        "metadata.labels" => lines(metadata.labels.iter().flatten()),
        "metadata.annotations" => lines(metadata.annotations.iter().flatten()),
        "spec.nodeName" => settings.node.clone(),
        "spec.serviceAccountName" => owned(spec.and_then(|spec| spec.service_account_name.as_ref())),
        "status.hostIP" => addresses().into_iter().next().unwrap_or_default(),
        "status.hostIPs" => addresses().join(","),
        "status.podIP" => owned(pod_ips.first()),
        "status.podIPs" => pod_ips.join(","),
        path => {
            let of_map =
                [("metadata.labels", &metadata.labels), ("metadata.annotations", &metadata.annotations)];
            let found = of_map.into_iter().find_map(|(start, map)| {
                let key = path.strip_prefix(start)?.strip_prefix("['")?.strip_suffix("']")?;
                Some(owned(map.as_ref().and_then(|map| map.get(key))))
            });
            found.ok_or_else(|| ConfigError::container(format!("unsupported fieldPath: {path}")))?
        }
    })
}

/// What a field of a container's resources says, in units of its divisor, rounded up. A limit that is not set is
/// what the node has.
pub(crate) fn resource_value(
    field: &ResourceFieldSelector,
    pod: &Pod,
    container: Option<&Container>,
    settings: &Settings,
) -> Result<String, ConfigError> {
    let named = field.container_name.as_deref().filter(|name| !name.is_empty());
    let spec = pod.spec.as_ref();
    let mut all =
        spec.into_iter().flat_map(|spec| spec.containers.iter().chain(spec.init_containers.iter().flatten()));
    let container = match named {
        Some(name) => all
            .find(|container| container.name == name)
            .ok_or_else(|| ConfigError::container(format!("container {name} not found")))?,
        None => container
            .ok_or_else(|| ConfigError::container("resourceFieldRef: no container is named".into()))?,
    };
    let unknown = || ConfigError::container(format!("unsupported container resource : {}", field.resource));
    let (list, resource) = field.resource.split_once('.').ok_or_else(unknown)?;
    let resources = container.resources.as_ref();
    let value = match list {
        "limits" => Milli::find(resources.and_then(|all| all.limits.as_ref()), resource)
            .filter(|limit| limit.0 != 0)
            .unwrap_or_else(|| Milli::of(Some(&settings.allocatable), resource)),
        "requests" => Milli::of(resources.and_then(|all| all.requests.as_ref()), resource),
        _ => return Err(unknown()),
    };
    let divisor = field.divisor.as_ref().and_then(|divisor| Milli::parse(&divisor.0));
    let divisor = divisor.filter(|divisor| divisor.0 > 0).unwrap_or(Milli(1000));
    match resource {
        "cpu" => Ok(divide_up(value.0, divisor.0).to_string()),
        "memory" | "ephemeral-storage" => {
            Ok(divide_up(i128::from(value.units()), i128::from(divisor.units())).to_string())
        }
        other if other.starts_with("hugepages-") => {
            Ok(divide_up(i128::from(value.units()), i128::from(divisor.units())).to_string())
        }
        _ => Err(unknown()),
    }
}

/// A map as text: one `key="value"` a line, by key.
fn lines<'a>(map: impl Iterator<Item = (&'a String, &'a String)>) -> String {
    map.map(|(key, value)| format!("{key}={}", quoted(value))).collect::<Vec<_>>().join("\n")
}

/// In quotes, with what would end the line or the text escaped as Go does.
pub(crate) fn quoted(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 2);
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{7}' => out.push_str("\\a"),
            '\u{8}' => out.push_str("\\b"),
            '\u{b}' => out.push_str("\\v"),
            '\u{c}' => out.push_str("\\f"),
            c if c.is_ascii_control() => out.push_str(&format!("\\x{:02x}", u32::from(c))),
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

/// Replaces `$(NAME)` by what `look` finds; what it does not find stays as it is written. `$$` is one `$`, so
/// `$$(NAME)` is `$(NAME)`. Nothing is expanded twice.
#[must_use]
pub fn expand<'a>(text: &str, mut look: impl FnMut(&str) -> Option<&'a str>) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        let after = &rest[at + 1..];
        if let Some(after) = after.strip_prefix('$') {
            out.push('$');
            rest = after;
        } else if let Some((name, behind)) = after.strip_prefix('(').and_then(|inner| inner.split_once(')')) {
            match look(name) {
                Some(value) => out.push_str(value),
                None => out.push_str(&rest[at..at + name.len() + 3]),
            }
            rest = behind;
        } else {
            out.push('$');
            rest = after;
        }
    }
    out.push_str(rest);
    out
}

/// As [`expand`], where every name must be there: the first that is not is the error.
pub(crate) fn expand_all<'a>(
    text: &str,
    mut look: impl FnMut(&str) -> Option<&'a str>,
) -> Result<String, String> {
    let mut lost = None;
    let made = expand(text, |name| {
        let found = look(name);
        if found.is_none() && lost.is_none() {
            lost = Some(name.to_owned());
        }
        found
    });
    match lost {
        Some(name) => Err(name),
        None => Ok(made),
    }
}

#[cfg(test)]
mod tests;
