//! Jobs: pods until enough have succeeded, or too many have failed.

use std::{sync::Arc, time::Duration};

use serde_json::{Value, json as value};

use super::{Controller, World, is_ending, owner_key, place_of, pods};
use crate::{clock, crd::condition, json, kinds, registry::built_in_resource, status::Status};

/// A pod waits so long after the first failure, twice as long after each further one.
const BACKOFF: (i64, i64) = (10, 600);

#[derive(Debug)]
pub(super) struct Jobs;

impl Controller for Jobs {
    const NAME: &'static str = "job-controller";

    fn keys(&self, key: &str, old: Option<&Value>, new: Option<&Value>) -> Vec<String> {
        let own = built_in_resource("batch", "jobs");
        if key.starts_with(&own.prefix()) {
            return vec![key.to_owned()];
        }
        if !key.starts_with(&built_in_resource("", "pods").prefix()) {
            return Vec::new();
        }
        [old, new].into_iter().flatten().filter_map(|pod| owner_key(own, pod)).collect()
    }

    async fn look(&self, world: &World, key: &str) -> Result<Option<Duration>, Status> {
        let resource = built_in_resource("batch", "jobs");
        let (namespace, name) = place_of(key);
        let Some(job) = world.api.cache.get(resource, namespace, name) else { return Ok(None) };
        if is_ending(&job) {
            return Ok(None);
        }
        if condition(&job, "Complete") || condition(&job, "Failed") {
            return finished(world, &job).await;
        }
        sync(world, &job).await
    }
}

/// A job that is done goes after its time.
async fn finished(world: &World, job: &Value) -> Result<Option<Duration>, Status> {
    let Some(ttl) = json::at(job, "spec.ttlSecondsAfterFinished").and_then(Value::as_i64) else {
        return Ok(None);
    };
    let done = json::list(job, "status.conditions").iter();
    let done = done.filter(|held| ["Complete", "Failed"].contains(&json::text(held, "type")));
    let since = done.filter_map(|held| clock::parse(json::text(held, "lastTransitionTime"))).next();
    let left = since.unwrap_or_default() + ttl - clock::unix();
    match u64::try_from(left) {
        Ok(left) if left > 0 => Ok(Some(Duration::from_secs(left))),
        _ => {
            world.delete(built_in_resource("batch", "jobs"), job).await?;
            Ok(None)
        }
    }
}

async fn sync(world: &World, job: &Value) -> Result<Option<Duration>, Status> {
    let resource = built_in_resource("batch", "jobs");
    let pod_resource = built_in_resource("", "pods");
    let namespace = json::text(job, "metadata.namespace");
    let all = pods::managed(world, job);
    let in_phase = |phase: &str| all.iter().filter(|pod| json::text(pod, "status.phase") == phase).count();
    let (succeeded, failed) = (in_phase("Succeeded"), in_phase("Failed"));
    let active: Vec<&Arc<Value>> = all.iter().filter(|pod| pods::is_active(pod)).collect();
    let number = |path: &str| json::at(job, path).and_then(Value::as_i64);
    let wanted = number("spec.completions").and_then(|count| usize::try_from(count).ok());
    let parallel = usize::try_from(number("spec.parallelism").unwrap_or(1)).unwrap_or(0);
    let limit = number("spec.backoffLimit").unwrap_or(6);
    let now = clock::now();
    let started = match json::text(job, "status.startTime") {
        "" => now.clone(),
        since => since.to_owned(),
    };
    let mut status = json::at(job, "status").cloned().unwrap_or_else(|| value!({}));
    json::set(&mut status, "startTime", started.clone());
    json::set(&mut status, "succeeded", succeeded);
    json::set(&mut status, "failed", failed);
    json::set(&mut status, "ready", active.iter().filter(|pod| kinds::is_ready(pod)).count());
    json::set(&mut status, "terminating", all.iter().filter(|pod| is_ending(pod)).count());
    json::set(&mut status, "uncountedTerminatedPods", value!({}));
    let deadline = number("spec.activeDeadlineSeconds");
    let age = clock::unix() - clock::parse(&started).unwrap_or_else(clock::unix);
    let overdue = deadline.is_some_and(|deadline| age >= deadline);
    let restarts: i64 = active
        .iter()
        .flat_map(|pod| json::list(pod, "status.containerStatuses"))
        .map(|container| json::int(container, "restartCount"))
        .sum();
    let failures = i64::try_from(failed).unwrap_or(i64::MAX).saturating_add(restarts);
    let end = if overdue {
        Some(("Failed", "DeadlineExceeded", "Job was active longer than specified deadline"))
    } else if failures > limit {
        Some(("Failed", "BackoffLimitExceeded", "Job has reached the specified backoff limit"))
    } else if wanted.map_or(succeeded > 0 && active.is_empty(), |wanted| succeeded >= wanted) {
        Some(("Complete", "CompletionsReached", "Reached expected number of succeeded pods"))
    } else {
        None
    };
    let suspended = json::truth(job, "spec.suspend");
    let mut again = deadline.and_then(|deadline| u64::try_from(deadline - age).ok()).map(Duration::from_secs);
    let mut running = active.len();
    if end.is_some() || suspended {
        for pod in &active {
            world.delete(pod_resource, pod).await?;
        }
        running = 0;
    } else {
        let missing = wanted.map_or(if succeeded > 0 { active.len() } else { parallel }, |wanted| {
            parallel.min(wanted - succeeded)
        });
        if running < missing {
            match wait(&all) {
                0 => {
                    for index in free_indexes(job, &all, missing - running) {
                        let pod = pod_for(job, index);
                        let pod = world.create(pod_resource, namespace, pod).await?;
                        let message = format!("Created pod: {}", json::text(&pod, "metadata.name"));
                        pods::tell(world, resource, job, false, "SuccessfulCreate", &message).await;
                        running += 1;
                    }
                }
                seconds => {
                    let wait = Duration::from_secs(u64::try_from(seconds).unwrap_or(1));
                    again = Some(again.map_or(wait, |other| other.min(wait)));
                }
            }
        }
        for pod in active.iter().skip(missing) {
            world.delete(pod_resource, pod).await?;
            running -= 1;
        }
    }
    json::set(&mut status, "active", running);
    let mut object = value!({"status": status});
    if let Some((ty, reason, message)) = end {
        for ty in [if ty == "Complete" { "SuccessCriteriaMet" } else { "FailureTarget" }, ty] {
            let condition = value!({
                "type": ty, "status": "True", "lastProbeTime": now, "lastTransitionTime": now, "reason": reason,
                "message": message,
            });
            kinds::set_condition(&mut object, condition);
        }
        if ty == "Complete" {
            json::set(&mut object, "status.completionTime", now.clone());
        }
        again = Some(Duration::ZERO);
    }
    if suspended != condition(job, "Suspended") {
        let (truth, reason) = if suspended { ("True", "JobSuspended") } else { ("False", "JobResumed") };
        let condition = value!({
            "type": "Suspended", "status": truth, "lastProbeTime": now, "lastTransitionTime": now, "reason": reason,
            "message": reason,
        });
        kinds::set_condition(&mut object, condition);
    }
    let status = json::at(&object, "status").cloned().unwrap_or_default();
    super::write_status(world, resource, job, &status).await?;
    if let Some((_, reason, message)) = end {
        pods::tell(world, resource, job, reason != "CompletionsReached", reason, message).await;
    }
    Ok(again)
}

/// Seconds until the next pod may be made: failures since the last success count.
fn wait(all: &[Arc<Value>]) -> i64 {
    let ended = |pod: &Value| {
        let containers = json::list(pod, "status.containerStatuses").iter();
        let times =
            containers.filter_map(|held| clock::parse(json::text(held, "state.terminated.finishedAt")));
        times.max().or_else(|| clock::parse(json::text(pod, "metadata.creationTimestamp"))).unwrap_or(0)
    };
    let of = |phase: &str| -> Vec<i64> {
        let pods = all.iter().filter(|pod| json::text(pod, "status.phase") == phase);
        pods.map(|pod| ended(pod)).collect()
    };
    let success = of("Succeeded").into_iter().max().unwrap_or(0);
    let failures: Vec<i64> = of("Failed").into_iter().filter(|at| *at > success).collect();
    let Some(last) = failures.iter().max() else { return 0 };
    let doubled = BACKOFF.0.saturating_mul(1 << (failures.len() - 1).min(8)).min(BACKOFF.1);
    (last + doubled - clock::unix()).max(0)
}

const INDEX: &str = "batch.kubernetes.io/job-completion-index";

/// Indexes for so many new pods; `None` each if the job has none.
fn free_indexes(job: &Value, all: &[Arc<Value>], count: usize) -> Vec<Option<i64>> {
    if json::text(job, "spec.completionMode") != "Indexed" {
        return vec![None; count];
    }
    let taken: Vec<&str> = all
        .iter()
        .filter(|pod| json::text(pod, "status.phase") != "Failed" && !is_ending(pod))
        .filter_map(|pod| json::map(pod, "metadata.annotations")?.get(INDEX)?.as_str())
        .collect();
    let indexes =
        (0..json::int(job, "spec.completions")).filter(|index| !taken.contains(&index.to_string().as_str()));
    indexes.take(count).map(Some).collect()
}

fn pod_for(job: &Value, index: Option<i64>) -> Value {
    let mut pod = pods::from_template(built_in_resource("batch", "jobs"), job);
    let Some(index) = index else { return pod };
    let name = json::text(job, "metadata.name");
    json::set(&mut pod, "metadata.generateName", format!("{name}-{index}-"));
    json::map_mut(&mut pod, "metadata.annotations").insert(INDEX.to_owned(), value!(index.to_string()));
    json::map_mut(&mut pod, "metadata.labels").insert(INDEX.to_owned(), value!(index.to_string()));
    json::default(&mut pod, "spec.hostname", format!("{name}-{index}"));
    let from = value!({"fieldRef": {"fieldPath": format!("metadata.labels['{INDEX}']")}});
    let variable = value!({"name": "JOB_COMPLETION_INDEX", "valueFrom": from});
    let containers = pod.pointer_mut("/spec/containers").and_then(Value::as_array_mut);
    for container in containers.into_iter().flatten() {
        let mut env = json::list(container, "env").to_vec();
        env.push(variable.clone());
        json::set(container, "env", env);
    }
    pod
}
