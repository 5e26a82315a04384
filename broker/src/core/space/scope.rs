//! What concerns one receiver of a space that each sees only in part.

use super::Space;

/// True of the one space whose receivers each get a part of it.
pub(super) fn is_scoped(origin: &str, name: &str) -> bool {
    origin.is_empty() && name == "fleet"
}

impl Space {
    /// The owner has listed its source, and everything that concerns this broker is here.
    pub(in crate::core) fn is_complete(&self) -> bool {
        self.owned || self.complete_in == self.at.0
    }
}
