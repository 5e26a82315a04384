//! Many connections through one socket, each with an identity of its own: how a fleet dials from one process.
//!
//! An agent has one connection and a socket for it. A socket for each of thousands costs descriptors and the
//! receive buffers of an endpoint; here connections are told apart by their ids instead. A path that a
//! middlebox has broken is left behind by dialling through another socket.

use std::{
    net::{SocketAddr, UdpSocket},
    sync::Arc,
};

use quinn::{Endpoint, EndpointConfig, TokioRuntime, TransportConfig, crypto::rustls::QuicClientConfig};

use super::{BindError, HandshakeError, QuicTransport, SERVER_NAME, Shape, bind_socket, transport_config};
use crate::link::{identity::PeerCertificate, tls::TlsError};

/// A bound UDP socket from which many connections are dialled. Cloning shares it; it is closed with its last
/// clone and connection.
#[derive(Debug, Clone)]
pub struct QuicSocket {
    endpoint: Endpoint,
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
        let socket: UdpSocket = bind_socket(local).map_err(failed)?;
        let endpoint = Endpoint::new(EndpointConfig::default(), None, socket, Arc::new(TokioRuntime));
        let endpoint = endpoint.map_err(failed)?;
        Ok(Self { endpoint, transport: Arc::new(transport_config(shape)), streams: shape.streams })
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
        let crypto = QuicClientConfig::try_from(tls)
            .map_err(|_suite| HandshakeError::Address(TlsError::NoInitialSuite.to_string()))?;
        let mut config = quinn::ClientConfig::new(Arc::new(crypto));
        config.transport_config(Arc::clone(&self.transport));
        let connecting = self
            .endpoint
            .connect_with(config, to, SERVER_NAME)
            .map_err(|error| HandshakeError::Address(error.to_string()))?;
        QuicTransport::new(connecting.await?, None, self.streams)
    }
}
