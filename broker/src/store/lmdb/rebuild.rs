//! A new checkpoint in place of one that is damaged, from what the journal still has.
//!
//! All of the Logs is there: their records are nowhere else, and where they stand is read from the segments, the
//! rewritten ones included, in the order of their lsns. Of State and facts there is what stands in segments that
//! were not freed: recent changes, but not what has long been as it is. So positions that others hold may be
//! ahead, and what comes of it is as uncertain as a backup that was restored.

use std::{fs::File, path::Path};

use codec::{Class, Flags, Kind, Record, RecordHeader, proto};

use super::{compact, overlay::Overlay};
use crate::{
    core::event::Lsn,
    store::{
        OpenError, SourceKind,
        journal::{
            Place,
            format::segment_name,
            scan::{self, Damaged, Segment},
        },
    },
};

/// The groups of rewritten segments, in the order of their lsns.
#[derive(Debug)]
pub(super) struct OldGroups<'a> {
    dir: &'a Path,
    segments: &'a [Segment],
    /// The latest first.
    groups: Vec<(Lsn, Place)>,
    pub(super) damage: Vec<Damaged>,
}

impl<'a> OldGroups<'a> {
    pub(super) fn list(dir: &'a Path, segments: &'a [Segment]) -> Result<Self, OpenError> {
        let (mut groups, mut damage) = (Vec::new(), Vec::new());
        for segment in segments {
            damage.extend(scan::old_groups(dir, segment, &mut groups)?);
        }
        groups.sort_unstable_by_key(|(lsn, place)| std::cmp::Reverse((*lsn, place.segment, place.offset)));
        Ok(Self { dir, segments, groups, damage })
    }

    /// Takes the effects of those up to this lsn.
    pub(super) fn apply(&mut self, up_to: Lsn, overlay: &mut Overlay) {
        while let Some((lsn, place)) = self.groups.pop_if(|(lsn, _)| *lsn <= up_to) {
            let mut records = Vec::new();
            let read = self.read(place, &mut records);
            match read {
                Ok(()) => overlay.apply(lsn, place, records.into_iter().map(compact)),
                Err(error) => {
                    tracing::error!(%error, lsn, "a group of a rewritten segment cannot be read");
                    overlay.lose(place);
                }
            }
        }
    }

    fn read(&self, place: Place, records: &mut Vec<Record>) -> std::io::Result<()> {
        let segment = self.segments.iter().find(|segment| segment.header.number == place.segment);
        let salt = segment.expect("listed").header.salt;
        let file = File::open(self.dir.join(segment_name(place.segment)))?;
        scan::read_groups(&file, salt, place.offset, place.len as usize, &mut |_, _, group| {
            records.extend(scan::split(group));
        })
    }
}

/// Declares what has records and is declared nowhere, so that its number is not given again and its records can be
/// read: under the name `lost-<number>`.
pub(super) fn declare_lost(overlay: &mut Overlay) {
    let layer = &overlay.active;
    let logs = layer.logs.keys().map(|source| (*source, SourceKind::Log, Class::Telemetry));
    let spaces = layer.state.keys().map(|(source, _)| (*source, SourceKind::State, Class::State));
    let lost: Vec<_> =
        logs.chain(spaces).filter(|(source, ..)| !layer.sources.contains_key(source)).collect();
    let (lsn, place) = (layer.last_lsn, Place { segment: 0, offset: 0, len: 0 });
    let records = lost.into_iter().map(|(source, kind, class)| declare(source, kind, class));
    overlay.apply(lsn, place, records.collect::<Vec<_>>());
}

fn declare(source: u32, kind: SourceKind, class: Class) -> Record {
    let name = format!("lost-{source}");
    let body = proto::Declare { origin: String::new(), kind: kind as u32, name, class: class as u32 };
    let header = RecordHeader {
        kind: Kind::DECLARE,
        class: class as u8,
        flags: Flags::default(),
        source,
        epoch: 0,
        seq: 0,
        aux: 0,
    };
    Record { header, body: codec::encode(&body) }
}
