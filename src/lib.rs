//! dylora trains a Mixture of LoRA Experts ("routed LoRA") on a frozen decoder: GPT-2, Llama, Qwen,
//! SmolLM or Mistral.
//!
//! The modules form layers, here lowest first. A module uses only modules that stand before it:
//!
//! ```text
//! config, durable, ffi, dist, tensor_file | hub | chat_template | data | model | peft | base
//! | mixture | eval | growth, generate | checkpoint | export | train | lifecycle | bench | study
//! | report, serve | cli, main
//! ```
//!
//! A target module with frozen weight W, bias b and experts e = 1..E of rank r_e computes
//!
//! ```text
//! y = x W + b + sum_e g_e * s_e * drop(x) A_e^T B_e^T          s_e = alpha_e / r_e
//! ```
//!
//! A learned router gives each token its routing weights,
//! `g = softmax(router_logits / temperature)`, `[b, t, e]`. One forward pass computes all experts.
//! The loss is backpropagated into the adapters and, through the routing weights, into the router.
//!
//! # Use
//!
//! The folder `examples` trains a mixture, generates text and routes by a rule of one's own. In
//! short, a run needs a config, a base, data and a mixture:
//!
//! ```no_run
//! use dylora::{base::Base, config::load, data, hub, mixture::Mixture, train::Trainer};
//!
//! # fn main() -> anyhow::Result<()> {
//! let config = load::load("mine.toml".as_ref(), &["train.duration.steps=100".to_owned()])?;
//! let hub = hub::HubSettings::new(hub::HubSettings::DEFAULT_ENDPOINT, "cache");
//! let base = Base::open(&config.base, &hub, &())?;
//! let eos = base.spec.eos_token_id();
//! let options = data::DataOptions::new(&config.data, config.run.seed, eos, None);
//! let data = data::load_datasets(&config.data.domains, &options, base.tokenizer()?, &|_| ())?;
//! let find = |source: &_| hub::find_adapter(source, &hub, &());
//! let mixture = Mixture::of_config(&config, &base.spec, &find)?;
//! let mut trainer = Trainer::new(config, &base, &mixture, data, tch::Device::Cpu)?;
//! let summary = trainer.run(&Default::default(), &mut |event| println!("{event:?}"))?;
//! println!("{}", summary.checkpoint.display());
//! # Ok(())
//! # }
//! ```
//!
//! The documentation shows what a program may rely on. The modules `durable`, `ffi`, `gguf`,
//! `tensor_file`, `bench`, `study`, `report`, `serve` and `cli` serve the binary and the tests.
//! They are public and hidden, and any version may change them.
//!
//! The library does not print, exit, or read the environment. [`tracing`] receives its logs. What
//! fails because of a user is an [`anyhow::Error`] whose text is meant for the user. The operations
//! of libtorch panic when they fail, as when memory runs out.
//!
//! # Glossary
//!
//! | term | meaning | shape |
//! |---|---|---|
//! | base | the pretrained decoder, frozen unless `method = "full"` | |
//! | decoder | a base's embeddings, blocks, final norm and head ([`model::decoder`]) | |
//! | family | bases that name and lay out their parts in the same way ([`model::families`]) | |
//! | part | what a decoder is made of, such as a norm, attention or an MLP | |
//! | target module | a linear layer of the base that gets experts, such as `attn.c_attn` | |
//! | product | a block's multiplication by one matrix, computed with the experts on it | |
//! | expert | a LoRA pair on each of its target modules; one expert is one PEFT adapter | |
//! | rank, alpha, scaling | r; alpha; alpha / r, or alpha / sqrt(r) with rsLoRA | |
//! | lora_a, lora_b | the down- and up-projection; by default B starts at 0 | `[r, i]`, `[o, r]` |
//! | router, router_logits | the layer or MLP that scores experts; its raw scores | `[b, t, e]` |
//! | site | where a router decides: for all layers, a layer or a module ([`model::Site`]) | |
//! | routing_probs | softmax over all experts, or over those that the layer has | `[b, t, e]` |
//! | routing_weights | what weighs the experts: probs, top k renormalised, or given | `[b, t, e]` |
//! | selected_experts, top_k | the k experts of a token; without top_k, all of them | `[b, t, k]` |
//! | expert_load | each expert's share of the assignments; sums to 1 | `[e]` |
//! | load_balancing_loss | E * sum_e f_e P_e, 1 when even ([`model::routing::totals`]) | scalar |
//! | uniform_mse | mean squared distance of the mean routing_probs from 1 / E | scalar |
//! | router_z_loss | mean squared logsumexp of the router_logits | scalar |
//! | selection_bias | added to routing_probs to choose the k best, not to weigh them | `[e]` |
//! | mature | under `router.hybrid`: an expert had its tokens or no longer improves | |
//! | dead | an expert whose mean weight over a window is below `dead_share` of an even one | |
//! | mutual_information | of expert and domain, in nats ([`eval::routing`]) | scalar |
//! | routing_entropy | mean entropy of routing_probs, in nats | scalar |
//! | record, shape | a document as its file holds it; the kind of its keys, such as `messages` | |
//! | document, block | one text; `seq_len` tokens of packed documents | `[t]` |
//! | mix | each domain's share of the training blocks, by `data.mixing`; sums to 1 | `[d]` |
//! | labels | the targets, already shifted; -100 means no loss | `[b, t]` |
//! | micro_batch_size, grad_accum_steps | sequences in a forward pass; forward passes in a step | |
//! | step | one optimizer update | |
//! | world, dist_rank | processes that compute together; one's number in it ([`dist`]) | |
//! | tokens_seen | number of target tokens trained on | |
//! | skill | the mean of the base's last hidden states on a domain ([`growth::skills`]) | `[d]` |
//! | stage | a run in a mixture's life; at its end each domain is scored ([`growth::stages`]) | |
//! | key-value cache | what attention keeps of earlier positions ([`model::decoder::kv_cache`]) | |
//! | prefill | the forward pass over a prompt, before the first new token | |
//! | study | a comparison of arms that get the same chances ([`study`]) | |
//! | arm | what a study compares, such as a single LoRA or a learned router ([`study::arms`]) | |
//! | oracle | routing with weight 1 on the expert of the token's domain | |
//! | recovery | the share of the oracle's gain over a single LoRA that a router has | scalar |
//! | active rank | the rank that a token uses: k r with top-k, r e^H with dense routing | scalar |
//! | checkpoint, export | all that resuming needs; what other programs load (PEFT) | |

// In the order of the layers. The hidden modules serve the binary and the tests, and versions make
// no promise about them (CONTRIBUTING.md).
pub mod config;
#[doc(hidden)]
pub mod dist;
#[doc(hidden)]
pub mod durable;
#[doc(hidden)]
pub mod ffi;
#[doc(hidden)]
pub mod gguf;
#[doc(hidden)]
pub mod tensor_file;

pub mod hub;

pub mod chat_template;

pub mod data;
pub mod model;
pub mod peft;

pub mod base;
pub mod mixture;

pub mod eval;
pub mod generate;
pub mod growth;

pub mod checkpoint;
pub mod export;
pub mod train;

pub mod lifecycle;

#[doc(hidden)]
pub mod bench;
#[doc(hidden)]
pub mod study;

#[doc(hidden)]
pub mod report;
#[doc(hidden)]
pub mod serve;

#[doc(hidden)]
pub mod cli;
