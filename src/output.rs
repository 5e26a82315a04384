//! What commands print: lines, tables, JSON. A reader that goes away ends the command quietly.

use std::io::{self, Write as _};

use crate::exit::{Failure, Outcome};

/// Prints bytes as they are.
pub(crate) fn bytes(bytes: &[u8]) -> Outcome {
    let mut out = io::stdout().lock();
    out.write_all(bytes).and_then(|()| out.flush()).map_err(|error| match error.kind() {
        io::ErrorKind::BrokenPipe => Failure::quiet(),
        _ => Failure::failed(format!("cannot print: {error}")),
    })
}

/// Prints a line.
pub(crate) fn line(text: &[u8]) -> Outcome {
    let mut whole = Vec::with_capacity(text.len() + 1);
    whole.extend_from_slice(text);
    whole.push(b'\n');
    bytes(&whole)
}

/// Prints a value as one line of JSON.
pub(crate) fn json(value: &impl serde::Serialize) -> Outcome {
    line(&serde_json::to_vec(value).map_err(Failure::failed)?)
}

/// Rows under a heading, columns aligned; the last one is not padded.
#[derive(Debug)]
pub(crate) struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(crate) fn new(heading: &[&str]) -> Self {
        Self { rows: vec![heading.iter().map(|text| (*text).to_owned()).collect()] }
    }

    /// Rows that go on below an earlier table.
    pub(crate) fn without_heading() -> Self {
        Self { rows: Vec::new() }
    }

    pub(crate) fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }

    pub(crate) fn print(&self) -> Outcome {
        bytes(self.render().as_bytes())
    }

    fn render(&self) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width =
            |at: usize| self.rows.iter().filter_map(|row| row.get(at)).map(|c| c.chars().count()).max();
        let widths: Vec<usize> = (0..columns).map(|at| width(at).unwrap_or(0)).collect();
        let mut text = String::new();
        for row in &self.rows {
            for (at, cell) in row.iter().enumerate() {
                let last = at + 1 == row.len();
                let width = if last { 0 } else { widths[at] };
                text.push_str(&format!("{cell:<width$}{}", if last { "\n" } else { "  " }));
            }
        }
        text
    }
}

impl std::fmt::Display for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.render())
    }
}

/// Bytes as people want to see them in a table: text if it is text, at most `max` characters.
pub(crate) fn preview(bytes: &[u8], max: usize) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) if text.chars().all(|c| !c.is_control() || c == '\t') => {
            let mut shown: String = text.chars().take(max).collect();
            if shown.len() < text.len() {
                shown.push('…');
            }
            shown
        }
        _ => format!("({} bytes)", bytes.len()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell_and_no_line_ends_in_blanks() {
        let mut table = Table::new(&["NAME", "N"]);
        table.row(vec!["a-long-name".to_owned(), "1".to_owned()]);
        assert_eq!(table.render(), "NAME         N\na-long-name  1\n");
    }

    #[test]
    fn a_preview_never_prints_control_characters() {
        assert_eq!(preview(b"71.5", 10), "71.5");
        assert_eq!(preview(b"\x1b[2J", 10), "(4 bytes)");
        assert_eq!(preview("äöü".as_bytes(), 2), "äö…");
    }
}
