//! Times as the API writes them.

use broker::clock::wall_us;
use time::{OffsetDateTime, UtcOffset, format_description::well_known::Rfc3339};

/// Now, to the second.
pub(crate) fn now() -> String {
    seconds(i64::try_from(wall_us() / 1_000_000).unwrap_or(i64::MAX))
}

/// Now, to the microsecond.
pub(crate) fn now_micros() -> String {
    let nanos = i128::from(wall_us()) * 1_000;
    written(OffsetDateTime::from_unix_timestamp_nanos(nanos).unwrap_or(OffsetDateTime::UNIX_EPOCH), true)
}

/// A time in seconds since 1970.
pub(crate) fn seconds(unix: i64) -> String {
    written(OffsetDateTime::from_unix_timestamp(unix).unwrap_or(OffsetDateTime::UNIX_EPOCH), false)
}

/// Seconds since 1970 of a written time.
pub(crate) fn parse(text: &str) -> Option<i64> {
    OffsetDateTime::parse(text, &Rfc3339).ok().map(OffsetDateTime::unix_timestamp)
}

/// Nanoseconds since 1970 of a written time.
pub(crate) fn nanos(text: &str) -> Option<i128> {
    OffsetDateTime::parse(text, &Rfc3339).ok().map(OffsetDateTime::unix_timestamp_nanos)
}

/// Seconds since 1970.
pub(crate) fn unix() -> i64 {
    i64::try_from(wall_us() / 1_000_000).unwrap_or(i64::MAX)
}

/// A written time in the one form in which it is kept.
pub(crate) fn normalized(text: &str, micros: bool) -> Option<String> {
    let time = OffsetDateTime::parse(text, &Rfc3339).ok()?;
    Some(written(time.to_offset(UtcOffset::UTC), micros))
}

fn written(time: OffsetDateTime, micros: bool) -> String {
    let (date, month) = (time.date(), u8::from(time.month()));
    let (hour, minute, second) = time.to_hms();
    let fraction = if micros { format!(".{:06}", time.microsecond()) } else { String::new() };
    let year = date.year();
    format!("{year:04}-{month:02}-{:02}T{hour:02}:{minute:02}:{second:02}{fraction}Z", date.day())
}

/// How long ago, as tables show it: `4m5s`, `3h`, `2d`.
pub(crate) fn age(written: &str) -> String {
    match parse(written) {
        Some(then) => duration(unix() - then),
        None => "<unknown>".to_owned(),
    }
}

/// A duration in seconds as tables show it.
pub(crate) fn duration(seconds: i64) -> String {
    const MINUTE: i64 = 60;
    const HOUR: i64 = 60 * MINUTE;
    const DAY: i64 = 24 * HOUR;
    let two = |large: i64, letter: char, small: i64, other: char| match small {
        0 => format!("{large}{letter}"),
        small => format!("{large}{letter}{small}{other}"),
    };
    match seconds {
        ..-1 => "<invalid>".to_owned(),
        -1..=0 => "0s".to_owned(),
        s if s < 2 * MINUTE => format!("{s}s"),
        s if s < 10 * MINUTE => two(s / MINUTE, 'm', s % MINUTE, 's'),
        s if s < 3 * HOUR => format!("{}m", s / MINUTE),
        s if s < 8 * HOUR => two(s / HOUR, 'h', s % HOUR / MINUTE, 'm'),
        s if s < 2 * DAY => format!("{}h", s / HOUR),
        s if s < 8 * DAY => two(s / DAY, 'd', s % DAY / HOUR, 'h'),
        s if s < 2 * 365 * DAY => format!("{}d", s / DAY),
        s if s < 8 * 365 * DAY => two(s / (365 * DAY), 'y', s % (365 * DAY) / DAY, 'd'),
        s => format!("{}y", s / (365 * DAY)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_one_written_form() {
        assert_eq!(normalized("2026-11-20T10:00:00+01:00", false).unwrap(), "2026-11-20T09:00:00Z");
        assert_eq!(normalized("2026-11-20T00:00:00Z", true).unwrap(), "2026-11-20T00:00:00.000000Z");
        assert_eq!(normalized("yesterday", false), None);
    }

    #[test]
    fn ages_are_as_short_as_kubectl_shows_them() {
        let shown = [5, 125, 600, 7020, 3 * 3600 + 60, 90_000, 8 * 86_400].map(duration);
        assert_eq!(shown, ["5s", "2m5s", "10m", "117m", "3h1m", "25h", "8d"]);
    }
}
