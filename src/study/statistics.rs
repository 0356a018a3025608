//! Means, standard deviations and t-intervals of paired differences.
//!
//! With differences d_1 .. d_n of mean m and standard deviation s, the 95 % interval is
//!
//! ```text
//! m ± t s / sqrt(n)        P(|T| <= t) = 0.95, T of Student's distribution with n - 1 degrees
//! ```
//!
//! For a whole number of degrees, the distribution has a finite series (Abramowitz and Stegun,
//! 26.7.3 and 26.7.4), which [`t_quantile`] inverts.

use std::f64::consts::{FRAC_2_PI, FRAC_PI_2};

use serde::{Deserialize, Serialize};

/// The probability that a t-interval covers the true mean.
const CONFIDENCE: f64 = 0.95;

/// A mean with its t-interval.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Interval {
    /// The mean.
    pub mean: f64,
    /// Half the width of the 95 % interval around the mean; `None` with a single value, which has
    /// no interval.
    pub half_width: Option<f64>,
}

impl Interval {
    /// The interval of `values`; `None` if there are none.
    pub fn of(values: &[f64]) -> Option<Self> {
        let mean = mean(values)?;
        let of_mean = deviation(values).map(|sd| sd / (values.len() as f64).sqrt());
        let half_width = of_mean.map(|error| error * t_quantile(values.len() as u32 - 1));
        Some(Self { mean, half_width })
    }

    /// Whether the whole interval lies above 0.
    pub(crate) fn is_above_zero(self) -> bool {
        self.half_width.is_some_and(|half| self.mean - half > 0.0)
    }

    /// Whether the whole interval lies below 0.
    pub(crate) fn is_below_zero(self) -> bool {
        self.half_width.is_some_and(|half| self.mean + half < 0.0)
    }
}

/// The mean; `None` if there are no values.
pub fn mean(values: &[f64]) -> Option<f64> {
    (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
}

/// The standard deviation of a sample, with n - 1 in the denominator; `None` with fewer than two
/// values.
pub fn deviation(values: &[f64]) -> Option<f64> {
    let mean = mean(values).filter(|_| values.len() > 1)?;
    let squares = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>();
    Some((squares / (values.len() - 1) as f64).sqrt())
}

/// The differences `a - b` of paired values.
pub fn differences(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a - b).collect()
}

/// The number t with `P(|T| <= t) = 0.95` for Student's distribution with `degrees` degrees of
/// freedom, of which there must be at least one.
pub fn t_quantile(degrees: u32) -> f64 {
    assert!(degrees > 0, "a distribution has at least one degree of freedom");
    // t = sqrt(degrees) tan(theta), and the probability rises with theta
    let (mut low, mut high) = (0.0, FRAC_PI_2);
    for _ in 0..100 {
        let theta = f64::midpoint(low, high);
        match within(theta, degrees) < CONFIDENCE {
            true => low = theta,
            false => high = theta,
        }
    }
    f64::from(degrees).sqrt() * f64::midpoint(low, high).tan()
}

/// `P(|T| <= sqrt(degrees) tan(theta))`: Abramowitz and Stegun, 26.7.3 for an odd number of degrees
/// and 26.7.4 for an even one.
fn within(theta: f64, degrees: u32) -> f64 {
    let (sin, cos) = theta.sin_cos();
    let is_odd = degrees % 2 == 1;
    // the terms cos^k with k = 1, 3, .. or 0, 2, .. up to degrees - 2, each from the one before
    let first = if is_odd { 1 } else { 0 };
    let mut term = if is_odd { cos } else { 1.0 };
    let mut sum = 0.0;
    let mut power = first;
    while power + 2 <= degrees {
        sum += term;
        power += 2;
        term *= cos * cos * f64::from(power - 1) / f64::from(power);
    }
    if is_odd { FRAC_2_PI * (theta + sin * sum) } else { sin * sum }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reference: `scipy.stats.t.ppf(0.975, degrees)` of SciPy 1.17.1.
    #[test]
    fn quantiles_are_those_of_scipy() {
        for (degrees, expected) in [
            (1, 12.706204736174694),
            (2, 4.302652729749462),
            (3, 3.1824463052837078),
            (4, 2.7764451051977934),
            (5, 2.5705818356363146),
            (9, 2.262157162798205),
            (30, 2.0422724563012378),
            (100, 1.9839715185235518),
        ] {
            let found = t_quantile(degrees);
            assert!((found / expected - 1.0).abs() < 1e-12, "{degrees}: {found}");
        }
    }

    /// `t = tan(0.95 pi / 2)` with 1 degree, `t = p sqrt(2 / (1 - p^2))` with 2.
    #[test]
    fn quantiles_agree_with_their_closed_forms() {
        let one = (CONFIDENCE * FRAC_PI_2).tan();
        let two = CONFIDENCE * (2.0 / (1.0 - CONFIDENCE.powi(2))).sqrt();
        for (degrees, expected) in [(1, one), (2, two)] {
            assert!((t_quantile(degrees) / expected - 1.0).abs() < 1e-12);
        }
        // with many degrees, the distribution is nearly the normal one
        assert!((t_quantile(100_000) - 1.959_964).abs() < 1e-4);
    }

    /// With d = 1, 2, 3: m = 2, s = 1, t = 4.3027 and half = t / sqrt(3).
    #[test]
    fn an_interval_is_the_mean_and_the_t_quantile_times_its_standard_error() {
        let interval = Interval::of(&[1.0, 2.0, 3.0]).expect("there are values");
        let half = interval.half_width.expect("there are several");
        assert!((interval.mean - 2.0).abs() < 1e-15);
        assert!((half - 4.302652729749462 / 3.0_f64.sqrt()).abs() < 1e-12);
        assert!(!interval.is_above_zero() && !interval.is_below_zero());
        let narrow = Interval::of(&[1.0, 1.1, 0.9]).expect("there are values");
        assert!(narrow.is_above_zero() && !narrow.is_below_zero());
        assert!(Interval::of(&[-1.0, -1.1, -0.9]).is_some_and(Interval::is_below_zero));
    }

    #[test]
    fn a_single_value_has_a_mean_but_no_interval() {
        let one = Interval::of(&[0.5]).expect("there is a value");
        assert_eq!(one, Interval { mean: 0.5, half_width: None });
        assert!(!one.is_above_zero() && !one.is_below_zero());
        assert_eq!((Interval::of(&[]), deviation(&[1.0])), (None, None));
    }

    #[test]
    fn differences_are_paired() {
        assert_eq!(differences(&[3.0, 5.0], &[1.0, 1.0]), [2.0, 4.0]);
        assert_eq!(deviation(&[2.0, 4.0]), Some(2.0_f64.sqrt()));
    }
}
