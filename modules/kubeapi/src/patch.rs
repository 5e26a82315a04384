//! The patches that name what to change: JSON patch, merge patch and strategic merge patch. (Server-side
//! apply, which names what is wanted, is in [`managed`](crate::managed).)

mod json_patch;
#[cfg(test)]
mod properties;
mod strategic;

pub(crate) use self::{json_patch::json_patch, strategic::strategic_patch};

use serde_json::{Map, Value};

/// Why a patch cannot be applied.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum PatchError {
    /// It is not a patch of its kind.
    #[error("{0}")]
    Malformed(String),
    /// It does not fit the object.
    #[error("the server rejected our request due to an error in our request")]
    Unfit,
}

/// RFC 7386.
pub(crate) fn merge_patch(value: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        *value = patch.clone();
        return;
    };
    if !value.is_object() {
        *value = Value::Object(Map::new());
    }
    let Some(map) = value.as_object_mut() else { return };
    for (name, change) in patch {
        if change.is_null() {
            map.remove(name);
        } else {
            merge_patch(map.entry(name.clone()).or_insert(Value::Null), change);
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn null_removes_and_everything_else_is_laid_over() {
        let mut value = json!({"a": {"b": 1, "c": 2}, "d": [1]});
        merge_patch(&mut value, &json!({"a": {"b": null, "e": {"f": null}}, "d": [2]}));
        assert_eq!(value, json!({"a": {"c": 2, "e": {}}, "d": [2]}));
    }
}
