//! Laws of apply, over random configurations of random managers.

use proptest::prelude::*;
use serde_json::{Map, Value, json};

use super::{Writer, apply, same_but_for_times, set::Set, update};
use crate::{normal::empty, schema::built_in};

fn writer(manager: &str) -> Writer<'_> {
    Writer { manager, api_version: "v1", subresource: "", time: "2026-01-01T00:00:00Z" }
}

/// What a manager may want of a pod: labels, and containers with images and variables.
fn config() -> impl Strategy<Value = Value> {
    let labels = prop::collection::btree_map("[a-d]", "[xy]", 0..4);
    let env = prop::collection::btree_map("[A-C]", "[12]", 0..3);
    let containers = prop::collection::btree_map("[p-s]", (prop::option::of("[ij]"), env), 0..4);
    (labels, containers).prop_map(|(labels, containers)| {
        let mut object = json!({"metadata": {"name": "n"}});
        if !labels.is_empty() {
            object["metadata"]["labels"] = json!(labels);
        }
        let containers: Vec<Value> = containers
            .into_iter()
            .map(|(name, (image, env))| {
                let mut container = json!({"name": name});
                if let Some(image) = image {
                    container["image"] = json!(image);
                }
                let env: Vec<Value> =
                    env.iter().map(|(name, value)| json!({"name": name, "value": value})).collect();
                if !env.is_empty() {
                    container["env"] = json!(env);
                }
                container
            })
            .collect();
        if !containers.is_empty() {
            object["spec"] = json!({"containers": containers});
        }
        object
    })
}

/// Every value that is set, by its path; elements of lists by their names.
fn values(value: &Value, path: &str, found: &mut Map<String, Value>) {
    match value {
        Value::Object(map) => {
            for (name, value) in map.iter().filter(|(name, _)| *name != "managedFields") {
                values(value, &format!("{path}.{name}"), found);
            }
        }
        Value::Array(list) => {
            for value in list {
                values(value, &format!("{path}[{}]", value["name"]), found);
            }
        }
        Value::Null => {}
        other => drop(found.insert(path.to_owned(), other.clone())),
    }
}

fn flat(value: &Value) -> Map<String, Value> {
    let mut found = Map::new();
    values(value, "", &mut found);
    found.retain(|path, _| path != ".metadata.name");
    found
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn applying_the_same_twice_changes_nothing(first in config(), second in config()) {
        let ty = built_in("Pod");
        let live = apply(&ty, &empty(&ty), &first, &writer("a"), true).unwrap();
        let live = apply(&ty, &live, &second, &writer("b"), true).unwrap();
        let again = apply(&ty, &live, &second, &writer("b"), true).unwrap();
        prop_assert!(same_but_for_times(&live, &again), "{live}\n{again}");
    }

    #[test]
    fn what_its_only_owner_wants_no_more_is_gone_and_what_others_own_stays(
        mine in config(), less in config(), other in config(),
    ) {
        let ty = built_in("Pod");
        let live = apply(&ty, &empty(&ty), &mine, &writer("me"), true).unwrap();
        // Without force: what both say alike both own.
        let Ok(live) = apply(&ty, &live, &other, &writer("other"), false) else { return Ok(()) };
        let live = apply(&ty, &live, &less, &writer("me"), true).unwrap();
        let (is, wanted, others) = (flat(&live), flat(&less), flat(&other));
        for (path, value) in &wanted {
            prop_assert_eq!(is.get(path), Some(value), "{} in {}", path, &live);
        }
        for path in others.keys() {
            prop_assert!(is.contains_key(path), "{path} of the other is gone: {live}");
        }
        for path in flat(&mine).keys() {
            let kept = wanted.contains_key(path) || others.contains_key(path);
            prop_assert_eq!(is.contains_key(path), kept, "{} in {}", path, &live);
        }
    }

    #[test]
    fn an_update_owns_exactly_what_it_changed(before in config(), after in config()) {
        let ty = built_in("Pod");
        let live = apply(&ty, &empty(&ty), &before, &writer("a"), true).unwrap();
        let mut new = apply(&ty, &empty(&ty), &after, &writer("x"), true).unwrap();
        new["metadata"].as_object_mut().unwrap().remove("managedFields");
        update(&ty, &live, &mut new, &writer("u"));
        let (was, is) = (flat(&live), flat(&new));
        let entries = new["metadata"]["managedFields"].as_array().cloned().unwrap_or_default();
        let owned: usize = entries
            .iter()
            .filter(|entry| entry["manager"] == "u")
            .map(|entry| leaves(&Set::decode(&entry["fieldsV1"]).unwrap()))
            .sum();
        let changed = is.iter().filter(|(path, value)| was.get(*path) != Some(value)).count();
        prop_assert_eq!(owned, changed, "{}", new);
    }

    #[test]
    fn a_set_is_read_as_it_was_written(one in config(), two in config()) {
        let ty = built_in("Pod");
        let live = apply(&ty, &empty(&ty), &one, &writer("a"), true).unwrap();
        let live = apply(&ty, &live, &two, &writer("b"), true).unwrap();
        for entry in live["metadata"]["managedFields"].as_array().into_iter().flatten() {
            let set = Set::decode(&entry["fieldsV1"]).unwrap();
            prop_assert_eq!(&set.encode(), &entry["fieldsV1"]);
        }
    }
}

fn leaves(set: &Set) -> usize {
    let own = usize::from(set.children.is_empty() && set.member);
    own + set.children.values().map(leaves).sum::<usize>()
}
