//! Who set which field: `metadata.managedFields`, updates and server-side apply.
//!
//! Every write names a manager. An update gives it what it adds and changes, and takes that from everybody
//! else. An apply says the whole of what the manager wants: what it wanted before and wants no more is
//! removed unless somebody else owns it, and what others own with another value is a conflict unless forced.

mod diff;
#[cfg(test)]
mod properties;
mod set;

use serde_json::{Map, Value, json};

use self::{
    diff::{compare, lay_over, owned_paths, take_out},
    set::Set,
};
use crate::schema::Type;

/// Who writes, in what way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Writer<'a> {
    /// Name of the manager.
    pub(crate) manager: &'a str,
    /// Group and version of what it writes.
    pub(crate) api_version: &'a str,
    /// "status", "scale", or empty.
    pub(crate) subresource: &'a str,
    /// When, RFC 3339.
    pub(crate) time: &'a str,
}

/// What others own and an apply would change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Conflict {
    /// Who.
    pub(crate) manager: String,
    /// Whether it is owned by an update, of which version and when.
    pub(crate) by_update: Option<(String, String)>,
    /// The field.
    pub(crate) path: String,
}

/// One entry of `managedFields`.
#[derive(Debug, Clone, PartialEq)]
struct Entry {
    manager: String,
    applies: bool,
    api_version: String,
    subresource: String,
    time: Option<String>,
    set: Set,
}

impl Entry {
    fn is_of(&self, writer: &Writer<'_>, applies: bool) -> bool {
        self.manager == writer.manager
            && self.applies == applies
            && self.api_version == writer.api_version
            && self.subresource == writer.subresource
    }
}

/// After a create or an update: what `new` says of its managers. `old` is the object before, or the empty
/// object of the kind.
pub(crate) fn update(ty: &Type, old: &Value, new: &mut Value, writer: &Writer<'_>) {
    let entries = match (entries_of(new), entries_of(old)) {
        // An empty first entry is how a client asks to forget everything.
        (Some(given), _) if given.is_empty() => Vec::new(),
        (Some(given), _) => given,
        (None, held) => held.unwrap_or_default(),
    };
    let difference = compare(ty, &unmanaged(old), &unmanaged(new));
    let changed = difference.added.union(&difference.modified);
    let mut kept = Vec::with_capacity(entries.len() + 1);
    let mut own = None;
    for mut entry in entries {
        if entry.is_of(writer, false) {
            own = Some(entry);
            continue;
        }
        entry.set = entry.set.difference(&changed).difference(&difference.removed);
        if !entry.set.is_empty() {
            kept.push(entry);
        }
    }
    let before = own.as_ref().map(|entry| entry.set.clone()).unwrap_or_default();
    let set = stripped(before.union(&changed).difference(&difference.removed));
    if !set.is_empty() {
        let unchanged = own.filter(|entry| entry.set == set);
        kept.push(unchanged.unwrap_or_else(|| new_entry(writer, false, set)));
    }
    write_entries(new, kept);
}

/// Lays `config` over `live` in the name of a manager.
pub(crate) fn apply(
    ty: &Type,
    live: &Value,
    config: &Value,
    writer: &Writer<'_>,
    force: bool,
) -> Result<Value, Vec<Conflict>> {
    let mut entries = entries_of(live).unwrap_or_default();
    let live_plain = unmanaged(live);
    let mut config = unmanaged(config);
    without_nulls(&mut config);
    let set = stripped(owned_paths(ty, &config));
    let last = entries.iter().position(|entry| entry.is_of(writer, true)).map(|at| entries.remove(at));

    let mut merged = lay_over(ty, &live_plain, &config);
    if let Some(last) = &last {
        let managed = entries.iter().fold(set.clone(), |all, entry| all.union(&entry.set));
        let gone = last.set.with_parents().difference(&managed.with_parents());
        take_out(ty, &mut merged, &gone);
    }
    let difference = compare(ty, &live_plain, &merged);
    let changed = difference.added.union(&difference.modified);
    let mut conflicts = Vec::new();
    for entry in &mut entries {
        let contested = entry.set.intersection(&changed);
        let by_update =
            || (!entry.applies).then(|| (entry.api_version.clone(), entry.time.clone().unwrap_or_default()));
        conflicts.extend(contested.paths().into_iter().map(|path| Conflict {
            manager: entry.manager.clone(),
            by_update: by_update(),
            path,
        }));
        entry.set = entry.set.difference(&changed).difference(&difference.removed);
    }
    if !conflicts.is_empty() && !force {
        return Err(conflicts);
    }
    entries.retain(|entry| !entry.set.is_empty());
    if !set.is_empty() {
        let unchanged = last.filter(|entry| entry.set == set);
        entries.push(unchanged.unwrap_or_else(|| new_entry(writer, true, set)));
    }
    write_entries(&mut merged, entries);
    Ok(merged)
}

/// Whether two objects differ in nothing but when their managers wrote.
pub(crate) fn same_but_for_times(old: &Value, new: &Value) -> bool {
    let timeless = |value: &Value| {
        let mut value = value.clone();
        let entries = value.pointer_mut("/metadata/managedFields").and_then(Value::as_array_mut);
        for entry in entries.into_iter().flatten().filter_map(Value::as_object_mut) {
            entry.remove("time");
        }
        value
    };
    timeless(old) == timeless(new)
}

fn new_entry(writer: &Writer<'_>, applies: bool, set: Set) -> Entry {
    Entry {
        manager: writer.manager.to_owned(),
        applies,
        api_version: writer.api_version.to_owned(),
        subresource: writer.subresource.to_owned(),
        time: Some(writer.time.to_owned()),
        set,
    }
}

/// Without managers, and without what belongs to nobody.
fn unmanaged(object: &Value) -> Value {
    let mut object = object.clone();
    let Some(map) = object.as_object_mut() else { return object };
    map.remove("apiVersion");
    map.remove("kind");
    if let Some(meta) = map.get_mut("metadata").and_then(Value::as_object_mut) {
        for field in SERVERS {
            meta.remove(field);
        }
    }
    object
}

/// Fields of the metadata that no manager owns.
const SERVERS: [&str; 9] = [
    "name",
    "namespace",
    "creationTimestamp",
    "selfLink",
    "uid",
    "generation",
    "managedFields",
    "resourceVersion",
    "deletionTimestamp",
];

fn stripped(mut set: Set) -> Set {
    set.remove(&["apiVersion"]);
    set.remove(&["kind"]);
    for field in SERVERS {
        set.remove(&["metadata", field]);
    }
    // That there is metadata is owned by nobody either.
    if let Some(mut meta) = set.children.remove("f:metadata") {
        meta.member = false;
        set.add("f:metadata".to_owned(), meta);
    }
    set
}

fn without_nulls(value: &mut Value) {
    match value {
        Value::Object(map) => {
            map.retain(|_, value| !value.is_null());
            map.values_mut().for_each(without_nulls);
        }
        Value::Array(list) => list.iter_mut().for_each(without_nulls),
        _ => {}
    }
}

/// `None`: the object says nothing of its managers, or nothing that can be understood.
fn entries_of(object: &Value) -> Option<Vec<Entry>> {
    let list = object.pointer("/metadata/managedFields")?.as_array()?;
    if list.iter().all(|entry| entry.as_object().is_some_and(Map::is_empty)) {
        return if list.is_empty() { None } else { Some(Vec::new()) };
    }
    list.iter().map(entry_of).collect()
}

fn entry_of(value: &Value) -> Option<Entry> {
    let text = |name: &str| value.get(name).and_then(Value::as_str).map(str::to_owned);
    Some(Entry {
        manager: text("manager").unwrap_or_default(),
        applies: match text("operation")?.as_str() {
            "Apply" => true,
            "Update" => false,
            _ => return None,
        },
        api_version: text("apiVersion")?,
        subresource: text("subresource").unwrap_or_default(),
        time: text("time"),
        set: Set::decode(value.get("fieldsV1")?)?,
    })
}

fn write_entries(object: &mut Value, mut entries: Vec<Entry>) {
    let key = |entry: &Entry| {
        (
            !entry.applies,
            entry.time.clone(),
            entry.manager.clone(),
            entry.api_version.clone(),
            entry.subresource.clone(),
        )
    };
    entries.sort_by_cached_key(key);
    let written: Vec<Value> = entries.iter().map(written).collect();
    let Some(map) = object.as_object_mut() else { return };
    let meta = map.entry("metadata").or_insert_with(|| json!({}));
    let Some(meta) = meta.as_object_mut() else { return };
    if written.is_empty() {
        meta.remove("managedFields");
    } else {
        meta.insert("managedFields".to_owned(), Value::Array(written));
    }
}

fn written(entry: &Entry) -> Value {
    let mut value = json!({
        "manager": entry.manager,
        "operation": if entry.applies { "Apply" } else { "Update" },
        "apiVersion": entry.api_version,
        "fieldsType": "FieldsV1",
        "fieldsV1": entry.set.encode(),
    });
    if let Some(time) = &entry.time {
        value["time"] = json!(time);
    }
    if !entry.subresource.is_empty() {
        value["subresource"] = json!(entry.subresource);
    }
    value
}
