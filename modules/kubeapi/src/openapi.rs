//! OpenAPI, made from the same descriptions by which objects are read: what `kubectl explain` shows and
//! `kubectl apply` merges by.

use std::{
    collections::BTreeMap,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    sync::Arc,
};

use serde_json::{Map, Value, json};

use crate::{
    registry::{Resource, Resources},
    schema::{Merge, Scalar, Struct, Type},
};

/// The document of a path, if it is one of OpenAPI.
pub(crate) fn document(resources: &Resources, path: &str) -> Option<Value> {
    match path {
        "/openapi/v3" => Some(index(resources)),
        "/openapi/v2" => Some(version_2(resources)),
        path => {
            let of = path.strip_prefix("/openapi/v3/")?;
            let (group, version) = match of.split('/').collect::<Vec<_>>()[..] {
                ["api", version] => ("", version),
                ["apis", group, version] => (group, version),
                _ => return None,
            };
            version_3(resources, group, version)
        }
    }
}

fn index(resources: &Resources) -> Value {
    let mut paths = Map::new();
    for (group, versions) in &resources.groups {
        for version in versions {
            let path =
                if group.is_empty() { format!("api/{version}") } else { format!("apis/{group}/{version}") };
            let Some(document) = version_3(resources, group, version) else { continue };
            // Clients keep a document as long as its address stays.
            let mut hasher = DefaultHasher::new();
            document.to_string().hash(&mut hasher);
            let url = format!("/openapi/v3/{path}?hash={:016X}", hasher.finish());
            paths.insert(path, json!({"serverRelativeURL": url}));
        }
    }
    json!({"paths": paths})
}

fn version_3(resources: &Resources, group: &str, version: &str) -> Option<Value> {
    let mut schemas = Schemas { root: "#/components/schemas/", found: BTreeMap::new() };
    let mut paths = Map::new();
    for resource in resources.of_version(group, version) {
        schemas.add_kind(resource);
        paths.extend(self::paths(resource, |name| json!({"$ref": format!("#/components/schemas/{name}")})));
    }
    if paths.is_empty() {
        return None;
    }
    Some(json!({
        "openapi": "3.0.0",
        "info": {"title": "Kubernetes", "version": "v1.36.2"},
        "paths": paths,
        "components": {"schemas": schemas.found},
    }))
}

fn version_2(resources: &Resources) -> Value {
    let mut schemas = Schemas { root: "#/definitions/", found: BTreeMap::new() };
    for (group, versions) in &resources.groups {
        for version in versions {
            resources.of_version(group, version).for_each(|resource| schemas.add_kind(resource));
        }
    }
    json!({
        "swagger": "2.0",
        "info": {"title": "Kubernetes", "version": "v1.36.2"},
        "paths": {},
        "definitions": schemas.found,
    })
}

/// The path of one object: what clients look at is which parameters a patch takes.
fn paths(resource: &Resource, reference: impl Fn(&str) -> Value) -> Map<String, Value> {
    let root = if resource.group.is_empty() { "/api" } else { "/apis" };
    let of = resource.api_version();
    let scope = if resource.namespaced { "/namespaces/{namespace}" } else { "" };
    let kind = gvk(resource);
    let parameter =
        |name: &str| json!({"name": name, "in": "query", "schema": {"type": "string", "uniqueItems": true}});
    let content = json!({"application/json": {"schema": reference(&schema_name(resource))}});
    let answer = json!({"200": {"description": "OK", "content": content}});
    let operation = |action: &str, parameters: &[&str]| {
        let parameters: Vec<Value> = parameters.iter().map(|name| parameter(name)).collect();
        json!({
            "x-kubernetes-action": action,
            "x-kubernetes-group-version-kind": kind,
            "parameters": parameters,
            "responses": answer,
        })
    };
    let writes = ["dryRun", "fieldManager", "fieldValidation"];
    let mut found = Map::new();
    let many = format!("{root}/{of}{scope}/{}", resource.plural);
    let mut collection = json!({"post": operation("post", &writes)});
    if resource.measured {
        let many_of = operation("list", &["labelSelector", "fieldSelector"]);
        found.insert(format!("{many}/{{name}}"), json!({"get": operation("get", &[])}));
        found.insert(many, json!({"get": many_of}));
        return found;
    }
    if !resource.review {
        collection["get"] =
            operation("list", &["labelSelector", "fieldSelector", "limit", "continue", "watch"]);
        let one = json!({
            "get": operation("get", &[]),
            "put": operation("put", &writes),
            "patch": operation("patch", &["dryRun", "fieldManager", "fieldValidation", "force"]),
            "delete": operation("delete", &["dryRun", "gracePeriodSeconds", "propagationPolicy"]),
        });
        found.insert(format!("{many}/{{name}}"), one);
    }
    found.insert(many, collection);
    found
}

fn gvk(resource: &Resource) -> Value {
    json!({"group": resource.group, "version": resource.version, "kind": resource.kind})
}

fn schema_name(resource: &Resource) -> String {
    if resource.custom.is_none() {
        return named(&resource.kind);
    }
    let mut group: Vec<&str> = resource.group.split('.').collect();
    group.reverse();
    format!("{}.{}.{}", group.join("."), resource.version, resource.kind)
}

fn named(name: &str) -> String {
    format!("io.k8s.api.{name}")
}

/// Schemas by name, as they are come by.
struct Schemas {
    root: &'static str,
    found: BTreeMap<String, Value>,
}

impl Schemas {
    fn add_kind(&mut self, resource: &Resource) {
        let name = schema_name(resource);
        let mut schema = match (&resource.custom, &resource.ty) {
            (Some(custom), _) => {
                let mut given = custom.given.clone();
                let meta = self.value(&crate::schema::built_in("ObjectMeta"));
                let fields = crate::json::map_mut(&mut given, "properties");
                fields.insert("metadata".to_owned(), meta);
                given
            }
            (None, Type::Struct(of)) => self.fields(of),
            (None, _) => return,
        };
        let fields = crate::json::map_mut(&mut schema, "properties");
        for (field, what) in
            [("apiVersion", "Group and version of the kind."), ("kind", "What kind of object this is.")]
        {
            fields.insert(field.to_owned(), json!({"type": "string", "description": what}));
        }
        schema["x-kubernetes-group-version-kind"] = json!([gvk(resource)]);
        self.found.insert(name, schema);
    }

    fn reference(&mut self, of: &Arc<Struct>) -> Value {
        let name = named(&of.name);
        if !self.found.contains_key(&name) {
            // Before it is filled in: a type may come by itself again.
            self.found.insert(name.clone(), Value::Null);
            let schema = self.fields(of);
            self.found.insert(name.clone(), schema);
        }
        json!({"$ref": format!("{}{name}", self.root)})
    }

    fn fields(&mut self, of: &Struct) -> Value {
        let mut properties = Map::new();
        for (name, field) in &of.fields {
            let mut schema = self.value(&field.ty);
            if schema.get("$ref").is_some() && self.root.contains("components") {
                // A reference takes nothing beside it.
                schema = json!({"allOf": [schema], "default": {}});
            }
            if !field.doc.is_empty() {
                schema["description"] = json!(field.doc);
            }
            if let Type::List { merge, .. } = &field.ty {
                list_extensions(&mut schema, merge);
            }
            if matches!(&field.ty, Type::Struct(of) if of.retain_keys) {
                schema["x-kubernetes-patch-strategy"] = json!("retainKeys");
            }
            properties.insert(name.clone(), schema);
        }
        let mut schema = json!({"type": "object", "properties": properties});
        if !of.doc.is_empty() {
            schema["description"] = json!(of.doc);
        }
        if of.atomic {
            schema["x-kubernetes-map-type"] = json!("atomic");
        }
        schema
    }

    fn value(&mut self, ty: &Type) -> Value {
        match ty {
            Type::Any => json!({"type": "object", "x-kubernetes-preserve-unknown-fields": true}),
            Type::Struct(of) if of.name.is_empty() => self.fields(of),
            Type::Struct(of) => self.reference(of),
            Type::Map { of, atomic } => {
                let mut schema = json!({"type": "object", "additionalProperties": self.value(of)});
                if *atomic {
                    schema["x-kubernetes-map-type"] = json!("atomic");
                }
                schema
            }
            Type::List { of, .. } => json!({"type": "array", "items": self.value(of)}),
            Type::Scalar(scalar) => match scalar {
                Scalar::Text | Scalar::Quantity => json!({"type": "string"}),
                Scalar::Int32 => json!({"type": "integer", "format": "int32"}),
                Scalar::Int64 => json!({"type": "integer", "format": "int64"}),
                Scalar::Number => json!({"type": "number"}),
                Scalar::Bool => json!({"type": "boolean"}),
                Scalar::Time | Scalar::MicroTime => json!({"type": "string", "format": "date-time"}),
                Scalar::IntOrString => json!({"type": "string", "format": "int-or-string"}),
                Scalar::Bytes => json!({"type": "string", "format": "byte"}),
            },
        }
    }
}

fn list_extensions(schema: &mut Value, merge: &Merge) {
    let (ty, keys, patch) = match merge {
        Merge::Atomic => ("atomic", None, None),
        Merge::Set => ("set", None, Some(None)),
        Merge::Keys(keys) => ("map", Some(keys), Some(keys.first())),
        Merge::PatchKey(key) => ("atomic", None, Some(Some(key))),
    };
    schema["x-kubernetes-list-type"] = json!(ty);
    if let Some(keys) = keys {
        schema["x-kubernetes-list-map-keys"] = json!(keys);
    }
    if let Some(key) = patch {
        let retain = schema["items"]["$ref"].as_str().is_some_and(|name| name.ends_with(".Volume"));
        schema["x-kubernetes-patch-strategy"] = json!(if retain { "merge,retainKeys" } else { "merge" });
        if let Some(key) = key {
            schema["x-kubernetes-patch-merge-key"] = json!(key);
        }
    }
}
