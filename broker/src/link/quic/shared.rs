//! Many connections through one socket, each with an identity of its own: how a fleet dials from one process.
//!
//! An agent has one connection and a socket for it. A socket for each of thousands costs descriptors and the
//! receive buffers of a port; here connections are told apart by their ids instead. A path that a
//! middlebox has broken is left behind by dialling through another socket.

use std::{fmt, net::SocketAddr, sync::Arc};

use quinn_proto::{ClientConfig, EndpointConfig, TransportConfig};

use super::{
    BindError, HandshakeError, LISTENER_MESSAGES, QuicTransport, SERVER_NAME, Shape, Side, bind_socket,
    port::Port, start, tls_session::ClientTls, transport_config,
};
use crate::link::{identity::PeerCertificate, tls::TlsError};

/// A bound UDP socket from which many connections are dialled. Cloning shares it; it is closed with its last
/// clone and connection.
#[derive(Clone)]
pub struct QuicSocket {
    port: Port,
    transport: Arc<TransportConfig>,
    streams: u32,
}

impl QuicSocket {
    /// Binds a local address; port 0 picks a free one. Needs a runtime.
    ///
    /// # Errors
    /// The address cannot be bound.
    pub fn bind(local: SocketAddr, shape: Shape) -> Result<Self, BindError> {
        let failed = |source| BindError::Socket { address: local, source };
        let socket = bind_socket(local, false).map_err(failed)?;
        let (port, worker) =
            Port::new(socket, EndpointConfig::default(), None, LISTENER_MESSAGES).map_err(failed)?;
        start(worker);
        Ok(Self { port, transport: Arc::new(transport_config(shape, Side::Dialler)), streams: shape.streams })
    }

    /// Connects to one address with the identity of `tls` ([`tls::dialler`](crate::link::tls::dialler)).
    /// Dropping the future gives the attempt up.
    ///
    /// # Errors
    /// No answer, or not a hub of the pinned tier.
    pub async fn dial(
        &self,
        tls: Arc<rustls::ClientConfig>,
        to: SocketAddr,
    ) -> Result<(QuicTransport, PeerCertificate), HandshakeError> {
        let crypto = ClientTls::new(tls)
            .ok_or_else(|| HandshakeError::Address(TlsError::NoInitialSuite.to_string()))?;
        let mut config = ClientConfig::new(Arc::new(crypto));
        config.transport_config(Arc::clone(&self.transport));
        let connecting = self.port.connect(config, to, SERVER_NAME);
        let connection = connecting.map_err(|error| HandshakeError::Address(error.to_string()))?;
        QuicTransport::connected(connection, self.streams).await
    }
}

impl fmt::Debug for QuicSocket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("QuicSocket").field(&self.port.local_addr()).finish()
    }
}
