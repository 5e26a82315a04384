//! Every bound of the API server, with its arithmetic.

use std::time::Duration;

/// Largest stored object, as JSON.
pub(crate) const OBJECT_MAX: usize = 3 << 19; // 1.5 MiB
/// Largest body of a request: an object with the old one in an annotation.
pub(crate) const BODY_MAX: usize = 3 << 20;
/// Levels of a body.
pub(crate) const DEPTH_MAX: usize = 64;
/// Values of a body: each costs some 70 bytes once parsed.
pub(crate) const VALUES_MAX: usize = 200_000;
/// Operations of one JSON patch.
pub(crate) const PATCH_OPS_MAX: usize = 10_000;
/// Connections at a time.
pub(crate) const CONNECTIONS_MAX: usize = 1024;
/// Requests that are worked on at a time, watches not counted.
pub(crate) const REQUESTS_MAX: usize = 256;
/// Watches at a time: each has a queue at the broker.
pub(crate) const WATCHES_MAX: usize = 2048;
/// Requests on their way to nodes at a time: logs that are followed, commands, forwarded ports. Each holds a
/// Stream's windows and two buffers of an upgraded connection.
pub(crate) const NODE_REQUESTS_MAX: usize = 1024;
/// Largest text of a node's refusal that is passed on.
pub(crate) const NODE_REFUSAL_MAX: usize = 2048;
/// Bytes of request headers of one connection; a token is about a kilobyte.
pub(crate) const HEADER_BYTES_MAX: usize = 64 << 10;
/// A connection that takes longer to say who it is, or to ask, is closed.
pub(crate) const HANDSHAKE_MAX: Duration = Duration::from_secs(10);
/// Time for a client to send a body, and for a request that is not a watch to be done.
pub(crate) const REQUEST_MAX: Duration = Duration::from_secs(60);
/// Objects of one page asked of the broker.
pub(crate) const PAGE: usize = 500;
/// Events that wait for a watcher to read them; behind them the broker's queue of the watch fills.
pub(crate) const WATCH_LINES_MAX: usize = 64;
/// A bookmark is sent this often.
pub(crate) const BOOKMARK_EVERY: Duration = Duration::from_mins(1);
/// A watch that names no end ends after this long, and up to twice as long.
pub(crate) const WATCH_FOR: Duration = Duration::from_mins(30);
/// How long a list waits for a revision that is not there yet.
pub(crate) const FUTURE_REVISION_WAIT: Duration = Duration::from_secs(3);
/// How often a write is tried again when another one gets in between.
pub(crate) const WRITE_TRIES: usize = 8;
/// Events are kept this long.
pub(crate) const EVENT_TTL: Duration = Duration::from_hours(1);

const _: () = assert!(OBJECT_MAX <= BODY_MAX);
const _: () =
    assert!(OBJECT_MAX + (4 << 10) <= broker::limits::STATE_VALUE_MAX, "what is stored beside fits");
