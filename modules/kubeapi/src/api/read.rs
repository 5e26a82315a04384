//! Reading a body as an object of a resource, reading one object, and the two forms of events.

use serde_json::{Map, Value, json};

use super::{Api, Ask, Done, Validation};
use crate::{crd::structural, json, normal, registry::Resource, status::Status};

impl Api {
    /// One object.
    pub(crate) async fn get(&self, ask: &Ask) -> Result<Done, Status> {
        let stored = self.store.get(&ask.key()).await?.ok_or_else(|| ask.not_found())?;
        Ok(Done::ok(shown(&ask.resource, stored.object)))
    }
}

/// Reads a body that is to be an object of the resource: of its kind, in normal form, with defaults. What is
/// unknown is refused or told.
pub(crate) fn object_of(ask: &Ask, mut object: Value, warnings: &mut Vec<String>) -> Result<Value, Status> {
    let resource = &ask.resource;
    check_kind(resource, &object)?;
    normalize(ask, &mut object, warnings)?;
    crate::kinds::default(resource, &mut object);
    Ok(object)
}

/// Whether a body is of the resource's kind and version.
pub(crate) fn check_kind(resource: &Resource, object: &Value) -> Result<(), Status> {
    let (wanted, kind) = (resource.api_version(), &resource.kind);
    let unrecognized = |what: &str| {
        let text = object.to_string();
        let shown: String = text.chars().take(200).collect();
        Status::bad_request(format!(
            "the object provided is unrecognized (must be of type {kind}): {what} ({shown})"
        ))
    };
    if !object.is_object() {
        return Err(unrecognized("couldn't get version/kind; json parse error: it is not an object"));
    }
    let (version, found) = (json::text(object, "apiVersion"), json::text(object, "kind"));
    if found.is_empty() && version.is_empty() {
        // The path says what it is, as it does for typed servers.
        return Ok(());
    }
    if version != wanted && !version.is_empty() {
        return Err(Status::bad_request(format!(
            "the API version in the data ({version}) does not match the expected API version ({wanted})"
        )));
    }
    if found != kind && !found.is_empty() {
        let short = wanted.rsplit('/').next().unwrap_or_default();
        let internal = if resource.group.is_empty() {
            "core"
        } else {
            resource.group.split('.').next().unwrap_or_default()
        };
        return Err(Status::bad_request(format!(
            "{found} in version \"{short}\" cannot be handled as a {kind}: converting ({short}.{found}) to \
             ({internal}.{kind}): unknown conversion"
        )));
    }
    Ok(())
}

/// Brings an object to its normal form, without defaults. Its version and kind are set.
pub(crate) fn normalize(ask: &Ask, object: &mut Value, warnings: &mut Vec<String>) -> Result<(), Status> {
    let resource = &ask.resource;
    json::set(object, "apiVersion", resource.api_version());
    json::set(object, "kind", resource.kind.clone());
    let cannot = |what: &str| {
        let kind = &resource.kind;
        Status::bad_request(format!(
            "{kind} in version \"{}\" cannot be handled as a {kind}: {what}",
            resource.version
        ))
    };
    let normal = match &resource.custom {
        Some(custom) => {
            let metadata = structural::normal_metadata(object);
            metadata.map(|mut unknown| {
                unknown.extend(custom.schema.prune(object));
                unknown
            })
        }
        None => {
            to_storage(resource, object);
            normal::normalize(stored_type(resource), object)
        }
    };
    let unknown = normal.map_err(|error| cannot(&error.0))?;
    let mut told: Vec<String> = unknown.iter().map(|path| format!("unknown field \"{path}\"")).collect();
    match ask.validation {
        Validation::Strict if !told.is_empty() => {
            return Err(cannot(&format!("strict decoding error: {}", told.join(", "))));
        }
        Validation::Warn => warnings.append(&mut told),
        Validation::Strict | Validation::Ignore => {}
    }
    if let Some(custom) = &resource.custom {
        warnings.extend(custom.deprecation.clone());
    }
    Ok(())
}

/// The type of what is stored.
pub(crate) fn stored_type(resource: &Resource) -> &crate::schema::Type {
    if resource.is("events.k8s.io", "events") {
        return &crate::registry::built_in_resource("", "events").ty;
    }
    &resource.ty
}

/// Fields of events in `events.k8s.io`, and what they are called in core.
const EVENT_NAMES: [(&str, &str); 7] = [
    ("regarding", "involvedObject"),
    ("note", "message"),
    ("reportingController", "reportingComponent"),
    ("deprecatedSource", "source"),
    ("deprecatedFirstTimestamp", "firstTimestamp"),
    ("deprecatedLastTimestamp", "lastTimestamp"),
    ("deprecatedCount", "count"),
];

/// An object of the store as a client of this resource sees it.
pub(crate) fn shown(resource: &Resource, mut object: Value) -> Value {
    if resource.is("events.k8s.io", "events") {
        rename(&mut object, |name| EVENT_NAMES.iter().find(|(_, core)| *core == name).map(|(new, _)| *new));
    }
    if resource.custom.is_some() || resource.group == "events.k8s.io" || resource.is("", "events") {
        json::set(&mut object, "apiVersion", resource.api_version());
    }
    object
}

fn to_storage(resource: &Resource, object: &mut Value) {
    if resource.is("events.k8s.io", "events") {
        rename(object, |name| EVENT_NAMES.iter().find(|(new, _)| *new == name).map(|(_, core)| *core));
    }
}

fn rename(object: &mut Value, to: impl Fn(&str) -> Option<&'static str>) {
    if let Some(map) = object.as_object_mut() {
        let all = std::mem::take(map).into_iter();
        *map = all.map(|(name, value)| (to(&name).map_or(name, str::to_owned), value)).collect::<Map<_, _>>();
    }
}

/// The object that a kind has before anything is set: what a create is compared with.
pub(crate) fn before_anything(resource: &Resource) -> Value {
    match resource.custom {
        Some(_) => json!({"metadata": {}}),
        None => normal::empty(stored_type(resource)),
    }
}
