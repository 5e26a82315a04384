//! Where revisions of a start begin: above all of any earlier one.
//!
//! The objects of a node's API are made anew at each start, and so would their revisions be. A number in a file,
//! raised before anything is shown, keeps them apart: a resourceVersion of an earlier start is always behind what
//! is known, which is answered with *410 Gone*, and never means something else.

use std::path::Path;

use broker::{
    private,
    store::{Recovered, Source, SourceKind},
};
use codec::{Class, Flags, Kind, Record, RecordHeader, frame::FrameParts};

use crate::pki::PkiError;

/// Revisions of one start, as a power of two: more than one can use, and more than a cluster's etcd has reached.
const BITS: u32 = 40;

/// The number of this start, from now on.
pub(super) fn next(folder: &Path) -> Result<u64, PkiError> {
    let path = folder.join("starts");
    let damaged = || PkiError::Damaged { path: path.clone() };
    let last = match private::read(&path, 64)? {
        Some(text) => {
            let text = String::from_utf8(text).map_err(|_| damaged())?;
            text.trim().parse::<u32>().map_err(|_| damaged())?
        }
        None => 0,
    };
    // Beyond some four billion starts, and 2^23 for clients that read a revision as a double.
    let next = last.checked_add(1).filter(|next| *next < 1 << 23).unwrap_or(1);
    private::write(&path, next.to_string().as_bytes())?;
    Ok(u64::from(next))
}

/// The least revision of a start.
pub(super) fn first_revision(life: u64) -> u64 {
    life << BITS
}

/// A store whose space `k8s` has come as far as the first revision.
pub(super) fn recovered(life: u64) -> Recovered {
    const SOURCE: u32 = 1;
    let first = first_revision(life);
    let source = Source {
        number: SOURCE,
        origin: "".into(),
        kind: SourceKind::State,
        name: "k8s".into(),
        class: Class::State,
    };
    let parts = FrameParts {
        topic: "start",
        time_us: 0,
        time_trusted: false,
        trace: None,
        ttl_s: 0,
        headers: &[],
        payload: b"{}",
    };
    let header = RecordHeader {
        kind: Kind::PUT,
        class: Class::State as u8,
        flags: Flags(0),
        source: SOURCE,
        epoch: 1,
        seq: first,
        aux: first,
    };
    let state = vec![Record { header, body: parts.encode() }];
    Recovered { sources: vec![source], state, ..Recovered::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_start_has_a_number_of_its_own() {
        let folder = tempfile::tempdir().unwrap();
        let starts: Vec<u64> = (0..3).map(|_| next(folder.path()).unwrap()).collect();
        assert_eq!(starts, [1, 2, 3]);
        std::fs::write(folder.path().join("starts"), "x").unwrap();
        assert!(matches!(next(folder.path()), Err(PkiError::Damaged { .. })));
    }
}
