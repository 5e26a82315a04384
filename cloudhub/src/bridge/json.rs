//! Reading Kubernetes objects as plain JSON, and comparing what two sides say.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};

use serde_json::Value;

/// The value at a path like `metadata.name`; field names here have no dots.
pub(super) fn at<'a>(value: &'a Value, path: &str) -> Option<&'a Value> {
    path.split('.').try_fold(value, |value, field| value.get(field))
}

/// A text, empty if there is none.
pub(super) fn text<'a>(value: &'a Value, path: &str) -> &'a str {
    at(value, path).and_then(Value::as_str).unwrap_or_default()
}

/// A list, empty if there is none.
pub(super) fn list<'a>(value: &'a Value, path: &str) -> &'a [Value] {
    at(value, path).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

/// Takes a field out of the object at a path; an empty path is the value itself.
pub(super) fn remove(value: &mut Value, path: &str, field: &str) {
    let mut names = path.split('.').filter(|name| !name.is_empty());
    let object = names.try_fold(value, |value, name| value.get_mut(name));
    if let Some(map) = object.and_then(Value::as_object_mut) {
        map.remove(field);
    }
}

/// The resourceVersion as a number. Anything else is no order that can be compared: 0.
pub(super) fn version(object: &Value) -> u64 {
    text(object, "metadata.resourceVersion").parse().unwrap_or(0)
}

/// Equal for values that mean the same to Kubernetes: the order of fields does not count, and a field that
/// says nothing (null, false, 0, empty) is as one that is not there.
pub(super) fn digest(value: &Value) -> u64 {
    let mut hasher = DefaultHasher::new();
    absorb(value, &mut hasher);
    hasher.finish()
}

fn absorb(value: &Value, hasher: &mut DefaultHasher) {
    match value {
        Value::Null => 0_u8.hash(hasher),
        Value::Bool(truth) => (1_u8, truth).hash(hasher),
        Value::Number(number) => (2_u8, number.to_string()).hash(hasher),
        Value::String(text) => (3_u8, text).hash(hasher),
        Value::Array(items) => {
            (4_u8, items.len()).hash(hasher);
            items.iter().for_each(|item| absorb(item, hasher));
        }
        Value::Object(map) => {
            5_u8.hash(hasher);
            let mut fields: Vec<_> = map.iter().filter(|(_, value)| !says_nothing(value)).collect();
            fields.sort_unstable_by_key(|(name, _)| *name);
            for (name, value) in fields {
                name.hash(hasher);
                absorb(value, hasher);
            }
            6_u8.hash(hasher);
        }
    }
}

fn says_nothing(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(truth) => !truth,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(map) => map.values().all(says_nothing),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_field_that_says_nothing_is_as_one_that_is_not_there() {
        let held = json!({"phase": "Running", "containerStatuses": [{"name": "a", "ready": true}]});
        let said = json!({"containerStatuses": [{"restartCount": 0, "ready": true, "name": "a", "lastState": {}}],
            "message": null, "phase": "Running", "podIPs": []});
        assert_eq!(digest(&held), digest(&said));
        assert_ne!(digest(&held), digest(&json!({"phase": "Running"})));
        assert_ne!(digest(&json!(["a", "b"])), digest(&json!(["b", "a"])));
    }

    #[test]
    fn a_path_leads_through_objects_alone() {
        let mut pod = json!({"metadata": {"name": "a", "managedFields": [1]}});
        assert_eq!(text(&pod, "metadata.name"), "a");
        assert_eq!(text(&pod, "metadata.name.first"), "");
        remove(&mut pod, "metadata", "managedFields");
        remove(&mut pod, "status.conditions", "x");
        assert_eq!(pod, json!({"metadata": {"name": "a"}}));
    }
}
