//! Lists: exact at one revision however many pages they come in.

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use serde_json::{Value, json as value};

use super::{Api, Ask, read::shown};
use crate::{
    json, limits,
    selector::{Fields, Labels},
    status::Status,
    store::{Page, StoreError},
};

/// What of a resource is asked for.
#[derive(Debug, Clone, Default)]
pub(crate) struct Query {
    pub(crate) labels: Labels,
    pub(crate) fields: Fields,
    /// At most so many objects; 0 for all.
    pub(crate) limit: usize,
    /// Where an earlier page ended.
    pub(crate) next: Option<Continue>,
    /// `resourceVersion`; 0 if none or any will do.
    pub(crate) revision: u64,
    /// The list is to be of exactly this revision.
    pub(crate) exact: bool,
}

/// Where a page ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Continue {
    revision: u64,
    /// Key of the last object looked at, without the resource's prefix.
    after: String,
}

/// A list.
#[derive(Debug)]
pub(crate) struct List {
    /// The objects, as clients of the resource see them.
    pub(crate) items: Vec<Value>,
    /// The revision at which it is the truth.
    pub(crate) revision: u64,
    /// Where it goes on.
    pub(crate) next: Option<String>,
}

impl Continue {
    /// Reads what a client brings back.
    pub(crate) fn read(text: &str) -> Result<Self, Status> {
        let bad = |what: &str| {
            Status::bad_request(format!("invalid continue token: continue key is not valid: {what}"))
        };
        let bytes =
            URL_SAFE_NO_PAD.decode(text.trim_end_matches('=')).map_err(|error| bad(&error.to_string()))?;
        let token = json::read(&bytes).map_err(|error| bad(&error.to_string()))?;
        let (revision, start) = (token.get("rv").and_then(Value::as_u64), json::text(&token, "start"));
        match (json::text(&token, "v"), revision, start.strip_suffix('\0')) {
            ("meta.k8s.io/v1", Some(revision), Some(after)) if !after.is_empty() => {
                Ok(Self { revision, after: after.trim_start_matches('/').to_owned() })
            }
            _ => Err(bad("it was not made by this server")),
        }
    }

    fn write(&self) -> String {
        let start = format!("/{}\0", self.after);
        URL_SAFE_NO_PAD
            .encode(value!({"v": "meta.k8s.io/v1", "rv": self.revision, "start": start}).to_string())
    }
}

impl Api {
    /// A list, or a page of one.
    pub(crate) async fn list(&self, ask: &Ask, query: &Query) -> Result<List, Status> {
        let prefix = ask.resource.prefix_of(&ask.namespace);
        // A selector by name is a look at one key.
        let named = query.fields.name().filter(|_| !ask.namespace.is_empty() || !ask.resource.namespaced);
        let under = match named {
            Some(name) if !ask.resource.namespaced => format!("{prefix}-/{name}"),
            Some(name) => format!("{prefix}{name}"),
            None => prefix.clone(),
        };
        let mut at = query.exact.then_some(query.revision);
        let mut after = None;
        if let Some(next) = &query.next {
            at = Some(next.revision);
            after = Some(format!("{prefix}{}", next.after));
        }
        if query.revision > 0 && query.next.is_none() {
            self.await_revision(query.revision).await?;
        }
        let limit = if query.limit == 0 { usize::MAX } else { query.limit };
        let mut items = Vec::new();
        loop {
            let size =
                if query.labels.is_empty() { limits::PAGE.min(limit - items.len()) } else { limits::PAGE };
            let page = self.page(&under, after, size, at).await?;
            at = Some(page.revision);
            let (count, mut last) = (page.objects.len(), None);
            let mut full = false;
            for (index, stored) in page.objects.into_iter().enumerate() {
                if items.len() == limit {
                    full = true;
                    break;
                }
                last = Some((index, stored.key.clone()));
                if query.labels.select(&stored.object) && query.fields.select(&stored.object) {
                    items.push(shown(&ask.resource, stored.object));
                }
            }
            let (index, key) = last.unwrap_or_default();
            let more = full || page.more || index + 1 < count;
            let is_full = items.len() == limit;
            if !more || is_full && !self.any_follows(&under, &key, query, page.revision).await? {
                return Ok(List { items, revision: page.revision, next: None });
            }
            if is_full {
                let after = key.strip_prefix(&prefix).unwrap_or_default().to_owned();
                let next = Continue { revision: page.revision, after }.write();
                return Ok(List { items, revision: page.revision, next: Some(next) });
            }
            after = Some(key);
        }
    }

    /// Whether anything that is selected stands behind a key.
    async fn any_follows(&self, under: &str, key: &str, query: &Query, at: u64) -> Result<bool, Status> {
        let mut after = Some(key.to_owned());
        loop {
            let page = self.page(under, after, limits::PAGE, Some(at)).await?;
            let found = |object: &Value| query.labels.select(object) && query.fields.select(object);
            if page.objects.iter().any(|stored| found(&stored.object)) {
                return Ok(true);
            }
            if !page.more {
                return Ok(false);
            }
            after = page.objects.last().map(|last| last.key.clone());
        }
    }

    async fn page(
        &self,
        under: &str,
        after: Option<String>,
        size: usize,
        at: Option<u64>,
    ) -> Result<Page, Status> {
        match self.store.page(under, after, size.max(1), at).await {
            Err(StoreError::TooOld { oldest }) if at.is_some_and(|at| at > oldest) => {
                let current = self.store.revision().await?;
                Err(Status::future_revision(at.unwrap_or_default(), current))
            }
            other => Ok(other?),
        }
    }

    /// Waits a little for a revision that is not there yet.
    pub(crate) async fn await_revision(&self, revision: u64) -> Result<(), Status> {
        if self.store.revision().await? >= revision {
            return Ok(());
        }
        let waited = tokio::time::timeout(limits::FUTURE_REVISION_WAIT, self.cache.reaches(revision)).await;
        match waited {
            Ok(()) => Ok(()),
            Err(_elapsed) => Err(Status::future_revision(revision, self.store.revision().await?)),
        }
    }
}

impl List {
    /// As clients read it.
    pub(crate) fn to_value(&self, ask: &Ask) -> Value {
        let built_in = ask.resource.custom.is_none();
        let items = self.items.iter().map(|item| {
            let mut item = item.clone();
            if built_in {
                json::remove(&mut item, "apiVersion");
                json::remove(&mut item, "kind");
            }
            item
        });
        value!({
            "kind": ask.resource.list_kind,
            "apiVersion": ask.resource.api_version(),
            "metadata": self.metadata(),
            "items": items.collect::<Vec<_>>(),
        })
    }

    /// Metadata of the list.
    pub(crate) fn metadata(&self) -> Value {
        let mut metadata = value!({"resourceVersion": self.revision.to_string()});
        if let Some(next) = &self.next {
            metadata["continue"] = value!(next);
        }
        metadata
    }
}
