//! Structural schemas: pruning, defaulting, validation, and the type that apply merges by.

use std::{collections::BTreeMap, sync::Arc};

use regex::Regex;
use serde_json::{Map, Value, json};

use crate::{
    json,
    schema::{Field, Merge, Presence, Scalar, Struct, Type, built_in},
    status::Cause,
};

/// One level of a structural schema.
#[derive(Debug, Default)]
pub(crate) struct Schema {
    ty: Option<Kind>,
    /// Fields that it does not name stay.
    pub(crate) keep_unknown: bool,
    int_or_string: bool,
    embedded: bool,
    nullable: bool,
    properties: BTreeMap<String, Self>,
    additional: Option<Box<Self>>,
    items: Option<Box<Self>>,
    merge: Option<Merge>,
    atomic_map: bool,
    default: Option<Value>,
    rules: Rules,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Object,
    Array,
    Text,
    Integer,
    Number,
    Bool,
}

/// What a value must be besides being of its type.
#[derive(Debug, Default)]
struct Rules {
    required: Vec<String>,
    choices: Option<Vec<Value>>,
    pattern: Option<(String, Regex)>,
    format: String,
    minimum: Option<(f64, bool)>,
    maximum: Option<(f64, bool)>,
    multiple_of: Option<f64>,
    lengths: (Option<u64>, Option<u64>),
    counts: (Option<u64>, Option<u64>),
    properties: (Option<u64>, Option<u64>),
    unique: bool,
    all_of: Vec<Schema>,
    any_of: Vec<Schema>,
    one_of: Vec<Schema>,
    not: Option<Box<Schema>>,
}

/// A schema is not structural.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{path}: {what}")]
pub(crate) struct SchemaError {
    pub(crate) path: String,
    pub(crate) what: String,
}

impl Schema {
    /// Reads an `openAPIV3Schema`.
    pub(crate) fn read(given: &Value) -> Result<Self, SchemaError> {
        let mut schema = read(given, "", false)?;
        if schema.ty.is_none() {
            schema.ty = Some(Kind::Object);
        }
        Ok(schema)
    }

    /// A schema that permits everything.
    pub(crate) fn open() -> Self {
        Self { ty: Some(Kind::Object), keep_unknown: true, ..Self::default() }
    }

    /// The type by which objects are merged.
    pub(crate) fn object_type(&self) -> Struct {
        let mut of = self.struct_type();
        of.fields.insert("metadata".to_owned(), field(built_in("ObjectMeta")));
        of.fields.remove("apiVersion");
        of.fields.remove("kind");
        of
    }

    fn struct_type(&self) -> Struct {
        let fields = self.properties.iter().map(|(name, schema)| (name.clone(), field(schema.merge_type())));
        Struct { open: true, atomic: self.atomic_map, fields: fields.collect(), ..Struct::default() }
    }

    fn merge_type(&self) -> Type {
        if self.int_or_string {
            return Type::Scalar(Scalar::IntOrString);
        }
        match self.ty {
            Some(Kind::Object) => match &self.additional {
                Some(of) if self.properties.is_empty() => {
                    Type::Map { of: Box::new(of.merge_type()), atomic: self.atomic_map }
                }
                _ if self.properties.is_empty() && !self.atomic_map => Type::Any,
                _ => Type::Struct(Arc::new(self.struct_type())),
            },
            Some(Kind::Array) => {
                let of = self.items.as_ref().map_or(Type::Any, |items| items.merge_type());
                Type::List { of: Box::new(of), merge: self.merge.clone().unwrap_or(Merge::Atomic) }
            }
            Some(Kind::Text) => Type::Scalar(Scalar::Text),
            Some(Kind::Integer) => Type::Scalar(Scalar::Int64),
            Some(Kind::Number) => Type::Scalar(Scalar::Number),
            Some(Kind::Bool) => Type::Scalar(Scalar::Bool),
            None => Type::Any,
        }
    }

    /// Takes away what the schema does not have. Returns the paths.
    pub(crate) fn prune(&self, object: &mut Value) -> Vec<String> {
        let mut gone = Vec::new();
        self.prune_at(object, "", true, &mut gone);
        gone
    }

    fn prune_at(&self, value: &mut Value, path: &str, is_object: bool, gone: &mut Vec<String>) {
        match value {
            Value::Object(map) => {
                if !self.keep_unknown && self.additional.is_none() && !self.int_or_string {
                    let kept = |name: &String| {
                        self.properties.contains_key(name)
                            || is_object && ["apiVersion", "kind", "metadata"].contains(&name.as_str())
                    };
                    let unknown: Vec<String> = map.keys().filter(|name| !kept(name)).cloned().collect();
                    for name in unknown {
                        map.remove(&name);
                        gone.push(join(path, &name));
                    }
                }
                for (name, value) in map {
                    if is_object && name == "metadata" {
                        continue;
                    }
                    if let Some(schema) = self.properties.get(name).or(self.additional.as_deref()) {
                        schema.prune_at(value, &join(path, name), schema.embedded, gone);
                    }
                }
            }
            Value::Array(list) => {
                for (index, value) in list.iter_mut().enumerate() {
                    if let Some(items) = &self.items {
                        items.prune_at(value, &format!("{path}[{index}]"), items.embedded, gone);
                    }
                }
            }
            _ => {}
        }
    }

    /// Fills in defaults.
    pub(crate) fn fill(&self, value: &mut Value) {
        match value {
            Value::Object(map) => {
                for (name, schema) in &self.properties {
                    let held = map.get(name);
                    let missing = held.is_none() || held.is_some_and(Value::is_null) && !schema.nullable;
                    match &schema.default {
                        Some(default) if missing => drop(map.insert(name.clone(), default.clone())),
                        _ => {}
                    }
                    if let Some(value) = map.get_mut(name) {
                        schema.fill(value);
                    }
                }
                if let Some(additional) = &self.additional {
                    let rest = map.iter_mut().filter(|(name, _)| !self.properties.contains_key(*name));
                    rest.for_each(|(_, value)| additional.fill(value));
                }
            }
            Value::Array(list) => {
                if let Some(items) = &self.items {
                    list.iter_mut().for_each(|value| items.fill(value));
                }
            }
            _ => {}
        }
    }

    /// What is wrong with an object.
    pub(crate) fn validate(&self, object: &Value) -> Vec<Cause> {
        let mut causes = Vec::new();
        self.check(object, "", &mut causes);
        causes
    }

    fn check(&self, value: &Value, path: &str, causes: &mut Vec<Cause>) {
        if value.is_null() && (self.nullable || self.ty.is_none()) {
            return;
        }
        if let Some(wanted) = self.wrong_type(value) {
            let why = format!("{} in body must be of type {wanted}: {:?}", shown(path), type_name(value));
            causes.push(Cause::type_invalid(path, &quoted(value), &why));
            return;
        }
        self.rules.check(value, path, causes);
        match value {
            Value::Object(map) => {
                for name in &self.rules.required {
                    if !map.contains_key(name) {
                        causes.push(Cause::required(join(path, name), ""));
                    }
                }
                for (name, value) in map {
                    if let Some(schema) = self.properties.get(name).or(self.additional.as_deref()) {
                        schema.check(value, &join(path, name), causes);
                    }
                }
            }
            Value::Array(list) => {
                for (index, value) in list.iter().enumerate() {
                    if let Some(items) = &self.items {
                        items.check(value, &format!("{path}[{index}]"), causes);
                    }
                }
                self.check_list(list, path, causes);
            }
            _ => {}
        }
    }

    fn check_list(&self, list: &[Value], path: &str, causes: &mut Vec<Cause>) {
        let name = |value: &Value| match &self.merge {
            Some(Merge::Keys(keys)) => {
                Some(keys.iter().map(|key| value.get(key).cloned()).collect::<Vec<_>>())
            }
            Some(Merge::Set) => Some(vec![Some(value.clone())]),
            _ => None,
        };
        for (index, value) in list.iter().enumerate() {
            let own = name(value);
            if own.is_some() && list[..index].iter().any(|before| name(before) == own) {
                causes.push(Cause::duplicate(format!("{path}[{index}]"), value));
            }
        }
    }

    fn wrong_type(&self, value: &Value) -> Option<&'static str> {
        if self.int_or_string {
            let right = value.is_string() || value.is_i64() || value.is_u64();
            return (!right).then_some("integer,string");
        }
        let right = match self.ty? {
            Kind::Object => value.is_object(),
            Kind::Array => value.is_array(),
            Kind::Text => value.is_string(),
            Kind::Integer => {
                value.is_i64() || value.is_u64() || value.as_f64().is_some_and(|float| float.fract() == 0.0)
            }
            Kind::Number => value.is_number(),
            Kind::Bool => value.is_boolean(),
        };
        if right {
            return None;
        }
        Some(match self.ty? {
            Kind::Array => "array",
            Kind::Text => "string",
            Kind::Integer => "integer",
            Kind::Number => "number",
            Kind::Bool => "boolean",
            Kind::Object => "object",
        })
    }

    fn accepts(&self, value: &Value) -> bool {
        let mut causes = Vec::new();
        self.check(value, "", &mut causes);
        causes.is_empty()
    }
}

impl Rules {
    fn check(&self, value: &Value, path: &str, causes: &mut Vec<Cause>) {
        let name = shown(path);
        let mut say = |why: String| causes.push(Cause::invalid(path, value, &why));
        if let Some(choices) = &self.choices
            && !choices.contains(value)
        {
            let listed: Vec<String> = choices.iter().map(Value::to_string).collect();
            let message = format!("Unsupported value: {value}: supported values: {}", listed.join(", "));
            causes.push(Cause { reason: "FieldValueNotSupported", message, field: path.to_owned() });
            return;
        }
        if let Some(number) = value.as_f64() {
            let (low, high) = (self.minimum, self.maximum);
            if let Some((least, exclusive)) =
                low.filter(|(least, x)| number < *least || *x && number <= *least)
            {
                let or = if exclusive { "greater than" } else { "greater than or equal to" };
                say(format!("{name} in body should be {or} {least}"));
            }
            if let Some((most, exclusive)) = high.filter(|(most, x)| number > *most || *x && number >= *most)
            {
                let or = if exclusive { "less than" } else { "less than or equal to" };
                say(format!("{name} in body should be {or} {most}"));
            }
            if let Some(of) = self.multiple_of.filter(|of| (number / of).fract() != 0.0) {
                say(format!("{name} in body should be a multiple of {of}"));
            }
        }
        if let Some(text) = value.as_str() {
            let length = text.chars().count() as u64;
            if let Some(least) = self.lengths.0.filter(|least| length < *least) {
                say(format!("{name} in body should be at least {least} chars long"));
            }
            if let Some(most) = self.lengths.1.filter(|most| length > *most) {
                say(format!("{name} in body should be at most {most} chars long"));
            }
            if let Some((pattern, _)) = self.pattern.as_ref().filter(|(_, regex)| !regex.is_match(text)) {
                say(format!("{name} in body should match '{pattern}'"));
            }
            if self.format == "date-time" && crate::clock::parse(text).is_none() {
                say(format!("{name} in body must be of type date-time: \"{text}\""));
            }
        }
        if let Some(list) = value.as_array() {
            let count = list.len() as u64;
            if let Some(least) = self.counts.0.filter(|least| count < *least) {
                say(format!("{name} in body should have at least {least} items"));
            }
            if let Some(most) = self.counts.1.filter(|most| count > *most) {
                say(format!("{name} in body should have at most {most} items"));
            }
            if self.unique && (1..list.len()).any(|index| list[..index].contains(&list[index])) {
                say(format!("{name} in body shouldn't contain duplicates"));
            }
        }
        if let Some(map) = value.as_object() {
            let count = map.len() as u64;
            if let Some(least) = self.properties.0.filter(|least| count < *least) {
                say(format!("{name} in body should have at least {least} properties"));
            }
            if let Some(most) = self.properties.1.filter(|most| count > *most) {
                say(format!("{name} in body should have at most {most} properties"));
            }
        }
        for schema in &self.all_of {
            schema.check(value, path, causes);
        }
        let mut say = |why: String| causes.push(Cause::invalid(path, value, &why));
        if !self.any_of.is_empty() && !self.any_of.iter().any(|schema| schema.accepts(value)) {
            say(format!("{name} in body must validate at least one schema (anyOf)"));
        }
        if !self.one_of.is_empty() && self.one_of.iter().filter(|schema| schema.accepts(value)).count() != 1 {
            say(format!("{name} in body must validate one and only one schema (oneOf)"));
        }
        if self.not.as_ref().is_some_and(|schema| schema.accepts(value)) {
            say(format!("{name} in body must not validate the schema (not)"));
        }
    }
}

fn read(given: &Value, path: &str, within_rule: bool) -> Result<Schema, SchemaError> {
    let error = |what: &str| SchemaError {
        path: format!("spec.validation.openAPIV3Schema{path}"),
        what: what.to_owned(),
    };
    let Some(map) = given.as_object() else { return Err(error("a schema is an object")) };
    let flag = |name: &str| map.get(name).and_then(Value::as_bool).unwrap_or(false);
    let number = |name: &str| map.get(name).and_then(Value::as_f64);
    let count = |name: &str| map.get(name).and_then(Value::as_u64);
    let mut schema = Schema {
        keep_unknown: flag("x-kubernetes-preserve-unknown-fields"),
        int_or_string: flag("x-kubernetes-int-or-string"),
        embedded: flag("x-kubernetes-embedded-resource"),
        nullable: flag("nullable"),
        default: map.get("default").cloned(),
        ..Schema::default()
    };
    schema.ty = match map.get("type").and_then(Value::as_str) {
        Some("object") => Some(Kind::Object),
        Some("array") => Some(Kind::Array),
        Some("string") => Some(Kind::Text),
        Some("integer") => Some(Kind::Integer),
        Some("number") => Some(Kind::Number),
        Some("boolean") => Some(Kind::Bool),
        None | Some("") => None,
        Some(other) => return Err(error(&format!("Unsupported value: \"{other}\""))),
    };
    if schema.ty.is_none()
        && !schema.keep_unknown
        && !schema.int_or_string
        && !within_rule
        && !path.is_empty()
    {
        return Err(error("Required value: must not be empty for specified object fields"));
    }
    for (name, below) in json::map(given, "properties").into_iter().flatten() {
        let below = read(below, &format!("{path}.properties[{name}]"), within_rule)?;
        schema.properties.insert(name.clone(), below);
    }
    schema.additional = match map.get("additionalProperties") {
        Some(Value::Bool(true)) => Some(Box::new(Schema { keep_unknown: true, ..Schema::default() })),
        Some(below @ Value::Object(_)) => {
            Some(Box::new(read(below, &format!("{path}.additionalProperties"), within_rule)?))
        }
        _ => None,
    };
    if let Some(items) = map.get("items") {
        schema.items = Some(Box::new(read(items, &format!("{path}.items"), within_rule)?));
    }
    if schema.ty == Some(Kind::Array) && schema.items.is_none() && !within_rule {
        return Err(error("Required value: must be specified"));
    }
    schema.merge = match map.get("x-kubernetes-list-type").and_then(Value::as_str) {
        Some("map") => {
            let keys = json::list(given, "x-kubernetes-list-map-keys").iter().filter_map(Value::as_str);
            Some(Merge::Keys(keys.map(str::to_owned).collect()))
        }
        Some("set") => Some(Merge::Set),
        _ => None,
    };
    schema.atomic_map = map.get("x-kubernetes-map-type").and_then(Value::as_str) == Some("atomic");
    let pattern = map.get("pattern").and_then(Value::as_str).map(|text| {
        let regex = regex::RegexBuilder::new(text).size_limit(1 << 20).build();
        regex.map(|regex| (text.to_owned(), regex)).map_err(|_| error("the pattern is no regular expression"))
    });
    let list = |name: &str| -> Result<Vec<Schema>, SchemaError> {
        let below = json::list(given, name).iter().enumerate();
        below.map(|(index, below)| read(below, &format!("{path}.{name}[{index}]"), true)).collect()
    };
    schema.rules = Rules {
        required: json::list(given, "required").iter().filter_map(Value::as_str).map(str::to_owned).collect(),
        choices: map.get("enum").and_then(Value::as_array).cloned(),
        pattern: pattern.transpose()?,
        format: json::text(given, "format").to_owned(),
        minimum: number("minimum").map(|least| (least, flag("exclusiveMinimum"))),
        maximum: number("maximum").map(|most| (most, flag("exclusiveMaximum"))),
        multiple_of: number("multipleOf").filter(|of| *of != 0.0),
        lengths: (count("minLength"), count("maxLength")),
        counts: (count("minItems"), count("maxItems")),
        properties: (count("minProperties"), count("maxProperties")),
        unique: flag("uniqueItems"),
        all_of: list("allOf")?,
        any_of: list("anyOf")?,
        one_of: list("oneOf")?,
        not: map.get("not").map(|below| read(below, &format!("{path}.not"), true)).transpose()?.map(Box::new),
    };
    Ok(schema)
}

fn field(ty: Type) -> Field {
    Field { ty, presence: Presence::Keep, doc: String::new() }
}

fn join(path: &str, name: &str) -> String {
    if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") }
}

fn shown(path: &str) -> &str {
    if path.is_empty() { "<nil>" } else { path }
}

fn type_name(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(number) if number.is_f64() => "number",
        Value::Number(_) => "integer",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

/// As messages show a value of a wrong type: by its type.
fn quoted(value: &Value) -> Value {
    json!(type_name(value))
}

/// Metadata of a custom resource as every object has it.
pub(crate) fn normal_metadata(object: &mut Value) -> Result<Vec<String>, crate::normal::TypeError> {
    let map = json::map_mut(object, "");
    let mut meta = map.remove("metadata").unwrap_or_else(|| Value::Object(Map::new()));
    if meta.is_null() {
        meta = Value::Object(Map::new());
    }
    let unknown = crate::normal::normalize(&built_in("ObjectMeta"), &mut meta);
    map.insert("metadata".to_owned(), meta);
    Ok(unknown?.into_iter().map(|path| format!("metadata.{path}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schema() -> Schema {
        Schema::read(&json!({"type": "object", "properties": {
            "spec": {"type": "object", "required": ["size"], "properties": {
                "size": {"type": "integer", "minimum": 1, "default": 3},
                "mode": {"type": "string", "enum": ["a", "b"], "pattern": "^[a-z]$"},
                "ports": {"type": "array", "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["p"],
                          "items": {"type": "object", "properties": {"p": {"type": "integer"}}}},
                "any": {"x-kubernetes-preserve-unknown-fields": true},
                "labels": {"type": "object", "additionalProperties": {"type": "string", "maxLength": 2}}}}}}))
        .unwrap()
    }

    #[test]
    fn unknown_fields_are_pruned_and_defaults_filled_in() {
        let mut object = json!({"apiVersion": "x", "kind": "y", "metadata": {"name": "n"}, "other": 1,
            "spec": {"extra": 1, "any": {"x": {"y": 1}}, "labels": {"k": "v"}}});
        assert_eq!(schema().prune(&mut object), ["other", "spec.extra"]);
        schema().fill(&mut object);
        let wanted = json!({"size": 3, "any": {"x": {"y": 1}}, "labels": {"k": "v"}});
        assert_eq!(object["spec"], wanted);
    }

    #[test]
    fn each_rule_is_checked_where_it_stands() {
        let causes = |spec: Value| -> Vec<String> {
            let found = schema().validate(&json!({"spec": spec}));
            found.into_iter().map(|cause| format!("{}: {}", cause.field, cause.message)).collect()
        };
        assert_eq!(causes(json!({"size": 1, "mode": "a"})), Vec::<String>::new());
        let low = "spec.size: Invalid value: 0: spec.size in body should be greater than or equal to 1";
        assert_eq!(causes(json!({"size": 0})), [low]);
        assert_eq!(causes(json!({})), ["spec.size: Required value"]);
        assert_eq!(causes(json!({"size": "x"})).len(), 1);
        assert_eq!(causes(json!({"size": 1, "mode": "z"})).len(), 1);
        assert_eq!(causes(json!({"size": 1, "ports": [{"p": 1}, {"p": 1}]})).len(), 1);
        assert_eq!(causes(json!({"size": 1, "labels": {"k": "long"}})).len(), 1);
    }

    #[test]
    fn a_schema_without_types_is_not_structural() {
        assert!(Schema::read(&json!({"type": "object", "properties": {"spec": {}}})).is_err());
        assert!(Schema::read(&json!({"type": "object", "properties": {"a": {"type": "array"}}})).is_err());
    }
}
