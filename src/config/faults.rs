//! The faults that the validation of a config finds.

use anyhow::{Result, anyhow};

/// The faults found so far, one line each.
#[derive(Default)]
pub(super) struct Faults(Vec<String>);

impl Faults {
    pub fn add(&mut self, key: &str, fault: String) {
        self.0.push(format!("`{key}` {fault}"));
    }

    pub fn at_least_one(&mut self, key: &str, value: i64) {
        if value < 1 {
            self.add(key, format!("must be at least 1, got {value}"));
        }
    }

    pub fn at_most(&mut self, key: &str, value: i64, most: i64) {
        if value > most {
            self.add(key, format!("must be at most {most}, got {value}"));
        }
    }

    pub fn above_zero(&mut self, key: &str, value: f64) {
        self.in_range(key, value, value.is_finite() && value > 0.0, "a number above 0");
    }

    pub fn at_least_zero(&mut self, key: &str, value: f64) {
        self.in_range(key, value, value.is_finite() && value >= 0.0, "a number of at least 0");
    }

    pub fn in_range(&mut self, key: &str, value: f64, ok: bool, what: &str) {
        if !ok {
            self.add(key, format!("must be {what}, got {}", number(value)));
        }
    }

    pub fn into_result(self) -> Result<()> {
        if self.0.is_empty() { Ok(()) } else { Err(anyhow!(self.0.join("\n"))) }
    }
}

/// A number with few digits: `1e308` and `0.5`.
pub(super) fn number(value: f64) -> String {
    let is_short = value == 0.0 || !value.is_finite() || (1e-4..1e9).contains(&value.abs());
    if is_short { value.to_string() } else { format!("{value:e}") }
}
