//! What the built-in kinds have of their own: defaults, what a create and an update prepare, validation.

mod defaults;
mod pods;
mod prepare;
mod validation;

pub(crate) use self::{
    defaults::default,
    pods::is_ready,
    prepare::{prepare_create, prepare_update},
    validation::{validate, validate_metadata},
};

use serde_json::{Value, json as value};

use crate::json;

/// Sets a condition of an object's status. When it last changed stays if its status does.
pub(crate) fn set_condition(object: &mut Value, mut condition: Value) {
    let ty = json::text(&condition, "type").to_owned();
    let status = json::map_mut(object, "status");
    let conditions = status.entry("conditions").or_insert_with(|| value!([]));
    if !conditions.is_array() {
        *conditions = value!([]);
    }
    let Some(conditions) = conditions.as_array_mut() else { return };
    match conditions.iter_mut().find(|held| json::text(held, "type") == ty) {
        Some(held) => {
            if json::text(held, "status") == json::text(&condition, "status")
                && let Some(since) = held.get("lastTransitionTime")
            {
                condition["lastTransitionTime"] = since.clone();
            }
            *held = condition;
        }
        None => conditions.push(condition),
    }
}
