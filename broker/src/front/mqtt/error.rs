//! Why a connection ends, and the numbers that MQTT has for it.

/// Reason codes of MQTT 5 that this server sends.
pub(super) mod reason {
    pub(in crate::front::mqtt) const SUCCESS: u8 = 0x00;
    pub(in crate::front::mqtt) const NO_SUBSCRIPTION: u8 = 0x11;
    pub(in crate::front::mqtt) const UNSPECIFIED: u8 = 0x80;
    pub(in crate::front::mqtt) const MALFORMED: u8 = 0x81;
    pub(in crate::front::mqtt) const PROTOCOL: u8 = 0x82;
    pub(in crate::front::mqtt) const IMPLEMENTATION: u8 = 0x83;
    pub(in crate::front::mqtt) const BAD_VERSION: u8 = 0x84;
    pub(in crate::front::mqtt) const BAD_CLIENT_ID: u8 = 0x85;
    pub(in crate::front::mqtt) const BAD_CREDENTIALS: u8 = 0x86;
    pub(in crate::front::mqtt) const NOT_AUTHORIZED: u8 = 0x87;
    pub(in crate::front::mqtt) const UNAVAILABLE: u8 = 0x88;
    pub(in crate::front::mqtt) const SHUTTING_DOWN: u8 = 0x8b;
    pub(in crate::front::mqtt) const BAD_AUTH_METHOD: u8 = 0x8c;
    pub(in crate::front::mqtt) const KEEP_ALIVE: u8 = 0x8d;
    pub(in crate::front::mqtt) const TAKEN_OVER: u8 = 0x8e;
    pub(in crate::front::mqtt) const BAD_FILTER: u8 = 0x8f;
    pub(in crate::front::mqtt) const BAD_TOPIC: u8 = 0x90;
    pub(in crate::front::mqtt) const RECEIVE_MAX: u8 = 0x93;
    pub(in crate::front::mqtt) const BAD_TOPIC_ALIAS: u8 = 0x94;
    pub(in crate::front::mqtt) const PACKET_TOO_LARGE: u8 = 0x95;
    pub(in crate::front::mqtt) const QUOTA: u8 = 0x97;
    pub(in crate::front::mqtt) const ADMINISTRATIVE: u8 = 0x98;
    pub(in crate::front::mqtt) const NO_SHARED: u8 = 0x9e;
}

/// A packet that ends its connection. The text says what is wrong with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum PacketError {
    /// The bytes are not what the specification describes.
    #[error("malformed packet: {0}")]
    Malformed(&'static str),
    /// Well formed, but not allowed here.
    #[error("protocol error: {0}")]
    Protocol(&'static str),
    /// Larger than this server takes.
    #[error("packet of {bytes} bytes where {max} are allowed")]
    TooLarge {
        /// What the packet claims to be.
        bytes: usize,
        /// The limit.
        max: usize,
    },
    /// The topic of a PUBLISH is no topic, or beyond the limits.
    #[error("invalid topic name")]
    BadTopic,
    /// A topic alias that is zero, too large or was never set.
    #[error("invalid topic alias")]
    BadTopicAlias,
    /// More publishes in flight than this server announced.
    #[error("more publishes in flight than the receive maximum")]
    ReceiveMax,
    /// A limit of this server that the specification does not know.
    #[error("over a limit: {0}")]
    Quota(&'static str),
    /// Neither MQTT 3.1.1 nor MQTT 5.
    #[error("unsupported protocol level {0}")]
    BadVersion(u8),
    /// Not MQTT at all.
    #[error("the first packet does not speak MQTT")]
    NotMqtt,
    /// Empty where it must not be, or too long.
    #[error("invalid client identifier")]
    BadClientId,
    /// Extended authentication is not offered.
    #[error("extended authentication is not supported")]
    BadAuthMethod,
}

impl PacketError {
    /// A property that does not belong into its packet.
    pub(super) const fn misplaced() -> Self {
        Self::Protocol("a property that does not belong here")
    }

    /// The reason code that tells the client.
    pub(super) const fn code(self) -> u8 {
        match self {
            Self::Malformed(_) | Self::NotMqtt => reason::MALFORMED,
            Self::Protocol(_) => reason::PROTOCOL,
            Self::TooLarge { .. } => reason::PACKET_TOO_LARGE,
            Self::BadTopic => reason::BAD_TOPIC,
            Self::BadTopicAlias => reason::BAD_TOPIC_ALIAS,
            Self::ReceiveMax => reason::RECEIVE_MAX,
            Self::Quota(_) => reason::QUOTA,
            Self::BadVersion(_) => reason::BAD_VERSION,
            Self::BadClientId => reason::BAD_CLIENT_ID,
            Self::BadAuthMethod => reason::BAD_AUTH_METHOD,
        }
    }

    /// How it is counted.
    pub(super) const fn cause(self) -> Cause {
        match self {
            Self::Malformed(_) => Cause::Malformed,
            Self::TooLarge { .. } => Cause::PacketTooLarge,
            Self::ReceiveMax | Self::Quota(_) => Cause::OverLimit,
            Self::BadVersion(_) | Self::NotMqtt => Cause::WrongProtocol,
            Self::Protocol(_)
            | Self::BadTopic
            | Self::BadTopicAlias
            | Self::BadClientId
            | Self::BadAuthMethod => Cause::ProtocolError,
        }
    }
}

/// Why a connection ended: the label of a counter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(usize)]
pub enum Cause {
    /// The client said DISCONNECT.
    Disconnected,
    /// The client closed the connection without a word.
    PeerClosed,
    /// Reading or writing failed.
    Io,
    /// Not a packet.
    Malformed,
    /// A packet that is not allowed where it stands.
    ProtocolError,
    /// A packet over the size limit.
    PacketTooLarge,
    /// A limit of this server.
    OverLimit,
    /// Not MQTT 3.1.1 or 5.
    WrongProtocol,
    /// No CONNECT in time.
    ConnectTimeout,
    /// Nothing received for one and a half keep-alive intervals.
    KeepAlive,
    /// Unknown user or wrong password.
    BadCredentials,
    /// A known user who may not do this.
    NotAuthorized,
    /// A newer connection has the same client identifier.
    TakenOver,
    /// The client does not read what it asked for.
    SlowConsumer,
    /// A publish could not be stored, and MQTT 3.1.1 has no other way to say so.
    PublishRefused,
    /// This process stops.
    Shutdown,
    /// An administrator ended the session.
    Revoked,
    /// The limit of connections was reached.
    TooManyConnections,
}

impl Cause {
    /// All causes, in the order of their numbers.
    pub const ALL: [Self; 18] = [
        Self::Disconnected,
        Self::PeerClosed,
        Self::Io,
        Self::Malformed,
        Self::ProtocolError,
        Self::PacketTooLarge,
        Self::OverLimit,
        Self::WrongProtocol,
        Self::ConnectTimeout,
        Self::KeepAlive,
        Self::BadCredentials,
        Self::NotAuthorized,
        Self::TakenOver,
        Self::SlowConsumer,
        Self::PublishRefused,
        Self::Shutdown,
        Self::Revoked,
        Self::TooManyConnections,
    ];

    /// The label's value.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Disconnected => "disconnected",
            Self::PeerClosed => "peer_closed",
            Self::Io => "io",
            Self::Malformed => "malformed",
            Self::ProtocolError => "protocol_error",
            Self::PacketTooLarge => "packet_too_large",
            Self::OverLimit => "over_limit",
            Self::WrongProtocol => "wrong_protocol",
            Self::ConnectTimeout => "connect_timeout",
            Self::KeepAlive => "keep_alive",
            Self::BadCredentials => "bad_credentials",
            Self::NotAuthorized => "not_authorized",
            Self::TakenOver => "taken_over",
            Self::SlowConsumer => "slow_consumer",
            Self::PublishRefused => "publish_refused",
            Self::Shutdown => "shutdown",
            Self::Revoked => "revoked",
            Self::TooManyConnections => "too_many_connections",
        }
    }
}
