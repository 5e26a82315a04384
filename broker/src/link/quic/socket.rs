//! A UDP socket in batches: many datagrams in one call, segments where the kernel knows them (GSO, GRO), ECN.

use std::{
    io::{self, IoSliceMut},
    net::SocketAddr,
    task::{Context, Poll, ready},
};

use quinn_proto::{EcnCodepoint, Transmit};
use quinn_udp::{BATCH_SIZE, RecvMeta, UdpSocketState};
use tokio::{io::Interest, net::UdpSocket};

/// A non-blocking socket of the current runtime.
#[derive(Debug)]
pub(super) struct Socket {
    io: UdpSocket,
    state: UdpSocketState,
}

impl Socket {
    pub(super) fn new(socket: std::net::UdpSocket) -> io::Result<Self> {
        Ok(Self { state: UdpSocketState::new((&socket).into())?, io: UdpSocket::from_std(socket)? })
    }

    pub(super) fn local_addr(&self) -> io::Result<SocketAddr> {
        self.io.local_addr()
    }

    /// Datagrams that one [`Transmit`] may hold.
    pub(super) fn segments_max(&self) -> usize {
        self.state.max_gso_segments().min(SEGMENTS_MAX)
    }

    pub(super) fn may_fragment(&self) -> bool {
        self.state.may_fragment()
    }

    /// Sends; what the network refuses is lost, as on any network.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] only.
    pub(super) fn try_send(&self, transmit: &Transmit, contents: &[u8]) -> io::Result<()> {
        let transmit = quinn_udp::Transmit {
            destination: transmit.destination,
            ecn: transmit.ecn.and_then(|ecn| quinn_udp::EcnCodepoint::from_bits(ecn as u8)),
            contents: &contents[..transmit.size],
            segment_size: transmit.segment_size,
            src_ip: transmit.src_ip,
        };
        let sent = self.io.try_io(Interest::WRITABLE, || self.state.send((&self.io).into(), &transmit));
        match sent {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => {
                tracing::debug!(%error, "a datagram was not sent");
                Ok(())
            }
            sent => sent,
        }
    }

    pub(super) fn poll_writable(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.io.poll_send_ready(cx)
    }

    /// Receives into `buffer` and hands over each datagram; how many calls' worth there was.
    pub(super) fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        buffer: &mut ReceiveBuffer,
        mut each: impl FnMut(Datagram<'_>),
    ) -> Poll<io::Result<()>> {
        let mut metas = [RecvMeta::default(); BATCH_SIZE];
        let received = loop {
            ready!(self.io.poll_recv_ready(cx))?;
            let mut chunks = buffer.bytes.chunks_exact_mut(MESSAGE_MAX);
            let mut slices: [IoSliceMut<'_>; BATCH_SIZE] =
                std::array::from_fn(|_| IoSliceMut::new(chunks.next().unwrap_or_default()));
            let slices = &mut slices[..buffer.messages];
            let receiving = || self.state.recv((&self.io).into(), slices, &mut metas);
            match self.io.try_io(Interest::READABLE, receiving) {
                Ok(received) => break received,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                // Of a former datagram; anybody could cause it.
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        };
        for (meta, message) in metas.iter().zip(buffer.bytes.chunks_exact(MESSAGE_MAX)).take(received) {
            let ecn = meta.ecn.and_then(|ecn| EcnCodepoint::from_bits(ecn as u8));
            for bytes in message[..meta.len].chunks(meta.stride.max(1)) {
                each(Datagram { from: meta.addr, to: meta.dst_ip, ecn, bytes });
            }
        }
        Poll::Ready(Ok(()))
    }
}

/// A datagram where it was received.
#[derive(Debug, Clone, Copy)]
pub(super) struct Datagram<'a> {
    pub(super) from: SocketAddr,
    pub(super) to: Option<std::net::IpAddr>,
    pub(super) ecn: Option<EcnCodepoint>,
    pub(super) bytes: &'a [u8],
}

/// Where datagrams are received. Pages that no datagram has reached cost nothing.
#[derive(Debug)]
pub(super) struct ReceiveBuffer {
    bytes: Box<[u8]>,
    messages: usize,
}

impl ReceiveBuffer {
    /// For this many messages in one call, each of up to 64 KiB of segments.
    pub(super) fn new(messages: usize) -> Self {
        let messages = messages.clamp(1, BATCH_SIZE);
        Self { bytes: vec![0; messages * MESSAGE_MAX].into(), messages }
    }
}

/// What the kernel puts together at most.
const MESSAGE_MAX: usize = 64 << 10;
/// Above this a send gains little and holds up its neighbours.
const SEGMENTS_MAX: usize = 10;
