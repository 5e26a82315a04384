//! Objects of built-in kinds in their normal form, as a client reads them whoever wrote them how.
//!
//! Unknown fields go (and are told), wrong types are errors, empty fields that mean nothing are left out and
//! those that are always there are filled in: what a typed server does by decoding and encoding.

use serde_json::{Map, Value, json};

use crate::{
    quantity::Milli,
    schema::{Presence, Scalar, Struct, Type},
};

/// A value is not of its type: as a typed server says it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TypeError(pub(crate) String);

/// Brings an object to its normal form. Returns the paths of fields that its type does not have; they are
/// gone.
pub(crate) fn normalize(ty: &Type, object: &mut Value) -> Result<Vec<String>, TypeError> {
    let mut unknown = Vec::new();
    // `apiVersion` and `kind` belong to every object and to no type.
    let mut version = Vec::new();
    if let Some(map) = object.as_object_mut() {
        for name in ["apiVersion", "kind"] {
            version.extend(map.remove(name).map(|value| (name, value)));
        }
    }
    Walk { unknown: &mut unknown }.value(ty, object, "")?;
    if let Some(map) = object.as_object_mut() {
        map.extend(version.into_iter().map(|(name, value)| (name.to_owned(), value)));
    }
    Ok(unknown)
}

/// What an object of this type is before anything is set.
pub(crate) fn empty(ty: &Type) -> Value {
    let mut object = json!({});
    // Nothing in it can be wrong.
    drop(Walk { unknown: &mut Vec::new() }.value(ty, &mut object, ""));
    object
}

struct Walk<'a> {
    unknown: &'a mut Vec<String>,
}

impl Walk<'_> {
    fn value(&mut self, ty: &Type, value: &mut Value, path: &str) -> Result<(), TypeError> {
        if value.is_null() {
            return Ok(());
        }
        match ty {
            Type::Any => Ok(()),
            Type::Scalar(scalar) => normal_scalar(*scalar, value, path),
            Type::Struct(of) => {
                let Some(map) = value.as_object_mut() else { return Err(wrong(value, "an object", path)) };
                self.fields(of, map, path)
            }
            Type::Map { of, .. } => {
                let Some(map) = value.as_object_mut() else { return Err(wrong(value, "a map", path)) };
                if matches!(**of, Type::Scalar(Scalar::Text)) {
                    // A null text is an empty one.
                    map.values_mut().filter(|value| value.is_null()).for_each(|value| *value = json!(""));
                }
                map.retain(|_, value| !value.is_null());
                for (key, value) in map {
                    self.value(of, value, &join(path, key))?;
                }
                Ok(())
            }
            Type::List { of, .. } => {
                let Some(list) = value.as_array_mut() else { return Err(wrong(value, "a list", path)) };
                for (index, value) in list.iter_mut().enumerate() {
                    if value.is_null() {
                        *value = zero(of);
                    }
                    self.value(of, value, &format!("{path}[{index}]"))?;
                }
                Ok(())
            }
        }
    }

    fn fields(&mut self, of: &Struct, map: &mut Map<String, Value>, path: &str) -> Result<(), TypeError> {
        if !of.open {
            let unknown = map.keys().filter(|name| !of.fields.contains_key(*name));
            let unknown: Vec<String> = unknown.cloned().collect();
            for name in unknown {
                map.remove(&name);
                self.unknown.push(join(path, &name));
            }
        }
        for (name, field) in &of.fields {
            if map.get(name).is_none_or(Value::is_null) {
                match field.presence {
                    Presence::Always => {
                        map.insert(name.clone(), zero(&field.ty));
                    }
                    Presence::Omit | Presence::Keep => {
                        map.remove(name);
                        continue;
                    }
                }
            }
            let Some(value) = map.get_mut(name) else { continue };
            self.value(&field.ty, value, &join(path, name))?;
            if field.presence == Presence::Omit && is_empty(value) {
                map.remove(name);
            }
        }
        Ok(())
    }
}

fn normal_scalar(scalar: Scalar, value: &mut Value, path: &str) -> Result<(), TypeError> {
    match (scalar, &*value) {
        (Scalar::Text, Value::String(_))
        | (Scalar::Bool, Value::Bool(_))
        | (Scalar::Number, Value::Number(_)) => Ok(()),
        (Scalar::Int32, Value::Number(number)) => {
            let fits = whole(number).is_some_and(|number| i32::try_from(number).is_ok());
            settle(value, fits, "int32", path)
        }
        (Scalar::Int64, Value::Number(number)) => {
            let fits = whole(number).is_some();
            settle(value, fits, "int64", path)
        }
        (Scalar::IntOrString, Value::String(_)) => Ok(()),
        (Scalar::IntOrString, Value::Number(number)) => {
            let fits = whole(number).is_some_and(|number| i32::try_from(number).is_ok());
            settle(value, fits, "intstr.IntOrString", path)
        }
        (Scalar::Time | Scalar::MicroTime, Value::String(text)) => {
            if text.is_empty() {
                *value = Value::Null;
                return Ok(());
            }
            let micros = scalar == Scalar::MicroTime;
            let normal = crate::clock::normalized(text, micros);
            *value = json!(
                normal.ok_or_else(|| TypeError(format!("{path}: parsing time {text:?}: not RFC 3339")))?
            );
            Ok(())
        }
        (Scalar::Quantity, Value::String(text)) if Milli::parse(text).is_some() => Ok(()),
        (Scalar::Quantity, Value::Number(number)) => {
            *value = json!(number.to_string());
            Ok(())
        }
        (Scalar::Quantity, _) => {
            let pattern = "^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$";
            Err(TypeError(format!("{path}: quantities must match the regular expression '{pattern}'")))
        }
        (Scalar::Bytes, Value::String(text)) => {
            use base64::Engine as _;
            match base64::engine::general_purpose::STANDARD.decode(text) {
                Ok(_) => Ok(()),
                Err(error) => Err(TypeError(format!("{path}: illegal base64 data: {error}"))),
            }
        }
        _ => Err(wrong(
            value,
            match scalar {
                Scalar::Int32 | Scalar::Int64 | Scalar::Number => "a number",
                Scalar::Bool => "bool",
                _ => "string",
            },
            path,
        )),
    }
}

/// The whole number that this is, written with a fraction of zero or not.
fn whole(number: &serde_json::Number) -> Option<i64> {
    let truncated = || {
        let float = number.as_f64().filter(|float| float.fract() == 0.0 && float.abs() < 9e15)?;
        #[allow(clippy::cast_possible_truncation)] // just compared
        Some(float as i64)
    };
    number.as_i64().or_else(truncated)
}

fn settle(value: &mut Value, fits: bool, ty: &str, path: &str) -> Result<(), TypeError> {
    if !fits {
        let message =
            format!("json: cannot unmarshal number {value} into Go struct field {path} of type {ty}");
        return Err(TypeError(message));
    }
    if let Value::Number(number) = &*value
        && !number.is_i64()
        && let Some(number) = whole(number)
    {
        *value = json!(number);
    }
    Ok(())
}

fn wrong(value: &Value, wanted: &str, path: &str) -> TypeError {
    let found = match value {
        Value::Null => "null",
        Value::Bool(_) => "bool",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    };
    TypeError(format!("json: cannot unmarshal {found} into Go struct field {path} of type {wanted}"))
}

/// What a field that is always there holds when nothing was set.
fn zero(ty: &Type) -> Value {
    match ty {
        Type::Struct(_) => json!({}),
        Type::Scalar(Scalar::Text | Scalar::Bytes) => json!(""),
        Type::Scalar(Scalar::Int32 | Scalar::Int64 | Scalar::Number | Scalar::IntOrString) => json!(0),
        Type::Scalar(Scalar::Bool) => json!(false),
        Type::Scalar(Scalar::Quantity) => json!("0"),
        Type::Scalar(Scalar::Time | Scalar::MicroTime) | Type::Any | Type::Map { .. } | Type::List { .. } => {
            Value::Null
        }
    }
}

/// Whether nothing is left of a field that is left out when empty. (A struct never is.)
fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(truth) => !truth,
        Value::Number(number) => number.as_i64() == Some(0),
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
    }
}

fn join(path: &str, name: &str) -> String {
    if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schema::built_in;

    #[test]
    fn what_is_empty_goes_and_what_is_unknown_is_told() {
        let mut map = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a", "x": 1}, "data": {}, "foo": 1});
        let unknown = normalize(&built_in("ConfigMap"), &mut map).unwrap();
        assert_eq!(unknown, ["foo", "metadata.x"]);
        assert_eq!(map, json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a"}}));
    }

    #[test]
    fn an_empty_object_has_what_is_always_there() {
        let node = empty(&built_in("Node"));
        assert_eq!(node["status"]["daemonEndpoints"], json!({"kubeletEndpoint": {"Port": 0}}));
        assert_eq!(empty(&built_in("PodSpec")), json!({"containers": null}));
    }

    #[test]
    fn a_wrong_type_is_an_error_and_a_zero_that_means_something_stays() {
        let mut wrong = json!({"spec": {"replicas": "3"}});
        assert!(normalize(&built_in("Deployment"), &mut wrong).is_err());
        let mut zero = json!({"spec": {"replicas": 0, "paused": false}});
        normalize(&built_in("Deployment"), &mut zero).unwrap();
        assert_eq!(zero["spec"]["replicas"], json!(0));
        assert!(zero["spec"].get("paused").is_none());
    }
}
