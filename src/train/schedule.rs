//! The learning rate over the steps, as a factor of each group's own.
//!
//! With `w` warm-up steps and `n` steps in all, step `s` (from 1) has
//!
//! ```text
//! s / (w + 1)                                          while s <= w; after that
//! 1                                                    constant
//! m + (1 - m) (1 - p)                                  linear
//! m + (1 - m) (1 + cos(pi p)) / 2                      cosine
//! ```
//!
//! where `p = (s - 1 - w) / (n - w)` and `m` is `min_ratio`. These are transformers' schedules
//! without their first step, whose factor is 0.

use std::f64::consts::PI;

use crate::config::{ScheduleConfig, ScheduleKind};

/// The number of warm-up steps of a run of `num_steps`: a tenth of them, but at most 50, unless the
/// config says otherwise.
pub fn warmup_steps(schedule: ScheduleConfig, num_steps: u64) -> u64 {
    schedule.warmup_steps.unwrap_or((num_steps / 10).min(50))
}

/// The factor of step `step`, from 1, of `num_steps`, for a parameter group with its own number of
/// warm-up steps or `None`.
pub fn factor(schedule: ScheduleConfig, own: Option<u64>, step: u64, num_steps: u64) -> f64 {
    let warmup = own.unwrap_or(warmup_steps(schedule, num_steps));
    if step <= warmup {
        return step as f64 / (warmup + 1) as f64;
    }
    let progress = (step - 1 - warmup) as f64 / num_steps.saturating_sub(warmup).max(1) as f64;
    let min = schedule.min_ratio;
    match schedule.kind {
        ScheduleKind::Constant => 1.0,
        ScheduleKind::Linear => min + (1.0 - min) * (1.0 - progress),
        ScheduleKind::Cosine => min + (1.0 - min) * (1.0 + (PI * progress).cos()) / 2.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(kind: ScheduleKind, warmup_steps: u64, min_ratio: f64) -> ScheduleConfig {
        ScheduleConfig { kind, warmup_steps: Some(warmup_steps), min_ratio }
    }

    #[test]
    fn warm_up_rises_in_even_parts_to_one() {
        let s = schedule(ScheduleKind::Constant, 4, 0.0);
        let factors: Vec<f64> = (1..=6).map(|step| factor(s, None, step, 10)).collect();
        assert_eq!(factors, [0.2, 0.4, 0.6, 0.8, 1.0, 1.0]);
    }

    #[test]
    fn linear_falls_in_even_parts_towards_the_minimum() {
        let s = schedule(ScheduleKind::Linear, 0, 0.5);
        let factors: Vec<f64> = (1..=4).map(|step| factor(s, None, step, 4)).collect();
        assert_eq!(factors, [1.0, 0.875, 0.75, 0.625]);
    }

    #[test]
    fn without_a_number_the_warm_up_is_a_tenth_of_the_run_but_at_most_50_steps() {
        let s = ScheduleConfig::default();
        assert_eq!([40, 600, 9].map(|steps| warmup_steps(s, steps)), [4, 50, 0]);
    }

    #[test]
    fn a_group_can_have_its_own_warm_up() {
        let s = schedule(ScheduleKind::Constant, 4, 0.0);
        assert_eq!(factor(s, Some(9), 2, 100), 0.2);
        assert_eq!(factor(s, Some(0), 1, 100), 1.0);
    }

    #[test]
    fn cosine_is_half_way_in_the_middle() {
        let s = schedule(ScheduleKind::Cosine, 2, 0.1);
        assert_eq!(factor(s, None, 3, 12), 1.0);
        assert!((factor(s, None, 8, 12) - 0.55).abs() < 1e-15);
        let last = factor(s, None, 12, 12);
        assert!(last > 0.1 && last < 0.13);
    }
}
