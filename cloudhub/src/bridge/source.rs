//! What the tier itself says: who is enrolled, who is linked, what nodes report.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use broker::{
    Handle, Outbox, Stopped, clock,
    event::{
        Command, Delivery, Event, Front, OriginFilter, Output, Response, RetainedOnSubscribe, SessionOpen,
        StateEvent, Subscription,
    },
    link::Links,
};
use bytes::Bytes;
use codec::{Filter, FrameView};
use tokio::sync::mpsc;

/// How often the links are looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// How often it is looked whether a node has a space of statuses: until its first report.
const ASK_EVERY: Duration = Duration::from_secs(1);
/// The same of a node that has had none for long: longer and longer.
const ASK_LONGEST: Duration = Duration::from_secs(30);

/// A change of a key.
#[derive(Debug)]
pub(super) struct Said {
    pub(super) key: String,
    /// `None`: it is gone.
    pub(super) value: Option<Bytes>,
}

/// A session of this process's own with its broker.
#[derive(Debug)]
struct Session {
    handle: Handle,
    outbox: Outbox,
    queue: VecDeque<Output>,
    owed: usize,
}

impl Session {
    async fn open(handle: &Handle) -> Result<Self, Stopped> {
        let (session, outbox) = handle.open_session();
        let open = SessionOpen {
            session,
            front: Front::Internal,
            client_id: "".into(),
            clean_start: true,
            expiry_s: 0,
            receive_max: u16::MAX,
            will: None,
        };
        handle.send(Event::SessionOpened(open), 0).await?;
        Ok(Self { handle: handle.clone(), outbox, queue: VecDeque::new(), owed: 0 })
    }

    /// False if there is no such space yet.
    async fn watch(&self, origin: &Arc<str>, space: &str, prefix: &str) -> Result<bool, Stopped> {
        let command = Command::StateWatch {
            session: self.outbox.session(),
            origin: Arc::clone(origin),
            space: space.into(),
            prefixes: vec![prefix.to_owned()],
            from: None,
            with_previous: false,
        };
        Ok(matches!(self.handle.call(command).await?, Response::Done))
    }

    /// The next output. Cancel safe.
    async fn next(&mut self) -> Result<Output, Stopped> {
        loop {
            if let Some(output) = self.queue.pop_front() {
                self.owed += output.cost();
                return Ok(output);
            }
            if self.owed > 0 {
                let session = self.outbox.session();
                self.handle.send(Event::Sent { session, bytes: self.owed }, 0).await?;
                self.owed = 0;
            }
            self.outbox.recv(&mut self.queue).await;
        }
    }

    async fn close(self) {
        let closed = Event::SessionClosed { session: self.outbox.session(), clean: true };
        if self.handle.send(closed, 0).await.is_err() {
            tracing::debug!("the broker stopped before a session of the bridge was closed");
        }
    }
}

/// Follows keys of a space until the receiver is gone or the broker stops. A space that does not exist yet is
/// waited for. `say` makes of each change what is sent.
pub(super) async fn follow_state<T: Send>(
    handle: Handle,
    origin: Arc<str>,
    space: &'static str,
    prefix: &'static str,
    out: mpsc::Sender<T>,
    say: impl Fn(Option<Said>) -> T + Send,
) {
    let mut wait = ASK_EVERY;
    loop {
        let Ok(mut session) = Session::open(&handle).await else { return };
        let watching = session.watch(&origin, space, prefix).await;
        if matches!(watching, Ok(true)) {
            wait = ASK_EVERY;
            let ended = tokio::select! {
                biased;
                () = out.closed() => true,
                ended = pass_on(&mut session, &out, &say) => ended,
            };
            session.close().await;
            if ended {
                return;
            }
            continue;
        }
        session.close().await;
        if watching.is_err() {
            return;
        }
        tokio::select! {
            biased;
            () = out.closed() => return,
            () = tokio::time::sleep(wait) => wait = (wait * 2).min(ASK_LONGEST),
        }
    }
}

/// True if it is over, false if the watch must begin anew.
async fn pass_on<T>(session: &mut Session, out: &mpsc::Sender<T>, say: &impl Fn(Option<Said>) -> T) -> bool {
    loop {
        let said = match session.next().await {
            Ok(Output::State(StateEvent::Put { entry, .. })) => {
                let value = Some(entry.value());
                say(Some(Said { key: entry.key, value }))
            }
            Ok(Output::State(StateEvent::Deleted { key, .. })) => say(Some(Said { key, value: None })),
            Ok(Output::State(StateEvent::Synced { .. })) => say(None),
            Ok(Output::State(StateEvent::TooOld { .. })) => return false,
            Ok(Output::Close(_)) | Err(Stopped) => return true,
            Ok(_) => continue,
        };
        if out.send(said).await.is_err() {
            return true;
        }
    }
}

/// Tells which nodes are linked and by what, each time that it changes.
pub(super) async fn follow_links<T: Send>(
    handle: Handle,
    links: Arc<Links>,
    out: mpsc::Sender<T>,
    say: impl Fn(BTreeMap<Arc<str>, &'static str>) -> T + Send,
) {
    let mut told: Option<BTreeMap<Arc<str>, &'static str>> = None;
    let mut turns = clock::every(LOOK_EVERY);
    loop {
        tokio::select! {
            biased;
            () = out.closed() => return,
            _ = turns.tick() => {}
        }
        let Ok(Response::Sessions(sessions)) = handle.call(Command::Sessions).await else { return };
        let linked = sessions.into_iter().filter(|session| session.established);
        let linked = linked.filter(|session| matches!(session.kind, "link" | "relayed"));
        let by = |name: &str| links.find(name).map_or("Relay", |link| link.transport());
        let now: BTreeMap<_, _> =
            linked.map(|session| (Arc::clone(&session.name), by(&session.name))).collect();
        if told.as_ref() == Some(&now) {
            continue;
        }
        told = Some(now.clone());
        if out.send(say(now)).await.is_err() {
            return;
        }
    }
}

/// Passes on what nodes publish at a topic, from now on.
pub(super) async fn follow_topic<T: Send>(
    handle: Handle,
    topic: &'static str,
    out: mpsc::Sender<T>,
    say: impl Fn(Arc<str>, Bytes) -> T + Send,
) {
    let Ok(mut session) = Session::open(&handle).await else { return };
    let subscription = Subscription {
        id: 1,
        origin: OriginFilter::AnyNode,
        filter: Filter::parse(topic).expect("a topic is a filter"),
        qos: 0,
        group: None,
        no_local: false,
        retain_as_published: false,
        retained: RetainedOnSubscribe::DoNotSend,
        wildcard_matches_dollar: true,
        identifier: 0,
    };
    let number = session.outbox.session();
    let event = Event::Subscribed { session: number, token: 1, subscriptions: vec![subscription] };
    if handle.send(event, 0).await.is_err() {
        return;
    }
    loop {
        let output = tokio::select! {
            biased;
            () = out.closed() => break,
            output = session.next() => output,
        };
        match output {
            Ok(Output::Deliver(Delivery { origin, frame, .. })) => {
                let Ok(view) = FrameView::parse(&frame) else { continue };
                if out.send(say(origin, frame.slice_ref(view.payload()))).await.is_err() {
                    break;
                }
            }
            Ok(Output::Close(_)) | Err(Stopped) => return,
            Ok(_) => {}
        }
    }
    session.close().await;
}
