//! The initial A, B and magnitudes of a module's experts (PEFT 0.21, `tuners/lora/layer.py`).
//!
//! ```text
//! default   A ~ U(-1/sqrt(i), 1/sqrt(i))        B = 0     `reset_lora_parameters`
//! gaussian  A ~ N(0, 1/r^2)                     B = 0     `reset_lora_parameters`
//! PiSSA     W^T = U S V^T:  A = sqrt(S_r / s) V_r^T,  B = U_r sqrt(S_r / s)      `pissa_init`
//! OLoRA     W^T = Q R:      A = R_r,                  B = Q_r                    `olora_init`
//! DoRA      m = |W^T + s (B A - B0 A0)| over inputs = |W^T|                 `DoraLinearLayer`
//! ```
//!
//! `W` is the weight `[i, o]`, so `W^T` is what PEFT calls the weight of a linear layer. PEFT's
//! `olora_init` overlooks `fan_in_fan_out` and factorises GPT-2's `W` itself, which gives factors
//! of the wrong shapes. Here OLoRA factorises `W^T`, as for a linear layer.

use tch::{Device, Kind, Tensor};

use super::slots::{RankRows, Slot, lay_out};
use super::spec::ExpertSpec;
use super::stack::{Dora, LoraExperts};
use crate::config::{LoraInit, ModulePath};
use crate::model::decoder::linear::Linear;
use crate::model::decoder::precision::wide;

/// Whether experts get the initial values of new ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InitialValues {
    /// Values as [`LoraInit`] says.
    Fresh,
    /// Any values, since they are about to be overwritten.
    Empty,
}

impl LoraExperts {
    /// The experts among `specs` that target `path`; `None` if there are none. Random numbers come
    /// from libtorch's default CPU generator, so that they are the same for every device.
    ///
    /// - `weight`: the base's weight as it was read, `[i, o]`, on the CPU
    /// - `linear`: the base's layer as the model uses it, on the model's device
    /// - `kind`: dtype of the trained parameters: f32, or f64 in tests
    /// - `values`: whether the experts get the initial values of new ones
    pub fn new(
        path: ModulePath,
        specs: &[ExpertSpec],
        weight: &Tensor,
        linear: &Linear,
        kind: Kind,
        values: InitialValues,
    ) -> Option<Self> {
        let slots = lay_out(specs, path);
        if slots.is_empty() {
            return None;
        }
        let (i, o) = weight.size2().expect("a linear layer's weight is [i, o]");
        let num_rows = RankRows(&slots).num_stacked();
        let bound = 1.0 / (i as f64).sqrt();
        let lora_a = Tensor::empty([num_rows, i], (kind, Device::Cpu)).uniform_(-bound, bound);
        let lora_b = Tensor::zeros([num_rows, o], (kind, Device::Cpu));
        let mut factors = BaseFactors { weight, svd: None, qr: None };
        let (mut initial_a, mut initial_b) = (vec![], vec![]);
        for slot in &slots {
            let mut a = lora_a.narrow(0, slot.start, slot.rank);
            let (a0, b0) = match specs[slot.expert].init {
                _ if values == InitialValues::Empty => match slot.initial {
                    Some(_) => (a.zeros_like(), lora_b.narrow(0, slot.start, slot.rank)),
                    None => continue,
                },
                LoraInit::Default => continue,
                LoraInit::Gaussian => {
                    let _ = a.normal_(0.0, 1.0 / slot.rank as f64);
                    continue;
                }
                LoraInit::Pissa => factors.pissa(slot),
                LoraInit::Olora => factors.olora(slot),
            };
            a.copy_(&a0);
            lora_b.narrow(0, slot.start, slot.rank).copy_(&b0);
            initial_a.push(a0.to_kind(kind));
            initial_b.push(b0.to_kind(kind));
        }
        let device = linear.stored().device();
        let initial = (!initial_a.is_empty()).then(|| {
            let stack = |parts: &[Tensor]| Tensor::cat(parts, 0).to_device(device);
            (stack(&initial_a), stack(&initial_b))
        });
        let trained = slots.iter().any(|slot| slot.trainable);
        let leaf = |x: Tensor| x.to_device(device).detach().copy().set_requires_grad(trained);
        let row_factors = Self::row_factors(&slots, specs.len(), (kind, device));
        let dora = Dora::new(&slots, specs.len(), linear, kind);
        let dora = dora.map(|dora| Dora { magnitude: leaf(dora.magnitude), ..dora });
        let (lora_a, lora_b) = (leaf(lora_a), leaf(lora_b));
        Some(Self { lora_a, lora_b, dora, initial, slots, row_factors })
    }
}

impl Dora {
    /// Magnitudes that leave the layer unchanged; `None` if there is no DoRA expert.
    fn new(slots: &[Slot], num_experts: usize, linear: &Linear, kind: Kind) -> Option<Self> {
        let experts: Vec<i64> =
            slots.iter().filter(|s| s.magnitude.is_some()).map(|s| s.expert as i64).collect();
        if experts.is_empty() {
            return None;
        }
        let options = (kind, linear.stored().device());
        let num_magnitudes = experts.len() as i64;
        let rows = RankRows(slots);
        let members = rows.filled(num_magnitudes, options, |slot| slot.magnitude, |_| 1.0);
        let scalings = rows.filled(1, options, |_| Some(0), |slot| slot.scaling).tr();
        let weight = linear.weight().detach().to_kind(kind);
        let base_norm2 = weight.square().sum_dim_intlist(0, false, kind);
        Some(Self {
            magnitude: base_norm2.sqrt().unsqueeze(0).repeat([num_magnitudes, 1]),
            base_norm2,
            experts: (experts.len() < num_experts)
                .then(|| Tensor::from_slice(&experts).to_device(options.1)),
            others: 1.0 - members.sum_dim_intlist(0, false, kind).unsqueeze(-1),
            same: members.tr().matmul(&members),
            members,
            scalings,
        })
    }
}

/// Factorisations of a base's weight, computed at the first use, in f32 as in PEFT, or in f64 if
/// the weight is f64.
struct BaseFactors<'a> {
    weight: &'a Tensor,
    /// `U [o, k]`, `S [k]`, `V [i, k]` of `W^T`.
    svd: Option<(Tensor, Tensor, Tensor)>,
    /// `Q [o, k]`, `R [k, i]` of `W^T`.
    qr: Option<(Tensor, Tensor)>,
}

impl BaseFactors<'_> {
    /// `W^T`, `[o, i]`.
    fn transposed(&self) -> Tensor {
        let weight = self.weight.detach();
        weight.to_kind(wide(weight.kind())).tr().contiguous()
    }

    /// `A0`, `[r, i]`, and `B0` transposed, `[r, o]`.
    fn pissa(&mut self, slot: &Slot) -> (Tensor, Tensor) {
        if self.svd.is_none() {
            self.svd = Some(self.transposed().svd(true, true));
        }
        let (u, s, v) = self.svd.as_ref().expect("it was just set");
        let root = (s.narrow(0, 0, slot.rank) / slot.scaling).sqrt().unsqueeze(-1);
        let part = |vectors: &Tensor| vectors.narrow(1, 0, slot.rank).tr() * &root;
        (part(v), part(u))
    }

    /// `A0`, `[r, i]`, and `B0` transposed, `[r, o]`.
    fn olora(&mut self, slot: &Slot) -> (Tensor, Tensor) {
        if self.qr.is_none() {
            self.qr = Some(Tensor::linalg_qr(&self.transposed(), "reduced"));
        }
        let (q, r) = self.qr.as_ref().expect("it was just set");
        (r.narrow(0, 0, slot.rank), q.narrow(1, 0, slot.rank).tr())
    }
}
