//! RFC 6902. Operations that would copy without bound are bounded by the size of what they make.

use serde_json::Value;

use super::PatchError;
use crate::limits;

/// Applies all operations or says why one cannot be; the value is then in any state.
pub(crate) fn json_patch(value: &mut Value, patch: &Value) -> Result<(), PatchError> {
    let malformed = |what: &str| PatchError::Malformed(what.to_owned());
    let operations = patch.as_array().ok_or_else(|| malformed("a JSON patch is a list of operations"))?;
    if operations.len() > limits::PATCH_OPS_MAX {
        let most = limits::PATCH_OPS_MAX;
        return Err(PatchError::Malformed(format!(
            "The allowed maximum operations in a JSON patch is {most}"
        )));
    }
    let mut copied = 0;
    for operation in operations {
        let text = |name: &str| operation.get(name).and_then(Value::as_str);
        let path = pointer(text("path").ok_or_else(|| malformed("an operation without a path"))?)?;
        let from = || pointer(text("from").ok_or_else(|| malformed("an operation without from"))?);
        let given =
            || operation.get("value").cloned().ok_or_else(|| malformed("an operation without a value"));
        match text("op") {
            Some("add") => add(value, &path, given()?)?,
            Some("remove") => drop(remove(value, &path)?),
            Some("replace") => *find_mut(value, &path)? = given()?,
            Some("move") => {
                let from = from()?;
                if path.len() > from.len() && path.starts_with(&from) {
                    return Err(PatchError::Unfit);
                }
                let moved = remove(value, &from)?;
                add(value, &path, moved)?;
            }
            Some("copy") => {
                let copy = find_mut(value, &from()?)?.clone();
                copied += size(&copy);
                if copied > limits::OBJECT_MAX {
                    return Err(PatchError::Unfit);
                }
                add(value, &path, copy)?;
            }
            Some("test") => {
                // Absent and null are the same to a test, as they are to the server's decoder.
                let found = find_mut(value, &path).map_or(Value::Null, |found| found.clone());
                if found != operation.get("value").cloned().unwrap_or(Value::Null) {
                    return Err(PatchError::Unfit);
                }
            }
            _ => {
                return Err(malformed("an operation that is none of add, remove, replace, move, copy, test"));
            }
        }
    }
    Ok(())
}

fn pointer(text: &str) -> Result<Vec<String>, PatchError> {
    if text.is_empty() {
        return Ok(Vec::new());
    }
    let rest = text
        .strip_prefix('/')
        .ok_or_else(|| PatchError::Malformed(format!("a path begins with a slash: {text}")))?;
    Ok(rest.split('/').map(|step| step.replace("~1", "/").replace("~0", "~")).collect())
}

fn find_mut<'a>(value: &'a mut Value, path: &[String]) -> Result<&'a mut Value, PatchError> {
    path.iter().try_fold(value, |value, step| {
        match value {
            Value::Object(map) => map.get_mut(step),
            Value::Array(list) => index(step).and_then(|index| list.get_mut(index)),
            _ => None,
        }
        .ok_or(PatchError::Unfit)
    })
}

fn add(value: &mut Value, path: &[String], new: Value) -> Result<(), PatchError> {
    let Some((last, way)) = path.split_last() else {
        *value = new;
        return Ok(());
    };
    match find_mut(value, way)? {
        Value::Object(map) => drop(map.insert(last.clone(), new)),
        Value::Array(list) => {
            let at = if last == "-" { list.len() } else { index(last).ok_or(PatchError::Unfit)? };
            if at > list.len() {
                return Err(PatchError::Unfit);
            }
            list.insert(at, new);
        }
        _ => return Err(PatchError::Unfit),
    }
    Ok(())
}

fn remove(value: &mut Value, path: &[String]) -> Result<Value, PatchError> {
    let (last, way) = path.split_last().ok_or(PatchError::Unfit)?;
    match find_mut(value, way)? {
        Value::Object(map) => map.remove(last).ok_or(PatchError::Unfit),
        Value::Array(list) => match index(last) {
            Some(index) if index < list.len() => Ok(list.remove(index)),
            _ => Err(PatchError::Unfit),
        },
        _ => Err(PatchError::Unfit),
    }
}

fn index(step: &str) -> Option<usize> {
    let plain = step == "0" || !step.starts_with(['0', '+']);
    step.parse().ok().filter(|_| plain)
}

fn size(value: &Value) -> usize {
    match value {
        Value::Array(list) => 32 + list.iter().map(size).sum::<usize>(),
        Value::Object(map) => 32 + map.iter().map(|(name, value)| name.len() + size(value)).sum::<usize>(),
        Value::String(text) => 32 + text.len(),
        _ => 32,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn patched(value: Value, patch: &Value) -> Result<Value, PatchError> {
        let mut value = value;
        json_patch(&mut value, patch).map(|()| value)
    }

    #[test]
    fn each_operation_does_what_the_standard_says() {
        let value = || json!({"a": {"b~/c": 1}, "l": [1, 2]});
        let check = |patch: Value, wanted: Value| assert_eq!(patched(value(), &patch), Ok(wanted));
        check(json!([{"op": "add", "path": "/l/1", "value": 9}]), json!({"a": {"b~/c": 1}, "l": [1, 9, 2]}));
        check(json!([{"op": "add", "path": "/l/-", "value": 9}]), json!({"a": {"b~/c": 1}, "l": [1, 2, 9]}));
        check(json!([{"op": "remove", "path": "/a/b~0~1c"}]), json!({"a": {}, "l": [1, 2]}));
        check(
            json!([{"op": "move", "from": "/l/0", "path": "/x"}]),
            json!({"a": {"b~/c": 1}, "l": [2], "x": 1}),
        );
        check(json!([{"op": "copy", "from": "/l", "path": "/a"}]), json!({"a": [1, 2], "l": [1, 2]}));
        check(json!([{"op": "replace", "path": "", "value": 1}]), json!(1));
        for unfit in [
            json!([{"op": "test", "path": "/l/0", "value": 2}]),
            json!([{"op": "remove", "path": "/none"}]),
            json!([{"op": "replace", "path": "/l/01", "value": 2}]),
            json!([{"op": "add", "path": "/l/7", "value": 2}]),
            json!([{"op": "move", "from": "/a", "path": "/a/x"}]),
        ] {
            assert_eq!(patched(value(), &unfit), Err(PatchError::Unfit), "{unfit}");
        }
    }

    #[test]
    fn copies_of_copies_are_bounded() {
        let mut patch = vec![json!({"op": "add", "path": "/a", "value": "x".repeat(10_000)})];
        patch.extend((0..40).map(|n| json!({"op": "copy", "from": "", "path": format!("/c{n}")})));
        assert_eq!(patched(json!({}), &Value::Array(patch)), Err(PatchError::Unfit));
    }
}
