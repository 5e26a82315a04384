//! Which resources are served: the built-in ones, and those that CustomResourceDefinitions add.

use std::{
    collections::BTreeMap,
    sync::{Arc, RwLock},
};

use crate::{
    crd::Custom,
    names::Names,
    schema::{BUILT_IN, Struct, Type},
};

mod built_in;

/// A resource in one version.
#[derive(Debug)]
pub(crate) struct Resource {
    /// API group; empty for core.
    pub(crate) group: String,
    /// Version.
    pub(crate) version: String,
    /// Kind of its objects.
    pub(crate) kind: String,
    /// Kind of a list of them.
    pub(crate) list_kind: String,
    /// Name in paths.
    pub(crate) plural: String,
    /// Name for people.
    pub(crate) singular: String,
    /// Short names for people.
    pub(crate) short: Vec<String>,
    /// Groups of resources it belongs to, such as "all".
    pub(crate) categories: Vec<String>,
    /// Whether its objects live in namespaces.
    pub(crate) namespaced: bool,
    /// What its objects look like.
    pub(crate) ty: Type,
    /// What its objects may be called.
    pub(crate) names: Names,
    /// Whether status is written apart.
    pub(crate) status: bool,
    /// Where replicas stand, if it can be scaled.
    pub(crate) scale: Option<Scale>,
    /// Further subresources.
    pub(crate) subresources: Vec<Subresource>,
    /// Fields by which it is selected.
    pub(crate) fields: Vec<String>,
    /// Whether metadata.generation counts changes of what is wanted.
    pub(crate) generation: bool,
    /// Nothing is stored: a create is a question.
    pub(crate) review: bool,
    /// Nothing is stored: what it shows is asked of nodes.
    pub(crate) measured: bool,
    /// A deletion answers with the object instead of a status.
    pub(crate) returns_deleted: bool,
    /// What a CustomResourceDefinition says of it.
    pub(crate) custom: Option<Arc<Custom>>,
    /// Group and resource under which it is stored, where these are not its own.
    pub(crate) stored_as: Option<(&'static str, &'static str)>,
}

/// Where the fields of a Scale stand in an object.
#[derive(Debug, Clone)]
pub(crate) struct Scale {
    /// `spec.replicas`
    pub(crate) spec: String,
    /// `status.replicas`
    pub(crate) status: String,
    /// Where the selector is: a LabelSelector, or a text.
    pub(crate) selector: String,
}

/// A subresource that is neither status nor scale.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Subresource {
    pub(crate) name: &'static str,
    pub(crate) group: &'static str,
    pub(crate) version: &'static str,
    pub(crate) kind: &'static str,
    pub(crate) verbs: &'static [&'static str],
}

impl Resource {
    /// `v1` or `apps/v1`.
    pub(crate) fn api_version(&self) -> String {
        api_version(&self.group, &self.version)
    }

    /// Where its objects are stored: `core/pods/`.
    pub(crate) fn prefix(&self) -> String {
        let (group, plural) = self.stored_as.unwrap_or((&self.group, &self.plural));
        let group = if group.is_empty() { "core" } else { group };
        format!("{group}/{plural}/")
    }

    /// Where the objects of a namespace are stored, or all for an empty one.
    pub(crate) fn prefix_of(&self, namespace: &str) -> String {
        match namespace {
            "" => self.prefix(),
            namespace => format!("{}{namespace}/", self.prefix()),
        }
    }

    /// Where an object is stored.
    pub(crate) fn key(&self, namespace: &str, name: &str) -> String {
        let namespace = if self.namespaced { namespace } else { "-" };
        format!("{}{namespace}/{name}", self.prefix())
    }

    /// Whether it is this resource, in whatever version.
    pub(crate) fn is(&self, group: &str, plural: &str) -> bool {
        self.group == group && self.plural == plural
    }

    /// Verbs of the resource itself.
    pub(crate) fn verbs(&self) -> &'static [&'static str] {
        if self.review {
            &["create"]
        } else if self.measured {
            &["get", "list"]
        } else if self.custom.is_some() {
            &["delete", "deletecollection", "get", "list", "patch", "create", "update", "watch"]
        } else if self.is("", "namespaces") {
            &["create", "delete", "get", "list", "patch", "update", "watch"]
        } else {
            &["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"]
        }
    }
}

/// `v1` or `apps/v1`.
pub(crate) fn api_version(group: &str, version: &str) -> String {
    if group.is_empty() { version.to_owned() } else { format!("{group}/{version}") }
}

/// All resources that are served.
#[derive(Debug, Default)]
pub(crate) struct Resources {
    /// By group, version, plural.
    by_path: BTreeMap<(String, String, String), Arc<Resource>>,
    /// Groups in the order in which they are shown, with their versions, the preferred one first.
    pub(crate) groups: Vec<(String, Vec<String>)>,
}

impl Resources {
    fn new(custom: Vec<Arc<Resource>>) -> Self {
        let mut all = Self::default();
        for resource in BUILT_INS.iter().chain(&custom) {
            let (group, version) = (&resource.group, &resource.version);
            match all.groups.iter_mut().find(|(held, _)| held == group) {
                Some((_, versions)) if versions.contains(version) => {}
                Some((_, versions)) => versions.push(version.clone()),
                None => all.groups.push((group.clone(), vec![version.clone()])),
            }
            let path = (group.clone(), version.clone(), resource.plural.clone());
            all.by_path.insert(path, Arc::clone(resource));
        }
        for (_, versions) in &mut all.groups {
            versions.sort_by_key(|version| std::cmp::Reverse(priority(version)));
        }
        all
    }

    /// The resource of a path.
    pub(crate) fn get(&self, group: &str, version: &str, plural: &str) -> Option<&Arc<Resource>> {
        self.by_path.get(&(group.to_owned(), version.to_owned(), plural.to_owned()))
    }

    /// The resource whose objects are of a kind.
    pub(crate) fn of_kind(&self, api_version: &str, kind: &str) -> Option<&Arc<Resource>> {
        let (group, version) = api_version.split_once('/').unwrap_or(("", api_version));
        let mut all = self.by_path.values();
        all.find(|held| held.group == group && held.version == version && held.kind == kind)
    }

    /// Resources of a group and version.
    pub(crate) fn of_version<'a>(
        &'a self,
        group: &'a str,
        version: &'a str,
    ) -> impl Iterator<Item = &'a Arc<Resource>> {
        let all = self.by_path.iter();
        let found = all.filter(move |((held, of, _), _)| held == group && of == version);
        found.map(|(_, resource)| resource)
    }

    /// Every resource of which objects are stored, once.
    pub(crate) fn stored(&self) -> impl Iterator<Item = &Arc<Resource>> {
        let mut seen = std::collections::BTreeSet::new();
        let all = self.by_path.values().filter(|resource| !resource.review && !resource.measured);
        all.filter(move |resource| seen.insert(resource.prefix()))
    }
}

/// Versions in the order of preference: v2, v1, v1beta2, v1alpha1.
fn priority(version: &str) -> (u8, u32, u32) {
    let number = |text: &str| text.parse().unwrap_or(0);
    let rest = version.strip_prefix('v').unwrap_or_default();
    match (rest.split_once("beta"), rest.split_once("alpha")) {
        (Some((major, minor)), _) => (1, number(major), number(minor)),
        (None, Some((major, minor))) => (0, number(major), number(minor)),
        (None, None) => (2, number(rest), 0),
    }
}

/// The resources as they are now.
#[derive(Debug)]
pub(crate) struct Registry(RwLock<Arc<Resources>>);

impl Registry {
    pub(crate) fn new() -> Self {
        Self(RwLock::new(Arc::new(Resources::new(Vec::new()))))
    }

    /// The resources now.
    pub(crate) fn now(&self) -> Arc<Resources> {
        Arc::clone(&self.0.read().expect("no panic under this lock"))
    }

    /// Replaces the custom resources.
    pub(crate) fn set_custom(&self, custom: Vec<Arc<Resource>>) {
        *self.0.write().expect("no panic under this lock") = Arc::new(Resources::new(custom));
    }
}

static BUILT_INS: std::sync::LazyLock<Vec<Arc<Resource>>> =
    std::sync::LazyLock::new(|| built_in::table().into_iter().map(Arc::new).collect());

/// A built-in resource in its preferred version.
pub(crate) fn built_in_resource(group: &str, plural: &str) -> &'static Arc<Resource> {
    BUILT_INS.iter().find(|resource| resource.is(group, plural)).expect("a built-in resource")
}

/// The type of a built-in kind.
fn type_of(name: &str) -> Arc<Struct> {
    Arc::clone(BUILT_IN.get(name).expect("a type that kinds/*.types describes"))
}
