//! Several ports at one address, each with its worker, and which of them a datagram belongs to.
//!
//! A connection belongs to the port that took its first packet. All ids that it gives are random, drawn until a
//! keyed hash of the id names that port: so an id says nothing to who does not know the key, whoever makes one
//! up reaches some port as with any other, and a first packet, whose id is the peer's choice, has one owner too.
//! The kernel computes the same hash and picks the socket (classic BPF, `SO_ATTACH_REUSEPORT_CBPF`); where it is
//! not allowed to, it picks by address, and a port that gets another's datagram hands it over, bounded in bytes.

use std::{
    io,
    net::UdpSocket,
    os::fd::AsRawFd as _,
    sync::{
        Arc, OnceLock, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use quinn_proto::{ConnectionId, ConnectionIdGenerator};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};

use super::port::Shared;

/// The ports of one address.
pub(super) struct Group {
    key: u32,
    ports: Box<[OnceLock<Weak<Shared>>]>,
    /// Datagrams that came to another port than their own.
    handed_over: AtomicU64,
}

/// A port's place in its group.
#[derive(Clone)]
pub(super) struct Place {
    group: Arc<Group>,
    index: usize,
}

/// Where ids begin in a packet: after the first byte, or after that, the version and the id's length.
const SHORT_ID_AT: usize = 1;
const LONG_ID_AT: usize = 6;
const LONG_FORM: u8 = 0x80;
/// Bytes of an id; the first half of them is hashed.
const ID_LEN: usize = 8;
/// Knuth's multiplicative hash; its high bits are the good ones.
const MULTIPLIER: u32 = 2_654_435_761;
const SHIFT: u32 = 16;
/// Return the accumulator.
const BPF_A: u32 = 0x10;

impl Group {
    /// For this many ports.
    pub(super) fn new(ports: usize) -> Arc<Self> {
        let key = getrandom::u32().unwrap_or_else(|_error| std::process::id());
        let ports = (0..ports).map(|_port| OnceLock::new()).collect();
        Arc::new(Self { key, ports, handed_over: AtomicU64::new(0) })
    }

    /// The place of each port.
    pub(super) fn places(self: &Arc<Self>) -> impl Iterator<Item = Place> {
        (0..self.ports.len()).map(|index| Place { group: Arc::clone(self), index })
    }

    fn owner(&self, id: [u8; 4]) -> usize {
        let hash = (u32::from_be_bytes(id) ^ self.key).wrapping_mul(MULTIPLIER) >> SHIFT;
        hash as usize % self.ports.len()
    }

    /// Has the kernel pick the same port as [`owner`](Self::owner). `first` is the socket that was bound first.
    #[allow(unsafe_code)]
    pub(super) fn steer(&self, first: &UdpSocket) -> io::Result<()> {
        let mut program = self.program();
        let filter = libc::sock_fprog {
            len: u16::try_from(program.len()).expect("ten lines"),
            filter: program.as_mut_ptr(),
        };
        let len = libc::socklen_t::try_from(size_of_val(&filter)).expect("16 bytes");
        // SAFETY: the descriptor is open as long as `first`, and the kernel copies the program, which is as
        // long as `filter` says, before the call returns.
        let set = unsafe {
            libc::setsockopt(
                first.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_ATTACH_REUSEPORT_CBPF,
                (&raw const filter).cast(),
                len,
            )
        };
        if set == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    fn program(&self) -> [libc::sock_filter; 10] {
        let ports = u32::try_from(self.ports.len()).expect("few");
        let at = |offset: usize| u32::try_from(offset).expect("small");
        let line = |code: u32, jt: u8, jf: u8, k: u32| libc::sock_filter {
            code: u16::try_from(code).expect("an operation"),
            jt,
            jf,
            k,
        };
        [
            line(libc::BPF_LD | libc::BPF_B | libc::BPF_ABS, 0, 0, 0),
            line(libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K, 0, 2, u32::from(LONG_FORM)),
            line(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, at(LONG_ID_AT)),
            line(libc::BPF_JMP | libc::BPF_JA, 0, 0, 1),
            line(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, at(SHORT_ID_AT)),
            line(libc::BPF_ALU | libc::BPF_XOR | libc::BPF_K, 0, 0, self.key),
            line(libc::BPF_ALU | libc::BPF_MUL | libc::BPF_K, 0, 0, MULTIPLIER),
            line(libc::BPF_ALU | libc::BPF_RSH | libc::BPF_K, 0, 0, SHIFT),
            line(libc::BPF_ALU | libc::BPF_MOD | libc::BPF_K, 0, 0, ports),
            line(libc::BPF_RET | BPF_A, 0, 0, 0),
        ]
    }
}

impl Place {
    /// The port takes its place.
    pub(super) fn take(&self, port: &Arc<Shared>) {
        // A place is taken once.
        drop(self.group.ports[self.index].set(Arc::downgrade(port)));
    }

    /// Another port of the group to which this datagram belongs, if it still serves.
    pub(super) fn other_owner(&self, datagram: &[u8]) -> Option<Arc<Shared>> {
        let id_at = if datagram.first()? & LONG_FORM == 0 { SHORT_ID_AT } else { LONG_ID_AT };
        let id = datagram.get(id_at..id_at + 4)?.first_chunk()?;
        let owner = self.group.owner(*id);
        if owner == self.index {
            return None;
        }
        let port = self.group.ports[owner].get()?.upgrade()?;
        self.group.handed_over.fetch_add(1, Ordering::Relaxed);
        Some(port)
    }

    /// Gives ids that name this port.
    pub(super) fn ids(&self) -> Ids {
        let mut seed = [0; 32];
        getrandom::fill(&mut seed).expect("without randomness there is no TLS either");
        Ids { place: self.clone(), random: StdRng::from_seed(seed) }
    }
}

/// Random ids of one port.
pub(super) struct Ids {
    place: Place,
    random: StdRng,
}

impl ConnectionIdGenerator for Ids {
    fn generate_cid(&mut self) -> ConnectionId {
        loop {
            let id: [u8; ID_LEN] = self.random.random();
            let hashed = *id.first_chunk().expect("half of it");
            if self.place.group.owner(hashed) == self.place.index {
                return ConnectionId::new(&id);
            }
        }
    }

    fn cid_len(&self) -> usize {
        ID_LEN
    }

    fn cid_lifetime(&self) -> Option<Duration> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_name_their_port_and_no_two_are_alike() {
        for ports in 1..6 {
            let group = Group::new(ports);
            for place in group.places() {
                let mut ids = place.ids();
                let drawn: std::collections::BTreeSet<Vec<u8>> =
                    (0..200).map(|_| ids.generate_cid().to_vec()).collect();
                assert_eq!(drawn.len(), 200);
                for id in drawn {
                    let (short, long) =
                        ([&[0x41][..], &id].concat(), [&[0xc1, 0, 0, 0, 1, 8][..], &id].concat());
                    let owner = group.owner(*id.first_chunk().unwrap());
                    assert_eq!(owner, place.index);
                    for packet in [short, long] {
                        let id_at = if packet[0] & LONG_FORM == 0 { SHORT_ID_AT } else { LONG_ID_AT };
                        assert_eq!(group.owner(*packet[id_at..].first_chunk().unwrap()), place.index);
                        (0..packet.len()).for_each(|cut| drop(place.other_owner(&packet[..cut])));
                    }
                }
            }
        }
    }

    #[test]
    fn the_kernel_picks_the_port_that_an_id_names() {
        use socket2::{Domain, Socket, Type};
        let bind = |address: std::net::SocketAddr| {
            let socket = Socket::new(Domain::IPV4, Type::DGRAM, None).unwrap();
            socket.set_reuse_port(true).unwrap();
            socket.bind(&address.into()).unwrap();
            socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
            UdpSocket::from(socket)
        };
        let group = Group::new(3);
        let first = bind("127.0.0.1:0".parse().unwrap());
        let address = first.local_addr().unwrap();
        let sockets = [first, bind(address), bind(address)];
        group.steer(&sockets[0]).unwrap();
        let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
        for (place, socket) in group.places().zip(&sockets) {
            let mut ids = place.ids();
            for header in [&[0x41][..], &[0xc1, 0, 0, 0, 1, 8][..]] {
                let packet = [header, &ids.generate_cid(), b"and the rest"].concat();
                sender.send_to(&packet, address).unwrap();
                let mut buffer = [0; 100];
                let len = socket.recv(&mut buffer).unwrap();
                assert_eq!(buffer[..len], packet);
            }
        }
    }
}
