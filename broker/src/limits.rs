//! Every bound of the broker, with its arithmetic.

/// Largest encoded Frame.
pub const FRAME_MAX: usize = 2 << 20;
/// Largest MQTT packet by default, and largest NATS payload.
pub const MQTT_PACKET_MAX: usize = 1 << 20;
/// Raw bytes of a link batch, unless it is one larger record.
pub const BATCH_RAW_MAX: usize = 64 << 10;

/// Bytes of events on their way to the driver, over all sessions.
pub const INPUT_BYTES_MAX: usize = 16 << 20;
/// Unit of the byte permits.
pub const PERMIT_BYTES: usize = 64;
/// Second bound on the same queue, for events without payload.
pub const INPUTS_MAX: usize = 4096;
/// Bytes of groups handed to the store and not yet durable; above it the driver takes no more input.
pub const UNPERSISTED_BYTES_MAX: usize = 16 << 20;
/// Events applied in one turn of the driver before it performs actions.
pub const TURN_MAX: usize = 256;

/// Queue of a client session: once it holds this much, Live is dropped and counted, and Log deliveries
/// wait. One message may exceed it, or the largest one would never be delivered.
pub const CLIENT_QUEUE_BYTES: usize = 1 << 20;
/// Queue of a client session beyond which it is closed as a slow consumer: answers are not droppable.
pub const CLIENT_QUEUE_BYTES_HARD: usize = 4 << 20;
/// Queue of a link session, for Live.
pub const LINK_QUEUE_BYTES: usize = 1 << 20;
/// Unacknowledged bytes of one Log on one link.
pub const LINK_LOG_WINDOW_BYTES: usize = 1 << 20;
/// Unacknowledged bytes of one space on one link.
pub const LINK_STATE_WINDOW_BYTES: usize = 256 << 10;
/// Unacknowledged bytes of all links that this process is ready to take, shared among them.
pub const LINKS_WINDOW_BYTES: usize = 256 << 20;
/// Least and greatest share of one link.
pub const LINK_WINDOW_MIN: usize = 64 << 10;
/// See [`LINK_WINDOW_MIN`].
pub const LINK_WINDOW_MAX: usize = 4 << 20;
/// Records kept that overtook Welcome: the window of a link, of an alarm Log and of a space, and
/// Live.
pub const LINK_EARLY_BYTES: usize =
    LINK_WINDOW_MAX + LINK_LOG_WINDOW_BYTES + LINK_STATE_WINDOW_BYTES + LINK_QUEUE_BYTES + FRAME_MAX;
/// A writer reports `Sent` at the latest after this many bytes.
pub const SENT_REPORT_BYTES: usize = 16 << 10;

/// Subscriptions of one client session: each costs a look in the trie, and a durable session is written
/// whole when one changes.
pub const CLIENT_SUBSCRIPTIONS_MAX: usize = 16_384;
/// Frames smaller than this are copied out of the buffer they came in before they are kept for long.
pub const PARK_COPY_BYTES: usize = BATCH_RAW_MAX / 4;
/// Deliveries in flight of one client whose frames may share the buffer they came in; later ones are copied.
pub const INFLIGHT_SHARED: usize = 64;
/// Recent records of a Log that came over a link, kept in memory.
pub const IMPORTED_TAIL_BYTES: usize = 64 << 10;

/// Largest value in an intent: with its key and id it is a frame of a Log.
pub const INTENT_VALUE_MAX: usize = STATE_VALUE_MAX;
/// Intents of a node that its hub has not acknowledged.
pub const INTENTS_MAX: u64 = 1_024;
/// Answers to the intents of one asker: to all that may be on their way.
pub const INTENT_RESULTS_MAX: usize = INTENTS_MAX as usize;
/// Keys that one node may want.
pub const WANT_KEYS_MAX: usize = 8_192;
/// Tombstones of a space beyond which the oldest are forgotten, whoever has not seen them.
pub const TOMBSTONES_MAX: usize = 16_384;
/// Tombstones of a space that one turn forgets.
pub const TOMBSTONES_FORGOTTEN: usize = 2_048;
/// Largest value of a State entry that a command writes: an API object of 1.5 MiB, with room.
pub const STATE_VALUE_MAX: usize = FRAME_MAX - (64 << 10);
/// Operations of one State write.
pub const STATE_OPS_MAX: usize = 1_024;
/// Bytes of keys and values of one State write: it is one journal group.
pub const STATE_WRITE_BYTES_MAX: usize = 4 << 20;
/// Entries of one page of a list of State.
pub const STATE_LIST_MAX: usize = 10_000;
/// Bytes of keys and frames of one page, if it has more than one entry.
pub const STATE_LIST_BYTES_MAX: usize = 4 << 20;
/// Watches of one session, and prefixes of one watch.
pub const WATCHES_MAX: usize = 64;

/// Acknowledged seqs above a cursor's low-water mark.
pub const CURSOR_ACKED_MAX: usize = 4096;
/// Requests forwarded to a node and not yet answered.
pub const REQUESTS_MAX: usize = 65_536;
/// Records that nobody can take, kept for people to look at.
pub const DEAD_LETTER_BYTES: u64 = 16 << 20;
/// Recent records of one Log kept in memory for readers at its end.
pub const LOG_TAIL_BYTES: usize = 1 << 20;

const _: () = assert!(BATCH_RAW_MAX * 4 <= LINK_LOG_WINDOW_BYTES, "a window holds several batches");
const _: () = assert!(CLIENT_QUEUE_BYTES + FRAME_MAX < CLIENT_QUEUE_BYTES_HARD);
const _: () = assert!(SENT_REPORT_BYTES * 16 <= CLIENT_QUEUE_BYTES, "late reports must not starve a queue");
const _: () = assert!(MQTT_PACKET_MAX < FRAME_MAX);
