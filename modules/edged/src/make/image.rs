//! Images: what they are called, when they are pulled, and who we are to their registries.

use std::collections::BTreeMap;

use base64::{Engine, engine::general_purpose::STANDARD};
use k8s_openapi::api::core::v1::{Container, Pod, Secret};
use serde::Deserialize;

use super::ConfigError;
use crate::{objects::Objects, runtime::cri};

/// The registry of images whose names say none.
const DEFAULT_REGISTRY: &str = "index.docker.io";

/// When an image is pulled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Policy {
    /// Before every start of a container.
    Always,
    /// When it is not here.
    IfNotPresent,
    /// Never.
    Never,
}

/// The container's policy: where it names none, an image without a fixed tag is always pulled.
#[must_use]
pub fn policy(container: &Container) -> Policy {
    match container.image_pull_policy.as_deref() {
        Some("Always") => Policy::Always,
        Some("Never") => Policy::Never,
        Some("IfNotPresent") => Policy::IfNotPresent,
        _ => match container.image.as_deref().map(split) {
            Some((_, Some("latest") | None, None)) => Policy::Always,
            _ => Policy::IfNotPresent,
        },
    }
}

/// Whether to pull. Not being here and never being pulled is an error.
pub fn decide(policy: Policy, image: &str, is_here: bool) -> Result<bool, ConfigError> {
    match (policy, is_here) {
        (Policy::Always, _) | (Policy::IfNotPresent, false) => Ok(true),
        (Policy::IfNotPresent | Policy::Never, true) => Ok(false),
        (Policy::Never, false) => Err(ConfigError {
            reason: "ErrImageNeverPull",
            message: format!("Container image \"{image}\" is not present with pull policy of Never"),
        }),
    }
}

/// The image's name with a tag: `latest` where neither tag nor digest is said.
pub fn name(image: &str) -> Result<String, ConfigError> {
    let wrong = |why: &str| ConfigError {
        reason: "InvalidImageName",
        message: format!(
            "Failed to apply default image tag \"{image}\": couldn't parse image name \"{image}\": invalid reference \
             format{why}"
        ),
    };
    let (repository, tag, digest) = split(image);
    let (registry, path) = match repository.split_once('/') {
        Some((first, rest)) if names_a_registry(first) => (Some(first), rest),
        _ => (None, repository),
    };
    if path.bytes().any(|byte| byte.is_ascii_uppercase()) {
        return Err(wrong(": repository name must be lowercase"));
    }
    let part = |part: &str| {
        let inside = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"._-".contains(&byte);
        let end = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);
        let bytes = part.as_bytes();
        part.bytes().all(inside) && end(bytes.first()) && end(bytes.last())
    };
    let tag_is_right = |tag: &str| {
        let word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
        let rest = |byte: u8| word(byte) || byte == b'.' || byte == b'-';
        (1..=128).contains(&tag.len()) && word(tag.as_bytes()[0]) && tag.bytes().all(rest)
    };
    let digest_is_right = |digest: &str| {
        digest.split_once(':').is_some_and(|(algorithm, hex)| {
            !algorithm.is_empty() && hex.len() >= 32 && hex.bytes().all(|byte| byte.is_ascii_hexdigit())
        })
    };
    let registry_is_right = |registry: &str| {
        !registry.is_empty()
            && registry.bytes().all(|byte| byte.is_ascii_alphanumeric() || b".-:[]".contains(&byte))
    };
    let right = path.len() <= 255
        && path.split('/').all(part)
        && tag.is_none_or(tag_is_right)
        && digest.is_none_or(digest_is_right)
        && registry.is_none_or(registry_is_right);
    if !right {
        return Err(wrong(""));
    }
    Ok(if tag.is_none() && digest.is_none() { format!("{image}:latest") } else { image.to_owned() })
}

/// Repository, tag, digest.
fn split(image: &str) -> (&str, Option<&str>, Option<&str>) {
    let (rest, digest) = match image.split_once('@') {
        Some((rest, digest)) => (rest, Some(digest)),
        None => (image, None),
    };
    // A colon before the last slash is a registry's port.
    match rest.rsplit_once(':') {
        Some((repository, tag)) if !tag.contains('/') => (repository, Some(tag), digest),
        _ => (rest, None, digest),
    }
}

fn names_a_registry(first: &str) -> bool {
    first.contains(['.', ':']) || first == "localhost"
}

/// Who we are to the image's registry, by the pod's secrets: the best match first. None: nobody.
#[must_use]
pub fn credentials(image: &str, pod: &Pod, objects: &Objects) -> Vec<cri::AuthConfig> {
    let secrets = pod.spec.iter().flat_map(|spec| spec.image_pull_secrets.iter().flatten());
    let secrets = secrets.filter_map(|reference| objects.secrets.get(&reference.name));
    let mut known: Vec<(String, Entry)> = secrets.flat_map(|secret| entries(secret)).collect();
    // The more is said, the further back in the alphabet: longer paths before shorter ones.
    known.sort_by(|(a, _), (b, _)| b.cmp(a));
    let (repository, ..) = split(image);
    let matching = |key: &str| {
        matches(key, repository)
            || (key.split('/').next() == Some(DEFAULT_REGISTRY) && is_of_default_registry(repository))
    };
    let found = known.into_iter().filter(|(key, _)| matching(key));
    found.map(|(key, entry)| entry.into_auth(&key)).collect()
}

/// A registry in a secret of type `dockerconfigjson` or `dockercfg`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
struct Entry {
    username: String,
    password: String,
    auth: String,
    identitytoken: String,
    registrytoken: String,
}

#[derive(Debug, Deserialize)]
struct DockerConfig {
    #[serde(default)]
    auths: BTreeMap<String, Entry>,
}

impl Entry {
    fn into_auth(self, key: &str) -> cri::AuthConfig {
        let decoded = STANDARD.decode(self.auth.trim()).ok().and_then(|bytes| String::from_utf8(bytes).ok());
        let from_auth = decoded.as_deref().and_then(|text| text.trim_end_matches('\0').split_once(':'));
        let (username, password) = match from_auth {
            Some((username, password)) => (username.to_owned(), password.to_owned()),
            None => (self.username, self.password),
        };
        cri::AuthConfig {
            username,
            password,
            auth: String::new(),
            server_address: key.to_owned(),
            identity_token: self.identitytoken,
            registry_token: self.registrytoken,
        }
    }
}

/// Each registry that a secret speaks of. A secret that is none of these speaks of none.
fn entries(secret: &Secret) -> Vec<(String, Entry)> {
    let data =
        |key: &str| secret.data.as_ref().and_then(|data| data.get(key)).map(|value| value.0.as_slice());
    let of_config =
        data(".dockerconfigjson").and_then(|json| serde_json::from_slice::<DockerConfig>(json).ok());
    let all = match of_config {
        Some(config) => config.auths,
        None => data(".dockercfg").and_then(|json| serde_json::from_slice(json).ok()).unwrap_or_default(),
    };
    all.into_iter().map(|(key, entry)| (normal(&key), entry)).collect()
}

/// Without scheme and version of the protocol.
fn normal(key: &str) -> String {
    let key = key.strip_prefix("https://").or_else(|| key.strip_prefix("http://")).unwrap_or(key);
    let (host, path) = key.split_once('/').unwrap_or((key, ""));
    let path = ["v1", "v2"].iter().find_map(|version| {
        let rest = path.strip_prefix(version)?;
        if rest.is_empty() { Some(rest) } else { rest.strip_prefix('/') }
    });
    let path = path.unwrap_or_else(|| key.split_once('/').map_or("", |(_, path)| path));
    let path = path.trim_end_matches('/');
    if path.is_empty() { host.to_owned() } else { format!("{host}/{path}") }
}

/// Host by host's labels (each may have `*`), equal ports, and a path that begins so.
fn matches(key: &str, repository: &str) -> bool {
    let (key_host, key_path) = key.split_once('/').unwrap_or((key, ""));
    let (host, path) = match repository.split_once('/') {
        Some((first, rest)) if names_a_registry(first) => (first, rest),
        _ => return false,
    };
    let port = |host: &str| host.rsplit_once(':').map(|(_, port)| port.to_owned());
    let labels = |host: &str| -> Vec<String> {
        let bare = host.rsplit_once(':').map_or(host, |(bare, _)| bare);
        bare.split('.').map(str::to_owned).collect()
    };
    let (wanted, had) = (labels(key_host), labels(host));
    port(key_host) == port(host)
        && wanted.len() == had.len()
        && wanted.iter().zip(&had).all(|(pattern, label)| glob(pattern, label))
        && path.starts_with(key_path)
}

fn glob(pattern: &str, text: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == text,
        Some((start, rest)) => text.strip_prefix(start).is_some_and(|text| {
            (0..=text.len()).any(|at| text.is_char_boundary(at) && glob(rest, &text[at..]))
        }),
    }
}

fn is_of_default_registry(repository: &str) -> bool {
    match repository.split_once('/') {
        None => true,
        Some((first, _)) => matches!(first, "docker.io" | DEFAULT_REGISTRY) || !names_a_registry(first),
    }
}
