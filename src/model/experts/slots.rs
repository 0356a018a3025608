//! Where the experts of a module lie. Each expert has a run of rows in the module's stacks of A and
//! B. If it starts from the base's weight, it also has a run of initial rows. The module's rank
//! space consists of the rows of the stacks and then the initial rows.
//!
//! Letters of shapes: `R` rows of the stacks, `R0` initial rows.

use tch::{Device, Kind, Tensor};

use super::spec::ExpertSpec;
use crate::config::ModulePath;

/// Where an expert lies in the stacks of a module, and its settings there.
#[derive(Debug, Clone)]
pub(crate) struct Slot {
    /// Index of the expert.
    pub expert: usize,
    /// Its first row in the stacks.
    pub start: i64,
    /// Number of its rows.
    pub rank: i64,
    /// Its scaling, `s_e`.
    pub scaling: f64,
    /// Its row of the magnitudes, if it is a DoRA expert.
    pub magnitude: Option<i64>,
    /// Its first initial row, if it starts from the base's weight.
    pub initial: Option<i64>,
    /// Whether it is trained.
    pub trainable: bool,
}

/// Lays out the experts that target `path`; empty if there are none.
pub(crate) fn lay_out(specs: &[ExpertSpec], path: ModulePath) -> Vec<Slot> {
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
pub(crate) struct RankRows<'a>(pub &'a [Slot]);

impl RankRows<'_> {
    /// Number of rows of the stacks, `R`.
    pub(crate) fn num_stacked(self) -> i64 {
        self.0.iter().map(|slot| slot.rank).sum()
    }

    /// Number of rows of the rank space, `R + R0`.
    pub fn num_rows(self) -> i64 {
        let initial = self.0.iter().filter(|slot| slot.initial.is_some());
        self.num_stacked() + initial.map(|slot| slot.rank).sum::<i64>()
    }

    /// The rows of a slot in the rank space: those in the stacks and, if the expert starts from the
    /// base's weight, its initial rows.
    pub fn of(self, slot: &Slot) -> (std::ops::Range<i64>, Option<std::ops::Range<i64>>) {
        let initial = slot.initial.map(|start| self.num_stacked() + start);
        let run = |start: i64| start..start + slot.rank;
        (run(slot.start), initial.map(run))
    }

    /// The scaling of each row's expert in that expert's line, 0 elsewhere:
    /// `[num_experts, R + R0]`.
    pub fn scalings(self, num_experts: usize, options: (Kind, Device)) -> Tensor {
        let line = |slot: &Slot| Some(slot.expert as i64);
        self.filled(num_experts as i64, options, line, |slot| slot.scaling)
    }

    /// A matrix `[num_lines, R + R0]`. The rows of a slot hold `value(slot)` in the line
    /// `line(slot)`, if it has one; everything else is 0. It is filled on its device, so that a
    /// step that needs it can be captured as a graph.
    pub fn filled(
        self,
        num_lines: i64,
        options: (Kind, Device),
        line: impl Fn(&Slot) -> Option<i64>,
        value: impl Fn(&Slot) -> f64,
    ) -> Tensor {
        let matrix = Tensor::zeros([num_lines, self.num_rows()], options);
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
