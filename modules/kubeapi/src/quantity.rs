//! Quantities: `500m`, `1Gi`, `2e3`.

use serde_json::Value;

/// A quantity in thousandths. Saturates: nobody has that much of anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub(crate) struct Milli(pub(crate) i128);

impl Milli {
    /// Reads a quantity; `None` if it is none.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let end = text.find(|c: char| !c.is_ascii_digit() && !"+-.".contains(c)).unwrap_or(text.len());
        let (number, suffix) = text.split_at(end);
        let (sign, digits) = match number.as_bytes().first()? {
            b'-' => (-1, &number[1..]),
            b'+' => (1, &number[1..]),
            _ => (1, number),
        };
        let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
        let all = format!("{whole}{fraction}");
        if all.is_empty() || all.len() > 30 || !all.bytes().all(|byte| byte.is_ascii_digit()) {
            return None;
        }
        let mantissa: i128 = all.parse().ok()?;
        let scale = 10_i128.checked_pow(u32::try_from(fraction.len()).ok()?)?;
        let (factor, divisor) = multiplier(suffix)?;
        let milli = mantissa.saturating_mul(factor).saturating_mul(1000);
        // Rounded up, so that nothing that is asked for becomes nothing.
        let below = scale.saturating_mul(divisor);
        Some(Self(sign * (milli / below + i128::from(milli % below != 0))))
    }

    /// The quantity in a value; 0 if there is none.
    pub(crate) fn of(value: Option<&Value>) -> Self {
        match value {
            Some(Value::String(text)) => Self::parse(text).unwrap_or_default(),
            Some(Value::Number(number)) => Self::parse(&number.to_string()).unwrap_or_default(),
            _ => Self::default(),
        }
    }
}

/// What a suffix multiplies by, as a fraction.
fn multiplier(suffix: &str) -> Option<(i128, i128)> {
    const KI: i128 = 1024;
    Some(match suffix {
        "" => (1, 1),
        "n" => (1, 1_000_000_000),
        "u" => (1, 1_000_000),
        "m" => (1, 1_000),
        "k" => (1_000, 1),
        "M" => (1_000_000, 1),
        "G" => (1_000_000_000, 1),
        "T" => (1_000_000_000_000, 1),
        "P" => (1_000_000_000_000_000, 1),
        "E" => (1_000_000_000_000_000_000, 1),
        "Ki" => (KI, 1),
        "Mi" => (KI.pow(2), 1),
        "Gi" => (KI.pow(3), 1),
        "Ti" => (KI.pow(4), 1),
        "Pi" => (KI.pow(5), 1),
        "Ei" => (KI.pow(6), 1),
        exponent => {
            let power: i32 = exponent.strip_prefix(['e', 'E'])?.parse().ok()?;
            let factor = 10_i128.checked_pow(power.unsigned_abs()).filter(|_| power.unsigned_abs() <= 20)?;
            if power < 0 { (1, factor) } else { (factor, 1) }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suffixes_and_fractions_are_understood() {
        let milli = |text| Milli::parse(text).map(|quantity| quantity.0);
        assert_eq!(milli("500m"), Some(500));
        assert_eq!(milli("0.5"), Some(500));
        assert_eq!(milli("1Ki"), Some(1_024_000));
        assert_eq!(milli("2e3"), Some(2_000_000));
        assert_eq!(milli("1E"), Some(1_000_000_000_000_000_000_000));
        assert_eq!(milli("1n"), Some(1));
        assert_eq!(milli("-1"), Some(-1000));
        for wrong in ["", "x", "1.2.3", "1KiB", "--1", "1e99999", "é"] {
            assert_eq!(milli(wrong), None, "{wrong}");
        }
    }
}
