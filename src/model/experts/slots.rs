//! Where the experts of a module lie: each has a run of rows of the module's stacks of A and B, and, if it
//! starts from the base's weight, a run of the rows of initial components. The rows of the stacks, then the
//! initial ones, are the module's rank space.
//!
//! Letters of shapes: `R` rows of the stacks, `R0` initial rows.

use tch::{Device, Kind, Tensor};

use super::spec::ExpertSpec;
use crate::config::ModulePath;

/// Where an expert lies in the stacks of a module.
#[derive(Debug, Clone)]
pub struct Slot {
    /// The expert.
    pub expert: usize,
    /// First of its rows.
    pub start: i64,
    /// How many it has.
    pub rank: i64,
    /// `s_e`.
    pub scaling: f64,
    /// Its row of the magnitudes, if it is a DoRA expert.
    pub magnitude: Option<i64>,
    /// First of its initial rows, if it starts from the base's weight.
    pub initial: Option<i64>,
    /// Whether it is trained.
    pub trainable: bool,
}

/// Lays out the experts that target `path`; none if there are none.
pub fn lay_out(specs: &[ExpertSpec], path: ModulePath) -> Vec<Slot> {
    let (mut start, mut magnitudes, mut initials) = (0, 0, 0);
    let mut slots = vec![];
    for (expert, spec) in specs.iter().enumerate() {
        let (Some(size), Some(scaling)) = (spec.modules.get(&path), spec.scaling(path)) else {
            continue;
        };
        slots.push(Slot {
            expert,
            start,
            rank: size.rank,
            scaling,
            magnitude: spec.use_dora.then_some(magnitudes),
            initial: spec.starts_from_base().then_some(initials),
            trainable: spec.trainable,
        });
        start += size.rank;
        magnitudes += i64::from(spec.use_dora);
        initials += if spec.starts_from_base() { size.rank } else { 0 };
    }
    slots
}

/// The rows of a module's rank space.
#[derive(Debug, Clone, Copy)]
pub struct RankRows<'a>(pub &'a [Slot]);

impl RankRows<'_> {
    /// `R`.
    pub fn num_stacked(self) -> i64 {
        self.0.iter().map(|slot| slot.rank).sum()
    }

    /// `R + R0`.
    pub fn num_rows(self) -> i64 {
        let initial = self.0.iter().filter(|slot| slot.initial.is_some());
        self.num_stacked() + initial.map(|slot| slot.rank).sum::<i64>()
    }

    /// A slot's runs of rows, first and behind the last: in the stacks and, if it has any, among the initial
    /// rows.
    pub fn of(self, slot: &Slot) -> (std::ops::Range<i64>, Option<std::ops::Range<i64>>) {
        let initial = slot.initial.map(|start| self.num_stacked() + start);
        let run = |start: i64| start..start + slot.rank;
        (run(slot.start), initial.map(run))
    }

    /// A matrix `[num_lines, R + R0]`, f64 on the CPU, with `value(slot)` at a slot's rows in the line
    /// `line(slot)`, if it has one, and 0 elsewhere.
    pub fn filled(
        self,
        num_lines: i64,
        line: impl Fn(&Slot) -> Option<i64>,
        value: impl Fn(&Slot) -> f64,
    ) -> Tensor {
        let matrix = Tensor::zeros([num_lines, self.num_rows()], (Kind::Double, Device::Cpu));
        for slot in self.0 {
            let Some(line) = line(slot) else { continue };
            let (stacked, initial) = self.of(slot);
            for run in [Some(stacked), initial].into_iter().flatten() {
                let _ = matrix.get(line).narrow(0, run.start, slot.rank).fill_(value(slot));
            }
        }
        matrix
    }
}
