//! Watches: every change of what is selected, once, in order.
//!
//! A watch begins with a list at one revision or behind a revision that the client names, and goes on from
//! there in the change window. An object that comes to be selected is ADDED, one that is selected no more is
//! DELETED, whatever happened to it. A bookmark says a revision of which everything before it was sent.

use std::{sync::Arc, time::Duration};

use serde_json::{Value, json as value};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;

use super::{
    Api, Ask,
    list::Query,
    read::{before_anything, shown},
};
use crate::{
    json, limits,
    status::Status,
    store::{self, Change, StoreError, set_revision},
};

/// What is to be watched.
#[derive(Debug, Clone)]
pub(crate) struct WatchQuery {
    /// What is selected, and behind which revision.
    pub(crate) query: Query,
    /// A list comes first.
    pub(crate) listed: bool,
    /// The end of that list is told by a bookmark.
    pub(crate) tells_end: bool,
    /// Bookmarks are wanted.
    pub(crate) bookmarks: bool,
    /// It ends after this long.
    pub(crate) lasts: Duration,
}

/// One event of a watch.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct WatchEvent {
    /// ADDED, MODIFIED, DELETED, BOOKMARK or ERROR.
    pub(crate) ty: &'static str,
    /// The object, or a Status.
    pub(crate) object: Value,
}

/// The client is gone or the watch is to end.
struct Over;

impl Api {
    /// Sends events until the time is up, the client is gone, or `stop`.
    pub(crate) async fn watch(
        self: Arc<Self>,
        ask: Ask,
        query: WatchQuery,
        out: mpsc::Sender<WatchEvent>,
        stop: CancellationToken,
    ) {
        let ends = Instant::now() + query.lasts;
        let gone = out.clone();
        let watching = Box::pin(self.watch_until(&ask, &query, &out, ends));
        tokio::select! {
            biased;
            () = stop.cancelled() => {}
            () = gone.closed() => {}
            () = watching => {}
        }
    }

    async fn watch_until(
        &self,
        ask: &Ask,
        query: &WatchQuery,
        out: &mpsc::Sender<WatchEvent>,
        ends: Instant,
    ) {
        let begun = self.begin(ask, query, out).await;
        let mut watch = match begun {
            Ok(Some(watch)) => watch,
            Ok(None) => return,
            Err(status) => return send_error(out, &status).await,
        };
        let mut bookmark_at = Instant::now() + limits::BOOKMARK_EVERY;
        loop {
            let change = tokio::select! {
                biased;
                change = watch.next() => Some(change),
                () = sleep_until(bookmark_at.min(ends)) => None,
            };
            match change {
                Some(Ok(change)) => {
                    if let Some(event) = event_of(ask, query, change)
                        && out.send(event).await.is_err()
                    {
                        break;
                    }
                }
                Some(Err(error)) => {
                    send_error(out, &watch_error(&error, query.query.revision)).await;
                    break;
                }
                None => {
                    if query.bookmarks && self.bookmark(ask, &mut watch, out).await.is_err()
                        || Instant::now() >= ends
                    {
                        break;
                    }
                    bookmark_at = Instant::now() + limits::BOOKMARK_EVERY;
                }
            }
        }
        watch.close().await;
    }

    /// `None`: the client is gone.
    async fn begin(
        &self,
        ask: &Ask,
        query: &WatchQuery,
        out: &mpsc::Sender<WatchEvent>,
    ) -> Result<Option<store::Watch>, Status> {
        let prefixes = vec![ask.resource.prefix_of(&ask.namespace)];
        if !query.listed {
            let after = query.query.revision;
            return match self.store.watch(prefixes.clone(), after).await {
                Ok(watch) => Ok(Some(watch)),
                // It may be a revision that another client has just been shown.
                Err(StoreError::TooOld { oldest }) if after >= oldest => {
                    self.await_revision(after).await?;
                    let watching = self.store.watch(prefixes, after).await;
                    watching.map(Some).map_err(|error| watch_error(&error, after))
                }
                Err(error) => Err(watch_error(&error, after)),
            };
        }
        let list = self.list(ask, &query.query).await?;
        for item in list.items {
            if out.send(WatchEvent { ty: "ADDED", object: item }).await.is_err() {
                return Ok(None);
            }
        }
        if query.tells_end {
            let mut end = bookmark(ask, list.revision);
            json::set(&mut end, "metadata.annotations", value!({"k8s.io/initial-events-end": "true"}));
            if out.send(WatchEvent { ty: "BOOKMARK", object: end }).await.is_err() {
                return Ok(None);
            }
        }
        let watching = self.store.watch(prefixes, list.revision).await;
        watching.map(Some).map_err(|error| watch_error(&error, list.revision))
    }

    /// Tells how far the watch is, if it is certain.
    async fn bookmark(
        &self,
        ask: &Ask,
        watch: &mut store::Watch,
        out: &mpsc::Sender<WatchEvent>,
    ) -> Result<(), Over> {
        if watch.report().await.is_err() || !watch.is_idle() {
            return Ok(());
        }
        let Ok(revision) = self.store.revision().await else { return Err(Over) };
        if !watch.is_idle() {
            return Ok(());
        }
        let event = WatchEvent { ty: "BOOKMARK", object: bookmark(ask, revision) };
        out.send(event).await.map_err(|_gone| Over)
    }
}

async fn send_error(out: &mpsc::Sender<WatchEvent>, status: &Status) {
    // If the client is gone there is nobody to tell.
    drop(out.send(WatchEvent { ty: "ERROR", object: status.to_value() }).await);
}

fn watch_error(error: &StoreError, after: u64) -> Status {
    match error {
        StoreError::TooOld { oldest } => {
            Status::expired(format!("too old resource version: {after} ({oldest})"))
        }
        other => Status::unavailable(other.to_string()),
    }
}

fn bookmark(ask: &Ask, revision: u64) -> Value {
    let mut object = before_anything(&ask.resource);
    json::set(&mut object, "apiVersion", ask.resource.api_version());
    json::set(&mut object, "kind", ask.resource.kind.clone());
    set_revision(&mut object, revision);
    object
}

fn event_of(ask: &Ask, query: &WatchQuery, change: Change) -> Option<WatchEvent> {
    let selected = |object: &Value| query.query.labels.select(object) && query.query.fields.select(object);
    let previous = change.previous.map(|stored| stored.object).filter(selected);
    let new = change.new.map(|stored| stored.object).filter(selected);
    let (ty, object) = match (previous, new) {
        (Some(_), Some(new)) => ("MODIFIED", new),
        (None, Some(new)) => ("ADDED", new),
        (Some(mut previous), None) => {
            set_revision(&mut previous, change.revision);
            ("DELETED", previous)
        }
        (None, None) => return None,
    };
    Some(WatchEvent { ty, object: shown(&ask.resource, object) })
}
