//! A batch in the form that the model takes: views of one tensor on the device.
//!
//! ```text
//! Rows -> HostInputs (one flat tensor and its layout) --one transfer--> Inputs (views of it)
//! ```
//!
//! Letters of shapes: `b` batch, `t` position, `n` labelled positions.

use tch::{Device, Kind, Tensor};

use super::host::{Extent, HostInputs, InputLayout, Rows};
use super::labelled::Labelled;
use super::prompt_means::{PromptMeans, RunningStep};
use super::targets::DomainTargets;
use crate::data::{Batch, IGNORED_LABEL};
use crate::model::decoder::context::{AttentionMask, Documents, same_document};

/// A batch on the device.
#[derive(Debug)]
pub struct Inputs {
    /// Token ids, `[b, t]`.
    pub input_ids: Tensor,
    /// Positions within each document, `[b, t]`.
    pub position_ids: Tensor,
    /// Which earlier positions each position attends to.
    pub mask: AttentionMask,
    /// Indices of the labelled positions in the flattened `[b t]`, `[n]`; any index for a filler.
    pub labelled: Tensor,
    /// Whether the labelled positions are all positions, in their order.
    pub every_position: bool,
    /// Targets of the labelled positions, `[n]`; -100 for a filler.
    pub labels: Tensor,
    /// Which labelled positions are not fillers, `[n]`; `None` if all count.
    pub counted: Option<Tensor>,
    /// The group of tokens that each labelled position belongs to, such as its domain, `[n]`.
    pub groups: Tensor,
    /// The expert that each position's record names, -1 for the base, `[b, t]`; `None` if no record
    /// decides.
    pub expert_ids: Option<Tensor>,
    /// 1 for each expert of the row's domain and 0 for the others, `[b, e]`, f32; `None` if domains
    /// have no experts.
    pub domain_experts: Option<Tensor>,
    /// Index of each position's document in its row; -1 in padding, `[b, t]`.
    pub(super) document_ids: Tensor,
    /// Which positions read a prompt, `[b, t]`; `None` means every position.
    prompt: Option<Tensor>,
    /// What is known of earlier positions, in a step of generation.
    pub(super) step: Option<StepState>,
}

/// What routing and the base's own pass know of earlier positions.
#[derive(Debug)]
pub(crate) struct StepState {
    /// What the base's own pass attends to, if a router reads the base's last hidden state.
    pub(super) base: Option<AttentionMask>,
    /// The position from which each expert is active, `[b, e]`; `None` if every expert always is.
    pub(super) active_from: Option<Tensor>,
    /// The means over prompts, if routers read them.
    pub(super) means: Option<RunningStep>,
}

impl Inputs {
    /// Moves host rows to `device`. All tokens are in one group.
    pub fn new(rows: Rows<'_>, device: Device) -> Self {
        let groups = vec![0; rows.num_rows];
        Self::of(&HostInputs::new(rows, Extent::of(&rows), &groups, None, device), device)
    }

    /// Moves a batch of data to `device`. The groups of tokens are the domains.
    ///
    /// - `by_record`: whether the experts that records name decide the routing
    pub fn of_batch(batch: &Batch, by_record: bool, device: Device) -> Self {
        Self::of_domains(batch, by_record, None, device)
    }

    /// The same for a batch whose domains have experts.
    pub fn of_domains(
        batch: &Batch,
        by_record: bool,
        experts: Option<&DomainTargets>,
        device: Device,
    ) -> Self {
        let rows = Rows::of_batch(batch, by_record);
        let extent = Extent::of(&rows);
        Self::of(&HostInputs::new(rows, extent, &batch.domains, experts, device), device)
    }

    /// Moves a batch to `device`.
    pub fn of(host: &HostInputs, device: Device) -> Self {
        host.layout.inputs(&host.to_device(device))
    }

    /// The labelled positions, in `num_groups` groups.
    pub fn label_rows(&self, num_groups: i64) -> Labelled<'_> {
        Labelled {
            rows: &self.labelled,
            groups: &self.groups,
            num_groups,
            counted: self.counted.as_ref(),
        }
    }

    /// 1 at each position that is a token and 0 in padding, `[b, t]`.
    pub(crate) fn real_tokens(&self, kind: Kind) -> Tensor {
        self.document_ids.ge(0).to_kind(kind)
    }

    /// A step of generation, whose rows are of one text each. All arguments but the last two are
    /// `[b, t]`, and have the names of fields.
    pub(super) fn of_step(
        input_ids: Tensor,
        position_ids: Tensor,
        document_ids: Tensor,
        mask: AttentionMask,
        step: StepState,
    ) -> Self {
        let none = || Tensor::zeros([0], (Kind::Int64, input_ids.device()));
        Self {
            position_ids,
            mask,
            labelled: none(),
            every_position: false,
            labels: none(),
            counted: None,
            groups: none(),
            expert_ids: None,
            domain_experts: None,
            document_ids,
            prompt: None,
            step: Some(step),
            input_ids,
        }
    }

    /// Takes means over prompts, in dtype `kind`.
    pub fn prompt_means(&self, kind: Kind) -> PromptMeans {
        let running = self.step.as_ref().and_then(|step| step.means.as_ref());
        if let Some(step) = running {
            return PromptMeans::Running(step.shallow_clone(), kind, 0.into());
        }
        let same = same_document(&self.document_ids);
        let averaged = match &self.prompt {
            None => same,
            Some(prompt) => same.logical_and(&prompt.unsqueeze(1)),
        };
        let averaged = averaged.to_kind(kind);
        let counts = averaged.sum_dim_intlist(-1, true, kind).clamp_min(1.0);
        PromptMeans::Whole(averaged / counts)
    }

    /// The same tokens as the base's own pass takes them in a step of generation, where it has a
    /// cache of its own. `None` if the pass takes these inputs.
    pub(in crate::model) fn of_base(&self) -> Option<Self> {
        let mask = self.step.as_ref()?.base.as_ref()?.shallow_clone();
        let state = StepState { base: None, active_from: None, means: None };
        let [ids, positions, documents] =
            [&self.input_ids, &self.position_ids, &self.document_ids].map(Tensor::shallow_clone);
        Some(Self::of_step(ids, positions, documents, mask, state))
    }

    /// The position from which each expert is active, `[b, e]`, in a step of generation.
    pub(in crate::model) fn active_from(&self) -> Option<&Tensor> {
        self.step.as_ref()?.active_from.as_ref()
    }

    /// 1 from the last occurrence of `wanted` in a document on and in padding, 0 elsewhere,
    /// `[b, t]`. `wanted` is not empty.
    pub(crate) fn active_from_last(&self, wanted: &[i64], kind: Kind) -> Tensor {
        let options = (Kind::Int64, self.input_ids.device());
        let (b, t) = self.input_ids.size2().expect("token ids are [b, t]");
        let padding = self.document_ids.lt(0);
        let num_starts = t + 1 - wanted.len() as i64;
        if num_starts < 1 {
            return padding.to_kind(kind);
        }
        let ids = |offset: i64| self.document_ids.narrow(1, offset, num_starts);
        let mut starts = ids(0).eq_tensor(&ids(t - num_starts));
        for (offset, &token) in (0..).zip(wanted) {
            let found = self.input_ids.narrow(1, offset, num_starts).eq(token);
            starts = starts.logical_and(&found);
        }
        // counted from 1, so that 0 means none
        let places_t = Tensor::arange(t, options) + 1;
        let starts_bt = Tensor::cat(
            &[starts.to_kind(options.0), Tensor::zeros([b, t - num_starts], options)],
            1,
        );
        let same_btt = self.document_ids.unsqueeze(1).eq_tensor(&self.document_ids.unsqueeze(2));
        let last_bt = (same_btt * (starts_bt * &places_t).unsqueeze(1)).amax(-1, false);
        let is_active = last_bt.ge(1).logical_and(&places_t.ge_tensor(&last_bt));
        is_active.logical_or(&padding).to_kind(kind)
    }

    /// One unpacked document without labels, as `trace` shows it.
    pub fn document(tokens: &[i64], device: Device) -> Self {
        let positions: Vec<i64> = (0..tokens.len() as i64).collect();
        let rows = Rows {
            num_rows: 1,
            seq_len: tokens.len(),
            input_ids: tokens,
            labels: &vec![IGNORED_LABEL; tokens.len()],
            position_ids: &positions,
            document_ids: &vec![0; tokens.len()],
            expert_ids: None,
            prompt: None,
        };
        Self::new(rows, device)
    }
}

impl InputLayout {
    /// The batch whose numbers are `flat`, as views of it.
    pub fn inputs(&self, flat: &Tensor) -> Inputs {
        let shape = [self.num_rows as i64, self.seq_len as i64];
        let mut at = 0;
        let mut next = |len: i64| {
            at += len;
            flat.narrow(0, at - len, len)
        };
        let positions = shape[0] * shape[1];
        let input_ids = next(positions).view(shape);
        let position_ids = next(positions).view(shape);
        let document_ids = next(positions).view(shape);
        let expert_ids = self.names_experts.then(|| next(positions).view(shape));
        let prompt = self.marks_prompts.then(|| next(positions).view(shape).ne(0));
        let num_experts = self.domain_experts as i64;
        let domain_experts = (num_experts > 0).then(|| {
            next(shape[0] * num_experts).view([shape[0], num_experts]).to_kind(Kind::Float)
        });
        let n = self.extent.num_labelled as i64;
        let (labelled, labels, groups) = (next(n), next(n), next(n));
        let mask = match self.extent.packed {
            None => AttentionMask::Causal,
            Some(packed) => AttentionMask::Documents(Documents::new(
                document_ids.shallow_clone(),
                next(packed.num_documents as i64 + 1).to_kind(Kind::Int),
                packed.longest as i64,
            )),
        };
        let counted = self.extent.is_rounded.then(|| labels.ge(0));
        Inputs {
            input_ids,
            position_ids,
            mask,
            labelled,
            every_position: self.labels_every_position(),
            labels,
            counted,
            groups,
            expert_ids,
            domain_experts,
            document_ids,
            prompt,
            step: None,
        }
    }
}
