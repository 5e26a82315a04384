//! Pins that the hub and the node need nothing in common but a network: two network namespaces, one
//! token, and the same lines that work in `octobus dev`.

use octobus_tests::{
    netns::Cable,
    octobus::{NODE, Octobus, Role, create_token, folder, octobus_at},
    stock::{MosquittoSub, NatsSub, Place, mosquitto_pub, nats_pub},
};

#[test]
fn a_token_a_join_and_an_edge_make_the_same_lines_work() {
    let cable = Cable::new().expect("network namespaces; run as root");
    let folder = folder();
    let (cloud, edge) = (Place::On(&cable.a), Place::On(&cable.b));

    let hub = Octobus::on_machine(Role::Cloud, &folder.path().join("hub"), &cable.a).start();
    let token = create_token(&hub.admin(), NODE);
    let data = folder.path().join("node");
    let hub_address = format!("https://{}", cable.a.address);
    let data_text = data.to_str().unwrap();
    octobus_at(edge, &["join", "--hub", &hub_address, "--token", &token, "--data", data_text]).ok();
    let node = Octobus::on_machine(Role::Edge, &data, &cable.b).start();

    let (mqtt, nats) = (node.endpoint("mqtt"), hub.endpoint("nats"));
    let at_the_hub = NatsSub::start(cloud, nats, "octobus.up.edge-1.>");
    let on_the_node = MosquittoSub::start(edge, mqtt, &["-q", "1", "-t", "valves/#"]);
    mosquitto_pub(edge, mqtt, &["-q", "1", "-t", "sensors/boiler/temp", "-m", "71.5"]).ok();
    nats_pub(cloud, nats, "octobus.down.edge-1.valves.3", "open");
    at_the_hub.expect("octobus.up.edge-1.sensors.boiler.temp", "71.5");
    on_the_node.expect("valves/3", "open");

    node.stop();
    hub.stop();
}
