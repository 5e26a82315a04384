//! What a volume shows of config maps, secrets, the pod itself and its token: files by path.

use std::{
    collections::BTreeMap,
    path::{Component, Path},
};

use k8s_openapi::api::core::v1::{
    ConfigMap, DownwardAPIVolumeFile, KeyToPath, Pod, ProjectedVolumeSource, Secret,
    ServiceAccountTokenProjection, Volume,
};

use crate::{
    env,
    make::{Settings, names},
    objects::{Objects, token_name},
};

const MODE: i32 = 0o644;
const PATH_MAX: usize = 4_096;

/// Files by path below the volume's folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Payload {
    pub(super) files: BTreeMap<String, Shown>,
    /// Never on a disk.
    pub(super) in_memory: bool,
}

/// A file that a volume shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Shown {
    pub(super) bytes: Vec<u8>,
    /// Rights, as the pod asks for them.
    pub(super) mode: u32,
    /// Who owns it, if not root.
    pub(super) user: Option<u32>,
}

/// What this volume shows; none if it is not of this sort.
pub(super) fn of(
    pod: &Pod,
    volume: &Volume,
    objects: &Objects,
    settings: &Settings,
) -> Option<Result<Payload, String>> {
    let made = if let Some(source) = &volume.config_map {
        let mode = source.default_mode;
        let files = config_map(objects, &source.name, source.items.as_deref(), source.optional, mode);
        files.map(|files| Payload { files, in_memory: false })
    } else if let Some(source) = &volume.secret {
        let name = names::text(&source.secret_name);
        let files = secret(objects, &name, source.items.as_deref(), source.optional, source.default_mode);
        files.map(|files| Payload { files, in_memory: true })
    } else if let Some(source) = &volume.downward_api {
        let files = downward(pod, source.items.as_deref().unwrap_or_default(), source.default_mode, settings);
        files.map(|files| Payload { files, in_memory: true })
    } else if let Some(source) = &volume.projected {
        projected(pod, &volume.name, source, objects, settings)
            .map(|files| Payload { files, in_memory: true })
    } else {
        return None;
    };
    Some(made.and_then(|payload| payload.checked()))
}

/// Whether the volume shows one object that says it never changes.
pub(super) fn never_changes(volume: &Volume, objects: &Objects) -> bool {
    let map = volume.config_map.as_ref().and_then(|source| objects.config_maps.get(&source.name));
    let secret = volume.secret.as_ref().and_then(|source| source.secret_name.as_ref());
    let secret = secret.and_then(|name| objects.secrets.get(name));
    map.is_some_and(|map| map.immutable == Some(true))
        || secret.is_some_and(|secret| secret.immutable == Some(true))
}

impl Payload {
    /// No path leads out of the volume, or to what the volume is made of.
    fn checked(self) -> Result<Self, String> {
        for path in self.files.keys() {
            let parts = Path::new(path).components();
            let plain = parts.clone().all(|part| matches!(part, Component::Normal(_)));
            if path.is_empty() || !plain || path.starts_with("..") {
                return Err(format!("invalid path {path:?}: must be relative and not contain '..'"));
            }
            if path.len() > PATH_MAX {
                return Err(format!("invalid path: must be less than or equal to {PATH_MAX} characters"));
            }
        }
        Ok(self)
    }
}

type Files = BTreeMap<String, Shown>;

fn config_map(
    objects: &Objects,
    name: &str,
    items: Option<&[KeyToPath]>,
    optional: Option<bool>,
    mode: Option<i32>,
) -> Result<Files, String> {
    let Some(map) = objects.config_maps.get(name) else {
        return absent("configmap", name, optional);
    };
    let map: &ConfigMap = map;
    let text = map.data.iter().flatten().map(|(key, value)| (key, value.as_bytes()));
    let binary = map.binary_data.iter().flatten().map(|(key, value)| (key, value.0.as_slice()));
    pick("configmap", text.chain(binary).collect(), items, optional, mode)
}

fn secret(
    objects: &Objects,
    name: &str,
    items: Option<&[KeyToPath]>,
    optional: Option<bool>,
    mode: Option<i32>,
) -> Result<Files, String> {
    let Some(secret) = objects.secrets.get(name) else { return absent("secret", name, optional) };
    let secret: &Secret = secret;
    let data = secret.data.iter().flatten().map(|(key, value)| (key, value.0.as_slice()));
    pick("secret", data.collect(), items, optional, mode)
}

fn absent(kind: &str, name: &str, optional: Option<bool>) -> Result<Files, String> {
    if optional == Some(true) { Ok(Files::new()) } else { Err(format!("{kind} \"{name}\" not found")) }
}

/// All keys, or those that are named, at the paths that are named.
fn pick(
    kind: &str,
    data: BTreeMap<&String, &[u8]>,
    items: Option<&[KeyToPath]>,
    optional: Option<bool>,
    mode: Option<i32>,
) -> Result<Files, String> {
    let mode = mode.unwrap_or(MODE);
    let shown = |bytes: &[u8], mode: i32| Shown { bytes: bytes.to_owned(), mode: rights(mode), user: None };
    let Some(items) = items.filter(|items| !items.is_empty()) else {
        return Ok(data.into_iter().map(|(key, bytes)| (key.clone(), shown(bytes, mode))).collect());
    };
    let mut files = Files::new();
    for item in items {
        match data.get(&item.key) {
            Some(bytes) => {
                files.insert(item.path.clone(), shown(bytes, item.mode.unwrap_or(mode)));
            }
            None if optional == Some(true) => {}
            None => {
                return Err(format!("{kind} references non-existent {} key: {}", key_kind(kind), item.key));
            }
        }
    }
    Ok(files)
}

fn key_kind(kind: &str) -> &str {
    if kind == "configmap" { "config" } else { kind }
}

fn downward(
    pod: &Pod,
    items: &[DownwardAPIVolumeFile],
    mode: Option<i32>,
    settings: &Settings,
) -> Result<Files, String> {
    let mut files = Files::new();
    for item in items {
        let text = match (&item.field_ref, &item.resource_field_ref) {
            (Some(field), _) => env::field_value(field, pod, settings, &[]),
            (None, Some(field)) => env::resource_value(field, pod, None, settings),
            (None, None) => continue,
        };
        let text = text.map_err(|error| error.message)?;
        let mode = rights(item.mode.or(mode).unwrap_or(MODE));
        files.insert(item.path.clone(), Shown { bytes: text.into_bytes(), mode, user: None });
    }
    Ok(files)
}

fn projected(
    pod: &Pod,
    volume: &str,
    projected: &ProjectedVolumeSource,
    objects: &Objects,
    settings: &Settings,
) -> Result<Files, String> {
    let mode = projected.default_mode;
    let mut files = Files::new();
    let mut tokens = 0;
    for source in projected.sources.iter().flatten() {
        if let Some(source) = &source.config_map {
            files.extend(config_map(objects, &source.name, source.items.as_deref(), source.optional, mode)?);
        }
        if let Some(source) = &source.secret {
            files.extend(secret(objects, &source.name, source.items.as_deref(), source.optional, mode)?);
        }
        if let Some(source) = &source.downward_api {
            files.extend(downward(pod, source.items.as_deref().unwrap_or_default(), mode, settings)?);
        }
        if let Some(source) = &source.service_account_token {
            let name = token_name(volume, tokens, &source.path);
            files.insert(source.path.clone(), token(pod, &name, source, mode, objects)?);
            tokens += 1;
        }
        if source.cluster_trust_bundle.is_some() {
            return Err("ClusterTrustBundle projection is not supported on this node".to_owned());
        }
    }
    Ok(files)
}

fn token(
    pod: &Pod,
    name: &str,
    source: &ServiceAccountTokenProjection,
    mode: Option<i32>,
    objects: &Objects,
) -> Result<Shown, String> {
    let uid = names::text(&pod.metadata.uid);
    let audience = names::text(&source.audience);
    // One that was made for somebody else, or for an earlier pod of this name, opens nothing.
    let fits = |token: &&std::sync::Arc<crate::objects::Token>| {
        token.pod_uid == uid && (audience.is_empty() || token.audience == audience)
    };
    let found =
        objects.tokens.get(name).filter(fits).ok_or("failed to fetch token: it has not arrived yet")?;
    let user = common_user(pod);
    let group =
        pod.spec.as_ref().and_then(|spec| spec.security_context.as_ref()).and_then(|own| own.fs_group);
    // Whoever the pod runs as owns it, and nobody else reads it.
    let mode = if user.is_some() || group.is_some() { 0o600 } else { rights(mode.unwrap_or(MODE)) };
    Ok(Shown { bytes: found.token.clone().into_bytes(), mode, user })
}

/// The user that all containers run as, where the pod says so.
fn common_user(pod: &Pod) -> Option<u32> {
    let spec = pod.spec.as_ref()?;
    let of_pod = spec.security_context.as_ref().and_then(|context| context.run_as_user);
    let mut users = spec.containers.iter().chain(spec.init_containers.iter().flatten()).map(|container| {
        container.security_context.as_ref().and_then(|context| context.run_as_user).or(of_pod)
    });
    let first = users.next()??;
    users.all(|user| user == Some(first)).then_some(first)?.try_into().ok()
}

fn rights(mode: i32) -> u32 {
    u32::try_from(mode).unwrap_or(0) & 0o777
}
