//! Classes of service: who goes first when a node runs out of memory.

use k8s_openapi::api::core::v1::{Pod, ResourceRequirements};

use crate::quantity::{Milli, Resources};

/// A pod's class of service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Qos {
    /// Asks for nothing.
    BestEffort,
    /// Asks for something.
    Burstable,
    /// Every container has limits of processor and memory and asks for just these.
    Guaranteed,
}

impl Qos {
    /// As in a pod's status.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Guaranteed => "Guaranteed",
            Self::Burstable => "Burstable",
            Self::BestEffort => "BestEffort",
        }
    }
}

/// The resources that make a class.
pub(crate) const COUNTED: [&str; 2] = ["cpu", "memory"];

/// The class of this pod.
#[must_use]
pub fn qos(pod: &Pod) -> Qos {
    let Some(spec) = &pod.spec else { return Qos::BestEffort };
    // Resources of the pod as a whole, where they are given, speak for all of it.
    let whole =
        spec.resources.as_ref().filter(|all| asks(all.requests.as_ref()) || asks(all.limits.as_ref()));
    let all: Vec<Option<&ResourceRequirements>> = match whole {
        Some(whole) => vec![Some(whole)],
        None => {
            let containers = spec.containers.iter().chain(spec.init_containers.iter().flatten());
            containers.map(|container| container.resources.as_ref()).collect()
        }
    };
    let nothing = |one: &Option<&ResourceRequirements>| {
        one.is_none_or(|one| !asks(one.requests.as_ref()) && !asks(one.limits.as_ref()))
    };
    if all.iter().all(nothing) {
        return Qos::BestEffort;
    }
    let exact = |one: &Option<&ResourceRequirements>| {
        one.is_some_and(|one| {
            COUNTED.iter().all(|name| {
                let limit = Milli::of(one.limits.as_ref(), name);
                let request = Milli::find(one.requests.as_ref(), name).unwrap_or(limit);
                limit.0 > 0 && limit == request
            })
        })
    };
    if all.iter().all(exact) { Qos::Guaranteed } else { Qos::Burstable }
}

fn asks(list: Option<&Resources>) -> bool {
    COUNTED.iter().any(|name| Milli::of(list, name).0 > 0)
}
