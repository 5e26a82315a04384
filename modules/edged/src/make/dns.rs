//! The resolver of a pod: whose name servers it asks, and in which domains it searches.

use std::net::IpAddr;

use k8s_openapi::api::core::v1::Pod;

use super::{Settings, names};
use crate::runtime::cri;

/// What resolvers take: more is cut off.
const SERVERS_MAX: usize = 3;
const SEARCHES_MAX: usize = 32;
const SEARCH_CHARS_MAX: usize = 2_048;

/// Reads a `resolv.conf`.
#[must_use]
pub fn read(text: &str) -> cri::DnsConfig {
    let mut found = cri::DnsConfig::default();
    for line in text.lines() {
        let line = line.split(['#', ';']).next().unwrap_or_default();
        let mut words = line.split_whitespace();
        match words.next() {
            Some("nameserver") => found.servers.extend(words.next().map(str::to_owned)),
            // The last one counts, as resolvers have it.
            Some("search" | "domain") => {
                found.searches = words.map(|word| word.trim_end_matches('.').to_owned()).collect();
                found.searches.retain(|word| !word.is_empty());
            }
            Some("options") => found.options.extend(words.map(str::to_owned)),
            _ => {}
        }
    }
    found
}

/// The machine's resolver as pods can use it. Where a resolver on the machine itself stands between (systemd-resolved
/// at 127.0.0.53), no pod reaches that: its own servers are in a file of their own.
#[must_use]
pub fn of_host() -> cri::DnsConfig {
    let files = ["/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"];
    first_for_pods(files.iter().filter_map(|file| std::fs::read_to_string(file).ok()))
}

/// The first that names a server which is not on the machine; else the first.
fn first_for_pods(texts: impl Iterator<Item = String>) -> cri::DnsConfig {
    let mut all: Vec<cri::DnsConfig> = texts.map(|text| read(&text)).collect();
    let is_local = |server: &String| server.parse::<IpAddr>().is_ok_and(|address| address.is_loopback());
    let useful = all.iter().position(|config| config.servers.iter().any(|server| !is_local(server)));
    if all.is_empty() { cri::DnsConfig::default() } else { all.swap_remove(useful.unwrap_or(0)) }
}

pub(super) fn of_pod(pod: &Pod, settings: &Settings) -> cri::DnsConfig {
    let spec = pod.spec.as_ref();
    let on_host = spec.is_some_and(|spec| spec.host_network == Some(true));
    let of_cluster = match spec.and_then(|spec| spec.dns_policy.as_deref()) {
        Some("None" | "Default") => false,
        Some("ClusterFirstWithHostNet") => true,
        _ => !on_host,
    };
    let mut config = if spec.is_some_and(|spec| spec.dns_policy.as_deref() == Some("None")) {
        cri::DnsConfig::default()
    } else {
        settings.host_dns.clone()
    };
    if of_cluster && !settings.cluster_dns.is_empty() {
        config.servers = settings.cluster_dns.iter().map(ToString::to_string).collect();
        config.searches = cluster_searches(pod, settings, &config.searches);
        config.options = vec!["ndots:5".to_owned()];
    }
    if let Some(asked) = spec.and_then(|spec| spec.dns_config.as_ref()) {
        config.servers.extend(asked.nameservers.iter().flatten().cloned());
        config.searches.extend(asked.searches.iter().flatten().cloned());
        for option in asked.options.iter().flatten() {
            let name = names::text(&option.name);
            let text = match &option.value {
                Some(value) if !value.is_empty() => format!("{name}:{value}"),
                _ => name.clone(),
            };
            config.options.retain(|known| known.split(':').next() != Some(name.as_str()));
            config.options.push(text);
        }
    }
    within_limits(config)
}

fn cluster_searches(pod: &Pod, settings: &Settings, host: &[String]) -> Vec<String> {
    let domain = &settings.cluster_domain;
    let mut searches = Vec::new();
    if !domain.is_empty() {
        let namespace = names::text(&pod.metadata.namespace);
        searches.extend([format!("{namespace}.svc.{domain}"), format!("svc.{domain}"), domain.clone()]);
    }
    searches.extend(host.iter().cloned());
    searches
}

fn within_limits(mut config: cri::DnsConfig) -> cri::DnsConfig {
    keep_first(&mut config.servers);
    config.servers.truncate(SERVERS_MAX);
    keep_first(&mut config.searches);
    config.searches.truncate(SEARCHES_MAX);
    let mut left = SEARCH_CHARS_MAX;
    let fits = config.searches.iter().take_while(|search| {
        let fits = search.len() < left;
        left = left.saturating_sub(search.len() + 1);
        fits
    });
    let fits = fits.count();
    config.searches.truncate(fits);
    config
}

/// Of equal ones the first.
fn keep_first(list: &mut Vec<String>) {
    let mut seen = std::collections::BTreeSet::new();
    list.retain(|one| seen.insert(one.clone()));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_resolver_that_only_the_machine_reaches_is_not_given_to_pods() {
        let servers = |texts: &[&str]| first_for_pods(texts.iter().map(|text| (*text).to_owned())).servers;
        let (stub, real) = ("nameserver 127.0.0.53\n", "nameserver 192.0.2.1\nnameserver 192.0.2.2\n");
        assert_eq!(servers(&[stub, real]), ["192.0.2.1", "192.0.2.2"]);
        assert_eq!(servers(&[real, stub]), ["192.0.2.1", "192.0.2.2"]);
        assert_eq!(
            servers(&[stub]),
            ["127.0.0.53"],
            "better than none: a pod on the host's network reaches it"
        );
        assert_eq!(servers(&[]), [""; 0]);
    }

    #[test]
    fn a_resolvers_file_is_read_as_resolvers_read_it() {
        let config = read(
            "# c\nnameserver 1.1.1.1 ; x\ndomain a.example\nsearch b.example. c.example .\noptions ndots:2 rotate\n",
        );
        assert_eq!(config.servers, ["1.1.1.1"]);
        assert_eq!(config.searches, ["b.example", "c.example"], "the last one counts");
        assert_eq!(config.options, ["ndots:2", "rotate"]);
    }
}
