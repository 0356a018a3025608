//! What a run was: its machine and versions, its data, its config, and checksums.

use maud::{Markup, html};

use super::{run_heading, scrolling, section};
use crate::config::{Config, DomainConfig, Validation};
use crate::report::Reported;
use crate::report::run::Run;
use crate::report::text::{bytes, short};

/// The section.
pub fn about(runs: &[Reported]) -> Markup {
    let content = html! {
        @for (index, run) in runs.iter().enumerate() {
            (run_heading(index, &run.run.name, runs.len()))
            @if run.run.is_cut {
                p class="none" {
                    "The last line of the metrics is not whole and was left out: the run is in \
                     progress, or was interrupted."
                }
            }
            @if run.run.has_metrics() { (machine(&run.run)) }
            @if let Some((config, text)) = &run.run.config {
                (data(&run.run, config))
                details { summary { "The whole config" } pre { code { (text) } } }
            }
            (checksums(&run.run))
        }
    };
    section("about", "Config, data and machine", content)
}

fn machine(run: &Run) -> Markup {
    let last = run.steps.last();
    html! {
        h4 { "Machine and versions" }
        @match &run.machine {
            None => p class="none" {
                "The run does not say on what machine it was made: its folder has no "
                code { "machine.json" } ", which older versions did not write."
            },
            Some(machine) => (scrolling(html! {
                table class="facts" { tbody {
                    (fact("dylora", &machine.dylora_version))
                    (fact("libtorch", &machine.libtorch_version))
                    (fact("device", &machine.device))
                    @if let Some(model) = &machine.device_model { (fact("model", model)) }
                    (fact("CPU cores, threads of libtorch",
                        &format!("{}, {}", machine.cpu_cores, machine.cpu_threads)))
                    (fact("last started", &machine.started_at))
                    @if let Some(last) = last {
                        (fact("peak memory", &bytes(last.peak_memory_bytes)))
                    }
                } }
            })),
        }
    }
}

fn fact(name: &str, value: &str) -> Markup {
    html! { tr { th scope="row" { (name) } td { (value) } } }
}

fn data(run: &Run, config: &Config) -> Markup {
    let last = run.windows.last();
    let validation = |domain: &DomainConfig| match &domain.validation {
        None => "none".to_owned(),
        Some(Validation::Fraction(fraction)) => format!("a fraction of {fraction}"),
        Some(Validation::Files(files)) => files.join(", "),
        Some(Validation::Hub(dataset)) => dataset.to_string(),
    };
    let training = |domain: &DomainConfig| match &domain.hub {
        None => domain.train.join(", "),
        Some(dataset) => dataset.to_string(),
    };
    html! {
        h4 { "Data" }
        (scrolling(html! {
            table class="words" {
                thead { tr {
                    @for name in ["domain", "expert", "share of the blocks", "training files",
                                  "validation"] {
                        th scope="col" { (name) }
                    }
                } }
                tbody {
                    @for domain in &config.data.domains {
                        tr {
                            th scope="row" { (domain.name) }
                            td {
                                @match &domain.expert {
                                    None => "-",
                                    Some(experts) => (experts.experts().iter().map(i64::to_string)
                                        .collect::<Vec<_>>().join(", ")),
                                }
                            }
                            td {
                                @match last.and_then(|window| window.mix.get(&domain.name)) {
                                    None => "-",
                                    Some(mix) => (short(mix.realised)),
                                }
                            }
                            td { (training(domain)) }
                            td { (validation(domain)) }
                        }
                    }
                }
            }
        }))
    }
}

fn checksums(run: &Run) -> Markup {
    html! {
        h4 { "Checksums" }
        (scrolling(html! {
            table class="words" {
                thead { tr {
                    th scope="col" { "what" } th scope="col" { "size" } th scope="col" { "BLAKE3" }
                } }
                tbody {
                    @for file in &run.files {
                        tr {
                            th scope="row" { (file.name) }
                            td { (bytes(file.num_bytes)) }
                            td { code { (file.hash) } }
                        }
                    }
                    @if let Ok(facts) = &run.checkpoint {
                        @if let Some(hash) = &facts.state.base_hash {
                            (checksum("the base's weights in f32", hash))
                        }
                        @if let Some(hash) = &facts.state.tokenizer_hash {
                            (checksum("the tokenizer", hash))
                        }
                        (checksum("fingerprint of the training data",
                            &facts.state.data_fingerprint))
                    }
                }
            }
        }))
        @match &run.checkpoint {
            Err(_) if !run.has_metrics() => {},
            Err(reason) => p class="none" { "No checkpoint was read: " (reason) "." },
            Ok(facts) => p class="note" {
                "The checkpoint is " code {
                    (facts.dir.file_name().unwrap_or_default().to_string_lossy())
                } ", the best, or the last if there is no best."
            },
        }
    }
}

fn checksum(what: &str, hash: &str) -> Markup {
    html! { tr { th scope="row" { (what) } td {} td { code { (hash) } } } }
}
