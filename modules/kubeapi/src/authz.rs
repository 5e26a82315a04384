//! Who may do what: masters everything, nodes what concerns their pods, everybody else what roles say.

pub(crate) mod bootstrap;
mod node;

use serde_json::Value;

use crate::{
    cache::Cache,
    json,
    registry::{Resource, built_in_resource},
    user::{MASTERS, User},
};

/// What somebody wants to do.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Attributes {
    pub(crate) verb: String,
    pub(crate) group: String,
    pub(crate) resource: String,
    pub(crate) subresource: String,
    pub(crate) namespace: String,
    pub(crate) name: String,
    /// The path, of what is no resource; empty otherwise.
    pub(crate) path: String,
}

impl Attributes {
    /// As messages say it.
    pub(crate) fn refusal(&self, user: &User) -> String {
        let who = &user.name;
        if !self.path.is_empty() {
            return format!("User \"{who}\" cannot {} path \"{}\"", self.verb, self.path);
        }
        let place = match self.namespace.as_str() {
            "" => "at the cluster scope".to_owned(),
            namespace => format!("in the namespace \"{namespace}\""),
        };
        let what = self.resource_name();
        format!(
            "User \"{who}\" cannot {} resource \"{what}\" in API group \"{}\" {place}",
            self.verb, self.group
        )
    }

    /// `pods/log`
    pub(crate) fn resource_name(&self) -> String {
        match self.subresource.as_str() {
            "" => self.resource.clone(),
            part => format!("{}/{part}", self.resource),
        }
    }
}

/// Whether somebody may do something.
pub(crate) fn allows(cache: &Cache, user: &User, wanted: &Attributes) -> bool {
    if user.is_in(MASTERS) {
        return true;
    }
    if let Some(node) = user.node()
        && node::allows(cache, node, wanted)
    {
        return true;
    }
    let mut allowed = false;
    each_rule(cache, user, &wanted.namespace, |rule| allowed = allowed || rule_allows(rule, wanted));
    allowed
}

/// The rules that hold for somebody in a namespace.
pub(crate) fn rules(cache: &Cache, user: &User, namespace: &str) -> Vec<Value> {
    let mut rules = Vec::new();
    each_rule(cache, user, namespace, |rule| rules.push(rule.clone()));
    rules
}

fn each_rule(cache: &Cache, user: &User, namespace: &str, mut visit: impl FnMut(&Value)) {
    let rbac = |plural| -> &'static Resource { built_in_resource("rbac.authorization.k8s.io", plural) };
    let mut visit_role = |binding: &Value, namespace: &str| {
        let name = json::text(binding, "roleRef.name");
        let role = match json::text(binding, "roleRef.kind") {
            "ClusterRole" => cache.get(rbac("clusterroles"), "", name),
            _ => cache.get(rbac("roles"), namespace, name),
        };
        if let Some(role) = role {
            rules_of(cache, &role).iter().for_each(&mut visit);
        }
    };
    for binding in cache.list(rbac("clusterrolebindings"), "") {
        if names_user(&binding, user, "") {
            visit_role(&binding, "");
        }
    }
    if !namespace.is_empty() {
        for binding in cache.list(rbac("rolebindings"), namespace) {
            if names_user(&binding, user, namespace) {
                visit_role(&binding, namespace);
            }
        }
    }
}

/// The rules of a role, with those of the roles that it takes together.
fn rules_of(cache: &Cache, role: &Value) -> Vec<Value> {
    let mut rules = json::list(role, "rules").to_vec();
    for selector in json::list(role, "aggregationRule.clusterRoleSelectors") {
        let Some(labels) = crate::selector::Labels::of(Some(selector)) else { continue };
        for other in cache.list(built_in_resource("rbac.authorization.k8s.io", "clusterroles"), "") {
            let own = json::text(&other, "metadata.name") == json::text(role, "metadata.name");
            if !own && labels.select(&other) {
                rules.extend(json::list(&other, "rules").iter().cloned());
            }
        }
    }
    rules
}

/// The first rule that goes beyond what somebody may do in a namespace: who gives rights must have them.
pub(crate) fn beyond(cache: &Cache, user: &User, namespace: &str, rules: &[Value]) -> Option<Value> {
    if user.is_in(MASTERS) {
        return None;
    }
    let mut own = Vec::new();
    each_rule(cache, user, namespace, |rule| own.push(rule.clone()));
    rules.iter().find(|rule| !is_within(rule, &own)).cloned()
}

/// Whether each single right of a rule is given by one of the others.
fn is_within(rule: &Value, own: &[Value]) -> bool {
    let texts =
        |field: &str| -> Vec<&str> { json::list(rule, field).iter().filter_map(Value::as_str).collect() };
    let has = |held: &Value, field: &str, wanted: &str| {
        let all = json::list(held, field);
        all.iter().any(|value| value == "*" || value == wanted)
    };
    let named = |held: &Value, name: Option<&&str>| {
        let names = json::list(held, "resourceNames");
        names.is_empty() || name.is_some_and(|name| names.iter().any(|held| held == name))
    };
    let names = texts("resourceNames");
    let names: Vec<Option<&&str>> =
        if names.is_empty() { vec![None] } else { names.iter().map(Some).collect() };
    let resources = texts("verbs").into_iter().all(|verb| {
        texts("apiGroups").into_iter().all(|group| {
            texts("resources").into_iter().all(|resource| {
                let part = resource.split_once('/').map(|(_, part)| format!("*/{part}"));
                names.iter().all(|name| {
                    own.iter().any(|held| {
                        let covers = has(held, "resources", resource)
                            || part.as_ref().is_some_and(|part| has(held, "resources", part));
                        has(held, "verbs", verb)
                            && has(held, "apiGroups", group)
                            && covers
                            && named(held, *name)
                    })
                })
            })
        })
    });
    let paths = texts("verbs").into_iter().all(|verb| {
        texts("nonResourceURLs").into_iter().all(|path| {
            own.iter().any(|held| {
                let covers =
                    json::list(held, "nonResourceURLs").iter().filter_map(Value::as_str).any(|own| {
                        own == path || own.strip_suffix('*').is_some_and(|start| path.starts_with(start))
                    });
                has(held, "verbs", verb) && covers
            })
        })
    });
    resources && paths
}

/// The rules that a binding gives.
pub(crate) fn rules_bound(cache: &Cache, binding: &Value) -> Vec<Value> {
    let (name, namespace) = (json::text(binding, "roleRef.name"), json::text(binding, "metadata.namespace"));
    let rbac = |plural| -> &'static Resource { built_in_resource("rbac.authorization.k8s.io", plural) };
    let role = match json::text(binding, "roleRef.kind") {
        "ClusterRole" => cache.get(rbac("clusterroles"), "", name),
        _ => cache.get(rbac("roles"), namespace, name),
    };
    role.map(|role| rules_of(cache, &role)).unwrap_or_default()
}

fn names_user(binding: &Value, user: &User, namespace: &str) -> bool {
    json::list(binding, "subjects").iter().any(|subject| {
        let name = json::text(subject, "name");
        match json::text(subject, "kind") {
            "User" => name == user.name,
            "Group" => user.is_in(name),
            "ServiceAccount" => {
                let of = json::text(subject, "namespace");
                let of = if of.is_empty() { namespace } else { of };
                user.name == format!("system:serviceaccount:{of}:{name}")
            }
            _ => false,
        }
    })
}

fn rule_allows(rule: &Value, wanted: &Attributes) -> bool {
    let has = |field: &str, fits: &dyn Fn(&str) -> bool| {
        json::list(rule, field).iter().filter_map(Value::as_str).any(fits)
    };
    if !has("verbs", &|verb| verb == "*" || verb == wanted.verb) {
        return false;
    }
    if !wanted.path.is_empty() {
        return has("nonResourceURLs", &|path| match path.strip_suffix('*') {
            Some(start) => wanted.path.starts_with(start),
            None => path == wanted.path,
        });
    }
    let whole = wanted.resource_name();
    let any_part = format!("*/{}", wanted.subresource);
    has("apiGroups", &|group| group == "*" || group == wanted.group)
        && has("resources", &|resource| {
            resource == "*" || resource == whole || !wanted.subresource.is_empty() && resource == any_part
        })
        && (json::list(rule, "resourceNames").is_empty() || has("resourceNames", &|name| name == wanted.name))
}

#[cfg(test)]
mod tests {
    use serde_json::json as value;

    use super::*;

    fn wanted(verb: &str, resource: &str, subresource: &str, name: &str) -> Attributes {
        Attributes {
            verb: verb.to_owned(),
            resource: resource.to_owned(),
            subresource: subresource.to_owned(),
            name: name.to_owned(),
            ..Attributes::default()
        }
    }

    #[test]
    fn who_gives_rights_must_have_them() {
        let own = [value!({"verbs": ["get", "list"], "apiGroups": [""], "resources": ["pods", "*/log"]})];
        let rule = |verb: &str, resource: &str| value!({"verbs": [verb], "apiGroups": [""], "resources": [resource]});
        assert!(is_within(&rule("get", "pods"), &own) && is_within(&rule("list", "pods/log"), &own));
        for refused in [rule("*", "pods"), rule("get", "*"), rule("get", "secrets"), rule("create", "pods")] {
            assert!(!is_within(&refused, &own), "{refused}");
        }
        assert!(!is_within(&value!({"verbs": ["get"], "nonResourceURLs": ["/metrics"]}), &own));
    }

    #[test]
    fn a_rule_allows_what_it_names_and_nothing_else() {
        let rule = value!({"verbs": ["get"], "apiGroups": [""], "resources": ["pods", "*/status"], "resourceNames": ["a"]});
        assert!(rule_allows(&rule, &wanted("get", "pods", "", "a")));
        assert!(rule_allows(&rule, &wanted("get", "nodes", "status", "a")));
        for refused in [
            wanted("get", "pods", "", "b"),
            wanted("get", "pods", "", ""),
            wanted("list", "pods", "", "a"),
            wanted("get", "pods", "log", "a"),
            wanted("get", "secrets", "", "a"),
            Attributes { group: "apps".to_owned(), ..wanted("get", "pods", "", "a") },
            Attributes { path: "/healthz".to_owned(), verb: "get".to_owned(), ..Attributes::default() },
        ] {
            assert!(!rule_allows(&rule, &refused), "{refused:?}");
        }
    }
}
