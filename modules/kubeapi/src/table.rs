//! Tables: what `kubectl get` shows of each kind.

mod cells;

use serde_json::{Value, json};

use crate::{clock, crd::Column, json, registry::Resource};

pub(crate) use cells::cells_of;

/// Name, type and priority of a column; the first is the object's name unless said otherwise.
type Heading = (&'static str, &'static str, u8);

/// The columns of a resource.
pub(crate) fn columns(resource: &Resource) -> Value {
    let heading = |name: &str, ty: &str, format: &str, about: &str, priority: i64| json!({"name": name, "type": ty, "format": format, "description": about, "priority": priority});
    if let Some(custom) = &resource.custom {
        let mut all = vec![heading("Name", "string", "name", NAME, 0)];
        all.extend(custom.columns.iter().map(|column| {
            let plain = format!("Custom resource definition column (in JSONPath format): {}", column.path);
            let about = if column.description.is_empty() { &plain } else { &column.description };
            heading(&column.name, &column.ty, &column.format, about, column.priority)
        }));
        return Value::Array(all);
    }
    let all = headings(resource).iter().map(|(name, ty, priority)| {
        let (format, about) = match *name {
            "Name" => ("name", NAME),
            "Age" | "Created At" => ("", CREATED),
            _ => ("", ""),
        };
        heading(name, ty, format, about, i64::from(*priority))
    });
    Value::Array(all.collect())
}

/// The cells of an object.
pub(crate) fn cells(resource: &Resource, object: &Value) -> Vec<Value> {
    if let Some(custom) = &resource.custom {
        let mut cells = vec![json!(json::text(object, "metadata.name"))];
        cells.extend(custom.columns.iter().map(|column| custom_cell(column, object)));
        return cells;
    }
    cells_of(resource, object)
}

const NAME: &str =
    "Unique among the objects of its resource, in its namespace if it has one. Cannot be changed.";
const CREATED: &str = "When the server made the object.";

fn headings(resource: &Resource) -> &'static [Heading] {
    match (resource.group.as_str(), resource.plural.as_str()) {
        ("", "nodes") => &[
            ("Name", "string", 0),
            ("Status", "string", 0),
            ("Roles", "string", 0),
            ("Age", "string", 0),
            ("Version", "string", 0),
            ("Internal-IP", "string", 1),
            ("External-IP", "string", 1),
            ("OS-Image", "string", 1),
            ("Kernel-Version", "string", 1),
            ("Container-Runtime", "string", 1),
        ],
        ("", "pods") => &[
            ("Name", "string", 0),
            ("Ready", "string", 0),
            ("Status", "string", 0),
            ("Restarts", "string", 0),
            ("Age", "string", 0),
            ("IP", "string", 1),
            ("Node", "string", 1),
            ("Nominated Node", "string", 1),
            ("Readiness Gates", "string", 1),
        ],
        ("apps", "deployments") => &[
            ("Name", "string", 0),
            ("Ready", "string", 0),
            ("Up-to-date", "string", 0),
            ("Available", "string", 0),
            ("Age", "string", 0),
            ("Containers", "string", 1),
            ("Images", "string", 1),
            ("Selector", "string", 1),
        ],
        ("apps", "replicasets") => &[
            ("Name", "string", 0),
            ("Desired", "integer", 0),
            ("Current", "integer", 0),
            ("Ready", "integer", 0),
            ("Age", "string", 0),
            ("Containers", "string", 1),
            ("Images", "string", 1),
            ("Selector", "string", 1),
        ],
        ("apps", "daemonsets") => &[
            ("Name", "string", 0),
            ("Desired", "integer", 0),
            ("Current", "integer", 0),
            ("Ready", "integer", 0),
            ("Up-to-date", "integer", 0),
            ("Available", "integer", 0),
            ("Node Selector", "string", 0),
            ("Age", "string", 0),
            ("Containers", "string", 1),
            ("Images", "string", 1),
            ("Selector", "string", 1),
        ],
        ("apps", "statefulsets") => &[
            ("Name", "string", 0),
            ("Ready", "string", 0),
            ("Age", "string", 0),
            ("Containers", "string", 1),
            ("Images", "string", 1),
        ],
        ("batch", "jobs") => &[
            ("Name", "string", 0),
            ("Status", "string", 0),
            ("Completions", "string", 0),
            ("Duration", "string", 0),
            ("Age", "string", 0),
            ("Containers", "string", 1),
            ("Images", "string", 1),
            ("Selector", "string", 1),
        ],
        ("batch", "cronjobs") => &[
            ("Name", "string", 0),
            ("Schedule", "string", 0),
            ("Suspend", "string", 0),
            ("Active", "integer", 0),
            ("Last Schedule", "string", 0),
            ("Age", "string", 0),
        ],
        ("", "services") => &[
            ("Name", "string", 0),
            ("Type", "string", 0),
            ("Cluster-IP", "string", 0),
            ("External-IP", "string", 0),
            ("Port(s)", "string", 0),
            ("Age", "string", 0),
            ("Selector", "string", 1),
        ],
        ("", "endpoints") => &[("Name", "string", 0), ("Endpoints", "string", 0), ("Age", "string", 0)],
        ("", "configmaps") => &[("Name", "string", 0), ("Data", "string", 0), ("Age", "string", 0)],
        ("", "secrets") => {
            &[("Name", "string", 0), ("Type", "string", 0), ("Data", "string", 0), ("Age", "string", 0)]
        }
        ("", "namespaces") => &[("Name", "string", 0), ("Status", "string", 0), ("Age", "string", 0)],
        ("", "events") => &[
            ("Last Seen", "string", 0),
            ("Type", "string", 0),
            ("Reason", "string", 0),
            ("Object", "string", 0),
            ("Subobject", "string", 1),
            ("Source", "string", 1),
            ("Message", "string", 0),
            ("First Seen", "string", 1),
            ("Count", "string", 1),
            ("Name", "string", 1),
        ],
        ("", "serviceaccounts") => &[("Name", "string", 0), ("Age", "string", 0)],
        ("coordination.k8s.io", "leases") => {
            &[("Name", "string", 0), ("Holder", "string", 0), ("Age", "string", 0)]
        }
        ("discovery.k8s.io", "endpointslices") => &[
            ("Name", "string", 0),
            ("AddressType", "string", 0),
            ("Ports", "string", 0),
            ("Endpoints", "string", 0),
            ("Age", "string", 0),
        ],
        ("policy", "poddisruptionbudgets") => &[
            ("Name", "string", 0),
            ("Min Available", "string", 0),
            ("Max Unavailable", "string", 0),
            ("Allowed Disruptions", "integer", 0),
            ("Age", "string", 0),
        ],
        ("metrics.k8s.io", "nodes") => {
            &[("Name", "string", 0), ("CPU", "string", 0), ("Memory", "string", 0), ("Window", "string", 0)]
        }
        ("metrics.k8s.io", "pods") => {
            &[("Name", "string", 0), ("Containers", "integer", 0), ("Window", "string", 0)]
        }
        ("rbac.authorization.k8s.io", "rolebindings" | "clusterrolebindings") => {
            &[("Name", "string", 0), ("Role", "string", 0), ("Age", "string", 0)]
        }
        _ => &[("Name", "string", 0), ("Created At", "date", 0)],
    }
}

fn custom_cell(column: &Column, object: &Value) -> Value {
    let found = json_path(object, &column.path);
    match (column.ty.as_str(), found) {
        (_, None) => Value::Null,
        ("date", Some(Value::String(text))) => json!(clock::age(&text)),
        ("string", Some(Value::String(text))) => json!(text),
        ("string", Some(other)) => json!(other.to_string()),
        (_, Some(found)) => found,
    }
}

/// The part of JSONPath that columns use: fields, quoted fields, indexes, `[*]` and filters by equality.
fn json_path(object: &Value, path: &str) -> Option<Value> {
    let mut found = vec![object.clone()];
    let mut many = false;
    let mut rest = path;
    while !rest.is_empty() {
        if let Some(after) = rest.strip_prefix('[') {
            let (inside, after) = after.split_once(']')?;
            rest = after;
            found = match inside {
                "*" => {
                    many = true;
                    found.iter().filter_map(Value::as_array).flatten().cloned().collect()
                }
                filter if filter.starts_with("?(") => {
                    let (field, wanted) = filter[2..].trim_end_matches(')').split_once("==")?;
                    let field = field.trim().strip_prefix("@.")?;
                    let wanted = wanted.trim().trim_matches(['"', '\'']);
                    let all = found.iter().filter_map(Value::as_array).flatten();
                    all.filter(|value| json::text(value, field) == wanted).cloned().collect()
                }
                quoted if quoted.starts_with(['\'', '"']) => {
                    let name = quoted.trim_matches(['"', '\'']);
                    found.iter().filter_map(|value| value.get(name)).cloned().collect()
                }
                index => {
                    let index: usize = index.parse().ok()?;
                    found.iter().filter_map(|value| value.get(index)).cloned().collect()
                }
            };
            continue;
        }
        rest = rest.trim_start_matches('.');
        let (mut name, mut end, mut escaped) = (String::new(), rest.len(), false);
        for (at, c) in rest.char_indices() {
            match c {
                '\\' if !escaped => escaped = true,
                '.' | '[' if !escaped => {
                    end = at;
                    break;
                }
                c => {
                    name.push(c);
                    escaped = false;
                }
            }
        }
        rest = &rest[end..];
        if !name.is_empty() {
            found = found.iter().filter_map(|value| value.get(&name)).cloned().collect();
        }
    }
    if many { Some(json!(found)).filter(|_| !found.is_empty()) } else { found.into_iter().next() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_of_columns_find_fields_elements_and_filtered_elements() {
        let object = json!({"spec": {"a": [{"type": "x", "v": 1}, {"type": "y", "v": 2}], "b.c": 3}});
        assert_eq!(json_path(&object, ".spec.a[1].v"), Some(json!(2)));
        assert_eq!(json_path(&object, ".spec.a[?(@.type==\"y\")].v"), Some(json!(2)));
        assert_eq!(json_path(&object, ".spec.a[*].v"), Some(json!([1, 2])));
        assert_eq!(json_path(&object, ".spec.b\\.c"), Some(json!(3)));
        assert_eq!(json_path(&object, ".spec['b.c']"), Some(json!(3)));
        assert_eq!(json_path(&object, ".none.x"), None);
    }
}
