//! Images that no container uses go when their disk is nearly full: the longest unused first.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use broker::clock;
use tokio::time::Instant;

use crate::{
    node::Disk,
    runtime::{Runtime, RuntimeError, cri},
};

/// How often the disk is looked at.
const BEAT: Duration = Duration::from_mins(5);
/// Room is made when more than this is used, until no more than that is: percent, as a kubelet.
const HIGH: u64 = 85;
const LOW: u64 = 80;
/// An image that came of late may be about to be used.
const YOUNG: Duration = Duration::from_mins(2);

/// Makes room for images, for as long as it is polled.
pub(crate) async fn run(runtime: Arc<dyn Runtime>) {
    let mut beat = clock::every(BEAT);
    let mut used_at = BTreeMap::new();
    loop {
        beat.tick().await;
        if let Err(error) = look(&*runtime, &mut used_at).await {
            tracing::debug!(%error, "images were not looked at");
        }
    }
}

async fn look(runtime: &dyn Runtime, used_at: &mut BTreeMap<String, Instant>) -> Result<(), RuntimeError> {
    let images = runtime.images().await?;
    let used: BTreeSet<String> =
        runtime.containers().await?.into_iter().flat_map(|held| [held.image_ref, held.image_id]).collect();
    let now = Instant::now();
    used_at.retain(|id, _| images.iter().any(|image| image.id == *id));
    for image in &images {
        if is_used(image, &used) {
            used_at.insert(image.id.clone(), now);
        }
        used_at.entry(image.id.clone()).or_insert(now);
    }
    let disks = runtime.image_disks().await?;
    let Some(at) = disks.into_iter().find_map(|disk| disk.fs_id.map(|id| PathBuf::from(id.mountpoint)))
    else {
        return Ok(());
    };
    let disk = tokio::task::spawn_blocking(move || Disk::read(&at)).await;
    let Ok(Ok(disk)) = disk else { return Ok(()) };
    for id in surplus(&images, &used, used_at, now, disk) {
        tracing::info!(image = id, "removing an image that nothing uses: the disk is nearly full");
        runtime.remove_image(&id).await?;
    }
    Ok(())
}

fn is_used(image: &cri::Image, used: &BTreeSet<String>) -> bool {
    used.contains(&image.id)
        || image.repo_digests.iter().chain(&image.repo_tags).any(|name| used.contains(name))
}

/// What to remove, in order.
fn surplus(
    images: &[cri::Image],
    used: &BTreeSet<String>,
    used_at: &BTreeMap<String, Instant>,
    now: Instant,
    disk: Disk,
) -> Vec<String> {
    let full = disk.bytes.saturating_sub(disk.bytes_free);
    if disk.bytes == 0 || full * 100 <= disk.bytes * HIGH {
        return Vec::new();
    }
    let mut excess = full - disk.bytes / 100 * LOW;
    let since = |image: &cri::Image| used_at.get(&image.id).copied().unwrap_or(now);
    let is_young = |image: &cri::Image| now.duration_since(since(image)) < YOUNG;
    let mut idle: Vec<&cri::Image> =
        images.iter().filter(|image| !image.pinned && !is_used(image, used) && !is_young(image)).collect();
    idle.sort_by_key(|image| (since(image), std::cmp::Reverse(image.size)));
    let mut chosen = Vec::new();
    for image in idle {
        if excess == 0 {
            break;
        }
        excess = excess.saturating_sub(image.size);
        chosen.push(image.id.clone());
    }
    chosen
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_longest_unused_images_go_first_and_only_from_a_disk_that_is_nearly_full() {
        let began = Instant::now();
        tokio::time::advance(Duration::from_mins(60)).await;
        let now = Instant::now();
        let image = |id: &str, size| cri::Image { id: id.to_owned(), size, ..cri::Image::default() };
        let images = [image("used", 50), image("old", 4), image("older", 4), image("young", 4)];
        let used = BTreeSet::from(["used".to_owned()]);
        let used_at = BTreeMap::from([
            ("old".to_owned(), began + Duration::from_mins(2)),
            ("older".to_owned(), began),
            ("young".to_owned(), now),
            ("used".to_owned(), began),
        ]);
        let disk = |free| Disk { bytes: 100, bytes_free: free, ..Disk::default() };
        let chosen = |free| surplus(&images, &used, &used_at, now, disk(free));
        assert_eq!(chosen(16), [""; 0], "84 percent are not yet too much");
        assert_eq!(chosen(14), ["older", "old"], "six percent must go");
        assert_eq!(chosen(1), ["older", "old"], "and never what is used or has just come");
    }
}
