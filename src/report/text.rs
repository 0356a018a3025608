//! Numbers and letters on a page.

/// A number as `metrics.jsonl` has it: the shortest text that is read as the same number.
pub fn exact(number: f64) -> String {
    match number.is_finite() {
        true => number.to_string(),
        false => "not finite".into(),
    }
}

/// A number with four digits, for charts and for reading.
pub fn short(number: f64) -> String {
    let size = number.abs();
    if !number.is_finite() {
        return "not finite".into();
    }
    if size >= 1e7 || (size > 0.0 && size < 1e-3) {
        return format!("{number:.2e}");
    }
    let digits = match size {
        1000.0.. => 0,
        100.0.. => 1,
        10.0.. => 2,
        1.0.. => 3,
        _ => 4,
    };
    format!("{number:.digits$}")
}

/// A number of bytes in KiB, MiB or GiB.
pub fn bytes(number: u64) -> String {
    let (mut value, mut unit) = (number as f64, "bytes");
    for larger in ["KiB", "MiB", "GiB"] {
        if value < 1024.0 {
            break;
        }
        (value, unit) = (value / 1024.0, larger);
    }
    if unit == "bytes" { format!("{number} bytes") } else { format!("{value:.1} {unit}") }
}

/// A letter for a run: A to Z, then AA, AB and so on.
pub fn letter(index: usize) -> String {
    let last = char::from(b'A' + (index % 26) as u8);
    if index < 26 { last.to_string() } else { letter(index / 26 - 1) + &last.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_exact_in_tables_and_short_elsewhere() {
        assert_eq!(exact(0.1 + 0.2), "0.30000000000000004");
        assert_eq!(exact(5e-7).parse::<f64>(), Ok(5e-7));
        assert_eq!(exact(f64::NAN), "not finite");
        let shown = [0.0, 1e-5, 0.012_345, 1.23456, -12.3456, 123.456, 12345.6, 1e9].map(short);
        assert_eq!(
            shown,
            ["0.0000", "1.00e-5", "0.0123", "1.235", "-12.35", "123.5", "12346", "1.00e9"]
        );
        assert_eq!([bytes(12), bytes(1536), bytes(3 << 29)], ["12 bytes", "1.5 KiB", "1.5 GiB"]);
        assert_eq!([letter(0), letter(25), letter(26), letter(53)], ["A", "Z", "AA", "BB"]);
    }
}
