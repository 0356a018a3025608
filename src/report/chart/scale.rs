//! A linear axis with round numbers.

/// An axis that maps values to positions.
#[derive(Debug, Clone)]
pub(crate) struct Scale {
    /// The smallest and the largest value.
    pub bounds: [f64; 2],
    /// Where these two lie.
    pub ends: [f64; 2],
    /// The round numbers that are written at the axis.
    pub ticks: Vec<f64>,
    /// The distance of two of these.
    step: f64,
}

impl Scale {
    /// An axis for the finite ones of `values`, with `count` round numbers or up to twice as many;
    /// `None` if there are none.
    pub fn new(values: impl Iterator<Item = f64>, ends: [f64; 2], count: usize) -> Option<Self> {
        let of = |bounds: Option<[f64; 2]>, value: f64| {
            let [low, high] = bounds.unwrap_or([value, value]);
            Some([low.min(value), high.max(value)])
        };
        let [low, high] = values.filter(|value| value.is_finite()).fold(None, of)?;
        let spread = high - low;
        // a single value gets some room on both sides
        let room = if spread > 0.0 { 0.0 } else { (0.5 * high.abs()).max(1e-12) };
        let bounds = [low - room, high + room];
        let step = round_step((bounds[1] - bounds[0]) / count.max(1) as f64);
        let first = (bounds[0] / step - 1e-9).ceil();
        let last = (bounds[1] / step + 1e-9).floor();
        let num = (last - first).clamp(-1.0, 50.0) as i64;
        let ticks = (0..=num).map(|i| (first + i as f64) * step).collect();
        Some(Self { bounds, ends, ticks, step })
    }

    /// Where a value lies.
    pub fn place(&self, value: f64) -> f64 {
        let ([low, high], [from, to]) = (self.bounds, self.ends);
        from + (value - low) / (high - low) * (to - from)
    }

    /// A round number as it is written.
    pub fn label(&self, tick: f64) -> String {
        let largest = self.ticks.iter().fold(0.0_f64, |most, tick| most.max(tick.abs()));
        if largest >= 1e6 || (largest > 0.0 && largest < 1e-2) {
            return if tick == 0.0 {
                "0".into()
            } else {
                format!("{tick:.1e}").replace(".0e", "e")
            };
        }
        let digits = (-(self.step.log10().floor())).clamp(0.0, 6.0) as usize;
        format!("{tick:.digits$}")
    }
}

/// The largest of 1, 2 and 5 times a power of ten that is at most `step`.
fn round_step(step: f64) -> f64 {
    let power = 10f64.powf(step.log10().floor());
    let factor = [5.0, 2.0].into_iter().find(|factor| factor * power <= step * (1.0 + 1e-9));
    factor.unwrap_or(1.0) * power
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(values: &[f64]) -> Vec<String> {
        let scale = Scale::new(values.iter().copied(), [0.0, 100.0], 3).expect("some are finite");
        scale.ticks.iter().map(|tick| scale.label(*tick)).collect()
    }

    #[test]
    fn an_axis_has_round_numbers_within_its_bounds() {
        assert_eq!(
            labels(&[0.93, 2.2, f64::NAN]),
            ["1.0", "1.2", "1.4", "1.6", "1.8", "2.0", "2.2"]
        );
        assert_eq!(labels(&[0.0, 120.0]), ["0", "20", "40", "60", "80", "100", "120"]);
        assert_eq!(labels(&[0.0, 5e-3]), ["0", "1e-3", "2e-3", "3e-3", "4e-3", "5e-3"]);
        assert_eq!(labels(&[-0.02, 0.03]), ["-0.02", "-0.01", "0.00", "0.01", "0.02", "0.03"]);
        assert_eq!(labels(&[3.0]), ["2", "3", "4"]);
        assert!(Scale::new([f64::NAN].into_iter(), [0.0, 1.0], 4).is_none());
    }

    #[test]
    fn the_ends_of_an_axis_are_its_bounds() {
        let scale = Scale::new([2.0, 6.0].into_iter(), [100.0, 0.0], 4).expect("it is finite");
        assert_eq!([scale.place(2.0), scale.place(5.0), scale.place(6.0)], [100.0, 25.0, 0.0]);
    }
}
