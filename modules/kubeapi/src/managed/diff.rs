//! Two objects of one type: what was added, changed and removed between them; which paths one has; how a
//! partial one is laid over a whole one; how paths are taken out.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value};

use super::set::Set;
use crate::schema::{Merge, Type};

/// What differs between two objects.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Difference {
    /// Paths of the new one that the old one does not have, those on the way included.
    pub(crate) added: Set,
    /// Values that are others.
    pub(crate) modified: Set,
    /// Paths of the old one that the new one does not have.
    pub(crate) removed: Set,
}

/// Compares two objects.
pub(crate) fn compare(ty: &Type, old: &Value, new: &Value) -> Difference {
    let mut found = Difference::default();
    if ty.is_atomic() {
        found.modified.member = old != new;
        return found;
    }
    let (before, after) = match (ty, old, new) {
        (Type::List { merge, .. }, _, _) => match (elements(merge, old), elements(merge, new)) {
            (Some(before), Some(after)) => (before, after),
            // Two elements with the same keys: it has no paths within, it is one value.
            _ => {
                found.modified.member = old != new;
                return found;
            }
        },
        (_, Value::Object(_) | Value::Null, Value::Object(_) | Value::Null) => (fields(old), fields(new)),
        _ => {
            found.modified.member = old != new;
            return found;
        }
    };
    for element in before.keys().chain(after.keys()).collect::<BTreeSet<_>>() {
        let below = below(ty, element);
        match (before.get(element), after.get(element)) {
            (Some(old), Some(new)) => {
                let inner = compare(below, old, new);
                found.added.add(element.clone(), inner.added);
                found.modified.add(element.clone(), inner.modified);
                found.removed.add(element.clone(), inner.removed);
            }
            (None, Some(new)) => found.added.add(element.clone(), every_path(below, new)),
            (Some(old), None) => found.removed.add(element.clone(), every_path(below, old)),
            (None, None) => {}
        }
    }
    found
}

/// All paths of a value, its own and those on the way included.
fn every_path(ty: &Type, value: &Value) -> Set {
    let mut set = Set::leaf();
    if !ty.is_atomic() {
        for (element, child) in parts(ty, value).unwrap_or_default() {
            set.add(element.clone(), every_path(below(ty, &element), child));
        }
    }
    set
}

/// The paths that somebody who applies this value wants to own: values, elements of lists, keys of maps, and
/// what is empty.
pub(crate) fn owned_paths(ty: &Type, value: &Value) -> Set {
    if ty.is_atomic() {
        return Set::leaf();
    }
    let Some(parts) = parts(ty, value) else { return Set::leaf() };
    let mut set = Set::default();
    for (element, child) in parts {
        let inner_type = below(ty, &element);
        let mut inner = owned_paths(inner_type, child);
        let is_field = element.strip_prefix("f:").is_some_and(|name| ty.is_named_field(name));
        let empty = child.is_null() || child.as_object().is_some_and(Map::is_empty);
        inner.member |= !is_field || empty || inner.is_empty();
        set.add(element, inner);
    }
    set
}

/// `partial` laid over `whole`: what both have is `partial`'s, what lists and maps of `whole` have besides
/// stays.
pub(crate) fn lay_over(ty: &Type, whole: &Value, partial: &Value) -> Value {
    if ty.is_atomic() {
        return partial.clone();
    }
    match (ty, whole, partial) {
        (Type::List { .. }, Value::Array(whole_list), Value::Array(partial_list)) => {
            let Some((before, after)) = parts(ty, whole).zip(parts(ty, partial)) else {
                return partial.clone();
            };
            let mut merged = Vec::with_capacity(before.len());
            let of = |element: &str| below(ty, element);
            for value in whole_list {
                let Some(element) = element_of(ty, value) else { continue };
                merged.push(match after.get(&element) {
                    Some(over) => lay_over(of(&element), value, over),
                    None => value.clone(),
                });
            }
            let new = partial_list
                .iter()
                .filter(|value| element_of(ty, value).is_some_and(|element| !before.contains_key(&element)));
            merged.extend(new.cloned());
            Value::Array(merged)
        }
        (_, Value::Object(whole), Value::Object(partial)) => {
            let mut merged = whole.clone();
            for (name, over) in partial {
                let value = match (whole.get(name), ty.child(name)) {
                    (Some(under), Some(ty)) => lay_over(ty, under, over),
                    _ => over.clone(),
                };
                merged.insert(name.clone(), value);
            }
            Value::Object(merged)
        }
        _ => partial.clone(),
    }
}

/// Takes the members of the set out of a value.
pub(crate) fn take_out(ty: &Type, value: &mut Value, set: &Set) {
    if ty.is_atomic() {
        return;
    }
    match value {
        Value::Object(map) => {
            for (element, below) in &set.children {
                let Some(name) = element.strip_prefix("f:") else { continue };
                if below.member {
                    map.remove(name);
                } else if let (Some(child), Some(ty)) = (map.get_mut(name), ty.child(name)) {
                    take_out(ty, child, below);
                }
            }
        }
        Value::Array(list) => list.retain_mut(|child| {
            let Some((element, below_set)) = element_of(ty, child)
                .and_then(|element| set.children.get(&element).map(|below| (element, below)))
            else {
                return true;
            };
            if !below_set.member {
                take_out(below(ty, &element), child, below_set);
            }
            !below_set.member
        }),
        _ => {}
    }
}

/// The parts of a granular value by their path elements; `None` if it has none that can be told apart.
fn parts<'a>(ty: &Type, value: &'a Value) -> Option<BTreeMap<String, &'a Value>> {
    match (ty, value) {
        (Type::List { merge, .. }, Value::Array(_) | Value::Null) => elements(merge, value),
        (Type::List { .. }, _) => None,
        (_, Value::Object(_)) => Some(fields(value)),
        _ => None,
    }
}

fn fields(value: &Value) -> BTreeMap<String, &Value> {
    let map = value.as_object().into_iter().flatten();
    map.map(|(name, value)| (format!("f:{name}"), value)).collect()
}

fn elements<'a>(merge: &Merge, value: &'a Value) -> Option<BTreeMap<String, &'a Value>> {
    let list = match value {
        Value::Null => return Some(BTreeMap::new()),
        Value::Array(list) => list,
        _ => return None,
    };
    let mut found = BTreeMap::new();
    for value in list {
        if found.insert(element(merge, value)?, value).is_some() {
            return None;
        }
    }
    Some(found)
}

/// The path element of a list's element.
fn element_of(ty: &Type, value: &Value) -> Option<String> {
    match ty {
        Type::List { merge, .. } => element(merge, value),
        _ => None,
    }
}

fn element(merge: &Merge, value: &Value) -> Option<String> {
    match merge {
        Merge::Keys(keys) => {
            let named = keys.iter().filter_map(|key| Some((key, value.get(key)?)));
            let named: BTreeMap<&String, &Value> = named.collect();
            if named.is_empty() {
                return None;
            }
            Some(format!("k:{}", serde_json::to_string(&named).ok()?))
        }
        Merge::Set => Some(format!("v:{value}")),
        Merge::Atomic | Merge::PatchKey(_) => None,
    }
}

/// The type of what a path element leads to.
fn below<'a>(ty: &'a Type, element: &str) -> &'a Type {
    match ty {
        Type::List { of, .. } => of,
        _ => element.strip_prefix("f:").and_then(|name| ty.child(name)).unwrap_or(&Type::Any),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::schema::built_in;

    #[test]
    fn an_added_element_is_owned_with_its_way() {
        let ty = built_in("PodSpec");
        let new = json!({"containers": [{"name": "c", "image": "i", "resources": {}}]});
        let found = compare(&ty, &json!({"containers": null}), &new);
        let wanted = json!({"f:containers": {"k:{\"name\":\"c\"}": {
            ".": {}, "f:image": {}, "f:name": {}, "f:resources": {}}}});
        assert_eq!(found.added.encode(), wanted);
        assert!(found.modified.is_empty() && found.removed.is_empty());
    }

    #[test]
    fn a_list_of_something_unknown_is_one_value() {
        let found = compare(&Type::Any, &json!({"a": [1, 2]}), &json!({"a": [1]}));
        assert_eq!(found.modified.encode(), json!({"f:a": {}}));
    }
}
