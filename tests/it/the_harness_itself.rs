//! Pins that the tools of these tests do what their names say, against brokers that are known to work: a
//! relay that does not cut, or a client that does not see, would let every other test pass.

use std::{
    net::{TcpStream, UdpSocket},
    process::Command,
    time::Duration,
};

use octobus_tests::{
    clock,
    mqtt::{Client, Options, Packet},
    nats,
    netns::Cable,
    octobus::free_port,
    process::Process,
    relay::{Faults, TcpRelay, UdpRelay},
    stock::{MosquittoSub, NatsSub, Place, mosquitto_pub, nats_pub, nats_server},
};

const SOON: Duration = Duration::from_secs(10);

#[test]
fn the_udp_relay_passes_cuts_and_rebinds() {
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    server.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    let relay = UdpRelay::new(server.local_addr().unwrap(), 1);
    let client = UdpSocket::bind("127.0.0.1:0").unwrap();
    client.set_read_timeout(Some(SOON)).unwrap();
    client.connect(relay.address()).unwrap();
    let mut buffer = [0; 16];

    client.send(b"one").unwrap();
    let (n, seen_as) = server.recv_from(&mut buffer).unwrap();
    assert_eq!(&buffer[..n], b"one");
    server.send_to(b"back", seen_as).unwrap();
    assert_eq!(client.recv(&mut buffer).unwrap(), 4);

    relay.set(Faults { cut: true, ..Faults::default() });
    client.send(b"lost").unwrap();
    assert!(server.recv_from(&mut buffer).is_err());
    relay.set(Faults { duplicate: 1.0, delay: Duration::from_millis(50), ..Faults::default() });
    let began = clock::now();
    client.send(b"twice").unwrap();
    for _copy in 0..2 {
        assert_eq!(server.recv_from(&mut buffer).unwrap(), (5, seen_as));
    }
    assert!(began.elapsed() >= Duration::from_millis(50));

    relay.set(Faults::default());
    relay.rebind();
    client.send(b"new").unwrap();
    assert_ne!(server.recv_from(&mut buffer).unwrap().1, seen_as);
}

#[test]
fn the_clients_and_the_tcp_relay_work_with_a_real_mosquitto() {
    let address = free_port();
    let mut command = Command::new("mosquitto");
    let _broker = Process::spawn("mosquitto", command.args(["-p", &address.port().to_string()]));
    clock::wait_for("mosquitto", SOON, || TcpStream::connect(address).ok());

    let relay = TcpRelay::new(address);
    let sub = MosquittoSub::start(Place::Here, address, &["-q", "1", "-t", "a/#"]);
    let mut client = Client::connect(relay.address(), &Options::new("through-the-relay")).unwrap();
    client.subscribe("b/#", 1).unwrap();
    client.publish_acked("a/1", b"from the small client", false).unwrap();
    sub.expect("a/1", "from the small client");
    mosquitto_pub(Place::Here, address, &["-q", "1", "-t", "b/2", "-m", "hello"]).ok();
    let got = client.next_publish(SOON).unwrap();
    assert!(matches!(&got, Packet::Publish { topic, payload, .. } if topic == "b/2" && payload == b"hello"));

    relay.cut();
    assert!(client.is_closed_within(SOON));
    relay.refuse(true);
    assert!(Client::connect(relay.address(), &Options::new("refused")).is_err());
}

#[test]
fn the_nats_clients_work_with_a_real_nats_server() {
    let (_server, address) = nats_server();
    let stock = NatsSub::start(Place::Here, address, "a.>");
    let mut small = nats::Client::connect(address).unwrap();
    small.subscribe("a.*").unwrap();
    small.publish("a.1", b"small").unwrap();
    nats_pub(Place::Here, address, "a.2", "stock");
    stock.expect("a.1", "small");
    stock.expect("a.2", "stock");
    assert_eq!(small.next(SOON).unwrap().payload, b"small");
    assert_eq!(small.next(SOON).unwrap().subject, "a.2");
}

#[test]
fn machines_on_a_cable_reach_each_other_and_nothing_else() {
    let cable = Cable::new().expect("network namespaces; run as root");
    let ping = |to: &str| {
        let script = format!(
            "import socket; s = socket.socket(); s.settimeout(1)\ntry: s.connect(('{to}', 9))\n\
             except ConnectionRefusedError: print('reached')\nexcept OSError as e: print(e)"
        );
        let mut command = cable.b.command("python3");
        octobus_tests::process::run_command(SOON, command.args(["-c", &script])).ok().join(" ")
    };
    assert_eq!(ping(cable.a.address), "reached");
    assert_ne!(ping("192.0.2.1"), "reached");
}
