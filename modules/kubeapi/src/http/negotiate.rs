//! In which form an answer is wanted, and bringing it into that form.

use std::sync::Arc;

use hyper::HeaderMap;
use serde_json::{Value, json};

use crate::{api::Ask, api::list::List, registry::Resource, status::Status, table};

/// The form of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    /// The objects as they are.
    Plain,
    /// Rows for people.
    Table,
    /// Metadata alone.
    Metadata,
}

/// What an Accept header asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Wanted {
    pub(crate) form: Form,
    /// As YAML. JSON is YAML: it is what is written.
    pub(crate) yaml: bool,
}

/// Reads the Accept header of a request for objects.
pub(crate) fn wanted(headers: &HeaderMap, list: bool) -> Result<Wanted, Status> {
    let plain = Wanted { form: Form::Plain, yaml: false };
    let Some(accept) = headers.get("accept") else { return Ok(plain) };
    let accept = accept.to_str().unwrap_or_default();
    if accept.trim().is_empty() {
        return Ok(plain);
    }
    for media in accept.split(',') {
        let mut parts = media.split(';').map(str::trim);
        let ty = parts.next().unwrap_or_default();
        let yaml = ty == "application/yaml";
        if !yaml && !["application/json", "application/*", "*/*"].contains(&ty) {
            continue;
        }
        let (mut kind, mut group, mut version) = ("", "", "");
        for (name, said) in parts.filter_map(|part| part.split_once('=')) {
            match name {
                "as" => kind = said,
                "g" => group = said,
                "v" => version = said,
                _ => {}
            }
        }
        if kind.is_empty() {
            return Ok(Wanted { form: Form::Plain, yaml });
        }
        if group != "meta.k8s.io" || version != "v1" {
            continue;
        }
        let form = match kind {
            "Table" => Form::Table,
            "PartialObjectMetadataList" if list => Form::Metadata,
            "PartialObjectMetadata" => Form::Metadata,
            _ => continue,
        };
        return Ok(Wanted { form, yaml });
    }
    let known = "application/json, application/yaml, application/json;stream=watch";
    let message = format!("406: Not Acceptable\n\nAvailable representations: {known}");
    Err(Status { details: Some(json!({})), ..Status::new(406, "NotAcceptable", message) })
}

/// Brings objects of a resource into a form.
#[derive(Debug, Clone)]
pub(crate) struct Shaper {
    pub(crate) resource: Arc<Resource>,
    pub(crate) form: Form,
    /// What stands beside each row of a table: None, Metadata or Object.
    pub(crate) beside: String,
    /// A watch tells the columns once.
    pub(crate) columns_told: bool,
}

impl Shaper {
    /// One object.
    pub(crate) fn object(&self, object: Value) -> Value {
        if object.get("kind").is_some_and(|kind| kind == "Status") && self.resource.kind != "Status" {
            return object;
        }
        match self.form {
            Form::Plain => object,
            Form::Metadata => partial(&object),
            Form::Table => {
                let revision = crate::json::text(&object, "metadata.resourceVersion").to_owned();
                self.table(&[object], json!({"resourceVersion": revision}), true)
            }
        }
    }

    /// A list.
    pub(crate) fn list(&self, ask: &Ask, list: &List) -> Value {
        match self.form {
            Form::Plain => list.to_value(ask),
            Form::Metadata => json!({
                "kind": "PartialObjectMetadataList",
                "apiVersion": "meta.k8s.io/v1",
                "metadata": list.metadata(),
                "items": list.items.iter().map(partial).collect::<Vec<_>>(),
            }),
            Form::Table => self.table(&list.items, list.metadata(), true),
        }
    }

    /// An object of an event.
    pub(crate) fn event(&mut self, object: Value) -> Value {
        if self.form != Form::Table {
            return self.object(object);
        }
        let revision = crate::json::text(&object, "metadata.resourceVersion").to_owned();
        let columns = !std::mem::replace(&mut self.columns_told, true);
        self.table(&[object], json!({"resourceVersion": revision}), columns)
    }

    /// The object of a bookmark.
    pub(crate) fn bookmark(&mut self, object: Value) -> Value {
        match self.form {
            Form::Table => {
                let columns = !std::mem::replace(&mut self.columns_told, true);
                let metadata = object.get("metadata").cloned().unwrap_or_default();
                self.table(&[], metadata, columns)
            }
            _ => self.object(object),
        }
    }

    fn table(&self, objects: &[Value], metadata: Value, with_columns: bool) -> Value {
        let rows: Vec<Value> = objects
            .iter()
            .map(|object| {
                let mut row = json!({"cells": table::cells(&self.resource, object)});
                match self.beside.as_str() {
                    "None" => {}
                    "Object" => row["object"] = object.clone(),
                    _ => row["object"] = partial(object),
                }
                row
            })
            .collect();
        json!({
            "kind": "Table",
            "apiVersion": "meta.k8s.io/v1",
            "metadata": metadata,
            "columnDefinitions": if with_columns { table::columns(&self.resource) } else { Value::Null },
            "rows": rows,
        })
    }
}

fn partial(object: &Value) -> Value {
    json!({
        "kind": "PartialObjectMetadata",
        "apiVersion": "meta.k8s.io/v1",
        "metadata": object.get("metadata").cloned().unwrap_or_default(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(accept: &str) -> Result<Form, u16> {
        let mut headers = HeaderMap::new();
        headers.insert("accept", accept.parse().unwrap());
        wanted(&headers, true).map(|wanted| wanted.form).map_err(|status| status.code)
    }

    #[test]
    fn the_first_form_that_is_served_is_taken() {
        let kubectl = "application/json;as=Table;v=v1;g=meta.k8s.io,application/json;as=Table;v=v1beta1;g=meta.k8s.io,application/json";
        assert_eq!(of(kubectl), Ok(Form::Table));
        assert_eq!(of("application/vnd.kubernetes.protobuf,application/json"), Ok(Form::Plain));
        assert_eq!(
            of("application/json;as=PartialObjectMetadataList;v=v1;g=meta.k8s.io"),
            Ok(Form::Metadata)
        );
        assert_eq!(of("*/*"), Ok(Form::Plain));
        assert_eq!(of("text/csv"), Err(406));
        assert_eq!(of("application/vnd.kubernetes.protobuf"), Err(406));
    }
}
