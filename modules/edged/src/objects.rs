//! What a pod uses besides itself: which objects it names, and their contents as the node has them.

use std::{collections::BTreeMap, sync::Arc};

use k8s_openapi::api::core::v1::{ConfigMap, Container, Pod, Secret, VolumeProjection};
use serde::{Deserialize, Serialize};

/// The objects that a pod names, all of its own namespace, as far as they are here.
#[derive(Debug, Clone, Default)]
pub struct Objects {
    /// By name.
    pub config_maps: BTreeMap<String, Arc<ConfigMap>>,
    /// By name, opened.
    pub secrets: BTreeMap<String, Arc<Secret>>,
    /// Tokens of the pod's service account, by [`token_name`].
    pub tokens: BTreeMap<String, Arc<Token>>,
}

/// A token that was requested for a pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Token {
    /// The pod it was bound to; one of another pod of this name is not used.
    pub pod_uid: String,
    /// Whom it is for; empty: the API server.
    #[serde(default)]
    pub audience: String,
    /// The token itself.
    pub token: String,
    /// RFC 3339.
    #[serde(default)]
    pub expiration_timestamp: String,
}

/// What a pod names. The value says whether it can do without: it names it as optional wherever it does.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct References {
    /// Names of config maps.
    pub config_maps: BTreeMap<String, bool>,
    /// Names of secrets. Secrets for pulling images are optional: kubelet tries without them.
    pub secrets: BTreeMap<String, bool>,
    /// See [`token_name`].
    pub tokens: BTreeMap<String, bool>,
}

/// What a token is called behind its pod's name and a dot: the first of a volume as the volume, each further one
/// with its path there.
#[must_use]
pub fn token_name(volume: &str, before: usize, path: &str) -> String {
    if before == 0 { volume.to_owned() } else { format!("{volume}.{}", path.replace('/', ".")) }
}

/// What this pod names.
#[must_use]
pub fn references(pod: &Pod) -> References {
    let mut found = References::default();
    let Some(spec) = &pod.spec else { return found };
    for container in spec.init_containers.iter().flatten().chain(&spec.containers) {
        found.of_container(container);
    }
    for secret in spec.image_pull_secrets.iter().flatten() {
        note(&mut found.secrets, &secret.name, Some(true));
    }
    for volume in spec.volumes.iter().flatten() {
        if let Some(source) = &volume.config_map {
            note(&mut found.config_maps, &source.name, source.optional);
        }
        if let Some(source) = &volume.secret {
            note(&mut found.secrets, source.secret_name.as_deref().unwrap_or_default(), source.optional);
        }
        let mut tokens = 0;
        for source in volume.projected.iter().flat_map(|projected| projected.sources.iter().flatten()) {
            found.of_projection(source);
            if let Some(token) = &source.service_account_token {
                note(&mut found.tokens, &token_name(&volume.name, tokens, &token.path), None);
                tokens += 1;
            }
        }
    }
    found
}

impl References {
    fn of_container(&mut self, container: &Container) {
        for source in container.env_from.iter().flatten() {
            if let Some(source) = &source.config_map_ref {
                note(&mut self.config_maps, &source.name, source.optional);
            }
            if let Some(source) = &source.secret_ref {
                note(&mut self.secrets, &source.name, source.optional);
            }
        }
        for source in container.env.iter().flatten().filter_map(|variable| variable.value_from.as_ref()) {
            if let Some(source) = &source.config_map_key_ref {
                note(&mut self.config_maps, &source.name, source.optional);
            }
            if let Some(source) = &source.secret_key_ref {
                note(&mut self.secrets, &source.name, source.optional);
            }
        }
    }

    fn of_projection(&mut self, source: &VolumeProjection) {
        if let Some(source) = &source.config_map {
            note(&mut self.config_maps, &source.name, source.optional);
        }
        if let Some(source) = &source.secret {
            note(&mut self.secrets, &source.name, source.optional);
        }
    }
}

/// A name that is empty names nothing.
fn note(names: &mut BTreeMap<String, bool>, name: &str, optional: Option<bool>) {
    if !name.is_empty() {
        *names.entry(name.to_owned()).or_insert(true) &= optional == Some(true);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::make::fixture::pod;

    #[test]
    fn every_place_that_names_an_object_is_found() {
        let pod = pod(serde_json::json!({
            "imagePullSecrets": [{"name": "pull"}],
            "initContainers": [{"name": "i", "envFrom": [{"configMapRef": {"name": "init"}}]}],
            "containers": [{
                "name": "c",
                "env": [
                    {"name": "A", "valueFrom": {"configMapKeyRef": {"name": "one", "key": "k", "optional": true}}},
                    {"name": "B", "valueFrom": {"secretKeyRef": {"name": "two", "key": "k"}}},
                ],
                "envFrom": [{"secretRef": {"name": "three", "optional": true}}],
            }],
            "volumes": [
                {"name": "a", "configMap": {"name": "one"}},
                {"name": "b", "secret": {"secretName": "four"}},
                {"name": "c", "projected": {"sources": [
                    {"configMap": {"name": "five"}}, {"secret": {"name": "six"}},
                    {"serviceAccountToken": {"path": "token"}},
                    {"serviceAccountToken": {"path": "for/vault", "audience": "vault"}},
                ]}},
            ],
        }));
        let names = |map: &BTreeMap<String, bool>| map.clone().into_iter().collect::<Vec<_>>();
        let found = references(&pod);
        let owned =
            |list: &[(&str, bool)]| list.iter().map(|(n, o)| ((*n).to_owned(), *o)).collect::<Vec<_>>();
        assert_eq!(
            names(&found.config_maps),
            owned(&[("five", false), ("init", false), ("one", false)]),
            "named twice, once as needed: needed"
        );
        assert_eq!(
            names(&found.secrets),
            owned(&[("four", false), ("pull", true), ("six", false), ("three", true), ("two", false)])
        );
        assert_eq!(names(&found.tokens), owned(&[("c", false), ("c.for.vault", false)]));
    }
}
