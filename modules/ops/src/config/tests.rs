use broker::core::Full;
use codec::Class;

use super::*;

fn resolve(
    role: Role,
    file: &str,
    env: &[(&str, &str)],
    flags: &[(&'static str, &str)],
) -> Result<Config, ConfigError> {
    let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
    let file = (!file.is_empty()).then(|| (PathBuf::from("octobus.toml"), file.to_owned()));
    let env = [("HOME", "/home/me")].iter().chain(env).map(owned).collect();
    let flags = flags.iter().map(|(name, value)| (*name, (*value).to_owned())).collect();
    Config::resolve(role, Sources { file, env, flags })
}

fn places(result: Result<Config, ConfigError>) -> Vec<String> {
    result.unwrap_err().mistakes.into_iter().map(|mistake| mistake.place).collect()
}

#[test]
fn a_flag_beats_the_environment_and_the_environment_the_file() {
    let file = "[listen]\nmqtt = '127.0.0.1:1'\nnats = '127.0.0.1:1'\nmetrics = '127.0.0.1:1'";
    let env = [("OCTOBUS_MQTT", "127.0.0.1:2"), ("OCTOBUS_NATS", "127.0.0.1:2")];
    let config = resolve(Role::Edge, file, &env, &[("--mqtt", "127.0.0.1:3")]).unwrap();
    let port = |addr: Option<SocketAddr>| addr.unwrap().port();
    assert_eq!(port(config.listen.mqtt), 3);
    assert_eq!(port(config.listen.nats), 2);
    assert_eq!(port(config.listen.metrics), 1);
}

#[test]
fn all_mistakes_of_all_layers_are_reported_at_once() {
    let file = "dta = '/x'\n[listen]\nmqtt = 'nonsense'\nntas = 'off'\n[limits]\nheartbeat = 5\n[[stream]]\nname = 'UPPER'";
    let env = [("OCTOBUS_NTAS", "off"), ("OCTOBUS_ANONYMOUS", "yes"), ("PATH", "/bin")];
    let error =
        resolve(Role::Edge, file, &env, &[("--metrics", "10003"), ("--bootstrap", "off")]).unwrap_err();
    let text = error.to_string();
    for expected in [
        "octobus.toml, key dta: there is no such key; did you mean data?",
        "octobus.toml, key listen.ntas: there is no such key; did you mean listen.nats?",
        "octobus.toml, key listen.mqtt = \"nonsense\": not HOST:PORT",
        "octobus.toml, key limits.heartbeat = \"5\": not a duration",
        "octobus.toml, key stream[0].name: \"UPPER\" is not a name",
        "octobus.toml, key stream[0].filters: is missing",
        "OCTOBUS_NTAS (environment): there is no such setting; did you mean OCTOBUS_NATS?",
        "OCTOBUS_ANONYMOUS (environment) = \"yes\": not true or false",
        "--metrics = \"10003\": not HOST:PORT",
        "--bootstrap: has no meaning for `octobus edge`",
    ] {
        assert!(text.contains(expected), "{expected}\nis not in\n{text}");
    }
    assert_eq!(error.mistakes.len(), 10, "{text}");
}

#[test]
fn a_file_that_is_not_toml_is_named_with_its_line() {
    let text = resolve(Role::Edge, "data = '/x'\n= 3", &[], &[]).unwrap_err().to_string();
    assert!(text.contains("octobus.toml: not TOML") && text.contains("line 2"), "{text}");
}

#[test]
fn anonymous_clients_are_let_in_by_default_only_in_dev() {
    assert!(resolve(Role::Dev, "", &[], &[]).unwrap().auth.anonymous);
    assert!(resolve(Role::Edge, "", &[], &[]).unwrap().auth.refuses_everybody());
    assert!(resolve(Role::Cloud, "", &[], &[]).unwrap().auth.refuses_everybody());
    let with_users = resolve(Role::Dev, "", &[], &[("--users", "/etc/users")]).unwrap();
    assert!(!with_users.auth.anonymous && !with_users.auth.refuses_everybody());
}

#[test]
fn anonymous_is_refused_where_a_front_listens_beyond_loopback() {
    let wide = places(resolve(Role::Dev, "", &[], &[("--mqtt", "0.0.0.0:1883")]));
    assert_eq!(wide, ["key listen.mqtt (OCTOBUS_MQTT, --mqtt)"]);
    let wide = places(resolve(Role::Cloud, "", &[], &[("--nats", "[::]:4222"), ("--anonymous", "true")]));
    assert_eq!(wide, ["key listen.nats (OCTOBUS_NATS, --nats)"]);
    assert!(resolve(Role::Edge, "", &[], &[("--anonymous", "true")]).is_ok());
    assert!(resolve(Role::Edge, "", &[], &[("--mqtt", "0.0.0.0:1883")]).is_ok(), "closed, so harmless");
}

#[test]
fn a_hub_and_a_node_on_one_machine_do_not_collide_by_default() {
    let used = |role| {
        let listen = resolve(role, "", &[], &[]).unwrap().listen;
        [listen.mqtt, listen.nats, listen.websocket, listen.quic, listen.bootstrap, listen.metrics]
            .into_iter()
            .flatten()
            .map(|addr| addr.port())
            .collect::<Vec<_>>()
    };
    let (hub, node) = (used(Role::Cloud), used(Role::Edge));
    assert_eq!(hub, [4222, 10000, 10001, 10002, 10003]);
    assert_eq!(node, [1883, 4223, 10004]);
}

#[test]
fn dev_listens_on_loopback_only() {
    let listen = resolve(Role::Dev, "", &[], &[]).unwrap().listen;
    let all = [
        listen.mqtt,
        listen.nats,
        listen.websocket,
        listen.quic,
        listen.bootstrap,
        listen.kubernetes,
        listen.metrics,
    ];
    assert!(all.into_iter().all(|addr| addr.unwrap().ip().is_loopback()));
    assert_eq!(listen.node_nats, None);
}

#[test]
fn dev_splits_into_a_hub_and_a_node_that_share_nothing() {
    let config = resolve(Role::Dev, "", &[("XDG_STATE_HOME", "/state")], &[]).unwrap();
    assert_eq!(config.data, Path::new("/state/octobus/dev"));
    let hub = config.dev_hub();
    let linked = units::hub("quic://127.0.0.1:777").unwrap();
    let node = config.dev_node(linked.clone());
    assert_eq!(hub.data, Path::new("/state/octobus/dev/hub"));
    assert_eq!(hub.listen.admin, Path::new("/state/octobus/dev/hub/admin.sock"));
    assert_eq!(node.listen.admin, Path::new("/state/octobus/dev/node/admin.sock"));
    assert_eq!((hub.listen.mqtt, node.listen.quic), (None, None));
    assert_eq!(node.hubs, [linked]);
    assert_eq!((hub.role, node.role), (Role::Cloud, Role::Edge));
}

#[test]
fn the_ways_to_one_hub_are_one_hub_and_a_proxy_has_no_password() {
    let file = "hub = ['quic://h:1', 'wss://h:443']\nproxy = 'http://proxy:8080'";
    let config = resolve(Role::Edge, file, &[], &[]).unwrap();
    assert_eq!(config.hubs, [Hub { host: "h".into(), quic: Some(1), websocket: Some(443) }]);
    assert_eq!(config.proxy, Some(Proxy { host: "proxy".into(), port: 8080 }));
    let effective = config.effective();
    assert_eq!(resolve(Role::Edge, &effective, &[], &[]).unwrap(), config, "{effective}");
    assert_eq!(places(resolve(Role::Edge, "", &[("OCTOBUS_PROXY", "http://me:x@proxy:1")], &[])).len(), 1);
}

#[test]
fn the_default_stream_is_always_there_and_last() {
    let file = "[[stream]]\nname = 'default'\nmax_bytes = '2GiB'\n[[stream]]\nname = 'alarms'\nfilters = ['alarms/#']\nclass = 'alarm'";
    let streams = resolve(Role::Edge, file, &[], &[]).unwrap().streams;
    let names: Vec<&str> = streams.iter().map(|stream| &*stream.name).collect();
    assert_eq!(names, ["alarms", "default"]);
    assert_eq!(streams[1].policy.bytes_max, 2 << 30);
    assert_eq!(
        (streams[0].class, streams[0].policy.full),
        (Class::Alarm, Full::Reject),
        "its class's default"
    );
    let twice = "[[stream]]\nname = 'a'\nfilters = ['x']\n[[stream]]\nname = 'a'\nfilters = ['y']";
    assert_eq!(places(resolve(Role::Edge, twice, &[], &[])), ["stream \"a\""]);
}

#[test]
fn a_stream_says_what_is_kept_of_it_and_alarms_are_not_thinned() {
    let file = "[[stream]]\nname = 's'\nfilters = ['s/#']\nmax_count = 1000\nmax_age = '7d'\nfull = 'thin'\n\
                thin_window = '500ms'\nttl = '1h'\nretain_acked = '5m'";
    let config = resolve(Role::Edge, file, &[], &[]).unwrap();
    let policy = config.streams[0].policy.clone();
    let minutes = |minutes| Some(Duration::from_mins(minutes));
    assert_eq!(policy.full, Full::Thin { window: Duration::from_millis(500) });
    assert_eq!((policy.count_max, policy.age_max), (Some(1000), minutes(7 * 24 * 60)));
    assert_eq!((policy.ttl, policy.retain_acked), (minutes(60), minutes(5)));
    assert_eq!(resolve(Role::Edge, &config.effective(), &[], &[]).unwrap(), config);

    let one = |more: &str| format!("[[stream]]\nname = 's'\nfilters = ['s/#']\n{more}");
    let mistake = |more: &str| places(resolve(Role::Edge, &one(more), &[], &[])).join(" ");
    assert!(mistake("class = 'alarm'\nfull = 'thin'").contains("full"), "alarms are never thinned");
    assert!(mistake("thin_window = '1s'").contains("full"), "without thin it has no meaning");
    assert!(mistake("retain_acked = '1m'").contains("retain_acked"), "a tier that lost its tail asks again");
    assert!(!mistake("full = 'sometimes'").is_empty());
    let reserved = "[[stream]]\nname = 'dead-letter'\nfilters = ['x']";
    assert!(!places(resolve(Role::Edge, reserved, &[], &[])).is_empty());
}

#[test]
fn one_file_serves_every_role() {
    let file =
        "hub = ['hub.example']\nnode = 'edge-7'\n[listen]\nbootstrap = '0.0.0.0:1'\nmqtt = '127.0.0.1:1'";
    let edge = resolve(Role::Edge, file, &[], &[]).unwrap();
    assert_eq!(edge.hubs, [units::hub("hub.example").unwrap()]);
    assert_eq!(edge.listen.bootstrap, None);
    assert_eq!(resolve(Role::Cloud, file, &[], &[]).unwrap().listen.mqtt, None);
}

#[test]
fn a_node_that_listens_for_links_is_a_relay_and_does_so_only_when_told() {
    assert_eq!(resolve(Role::Edge, "", &[], &[]).unwrap().listen.quic, None);
    let relay = resolve(Role::Edge, "", &[], &[("--quic", "0.0.0.0:10001")]).unwrap();
    assert_eq!(relay.listen.quic.unwrap().port(), 10001);
    let behind = resolve(Role::Edge, "hub = ['gw']\nrelay = 'gw-1'", &[], &[]).unwrap();
    assert_eq!(behind.relay.as_deref(), Some("gw-1"));
    assert_eq!(places(resolve(Role::Cloud, "", &[], &[("--relay", "gw-1")])), ["--relay"]);
}

#[test]
fn the_effective_configuration_reads_back_as_itself() {
    let file = "node = 'edge-7'\nhub = ['h']\n[[stream]]\nname = 'a'\nfilters = ['a/#']\nclass = 'event'";
    for role in [Role::Dev, Role::Cloud, Role::Edge] {
        let config = resolve(role, file, &[], &[]).unwrap();
        assert_eq!(resolve(role, &config.effective(), &[], &[]).unwrap(), config);
    }
}

/// Lines that begin with `#cloud# ` hold the defaults of that role, and so on for the others.
#[test]
fn the_sample_file_holds_exactly_the_defaults_of_each_role() {
    let sample = include_str!("../../../../docs/octobus.toml");
    for role in [Role::Dev, Role::Cloud, Role::Edge] {
        let mark = format!("#{}# ", role.as_str());
        let text: Vec<&str> = sample.lines().map(|line| line.strip_prefix(&mark).unwrap_or(line)).collect();
        let from_sample = resolve(role, &text.join("\n"), &[], &[]).unwrap();
        assert_eq!(from_sample, resolve(role, "", &[], &[]).unwrap(), "{}", role.as_str());
    }
}

#[test]
fn the_sample_file_names_every_key() {
    let sample = include_str!("../../../../docs/octobus.toml");
    for role in [Role::Dev, Role::Cloud, Role::Edge] {
        let effective: toml::Table = resolve(role, "", &[], &[]).unwrap().effective().parse().unwrap();
        for (name, value) in &effective {
            let inner = value.as_table().into_iter().flat_map(|table| table.keys());
            for key in inner.chain([name]) {
                assert!(sample.contains(key.as_str()), "{key} is missing in docs/octobus.toml");
            }
        }
    }
}

#[test]
fn a_budget_says_what_it_concerns_and_how_much_it_permits() {
    let file = "[[budget]]\nname = 'metered'\nclasses = ['telemetry', 'bulk']\nrate = '16KiB'\nper_month = '500MiB'\n\
                [[budget]]\nname = 'by-night'\nstreams = ['video']\nwindows = ['22:00-06:00', '12:30-13:00']";
    let config = resolve(Role::Edge, file, &[], &[]).unwrap();
    let [metered, night] = &config.budgets[..] else { panic!("two") };
    assert_eq!(metered.classes, [Class::Telemetry, Class::Bulk]);
    let rate = metered.rate.unwrap();
    assert_eq!((rate.bytes, rate.burst, metered.per_month), (16 << 10, 16 << 10, Some(500 << 20)));
    assert_eq!(night.windows, [(22 * 60, 6 * 60), (12 * 60 + 30, 13 * 60)]);
    let again = resolve(Role::Edge, &config.effective(), &[], &[]).unwrap();
    assert_eq!(again.budgets, config.budgets);
    for (wrong, expected) in [
        ("rate = '1KiB'\nclasses = ['control']", "not a class that a budget can hold"),
        ("windows = ['22-6']", "not a window of the UTC day"),
        ("windows = ['25:00-06:00']", "not a window of the UTC day"),
        ("per_day = '0'", "is nothing"),
        ("streams = ['a']", "limits nothing"),
        ("burst = '1KiB'\nper_day = '1MiB'", "a burst without a rate"),
        ("per_week = '1MiB'\nrate = '1KiB'", "there is no such key"),
    ] {
        let error = resolve(Role::Edge, &format!("[[budget]]\nname = 'b'\n{wrong}"), &[], &[]).unwrap_err();
        assert!(error.to_string().contains(expected), "{wrong}: {error}");
    }
}

#[test]
fn a_replica_of_a_tier_has_servers_and_a_name_and_no_nats_front() {
    let flags = [("--fabric", "nats-1,tls://nats-2:4333"), ("--replica", "hub-1")];
    let config = resolve(Role::Cloud, "", &[], &flags).unwrap();
    let fabric = config.fabric.clone().unwrap();
    assert_eq!(fabric.servers, ["nats://nats-1:4222", "tls://nats-2:4333"]);
    assert_eq!((&*fabric.replica, config.listen.nats), ("hub-1", None));
    assert_eq!(fabric.durability(), fabric::Durability::Process, "what JetStream promises by itself");
    assert_eq!(resolve(Role::Cloud, &config.effective(), &[], &[]).unwrap(), config);
    for (file, flags, expected) in [
        ("", vec![("--fabric", "nats-1")], "every replica needs a name of its own"),
        ("", [&flags[..], &[("--nats", "127.0.0.1:4222")]].concat(), "clients speak to those servers"),
        ("", vec![("--fabric", "http://nats-1"), ("--replica", "a")], "not the address of a nats-server"),
        ("", vec![("--fabric", "nats://me:secret@nats-1"), ("--replica", "a")], "holds a user"),
        ("[fabric]\nuser = 'octobus'", flags.to_vec(), "belong together"),
        ("[fabric]\nrequire_durability = 'power-loss'", flags.to_vec(), "sync_interval: always"),
    ] {
        let error = resolve(Role::Cloud, file, &[], &flags).unwrap_err().to_string();
        assert!(error.contains(expected), "{expected}\nis not in\n{error}");
    }
    let foreign = resolve(Role::Edge, "", &[], &flags).unwrap_err().to_string();
    assert!(foreign.contains("--replica: has no meaning"), "{foreign}");
}
