//! Strategic merge patches: a merge patch that knows which lists have keys.
//!
//! Directives: `$patch: replace | delete | merge`, `$deleteFromPrimitiveList/<field>`,
//! `$setElementOrder/<field>`, `$retainKeys`.

use serde_json::{Map, Value};

use super::PatchError;
use crate::schema::{Merge, Type};

/// Applies a patch.
pub(crate) fn strategic_patch(ty: &Type, value: &mut Value, patch: &Value) -> Result<(), PatchError> {
    let Value::Object(patch) = patch else {
        return Err(PatchError::Malformed("a strategic merge patch is an object".to_owned()));
    };
    if !value.is_object() {
        *value = Value::Object(Map::new());
    }
    let Some(map) = value.as_object_mut() else { return Ok(()) };
    merge(ty, map, patch)
}

fn merge(ty: &Type, map: &mut Map<String, Value>, patch: &Map<String, Value>) -> Result<(), PatchError> {
    match patch.get("$patch").and_then(Value::as_str) {
        Some("replace") => {
            *map = plain(patch);
            return Ok(());
        }
        Some("delete") => {
            map.clear();
            return Ok(());
        }
        Some("merge") | None => {}
        Some(other) => return Err(malformed(&format!("unknown patch type {other}"))),
    }
    if let Some(keep) = patch.get("$retainKeys") {
        let keep = keep.as_array().ok_or_else(|| malformed("$retainKeys is a list"))?;
        map.retain(|name, _| keep.iter().any(|kept| kept.as_str() == Some(name)));
    }
    for (name, change) in patch {
        if let Some(field) = name.strip_prefix("$deleteFromPrimitiveList/") {
            let gone = change.as_array().ok_or_else(|| malformed("$deleteFromPrimitiveList is a list"))?;
            if let Some(list) = map.get_mut(field).and_then(Value::as_array_mut) {
                list.retain(|value| !gone.contains(value));
            }
        }
    }
    for (name, change) in patch.iter().filter(|(name, _)| !name.starts_with('$')) {
        let child = ty.child(name).unwrap_or(&Type::Any);
        if change.is_null() {
            map.remove(name);
            continue;
        }
        match (child, change) {
            (Type::List { of, merge }, Value::Array(change)) => match key_of(merge) {
                Some(key) => {
                    let held = map.entry(name.clone()).or_insert(Value::Null);
                    merge_list(of, key, held, change)?;
                }
                None if *merge == Merge::Set => {
                    let held = map.entry(name.clone()).or_insert(Value::Null);
                    merge_set(held, change);
                }
                None => drop(map.insert(name.clone(), Value::Array(plain_list(change)))),
            },
            (_, Value::Object(change)) => {
                let held = map.entry(name.clone()).or_insert(Value::Null);
                if !held.is_object() {
                    *held = Value::Object(Map::new());
                }
                let Some(held) = held.as_object_mut() else { continue };
                merge(child, held, change)?;
                if change.get("$patch").and_then(Value::as_str) == Some("delete") {
                    map.remove(name);
                }
            }
            _ => drop(map.insert(name.clone(), change.clone())),
        }
    }
    for (name, order) in patch {
        if let Some(field) = name.strip_prefix("$setElementOrder/")
            && let (Some(order), Some(list)) =
                (order.as_array(), map.get_mut(field).and_then(Value::as_array_mut))
        {
            let key = match ty.child(field) {
                Some(Type::List { merge, .. }) => key_of(merge),
                _ => None,
            };
            sort_by(list, order, key);
        }
    }
    Ok(())
}

fn merge_list(of: &Type, key: &str, held: &mut Value, change: &[Value]) -> Result<(), PatchError> {
    if !held.is_array() {
        *held = Value::Array(Vec::new());
    }
    let Some(list) = held.as_array_mut() else { return Ok(()) };
    let directive = |value: &Value| value.get("$patch").and_then(Value::as_str).map(str::to_owned);
    // An element that only says `$patch: replace` replaces the whole list by the others.
    if change.iter().any(|value| directive(value).as_deref() == Some("replace") && value.get(key).is_none()) {
        *list = plain_list(change);
        list.retain(|value| value.as_object().is_none_or(|map| !map.is_empty()));
        return Ok(());
    }
    for value in change {
        let patch =
            value.as_object().ok_or_else(|| malformed("an element of a list with keys is an object"))?;
        let wanted = patch.get(key).ok_or_else(|| {
            PatchError::Malformed(format!("map: {value} does not contain declared merge key: {key}"))
        })?;
        let at = list.iter().position(|held| held.get(key) == Some(wanted));
        match (directive(value).as_deref(), at) {
            (Some("delete"), _) => list.retain(|held| held.get(key) != Some(wanted)),
            (Some("replace"), Some(at)) => list[at] = Value::Object(plain(patch)),
            (_, Some(at)) => {
                if let Some(held) = list[at].as_object_mut() {
                    merge(of, held, patch)?;
                }
            }
            (_, None) => list.push(Value::Object(plain(patch))),
        }
    }
    Ok(())
}

fn merge_set(held: &mut Value, change: &[Value]) {
    if !held.is_array() {
        *held = Value::Array(Vec::new());
    }
    let Some(list) = held.as_array_mut() else { return };
    for value in change {
        if !list.contains(value) {
            list.push(value.clone());
        }
    }
}

/// Puts what the order names into this order; everything else keeps its place relative to what stood before
/// it.
fn sort_by(list: &mut Vec<Value>, order: &[Value], key: Option<&str>) {
    let name = |value: &Value| match key {
        Some(key) => value.get(key).cloned(),
        None => Some(value.clone()),
    };
    let place =
        |value: &Value| name(value).and_then(|own| order.iter().position(|o| name(o) == Some(own.clone())));
    let mut last = 0;
    let mut keyed: Vec<((usize, usize), Value)> = Vec::with_capacity(list.len());
    for value in list.drain(..) {
        let at = match place(&value) {
            Some(place) => {
                last = place + 1;
                (place + 1, 0)
            }
            None => (last, 1),
        };
        keyed.push((at, value));
    }
    keyed.sort_by_key(|(at, _)| *at);
    list.extend(keyed.into_iter().map(|(_, value)| value));
}

fn key_of(merge: &Merge) -> Option<&str> {
    match merge {
        Merge::Keys(keys) => keys.first().map(String::as_str),
        Merge::PatchKey(key) => Some(key),
        Merge::Atomic | Merge::Set => None,
    }
}

/// Without directives and without what is to be removed.
fn plain(patch: &Map<String, Value>) -> Map<String, Value> {
    let kept = patch.iter().filter(|(name, value)| !name.starts_with('$') && !value.is_null());
    kept.map(|(name, value)| (name.clone(), plain_value(value))).collect()
}

fn plain_list(list: &[Value]) -> Vec<Value> {
    list.iter().map(plain_value).collect()
}

fn plain_value(value: &Value) -> Value {
    match value {
        Value::Object(map) => Value::Object(plain(map)),
        Value::Array(list) => Value::Array(plain_list(list)),
        other => other.clone(),
    }
}

fn malformed(what: &str) -> PatchError {
    PatchError::Malformed(what.to_owned())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::schema::built_in;

    fn patched(value: Value, patch: &Value) -> Value {
        let mut value = value;
        strategic_patch(&built_in("Pod"), &mut value, patch).unwrap();
        value
    }

    fn pod() -> Value {
        json!({"metadata": {"finalizers": ["a", "b"]}, "spec": {
            "containers": [{"name": "a", "image": "1", "env": [{"name": "X", "value": "1"}]}, {"name": "b"}],
            "tolerations": [{"key": "k"}],
            "volumes": [{"name": "v", "emptyDir": {}}]}})
    }

    #[test]
    fn elements_with_keys_are_merged_and_others_replaced() {
        let patch = json!({"spec": {"containers": [{"name": "a", "image": "2"}, {"name": "c"}],
                                    "tolerations": [{"key": "z"}]}});
        let after = patched(pod(), &patch);
        assert_eq!(after["spec"]["containers"][0]["image"], "2");
        assert_eq!(after["spec"]["containers"][0]["env"][0]["value"], "1");
        assert_eq!(after["spec"]["containers"].as_array().unwrap().len(), 3);
        assert_eq!(after["spec"]["tolerations"], json!([{"key": "z"}]));
    }

    #[test]
    fn directives_delete_replace_retain_and_order() {
        let patch = json!({
        "metadata": {"$deleteFromPrimitiveList/finalizers": ["a"]},
        "spec": {
            "$setElementOrder/containers": [{"name": "c"}, {"name": "b"}],
            "containers": [{"name": "a", "$patch": "delete"}, {"name": "c"}],
            "volumes": [{"name": "v", "$retainKeys": ["name", "hostPath"], "hostPath": {"path": "/"}}],
        }});
        let after = patched(pod(), &patch);
        assert_eq!(after["metadata"]["finalizers"], json!(["b"]));
        assert_eq!(after["spec"]["containers"], json!([{"name": "c"}, {"name": "b"}]));
        assert_eq!(after["spec"]["volumes"], json!([{"name": "v", "hostPath": {"path": "/"}}]));
        let replaced =
            patched(pod(), &json!({"spec": {"containers": [{"$patch": "replace"}, {"name": "z"}]}}));
        assert_eq!(replaced["spec"]["containers"], json!([{"name": "z"}]));
    }

    #[test]
    fn an_element_without_its_key_is_refused() {
        let mut value = pod();
        let patch = json!({"spec": {"containers": [{"image": "x"}]}});
        assert!(strategic_patch(&built_in("Pod"), &mut value, &patch).is_err());
    }
}
