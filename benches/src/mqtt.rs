//! A raw MQTT 3.1.1 client that costs little and is the same for every server: it writes its own bytes, reads no
//! more of a packet than it must, and lets only so much be under way as fits.

use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, Interest},
    net::{TcpSocket, TcpStream},
    sync::Notify,
    time::timeout,
};

use crate::measure;

/// No answer for this long: what is missing is lost.
const PATIENCE: Duration = Duration::from_secs(3);
const READ_BYTES: usize = 64 << 10;

/// Connects and says CONNECT: clean session, keep-alive of an hour (rumqttd refuses none).
///
/// # Errors
/// The server does not accept.
pub async fn connect(server: SocketAddr, client_id: &str) -> anyhow::Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    let mut stream = timeout(PATIENCE, socket.connect(server)).await.context("connect: no answer")??;
    stream.set_nodelay(true)?;
    // Ports of a thousand clients must not stay in TIME_WAIT: closing resets.
    socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
    let mut packet = Vec::new();
    let body_len = 10 + 2 + client_id.len();
    put_head(&mut packet, 0x10, body_len);
    packet.extend_from_slice(b"\0\x04MQTT\x04\x02\x0e\x10");
    put_text(&mut packet, client_id);
    stream.write_all(&packet).await?;
    let mut connack = [0; 4];
    timeout(PATIENCE, stream.read_exact(&mut connack)).await.context("CONNECT: no answer")??;
    ensure!(connack == [0x20, 2, 0, 0], "{server} does not let {client_id} in: {connack:?}");
    Ok(stream)
}

/// Subscribes to one filter and waits for the answer.
///
/// # Errors
/// The server refuses.
pub async fn subscribe(stream: &mut TcpStream, filter: &str, qos: u8) -> anyhow::Result<()> {
    let mut packet = Vec::new();
    put_head(&mut packet, 0x82, 2 + 2 + filter.len() + 1);
    packet.extend_from_slice(&[0, 1]);
    put_text(&mut packet, filter);
    packet.push(qos);
    stream.write_all(&packet).await?;
    let mut suback = [0; 5];
    timeout(PATIENCE, stream.read_exact(&mut suback)).await.context("SUBSCRIBE: no answer")??;
    ensure!(suback == [0x90, 3, 0, 1, qos], "{filter} is not granted: {suback:?}");
    Ok(())
}

/// One publisher and those who receive from it.
#[derive(Debug)]
pub struct Group {
    stream: TcpStream,
    qos: u8,
    fanout: u64,
    window: u64,
    /// One PUBLISH; the packet id is written over.
    packet: Vec<u8>,
    packet_id_at: usize,
    sent: u64,
    acked: u64,
    shared: Arc<Received>,
}

/// What the receivers of a group have.
#[derive(Debug, Default)]
struct Received {
    deliveries: AtomicU64,
    /// From this many on the publisher wants to know.
    wanted: AtomicU64,
    lost: AtomicU64,
    enough: Notify,
}

impl Received {
    fn add(&self, count: u64) {
        let now = self.deliveries.fetch_add(count, Ordering::Relaxed) + count;
        if now >= self.wanted.load(Ordering::Relaxed) {
            self.enough.notify_one();
        }
    }
}

impl Group {
    /// Connects a publisher and `fanout` subscribers to a topic of their own. At most `window` messages are on
    /// their way at a time: not yet with all subscribers, or not yet acknowledged.
    ///
    /// # Errors
    /// The server refuses one of them.
    pub async fn connect(
        server: SocketAddr,
        name: &str,
        qos: u8,
        fanout: usize,
        window: u64,
        payload: usize,
        tasks: &broker::Tasks,
    ) -> anyhow::Result<Self> {
        let topic = format!("bench/{name}/value");
        let shared = Arc::new(Received::default());
        for n in 0..fanout {
            let mut stream = connect(server, &format!("{name}-s{n}")).await?;
            subscribe(&mut stream, &topic, qos).await?;
            tasks.spawn("subscriber", receive(stream, Arc::clone(&shared)));
        }
        let stream = connect(server, &format!("{name}-p")).await?;
        let mut packet = Vec::new();
        let packet_id_len = if qos > 0 { 2 } else { 0 };
        put_head(&mut packet, 0x30 | qos << 1, 2 + topic.len() + packet_id_len + payload);
        put_text(&mut packet, &topic);
        let packet_id_at = packet.len();
        packet.resize(packet.len() + packet_id_len, 0);
        packet.resize(packet.len() + payload, b'x');
        Ok(Self {
            stream,
            qos,
            fanout: fanout as u64,
            window,
            packet,
            packet_id_at,
            sent: 0,
            acked: 0,
            shared,
        })
    }

    /// Publishes until `end`, then waits for what is on its way. The number of deliveries, and how many were lost.
    ///
    /// # Errors
    /// The connection breaks.
    pub async fn run_until(&mut self, end: Instant) -> anyhow::Result<(u64, u64)> {
        let before = self.shared.deliveries.load(Ordering::Relaxed);
        let lost = self.shared.lost.load(Ordering::Relaxed);
        while measure::now() < end {
            // Half a window at a time, so that everybody's reads and writes carry several packets.
            self.settle(self.window / 2).await?;
            self.send(self.window - self.window / 2).await?;
        }
        self.settle(0).await?;
        let lost = self.shared.lost.load(Ordering::Relaxed) - lost;
        Ok((self.shared.deliveries.load(Ordering::Relaxed) - before - lost, lost))
    }

    async fn send(&mut self, count: u64) -> io::Result<()> {
        let mut burst = Vec::with_capacity(self.packet.len() * count as usize);
        for _ in 0..count {
            if self.qos > 0 {
                let packet_id = (self.sent % 65_535 + 1) as u16;
                self.packet[self.packet_id_at..self.packet_id_at + 2]
                    .copy_from_slice(&packet_id.to_be_bytes());
            }
            burst.extend_from_slice(&self.packet);
            self.sent += 1;
        }
        self.stream.write_all(&burst).await
    }

    /// Waits until at most this many messages are on their way.
    async fn settle(&mut self, under_way: u64) -> anyhow::Result<()> {
        let target = self.sent.saturating_sub(under_way);
        if self.qos > 0 {
            while self.acked < target {
                let acked = timeout(PATIENCE, self.read_acks()).await.context("PUBACK: none")??;
                self.acked += acked;
            }
        }
        let wanted = target * self.fanout;
        self.shared.wanted.store(wanted, Ordering::Relaxed);
        loop {
            let missing = wanted.saturating_sub(self.shared.deliveries.load(Ordering::Relaxed));
            if missing == 0 {
                return Ok(());
            }
            if timeout(PATIENCE, self.shared.enough.notified()).await.is_err() {
                let missing = wanted.saturating_sub(self.shared.deliveries.load(Ordering::Relaxed));
                self.shared.lost.fetch_add(missing, Ordering::Relaxed);
                self.shared.deliveries.fetch_add(missing, Ordering::Relaxed);
            }
        }
    }

    /// PUBACKs are four bytes each, and nothing else comes to a publisher.
    async fn read_acks(&mut self) -> anyhow::Result<u64> {
        let mut raw = [0; 4096];
        let mut len = self.stream.read(&mut raw).await?;
        while len % 4 != 0 {
            len += self.stream.read(&mut raw[len..]).await?;
        }
        ensure!(len > 0, "the server closed the publisher's connection");
        ensure!(raw[0] == 0x40, "a publisher got {:#04x}", raw[0]);
        Ok(len as u64 / 4)
    }
}

/// Counts what comes, and acknowledges what wants it, until the connection ends.
async fn receive(mut stream: TcpStream, shared: Arc<Received>) {
    let (mut raw, mut held) = (Vec::<u8>::new(), 0);
    let mut acks = Vec::new();
    loop {
        if stream.ready(Interest::READABLE).await.is_err() {
            return;
        }
        // Idle receivers keep no buffer: there are a thousand.
        raw.resize(held + READ_BYTES, 0);
        match stream.try_read(&mut raw[held..]) {
            Ok(0) => return,
            Ok(len) => held += len,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            Err(_) => return,
        }
        let Ok((taken, count)) = take_publishes(&raw[..held], &mut acks) else { return };
        raw.copy_within(taken..held, 0);
        held -= taken;
        raw.truncate(held);
        if !acks.is_empty() {
            if stream.write_all(&acks).await.is_err() {
                return;
            }
            acks.clear();
        }
        shared.add(count);
    }
}

/// Whole PUBLISH packets at the start of `raw`: their bytes and their number. PUBACKs are appended to `acks`.
fn take_publishes(raw: &[u8], acks: &mut Vec<u8>) -> anyhow::Result<(usize, u64)> {
    let (mut at, mut count) = (0, 0);
    while let Some((head, len)) = packet_len(&raw[at..]) {
        if raw.len() - at < head + len {
            break;
        }
        let (first, body) = (raw[at], &raw[at + head..at + head + len]);
        if first >> 4 != 3 {
            bail!("a subscriber got {first:#04x}");
        }
        if first & 0x06 != 0 {
            let topic_len = usize::from(u16::from_be_bytes([body[0], body[1]]));
            acks.extend_from_slice(&[0x40, 2, body[2 + topic_len], body[3 + topic_len]]);
        }
        at += head + len;
        count += 1;
    }
    Ok((at, count))
}

/// Length of a packet's head and of its body, if the head is complete.
fn packet_len(raw: &[u8]) -> Option<(usize, usize)> {
    let mut len = 0;
    for (n, byte) in raw.get(1..)?.iter().take(4).enumerate() {
        len |= usize::from(byte & 0x7f) << (7 * n);
        if byte & 0x80 == 0 {
            return Some((n + 2, len));
        }
    }
    None
}

fn put_head(out: &mut Vec<u8>, first: u8, mut len: usize) {
    out.push(first);
    loop {
        let more = if len > 0x7f { 0x80 } else { 0 };
        out.push((len & 0x7f) as u8 | more);
        len >>= 7;
        if more == 0 {
            return;
        }
    }
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    let len = u16::try_from(text.len()).expect("the benches' texts are short");
    out.extend_from_slice(&len.to_be_bytes());
    out.extend_from_slice(text.as_bytes());
}
