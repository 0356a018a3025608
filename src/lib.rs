//! dylora trains a Mixture of LoRA Experts ("routed LoRA") on a frozen GPT-2, and the whole run reads
//! from left to right:
//!
//! ```text
//! config -> hub -> data  \
//!               -> model -> base -> mixture -> growth -> eval -> skills -> train -> bench -> export
//!                                                                                   (cli -> main)
//! ```
//!
//! A module uses only what stands to its left. For a target linear layer with frozen weight W and
//! experts e = 1..E of rank r_e,
//!
//! ```text
//! y = x W + b + sum_e g_e * s_e * drop(x) A_e^T B_e^T          s_e = alpha_e / r_e
//! ```
//!
//! with routing weights `g = softmax(router_logits / temperature)`, `[b, t, e]`, that a learned router
//! gives each token. One forward pass computes all experts; the loss is backpropagated into the
//! adapters and through the routing weights into the router.
//!
//! # Glossary
//!
//! | term | meaning | shape |
//! |---|---|---|
//! | base | the pretrained GPT-2, never trained (except by `method = "full"`) | |
//! | target module | a linear layer of the base that gets experts: `attn.c_attn`, `attn.c_proj`, `mlp.c_fc`, `mlp.c_proj` | |
//! | expert | one LoRA pair on each target module; expert e over all modules is one PEFT adapter | |
//! | rank, alpha, scaling | r; alpha; alpha / r | |
//! | lora_a, lora_b | an expert's down- and up-projection; B is 0 at the start | `[r, i]`, `[o, r]` |
//! | router, router_logits | the layer or MLP that scores experts; its raw scores | `[b, t, e]` |
//! | site | a place where a router decides: for all layers, a layer or a module ([`model::routing`]) | |
//! | routing_probs | softmax over all experts, or over those that the layer has | `[b, t, e]` |
//! | routing_weights | what mixes the experts: probs, the top k renormalised, or given ([`model::routing`]) | `[b, t, e]` |
//! | selected_experts, top_k | the k chosen; absent = all | `[b, t, k]` |
//! | expert_load | share of assignments per expert, sums to 1 | `[e]` |
//! | load_balancing_loss | E * sum_e f_e P_e, 1 when even ([`model::routing_totals`]) | scalar |
//! | uniform_mse | mean squared distance of the mean routing_probs from 1 / E | scalar |
//! | router_z_loss | mean squared logsumexp of the logits | scalar |
//! | selection_bias | added to routing_probs where the k best are chosen, not where they weigh | `[e]` |
//! | mature | of an expert under the hybrid rule: has had its tokens, or no longer improves | |
//! | dead | of an expert: has less than `dead_share` of an even weight over a window of steps | |
//! | mutual_information | of expert and domain, nats ([`eval::routing`]) | scalar |
//! | routing_entropy | mean entropy of routing_probs, nats | scalar |
//! | document, block | a text; `seq_len` tokens of packed documents | `[t]` |
//! | mix | each domain's share of the training blocks, by `data.mixing`; sums to 1 | `[d]` |
//! | labels | targets, already shifted; -100 = no loss | `[b, t]` |
//! | micro_batch_size, grad_accum_steps, step | sequences a forward; forwards an update; one optimizer update | |
//! | tokens_seen | target tokens trained on | |
//! | skill | what a domain asks of the base: the mean of its last hidden states ([`skills`]) | `[d]` |
//! | stage | a run in a mixture's life, at whose end each domain is scored ([`growth::stages`]) | |
//! | checkpoint, export | all that resuming needs; what others load (PEFT) | |

#![warn(missing_docs)]

pub mod config;
pub mod durable;
pub mod ffi;

pub mod hub;

pub mod data;
pub mod model;
pub mod peft;

pub mod base;
pub mod mixture;

pub mod growth;

pub mod eval;

pub mod tensor_file;

pub mod checkpoint;

pub mod train;

pub mod lifecycle;

pub mod bench;

pub mod export;

pub mod cli;
