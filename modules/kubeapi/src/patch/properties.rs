//! Laws of strategic merge patches.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::{merge_patch, strategic_patch};
use crate::schema::built_in;

fn pod() -> impl Strategy<Value = Value> {
    let labels = prop::collection::btree_map("[a-d]", "[xy]", 1..4);
    let containers =
        prop::collection::btree_map("[p-s]", ("[ij]", prop::collection::vec("[k-m]", 1..3)), 1..4);
    (labels, containers).prop_map(|(labels, containers)| {
        let containers: Vec<Value> = containers
            .into_iter()
            .map(|(name, (image, args))| json!({"name": name, "image": image, "args": args}))
            .collect();
        json!({"metadata": {"labels": labels}, "spec": {"containers": containers}})
    })
}

fn by_name<'a>(pod: &'a Value, name: &Value) -> Option<&'a Value> {
    pod["spec"]["containers"].as_array().into_iter().flatten().find(|held| held["name"] == *name)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_patch_applied_twice_is_a_patch_applied_once(live in pod(), patch in pod()) {
        let ty = built_in("Pod");
        let mut once = live;
        strategic_patch(&ty, &mut once, &patch).unwrap();
        let mut twice = once.clone();
        strategic_patch(&ty, &mut twice, &patch).unwrap();
        prop_assert_eq!(once, twice);
    }

    #[test]
    fn elements_that_the_patch_does_not_name_stay_and_the_others_are_its_own(live in pod(), patch in pod()) {
        let mut patched = live.clone();
        strategic_patch(&built_in("Pod"), &mut patched, &patch).unwrap();
        for container in live["spec"]["containers"].as_array().unwrap() {
            let wanted = by_name(&patch, &container["name"]).unwrap_or(container);
            prop_assert_eq!(by_name(&patched, &container["name"]), Some(wanted));
        }
        for container in patch["spec"]["containers"].as_array().unwrap() {
            prop_assert_eq!(by_name(&patched, &container["name"]), Some(container));
        }
    }

    #[test]
    fn without_lists_it_is_a_merge_patch(live in pod(), patch in pod()) {
        let plain = json!({"metadata": patch["metadata"]});
        let (mut strategic, mut merged) = (live.clone(), live);
        strategic_patch(&built_in("Pod"), &mut strategic, &plain).unwrap();
        merge_patch(&mut merged, &plain);
        prop_assert_eq!(strategic, merged);
    }
}
