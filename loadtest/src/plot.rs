//! A picture of a run: linked nodes, CPU and memory over time, as SVG.

use std::fmt::Write as _;

use crate::{director::Sample, report::Report};

const WIDTH: f64 = 860.0;
const PANEL: f64 = 180.0;
const LEFT: f64 = 70.0;
const TOP: f64 = 50.0;
const GAP: f64 = 50.0;
/// Points of one line: more cannot be seen.
const POINTS_MAX: usize = 800;
/// CPU is told over this long at least: shorter is noise.
const WINDOW_S: f64 = 0.5;
const COLOURS: [&str; 2] = ["#1f6feb", "#d1592b"];

/// A panel: a title, and named lines of (seconds, value).
struct Panel {
    title: String,
    lines: Vec<(&'static str, Vec<(f64, f64)>)>,
}

/// The picture of a run.
#[must_use]
pub fn svg(report: &Report, samples: &[Sample]) -> String {
    let step = samples.len().div_ceil(POINTS_MAX).max(1);
    let seen: Vec<&Sample> = samples.iter().step_by(step).collect();
    let line = |value: fn(&Sample) -> f64| seen.iter().map(|s| (s.at_s, value(s))).collect::<Vec<_>>();
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let rss = |value: fn(&Sample) -> u64| seen.iter().map(|s| (s.at_s, mib(value(s)))).collect::<Vec<_>>();
    let panels = [
        Panel {
            title: format!("nodes linked ({:.0} a second while linking)", report.handshakes_per_s),
            lines: vec![("nodes", line(|sample| sample.connected as f64))],
        },
        Panel {
            title: "CPU, cores".to_owned(),
            lines: vec![
                ("hub", rate(&line(|sample| sample.cpu_s.0))),
                ("nodes", rate(&line(|sample| sample.cpu_s.1))),
            ],
        },
        Panel {
            title: "resident memory, MiB".to_owned(),
            lines: vec![("hub", rss(|sample| sample.rss.0)), ("nodes", rss(|sample| sample.rss.1))],
        },
    ];
    let height = TOP + panels.len() as f64 * (PANEL + GAP);
    let end = samples.last().map_or(1.0, |last| last.at_s.max(0.1));
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" \
         font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n<text x=\"{LEFT}\" y=\"24\" \
         font-size=\"16\">{}: {} nodes</text>\n",
        escape(&report.scenario),
        report.nodes
    );
    for (panel, place) in panels.iter().zip(0..) {
        draw(&mut out, panel, TOP + f64::from(place) * (PANEL + GAP), end);
    }
    out.push_str("</svg>\n");
    out
}

/// How fast a growing value grew, at each point over the window before it.
fn rate(line: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let mut from = 0;
    let mut out = Vec::new();
    for (at, value) in line {
        while from + 1 < line.len() && line[from + 1].0 <= at - WINDOW_S {
            from += 1;
        }
        let (since, before) = line[from];
        if *at - since >= WINDOW_S {
            // A process that was started again has used nothing yet.
            out.push((*at, ((value - before) / (at - since)).max(0.0)));
        }
    }
    out
}

fn draw(out: &mut String, panel: &Panel, top: f64, end: f64) {
    let most = panel.lines.iter().flat_map(|(_, line)| line).map(|(_, value)| *value).fold(0.0, f64::max);
    let scale = nice(most);
    let right = WIDTH - 20.0;
    let x = |at: f64| LEFT + (right - LEFT) * at / end;
    let y = |value: f64| top + PANEL * (1.0 - value / scale);
    let mut put = |text: String| {
        out.push_str(&text);
        out.push('\n');
    };
    put(format!("<text x=\"{LEFT}\" y=\"{:.1}\">{}</text>", top - 8.0, escape(&panel.title)));
    for part in 0..=4 {
        let value = scale * f64::from(part) / 4.0;
        put(format!(
            "<line x1=\"{LEFT}\" x2=\"{right}\" y1=\"{0:.1}\" y2=\"{0:.1}\" stroke=\"#ddd\"/><text x=\"{1:.1}\" \
             y=\"{2:.1}\" text-anchor=\"end\">{value}</text>",
            y(value),
            LEFT - 6.0,
            y(value) + 4.0
        ));
        let at = end * f64::from(part) / 4.0;
        put(format!(
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{at:.1} s</text>",
            x(at),
            top + PANEL + 16.0
        ));
    }
    for ((name, line), place) in panel.lines.iter().zip(0..) {
        let colour = COLOURS[place % COLOURS.len()];
        let mut points = String::new();
        for (at, value) in line {
            write!(points, "{:.1},{:.1} ", x(*at), y(*value)).expect("a String takes everything");
        }
        put(format!(
            "<polyline fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.5\" points=\"{}\"/><text x=\"{:.1}\" \
             y=\"{:.1}\" fill=\"{colour}\" text-anchor=\"end\">{name}</text>",
            points.trim_end(),
            right - 60.0 * place as f64,
            top - 8.0
        ));
    }
}

/// The least of 1, 2, 4 or 10 times a power of ten that is not below.
fn nice(most: f64) -> f64 {
    if most <= 0.0 || !most.is_finite() {
        return 1.0;
    }
    let power = 10_f64.powf(most.log10().floor());
    [1.0, 2.0, 4.0, 10.0].into_iter().map(|n| n * power).find(|n| *n >= most).unwrap_or(10.0 * power)
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_picture_has_a_line_for_each_value_and_nothing_that_is_no_number() {
        let sample = |n: u32| Sample {
            at_s: f64::from(n) / 10.0,
            connected: u64::from(n),
            cpu_s: (f64::from(n) / 20.0, 0.0),
            rss: (1 << 20, 2 << 20),
        };
        let report = Report { scenario: "<steady>".to_owned(), ..Report::default() };
        for samples in [Vec::new(), (0..5000).map(sample).collect::<Vec<_>>()] {
            let picture = svg(&report, &samples);
            assert_eq!(picture.matches("<polyline").count(), 5);
            assert!(!picture.contains("NaN") && !picture.contains("inf") && !picture.contains("<steady>"));
            assert!(picture.len() < 200_000, "{}", picture.len());
        }
        let half = rate(&(0..100).map(|n| (f64::from(n) / 10.0, f64::from(n) / 20.0)).collect::<Vec<_>>());
        assert!(half.iter().all(|(_, cores)| (cores - 0.5).abs() < 1e-9), "{half:?}");
    }

    #[test]
    fn an_axis_ends_at_a_round_number() {
        for (most, end) in [(0.0, 1.0), (0.9, 1.0), (3.0, 4.0), (41.0, 100.0), (1000.0, 1000.0)] {
            assert!((nice(most) - end).abs() < 1e-9, "{most}");
        }
    }
}
