//! Quantities: `500m`, `1Gi`, `2e3`.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

/// A list of resources, as requests, limits and capacities are.
pub type Resources = BTreeMap<String, Quantity>;

/// A quantity in thousandths. Saturates: nobody has that much of anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Milli(pub i128);

impl Milli {
    /// Reads a quantity; `None` if it is none.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
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
        let below = scale.saturating_mul(divisor);
        // Rounded up, so that nothing that is asked for becomes nothing.
        Some(Self(sign * divide_up(milli, below)))
    }

    /// The quantity of this resource in a list; 0 if there is none.
    #[must_use]
    pub fn of(resources: Option<&Resources>, name: &str) -> Self {
        Self::find(resources, name).unwrap_or_default()
    }

    /// The quantity of this resource in a list, if it is there.
    #[must_use]
    pub fn find(resources: Option<&Resources>, name: &str) -> Option<Self> {
        resources?.get(name).and_then(|quantity| Self::parse(&quantity.0))
    }

    /// So many whole units.
    #[must_use]
    pub fn whole(units: u64) -> Self {
        Self(i128::from(units) * 1000)
    }

    /// Whole units, rounded up.
    #[must_use]
    pub fn units(self) -> i64 {
        clamp(divide_up(self.0, 1000))
    }

    /// Thousandths.
    #[must_use]
    pub fn milli(self) -> i64 {
        clamp(self.0)
    }
}

/// Rounded up; both as kubelet rounds what it tells containers of their resources.
#[must_use]
pub(crate) fn divide_up(value: i128, by: i128) -> i128 {
    let by = by.max(1);
    value.div_euclid(by) + i128::from(value.rem_euclid(by) != 0)
}

fn clamp(value: i128) -> i64 {
    i64::try_from(value).unwrap_or(if value < 0 { i64::MIN } else { i64::MAX })
}

/// What a suffix multiplies by, as a fraction.
fn multiplier(suffix: &str) -> Option<(i128, i128)> {
    let binary = ["Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];
    let decimal = ["k", "M", "G", "T", "P", "E"];
    let below = ["m", "u", "n"];
    let at = |list: &[&str]| list.iter().position(|known| *known == suffix).map(|at| at as u32 + 1);
    if suffix.is_empty() {
        return Some((1, 1));
    }
    if let Some(power) = at(&binary) {
        return Some((1024_i128.pow(power), 1));
    }
    if let Some(power) = at(&decimal) {
        return Some((1000_i128.pow(power), 1));
    }
    if let Some(power) = at(&below) {
        return Some((1, 1000_i128.pow(power)));
    }
    let power: i32 = suffix.strip_prefix(['e', 'E'])?.parse().ok()?;
    let factor = 10_i128.checked_pow(power.unsigned_abs()).filter(|_| power.unsigned_abs() <= 20)?;
    Some(if power < 0 { (1, factor) } else { (factor, 1) })
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
        assert_eq!(milli("64Mi"), Some(67_108_864_000));
        assert_eq!(milli("2e3"), Some(2_000_000));
        assert_eq!(milli("1E"), Some(1_000_000_000_000_000_000_000));
        assert_eq!(milli("1n"), Some(1));
        assert_eq!(milli("-1"), Some(-1000));
        for wrong in ["", "x", "1.2.3", "1KiB", "--1", "1e99999", "é"] {
            assert_eq!(milli(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn units_are_rounded_up() {
        assert_eq!(Milli(1).units(), 1);
        assert_eq!(Milli(1000).units(), 1);
        assert_eq!(Milli(1001).units(), 2);
        assert_eq!(Milli(0).units(), 0);
    }
}
