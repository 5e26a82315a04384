//! Reading JSON and YAML of others, bounded before anything is allocated, and small helpers for values.

use serde_json::{Map, Value, json};

use crate::limits;

/// Why a body is not an object.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ReadError {
    /// It is nested deeper than [`limits::DEPTH_MAX`].
    #[error("nested deeper than {} levels", limits::DEPTH_MAX)]
    Depth,
    /// It has more values than [`limits::VALUES_MAX`].
    #[error("more than {} values", limits::VALUES_MAX)]
    Values,
    /// It is not JSON.
    #[error("json parse error: {0}")]
    Json(String),
    /// It is not YAML.
    #[error("yaml parse error: {0}")]
    Yaml(String),
}

/// Reads one JSON value.
pub(crate) fn read(bytes: &[u8]) -> Result<Value, ReadError> {
    check_shape(bytes)?;
    serde_json::from_slice(bytes).map_err(|error| {
        ReadError::Json(match error.classify() {
            serde_json::error::Category::Eof => "unexpected end of JSON input".to_owned(),
            _ => error.to_string(),
        })
    })
}

/// Reads one YAML document; JSON is YAML too.
pub(crate) fn read_yaml(bytes: &[u8]) -> Result<Value, ReadError> {
    let start = bytes.iter().find(|byte| !byte.is_ascii_whitespace());
    if start == Some(&b'{') {
        return read(bytes);
    }
    let text = std::str::from_utf8(bytes).map_err(|error| ReadError::Yaml(error.to_string()))?;
    let options = serde_saphyr::options! {
        budget: serde_saphyr::budget! { max_depth: limits::DEPTH_MAX, max_nodes: limits::VALUES_MAX },
    };
    serde_saphyr::from_str_with_options(text, options).map_err(|error| ReadError::Yaml(error.to_string()))
}

/// Counts levels and values without keeping anything: a few bytes of input cost a hundred once parsed.
fn check_shape(bytes: &[u8]) -> Result<(), ReadError> {
    let (mut depth, mut values, mut in_text, mut escaped) = (0_usize, 1_usize, false, false);
    for byte in bytes {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_text => escaped = true,
            b'"' => in_text = !in_text,
            _ if in_text => {}
            b'[' | b'{' => {
                depth += 1;
                values += 1;
            }
            b']' | b'}' => depth = depth.saturating_sub(1),
            b',' => values += 1,
            _ => {}
        }
        if depth > limits::DEPTH_MAX {
            return Err(ReadError::Depth);
        }
        if values > limits::VALUES_MAX {
            return Err(ReadError::Values);
        }
    }
    Ok(())
}

/// What stands at a path of fields: `spec.template`.
pub(crate) fn at<'a>(value: &'a Value, path: &str) -> Option<&'a Value> {
    path.split('.').try_fold(value, |value, name| value.get(name))
}

/// The text at a path of fields; empty if there is none.
pub(crate) fn text<'a>(value: &'a Value, path: &str) -> &'a str {
    at(value, path).and_then(Value::as_str).unwrap_or_default()
}

/// The whole number at a path of fields; 0 if there is none.
pub(crate) fn int(value: &Value, path: &str) -> i64 {
    at(value, path).and_then(Value::as_i64).unwrap_or(0)
}

/// The truth at a path of fields; false if there is none.
pub(crate) fn truth(value: &Value, path: &str) -> bool {
    at(value, path).and_then(Value::as_bool).unwrap_or(false)
}

/// The list at a path of fields; empty if there is none.
pub(crate) fn list<'a>(value: &'a Value, path: &str) -> &'a [Value] {
    at(value, path).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

/// The map at a path of fields.
pub(crate) fn map<'a>(value: &'a Value, path: &str) -> Option<&'a Map<String, Value>> {
    at(value, path).and_then(Value::as_object)
}

/// The map at a path of fields, made if something else or nothing is there.
pub(crate) fn map_mut<'a>(value: &'a mut Value, path: &str) -> &'a mut Map<String, Value> {
    let names = path.split('.').filter(|name| !name.is_empty());
    let found = names.fold(value, |value, name| as_map(value).entry(name).or_insert(Value::Null));
    as_map(found)
}

/// Sets what stands at a path of fields, making the way there.
pub(crate) fn set(value: &mut Value, path: &str, to: impl Into<Value>) {
    let (way, last) = path.rsplit_once('.').unwrap_or(("", path));
    map_mut(value, way).insert(last.to_owned(), to.into());
}

/// Sets it where nothing is.
pub(crate) fn default(value: &mut Value, path: &str, to: impl Into<Value>) {
    let (way, last) = path.rsplit_once('.').unwrap_or(("", path));
    let held = map_mut(value, way).entry(last).or_insert(Value::Null);
    if held.is_null() {
        *held = to.into();
    }
}

/// Takes away what stands at a path of fields.
pub(crate) fn remove(value: &mut Value, path: &str) -> Option<Value> {
    let (way, last) = path.rsplit_once('.').unwrap_or(("", path));
    let within =
        way.split('.').filter(|name| !name.is_empty()).try_fold(value, |value, name| value.get_mut(name));
    within?.as_object_mut()?.remove(last)
}

fn as_map(value: &mut Value) -> &mut Map<String, Value> {
    if !value.is_object() {
        *value = json!({});
    }
    value.as_object_mut().expect("was made one")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nesting_and_number_of_values_are_bounded_before_they_are_parsed() {
        let deep = "[".repeat(limits::DEPTH_MAX + 1);
        assert_eq!(read(deep.as_bytes()), Err(ReadError::Depth));
        let many = format!("[{}0]", "0,".repeat(limits::VALUES_MAX));
        assert_eq!(read(many.as_bytes()), Err(ReadError::Values));
        assert_eq!(read(br#"{"a":"[[[,,,\"[["}"#), Ok(json!({"a": "[[[,,,\"[["})));
    }

    #[test]
    fn yaml_is_read_as_json_is() {
        let wanted = json!({"a": [1, "x", true, null], "b": {"c": "1"}});
        assert_eq!(read_yaml(b"a:\n- 1\n- x\n- true\n- null\nb: {c: '1'}\n"), Ok(wanted.clone()));
        assert_eq!(read_yaml(wanted.to_string().as_bytes()), Ok(wanted));
        let bomb = "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b]\n\
                    d: &d [*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d]\nf: [*e,*e,*e,*e,*e,*e,*e,*e]\n\
                    g: [*e,*e,*e,*e,*e,*e,*e,*e]\n";
        assert!(read_yaml(bomb.as_bytes()).is_err());
    }
}
