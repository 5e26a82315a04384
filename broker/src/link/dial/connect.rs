//! One attempt at one hub: QUIC and WebSocket side by side, the first that is through.
//!
//! The preferred way has a head start; the other begins when that is over, or at once when the first has
//! failed. So where UDP is dropped without a word a link costs [`HEAD_START`] more, once: the way that
//! worked is preferred from then on, also after a restart.

use std::{net::SocketAddr, time::Duration};

use tokio::{
    net::lookup_host,
    time::{sleep, timeout},
};

use super::{
    super::{
        quic::{QuicDialler, QuicTransport},
        websocket::{WebSocketDialler, WebSocketTransport},
    },
    Dialler, Hub, Way,
};
use crate::core::event::Peer;

/// What the preferred way has for itself: two lost first packets of QUIC at its initial round trip of 333 ms.
const HEAD_START: Duration = Duration::from_millis(1500);
/// Addresses of one name that are tried.
const ADDRESSES_MAX: usize = 4;

/// Which ways are tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Order {
    /// Both, this one with a head start.
    First(Way),
    /// A probe.
    QuicOnly,
}

/// An authenticated connection.
#[derive(Debug)]
pub(super) enum Connected {
    Quic(QuicTransport),
    WebSocket(WebSocketTransport),
}

impl Connected {
    pub(super) const fn way(&self) -> Way {
        match self {
            Self::Quic(_) => Way::Quic,
            Self::WebSocket(_) => Way::WebSocket,
        }
    }
}

type Outcome = Result<(Connected, Peer), String>;

/// Connects, or says of each way why not. Dropping the future gives all attempts up.
pub(super) async fn connect(dialler: &Dialler, hub: &Hub, order: Order) -> Outcome {
    let patience = dialler.params.handshake;
    let quic = async |port: u16| by_quic(&dialler.quic, &hub.host, port, patience).await;
    let websocket = async |port: u16| by_websocket(&dialler.websocket, &hub.host, port, patience).await;
    match (order, hub.quic, hub.websocket) {
        (Order::QuicOnly, Some(port), _) | (Order::First(_), Some(port), None) => quic(port).await,
        (Order::First(_), None, Some(port)) => websocket(port).await,
        (Order::First(Way::Quic), Some(udp), Some(tcp)) => race(quic(udp), websocket(tcp)).await,
        (Order::First(Way::WebSocket), Some(udp), Some(tcp)) => race(websocket(tcp), quic(udp)).await,
        (_, None, _) => Err("no way to dial it is known".to_owned()),
    }
}

/// The first that succeeds; `second` begins after [`HEAD_START`] or when `first` has failed.
async fn race(first: impl Future<Output = Outcome>, second: impl Future<Output = Outcome>) -> Outcome {
    let (mut first, mut second) = (std::pin::pin!(first), std::pin::pin!(second));
    let mut failed = None;
    tokio::select! {
        biased;
        outcome = &mut first => match outcome {
            Ok(connected) => return Ok(connected),
            Err(error) => failed = Some(error),
        },
        () = sleep(HEAD_START) => {}
    }
    let other = match failed {
        Some(_) => second.await,
        None => tokio::select! {
            biased;
            outcome = &mut first => match outcome {
                Ok(connected) => Ok(connected),
                Err(error) => {
                    failed = Some(error);
                    second.await
                }
            },
            outcome = &mut second => match outcome {
                Ok(connected) => Ok(connected),
                Err(error) => {
                    failed = Some(error);
                    first.await
                }
            },
        },
    };
    other.map_err(|error| match failed {
        Some(failed) => format!("{failed}; {error}"),
        None => error,
    })
}

/// Tries the addresses of a hub one after the other, all within `patience`.
async fn by_quic(quic: &QuicDialler, host: &str, port: u16, patience: Duration) -> Outcome {
    let resolved = timeout(patience, lookup_host((host, port))).await;
    let addresses: Vec<SocketAddr> = match resolved {
        Ok(Ok(addresses)) => addresses.take(ADDRESSES_MAX).collect(),
        Ok(Err(error)) => return Err(format!("cannot resolve {host}: {error}")),
        Err(_elapsed) => return Err(format!("cannot resolve {host}: no answer")),
    };
    let each = patience / u32::try_from(addresses.len().max(1)).expect("few");
    let mut last = format!("{host} has no address");
    for address in addresses {
        last = match timeout(each, quic.dial(address)).await {
            Ok(Ok((transport, certificate))) => {
                return Ok((Connected::Quic(transport), certificate.identity.peer()));
            }
            Ok(Err(error)) => format!("quic://{address}: {error}"),
            Err(_elapsed) => format!("quic://{address}: no answer (is UDP blocked?)"),
        };
    }
    Err(last)
}

async fn by_websocket(websocket: &WebSocketDialler, host: &str, port: u16, patience: Duration) -> Outcome {
    match websocket.dial(host, port, patience).await {
        Ok((transport, certificate)) => Ok((Connected::WebSocket(transport), certificate.identity.peer())),
        Err(error) => Err(format!("wss://{host}:{port}: {error}")),
    }
}
