//! A backup of the process that runs, over the admin socket.

use std::path::PathBuf;

use axum::{
    Router,
    extract::{Query, State},
    response::{IntoResponse, Response},
    routing::post,
};
use broker::{
    Tasks,
    store::{backup, lmdb::backup::Copier},
};
use serde::Deserialize;

use super::{
    Refusal,
    stream::{self},
};
use crate::api::Problem;

/// What a backup is made of.
#[derive(Debug, Clone)]
pub struct Backups {
    /// The store.
    pub copier: Copier,
    /// The data folder.
    pub data: PathBuf,
    /// Where answers run.
    pub tasks: Tasks,
}

/// `POST /v1/backup?to=`: one line, a [`Manifest`](backup::Manifest) or a [`Problem`].
pub fn router(backups: Backups) -> Router {
    Router::new().route("/v1/backup", post(make)).with_state(backups)
}

#[derive(Debug, Deserialize)]
struct BackupQuery {
    to: PathBuf,
}

async fn make(State(backups): State<Backups>, Query(BackupQuery { to }): Query<BackupQuery>) -> Response {
    if !to.is_absolute() {
        return Refusal::bad("`to` is not an absolute path").into_response();
    }
    let Backups { copier, data, tasks } = backups;
    // A stream, because its answer may begin long before its end.
    stream::ndjson(&tasks, "admin backup", |mut lines| async move {
        let made = tokio::task::spawn_blocking(move || backup::of_running(&copier, &data, &to)).await;
        match made {
            Ok(Ok(manifest)) => lines.line(&manifest).await?,
            Ok(Err(error)) => lines.line(&Problem { error: error.to_string() }).await?,
            Err(error) => lines.line(&Problem { error: format!("the backup failed: {error}") }).await?,
        }
        lines.flush().await
    })
}
