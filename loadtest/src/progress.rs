//! One line that says how far a run is: on a terminal only.

use std::io::{IsTerminal as _, Write as _};

/// Shows progress on standard error.
#[derive(Debug)]
pub struct Progress {
    shows: bool,
    open: bool,
}

const WIDTH: usize = 40;

impl Progress {
    /// Shows something if standard error is a terminal.
    #[must_use]
    pub fn on_terminal() -> Self {
        Self { shows: std::io::stderr().is_terminal(), open: false }
    }

    /// Shows nothing.
    #[must_use]
    pub const fn silent() -> Self {
        Self { shows: false, open: false }
    }

    /// A bar; what follows takes its place, if it is the same one further on.
    pub fn show(&mut self, what: &str, done: u64, of: u64) {
        if self.shows {
            self.write(&format!("\r\x1b[K{}", bar(what, done, of)));
            self.open = true;
        }
    }

    /// A line.
    pub fn say(&mut self, what: &str) {
        if self.shows {
            let lead = if std::mem::take(&mut self.open) { "\n" } else { "" };
            self.write(&format!("{lead}{what}\n"));
        }
    }

    fn write(&self, text: &str) {
        let mut out = std::io::stderr().lock();
        // A terminal that is gone sees nothing.
        drop(out.write_all(text.as_bytes()).and_then(|()| out.flush()));
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if self.open {
            self.write("\n");
        }
    }
}

fn bar(what: &str, done: u64, of: u64) -> String {
    let share = if of == 0 { 1.0 } else { (done as f64 / of as f64).clamp(0.0, 1.0) };
    let full = (share * WIDTH as f64) as usize;
    format!("{what:<12} [{}{}] {done}/{of}", "#".repeat(full), " ".repeat(WIDTH - full))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_fills() {
        assert_eq!(bar("x", 0, 0).matches('#').count(), WIDTH);
        assert_eq!(bar("x", 1, 2).matches('#').count(), WIDTH / 2);
        assert_eq!(bar("x", 3, 2).matches('#').count(), WIDTH);
    }
}
