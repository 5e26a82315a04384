//! A long line in this process: a UDP relay that hands every datagram on after half a round trip.

use std::{
    collections::{HashMap, VecDeque, hash_map::Entry},
    io,
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use broker::Tasks;
use tokio::{
    net::UdpSocket,
    sync::mpsc,
    time::{Instant, sleep_until},
};

/// Largest datagram.
const DATAGRAM_MAX: usize = 64 << 10;
/// Datagrams on their way in one direction of one peer; more are lost, as on any line.
const ON_THE_WAY_MAX: usize = 8192;

/// Starts a relay to `to`; where it listens. It ends with `tasks`.
///
/// # Errors
/// No port.
pub async fn start(to: SocketAddr, round_trip: Duration, tasks: &Tasks) -> io::Result<SocketAddr> {
    let front = Arc::new(UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await?);
    let address = front.local_addr()?;
    let (stop, own) = (tasks.stopped(), tasks.clone());
    tasks.spawn("long line", async move {
        let relaying = relay(front, to, round_trip / 2, own);
        tokio::select! {
            () = stop.cancelled() => {}
            ended = relaying => tracing::debug!(?ended, "the long line has ended"),
        }
    });
    Ok(address)
}

/// For each peer a socket of its own towards the hub, so that answers find back.
async fn relay(front: Arc<UdpSocket>, to: SocketAddr, delay: Duration, tasks: Tasks) -> io::Result<()> {
    let mut peers: HashMap<SocketAddr, mpsc::Sender<(Instant, Vec<u8>)>> = HashMap::new();
    let mut buffer = vec![0; DATAGRAM_MAX];
    loop {
        let (length, from) = front.recv_from(&mut buffer).await?;
        let sender = match peers.entry(from) {
            Entry::Occupied(peer) => peer.into_mut(),
            Entry::Vacant(new) => new.insert(connect(&front, from, to, delay, &tasks).await?),
        };
        drop(sender.try_send((Instant::now() + delay, buffer[..length].to_vec())));
    }
}

/// The line of one peer: where its datagrams go in. What the hub answers goes back to it.
async fn connect(
    front: &Arc<UdpSocket>,
    from: SocketAddr,
    to: SocketAddr,
    delay: Duration,
    tasks: &Tasks,
) -> io::Result<mpsc::Sender<(Instant, Vec<u8>)>> {
    let back = Arc::new(UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await?);
    back.connect(to).await?;
    let sender = delayed(Arc::clone(&back), None, tasks);
    let answers = delayed(Arc::clone(front), Some(from), tasks);
    let stop = tasks.stopped();
    tasks.spawn("long line back", async move {
        let mut buffer = vec![0; DATAGRAM_MAX];
        loop {
            let received = tokio::select! {
                () = stop.cancelled() => return,
                received = back.recv(&mut buffer) => received,
            };
            // Nobody listens there now: the datagram is lost, the line stays.
            let Ok(length) = received else { continue };
            drop(answers.try_send((Instant::now() + delay, buffer[..length].to_vec())));
        }
    });
    Ok(sender)
}

/// Sends what comes in when its time has come.
fn delayed(
    socket: Arc<UdpSocket>,
    to: Option<SocketAddr>,
    tasks: &Tasks,
) -> mpsc::Sender<(Instant, Vec<u8>)> {
    let (sender, mut receiver) = mpsc::channel::<(Instant, Vec<u8>)>(ON_THE_WAY_MAX);
    let stop = tasks.stopped();
    tasks.spawn("long line forward", async move {
        let mut waiting = VecDeque::new();
        loop {
            let due = waiting.front().map(|(at, _): &(Instant, Vec<u8>)| *at);
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                datagram = receiver.recv(), if waiting.len() < ON_THE_WAY_MAX => match datagram {
                    Some(datagram) => waiting.push_back(datagram),
                    None => return,
                },
                () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {
                    let Some((_, datagram)) = waiting.pop_front() else { continue };
                    let sent = match to {
                        Some(to) => socket.send_to(&datagram, to).await,
                        None => socket.send(&datagram).await,
                    };
                    drop(sent);
                }
            }
        }
    });
    sender
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_answer_takes_a_round_trip_and_finds_back() {
        let hub = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let tasks = Tasks::new();
        let line = start(hub.local_addr().unwrap(), Duration::from_millis(40), &tasks).await.unwrap();
        let node = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let (began, mut buffer) = (Instant::now(), [0; 16]);
        node.send_to(b"ping", line).await.unwrap();
        let (length, from) = hub.recv_from(&mut buffer).await.unwrap();
        hub.send_to(&buffer[..length], from).await.unwrap();
        let (length, from) = node.recv_from(&mut buffer).await.unwrap();
        assert_eq!((&buffer[..length], from), (&b"ping"[..], line));
        assert!(began.elapsed() >= Duration::from_millis(40), "{:?}", began.elapsed());
    }
}
