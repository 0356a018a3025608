//! What is trained and what is saved, by name.
//!
//! ```text
//! {module}.expert_{e}.lora_a                [r, i]    PEFT's lora_A.weight
//! {module}.shared.lora_a                              the part that is always on
//!                              .lora_b      [o, r]    PEFT's lora_B.weight
//!                              .magnitude   [o]       with DoRA
//!                              .initial_a, .initial_b with PiSSA and OLoRA: the first A and B
//! router.weight [e, d], .bias [e]                     a router for all layers
//!       .hidden.{i}.weight, .bias                     its hidden layers
//!       .selection_bias [e]                           helps to choose the k best; not trained
//! {layer}.router.*, {module}.router.*                 a router for each layer or module
//! transformer.*, model.*, lm_head.weight              the base, with method = "full"
//! ```
//!
//! `{layer}` is `h.0` or `layers.0`, and `{module}` is `h.0.attn.c_attn` or
//! `layers.0.self_attn.q_proj`.
//!
//! An expert is a run of rows in its module's stacks. Each stack is one leaf of the graph, and an
//! expert in it can be trained while another is frozen.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Result, bail};
use tch::Tensor;

use super::RoutedModel;
use super::experts::slots::Slot;
pub use super::experts::spec::expert_name;
use super::experts::spec::part_name;
use crate::config::{ModulePath, RoutingChoice};

/// Which parameter group a trained parameter belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ParameterGroup {
    /// LoRA matrices and magnitudes.
    Adapters,
    /// The routers.
    Router,
    /// The routers' columns of an expert that is added, with the router's settings but a learning
    /// rate of their own.
    NewColumn,
    /// Matrices of the base (`method = "full"`).
    Base,
    /// Biases, normalisations and embeddings of the base, which have no weight decay.
    BaseNoDecay,
}

/// A trained parameter: a whole leaf of the graph, or some rows of one.
#[derive(Debug)]
pub struct TrainedParameter {
    /// Its name in checkpoints.
    pub name: String,
    /// The values, without gradient: a view of the leaf or its rows. An expert's B is `[r, o]`
    /// here.
    pub tensor: Tensor,
    /// Its group.
    pub group: ParameterGroup,
    /// Factor of the group's learning rate; of [`ParameterGroup::NewColumn`], the learning rate.
    pub rate: f64,
    /// The layer of the expert that it belongs to; `None` if it belongs to no expert.
    pub layer: Option<usize>,
    /// Index of its leaf in [`Trained::leaves`].
    leaf: usize,
    /// First row and number of rows; `None` for the whole leaf.
    rows: Option<(i64, i64)>,
}

/// How fast the older parts of a mixture are trained after it has grown.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct OldParts {
    /// Number of routed experts before the growth, which is also the index of the new one.
    pub num_experts: usize,
    /// Factor of the learning rate of these experts and of the part that is always on.
    pub experts_rate: f64,
    /// Factor of the learning rate of these experts' router columns and of the routers' hidden
    /// layers; 0 freezes them.
    pub columns_rate: f64,
    /// The learning rate of the new expert's router columns.
    pub new_column_learning_rate: f64,
}

/// What is trained.
#[derive(Debug, Default)]
pub struct Trained {
    /// The tensors with respect to which the loss is differentiated.
    pub leaves: Vec<Tensor>,
    /// The trained parameters in these leaves, in a fixed order.
    pub parameters: Vec<TrainedParameter>,
}

impl Trained {
    /// The gradients of the parameters, from those of the leaves.
    pub fn split(&self, leaf_grads: &[Tensor]) -> Vec<Tensor> {
        let of = |parameter: &TrainedParameter| parameter.part_of(&leaf_grads[parameter.leaf]);
        self.parameters.iter().map(of).collect()
    }

    /// The size of all gradients, in bytes.
    pub(crate) fn num_bytes(&self) -> usize {
        let bytes = |p: &TrainedParameter| p.tensor.numel() * p.tensor.kind().elt_size_in_bytes();
        self.parameters.iter().map(bytes).sum()
    }

    /// The layer below which the graph is cut if the gradients of the upper layers are to be
    /// computed first. A sixth of the layers with trained experts, rounded up, is below it, so that
    /// the second sum, which nothing hides, is short. `None` if there are fewer than two such
    /// layers.
    pub fn cut_layer(&self) -> Option<usize> {
        let layers: BTreeSet<usize> = self.parameters.iter().filter_map(|p| p.layer).collect();
        layers.iter().copied().nth(layers.len().div_ceil(6))
    }

    /// The leaves that are not wholly above a cut below `layer`, by their indices.
    pub(crate) fn leaves_below(&self, layer: Option<usize>) -> Vec<usize> {
        let below = self.parameters.iter().filter(|parameter| !parameter.is_above(layer));
        let mut leaves: Vec<usize> = below.map(|parameter| parameter.leaf).collect();
        leaves.dedup();
        leaves
    }

    fn add(
        &mut self,
        leaf: &Tensor,
        rows: Vec<NamedRows>,
        (group, layer): (ParameterGroup, Option<usize>),
    ) {
        if rows.is_empty() {
            return;
        }
        let index = self.leaves.len();
        for NamedRows { name, rows, rate, is_new_column } in rows {
            let group = if is_new_column { ParameterGroup::NewColumn } else { group };
            let tensor = match rows {
                None => leaf.detach(),
                Some((start, len)) => leaf.detach().narrow(0, start, len),
            };
            let leaf = index;
            self.parameters.push(TrainedParameter { name, tensor, group, rate, layer, leaf, rows });
        }
        self.leaves.push(leaf.shallow_clone());
    }
}

impl TrainedParameter {
    /// Its part of the gradient of its leaf.
    fn part_of(&self, leaf_grad: &Tensor) -> Tensor {
        match self.rows {
            None => leaf_grad.shallow_clone(),
            Some((start, len)) => leaf_grad.narrow(0, start, len),
        }
    }

    /// Its part of the gradient of its leaf, or zeros if the leaf has no gradient.
    pub(crate) fn grad(&self, leaf_grads: &[Option<Tensor>]) -> Tensor {
        match &leaf_grads[self.leaf] {
            Some(grad) => self.part_of(grad),
            None => self.tensor.zeros_like(),
        }
    }

    /// Whether only the part of the graph above a cut below `layer` depends on it. Without a cut,
    /// none does.
    pub(crate) fn is_above(&self, layer: Option<usize>) -> bool {
        matches!((self.layer, layer), (Some(own), Some(cut)) if own >= cut)
    }
}

impl RoutedModel {
    /// What is trained when `routing` decides the weights: the trainable experts that it can give a
    /// weight, and the routers if it is [`RoutingChoice::Router`] and they are trainable. If the
    /// base is trained, nothing else is. `old` is for a mixture that has grown.
    pub fn trained(&self, routing: RoutingChoice, old: Option<OldParts>) -> Trained {
        let mut trained = Trained::default();
        if self.trains_base {
            for (name, tensor) in self.decoder.named_parameters() {
                let is_embedding = self.decoder.spec.names().is_embedding(&name);
                let group = base_group(is_embedding, &tensor);
                trained.add(&tensor, vec![NamedRows::whole(name)], (group, None));
            }
            return trained;
        }
        let reached = |expert: usize| match routing {
            RoutingChoice::Expert(only) => only == expert as i64 || self.specs[expert].shared,
            RoutingChoice::None => false,
            _ => true,
        };
        for (path, experts) in self.modules() {
            let slots = experts.slots.iter().filter(|slot| slot.trainable && reached(slot.expert));
            let named = |key: &str, expert, rows| NamedRows {
                name: format!("{path}.{}.{key}", part_name(self.specs(), expert)),
                rows: Some(rows),
                rate: old
                    .filter(|old| expert != old.num_experts)
                    .map_or(1.0, |old| old.experts_rate),
                is_new_column: false,
            };
            let rows = |key: &str| {
                let row = |slot: &Slot| named(key, slot.expert, (slot.start, slot.rank));
                slots.clone().map(row).collect::<Vec<_>>()
            };
            let place = (ParameterGroup::Adapters, Some(path.layer));
            trained.add(&experts.lora_a, rows("lora_a"), place);
            trained.add(&experts.lora_b, rows("lora_b"), place);
            if let Some(dora) = &experts.dora {
                let row = |slot: &Slot| Some(named("magnitude", slot.expert, (slot.magnitude?, 1)));
                let rows = slots.clone().filter_map(row).collect();
                trained.add(&dora.magnitude, rows, place);
            }
        }
        if routing == RoutingChoice::Router && self.router_spec().trainable {
            for (name, tensor) in self.router_leaves() {
                let place = (ParameterGroup::Router, None);
                trained.add(&tensor, router_rows(name, &tensor, old), place);
            }
        }
        trained
    }

    /// Every tensor by name, in PEFT's layout, except those of a frozen base: views without
    /// gradient.
    pub fn tensors(&self) -> BTreeMap<String, Tensor> {
        if self.trains_base {
            let named = self.decoder.named_parameters().into_iter();
            return named.map(|(name, tensor)| (name, tensor.detach())).collect();
        }
        let mut tensors = BTreeMap::new();
        for (path, experts) in self.modules() {
            for part in experts.tensors() {
                let name = format!("{path}.{}.{}", part_name(&self.specs, part.expert), part.key);
                tensors.insert(name, part.tensor);
            }
        }
        tensors.extend(self.router_tensors());
        tensors
    }

    /// The tensors of the frozen experts, and those of routers that are not trainable, by name.
    pub(crate) fn frozen_tensors(&self) -> Vec<(String, Tensor)> {
        let frozen = |name: &String| {
            let is_of = |e: usize| name.contains(&format!(".{}.", part_name(&self.specs, e)));
            self.specs.iter().enumerate().any(|(e, spec)| !spec.trainable && is_of(e))
        };
        let experts = self.tensors().into_iter().filter(|(name, _)| frozen(name));
        let routers = match self.router_spec().trainable {
            true => vec![],
            false => self.router_leaves(),
        };
        experts.chain(routers.into_iter().map(|(name, tensor)| (name, tensor.detach()))).collect()
    }

    /// Overwrites every tensor of [`RoutedModel::tensors`] with the one of the same name in
    /// `tensors`.
    ///
    /// # Errors
    /// If a tensor is missing, extra or misshapen; the message names it.
    pub fn load(&self, tensors: &BTreeMap<String, Tensor>) -> Result<()> {
        let own = self.tensors();
        if let Some(name) = own.keys().find(|name| !tensors.contains_key(*name)) {
            bail!("tensor `{name}` is missing");
        }
        self.load_some(tensors)
    }

    /// Overwrites those of [`RoutedModel::tensors`] that `tensors` holds.
    ///
    /// # Errors
    /// If a tensor is extra or misshapen; the message names it, and nothing is overwritten.
    pub fn load_some(&self, tensors: &BTreeMap<String, Tensor>) -> Result<()> {
        let own = self.tensors();
        for (name, source) in tensors {
            let Some(tensor) = own.get(name) else {
                bail!("tensor `{name}` belongs to no parameter of this model");
            };
            if source.size() != tensor.size() {
                bail!("tensor `{name}` must be {:?}, got {:?}", tensor.size(), source.size());
            }
        }
        tch::no_grad(|| {
            for (name, source) in tensors {
                own[name].shallow_clone().copy_(source);
            }
        });
        Ok(())
    }

    /// The routers' leaves, by name.
    fn router_leaves(&self) -> Vec<(String, Tensor)> {
        let mut leaves = vec![];
        for (name, router) in self.routers.names().into_iter().zip(self.routers.all()) {
            for (i, (weight, bias)) in router.hidden.iter().enumerate() {
                leaves.push((format!("{name}.hidden.{i}.weight"), weight.shallow_clone()));
                leaves.push((format!("{name}.hidden.{i}.bias"), bias.shallow_clone()));
            }
            leaves.push((format!("{name}.weight"), router.weight.shallow_clone()));
            leaves.push((format!("{name}.bias"), router.bias.shallow_clone()));
        }
        leaves
    }

    /// All tensors of the routers by name, without gradient.
    pub fn router_tensors(&self) -> BTreeMap<String, Tensor> {
        let leaves = self.router_leaves().into_iter().map(|(name, t)| (name, t.detach()));
        let named = self.routers.names().into_iter().zip(self.routers.all());
        let biases = named.filter_map(|(name, router)| {
            let bias = router.selection_bias.as_ref()?.shallow_clone();
            Some((format!("{name}.selection_bias"), bias))
        });
        leaves.chain(biases).collect()
    }

    /// An expert's tensor on a module; `key` is the last part of its name in
    /// [`RoutedModel::tensors`].
    pub fn expert_tensor(&self, path: ModulePath, expert: usize, key: &str) -> Option<Tensor> {
        self.experts(path)?.tensor(expert, key)
    }
}

/// Rows of a leaf that become one parameter, with its name and [rate](TrainedParameter::rate).
struct NamedRows {
    name: String,
    rows: Option<(i64, i64)>,
    rate: f64,
    is_new_column: bool,
}

impl NamedRows {
    fn whole(name: String) -> Self {
        Self { name, rows: None, rate: 1.0, is_new_column: false }
    }
}

/// The parameters in a router's tensor: the whole tensor or, in a mixture that has grown, its old
/// and its new columns, each at a rate of its own.
fn router_rows(name: String, tensor: &Tensor, old: Option<OldParts>) -> Vec<NamedRows> {
    let Some(OldParts { num_experts, columns_rate, new_column_learning_rate, .. }) = old else {
        return vec![NamedRows::whole(name)];
    };
    let mut rows = if name.contains(".hidden.") {
        vec![NamedRows { rate: columns_rate, ..NamedRows::whole(name) }]
    } else {
        let (old, all) = (num_experts as i64, tensor.size()[0]);
        let part = |part, rows, rate, is_new_column| {
            let (name, rows) = (format!("{name}.{part}"), Some(rows));
            NamedRows { name, rows, rate, is_new_column }
        };
        vec![
            part("old", (0, old), columns_rate, false),
            part("new", (old, all - old), new_column_learning_rate, true),
        ]
    };
    rows.retain(|rows| rows.rate > 0.0);
    rows
}

fn base_group(is_embedding: bool, tensor: &Tensor) -> ParameterGroup {
    let decays = tensor.dim() == 2 && !is_embedding;
    if decays { ParameterGroup::Base } else { ParameterGroup::BaseNoDecay }
}
