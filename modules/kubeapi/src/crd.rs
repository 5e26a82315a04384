//! Custom resources: what a CustomResourceDefinition makes of an object.

pub(crate) mod structural;

use std::sync::Arc;

use serde_json::{Value, json};

use self::structural::Schema;
use crate::{
    json,
    names::Names,
    registry::{Resource, Scale},
    schema::Type,
};

/// What a CustomResourceDefinition says of one version of its resource.
#[derive(Debug)]
pub(crate) struct Custom {
    /// The schema of its objects.
    pub(crate) schema: Schema,
    /// The schema as it was given, for OpenAPI.
    pub(crate) given: Value,
    /// Columns of tables, after the name.
    pub(crate) columns: Vec<Column>,
    /// A warning for everybody who uses this version.
    pub(crate) deprecation: Option<String>,
}

/// A column of a table of custom resources.
#[derive(Debug, Clone)]
pub(crate) struct Column {
    pub(crate) name: String,
    pub(crate) ty: String,
    pub(crate) format: String,
    pub(crate) description: String,
    pub(crate) priority: i64,
    pub(crate) path: String,
}

/// The resources of an established CustomResourceDefinition: one for each version that is served.
pub(crate) fn resources(definition: &Value) -> Vec<Arc<Resource>> {
    if !condition(definition, "Established") {
        return Vec::new();
    }
    let versions = json::list(definition, "spec.versions");
    let served = versions.iter().filter(|version| json::truth(version, "served"));
    served.map(|version| Arc::new(resource(definition, version))).collect()
}

/// Whether a condition of an object is true.
pub(crate) fn condition(object: &Value, ty: &str) -> bool {
    let conditions = json::list(object, "status.conditions");
    conditions.iter().any(|held| json::text(held, "type") == ty && json::text(held, "status") == "True")
}

fn resource(definition: &Value, version: &Value) -> Resource {
    let spec = |path: &str| json::text(definition, &format!("spec.{path}")).to_owned();
    let texts = |path: &str| -> Vec<String> {
        let list = json::list(definition, path).iter().filter_map(Value::as_str);
        list.map(str::to_owned).collect()
    };
    let given = json::at(version, "schema.openAPIV3Schema").cloned().unwrap_or_else(|| json!({}));
    let mut schema = Schema::read(&given).unwrap_or_else(|_| Schema::open());
    if json::truth(definition, "spec.preserveUnknownFields") {
        schema.keep_unknown = true;
    }
    let path = |path: &str| path.trim_start_matches('.').to_owned();
    let scale = json::at(version, "subresources.scale").map(|scale| Scale {
        spec: path(json::text(scale, "specReplicasPath")),
        status: path(json::text(scale, "statusReplicasPath")),
        selector: path(json::text(scale, "labelSelectorPath")),
    });
    let mut fields = vec!["metadata.name".to_owned(), "metadata.namespace".to_owned()];
    fields.extend(
        json::list(version, "selectableFields").iter().map(|field| path(json::text(field, "jsonPath"))),
    );
    let columns = json::list(version, "additionalPrinterColumns").iter().map(|column| Column {
        name: json::text(column, "name").to_owned(),
        ty: json::text(column, "type").to_owned(),
        format: json::text(column, "format").to_owned(),
        description: json::text(column, "description").to_owned(),
        priority: json::int(column, "priority"),
        path: json::text(column, "jsonPath").to_owned(),
    });
    let mut columns: Vec<Column> = columns.collect();
    if columns.is_empty() {
        columns.push(Column {
            name: "Age".to_owned(),
            ty: "date".to_owned(),
            format: String::new(),
            description: String::new(),
            priority: 0,
            path: ".metadata.creationTimestamp".to_owned(),
        });
    }
    let deprecation = json::truth(version, "deprecated").then(|| {
        let said = json::text(version, "deprecationWarning");
        let plain = || {
            format!("{}/{} {} is deprecated", spec("group"), json::text(version, "name"), spec("names.kind"))
        };
        if said.is_empty() { plain() } else { said.to_owned() }
    });
    Resource {
        group: spec("group"),
        version: json::text(version, "name").to_owned(),
        kind: spec("names.kind"),
        list_kind: spec("names.listKind"),
        plural: spec("names.plural"),
        singular: spec("names.singular"),
        short: texts("spec.names.shortNames"),
        categories: texts("spec.names.categories"),
        namespaced: spec("scope") == "Namespaced",
        ty: Type::Struct(Arc::new(schema.object_type())),
        names: Names::Subdomain,
        status: json::at(version, "subresources.status").is_some(),
        scale,
        subresources: Vec::new(),
        fields,
        generation: true,
        review: false,
        measured: false,
        returns_deleted: false,
        custom: Some(Arc::new(Custom { schema, given, columns, deprecation })),
        stored_as: None,
    }
}
