//! What `dylora train --dry-run` prints: the resolved config, the experts, the number of
//! parameters, the estimated memory and the data.

use anyhow::Result;
use serde_json::{Value, json};

use super::results::Schema;
use super::start::ReadyRun;
use super::{print_result, table};
use crate::config::{self, Config, DomainExperts, Method};
use crate::data::{Datasets, Domain, TokenDataset};
use crate::model::experts::spec::{ExpertSpec, part_name};
use crate::model::experts::targets::{self, TargetMatch};
use crate::train::plan::{MemoryEstimate, ParameterCounts, num_steps};

/// Prints what a run would do.
pub fn dry_run(run: &ReadyRun, json: bool) -> Result<()> {
    let ReadyRun { config, device, base, data, specs, .. } = run;
    let counts = ParameterCounts::new(config, specs, &base.spec);
    let memory = MemoryEstimate::new(config, specs, &base.spec, &counts, *device);
    let steps = num_steps(config, &data.train)?;
    let targets = match config.method {
        Method::RoutedLora => {
            let mut found = targets::matches(&config.lora, &base.spec);
            let experts = config.lora.experts.iter().zip(specs).enumerate();
            let adapters = experts.filter(|(_, (expert, _))| expert.source.is_some());
            found.extend(adapters.map(|(index, (_, spec))| spec.source_match(index)));
            found
        }
        Method::Full => vec![],
    };
    let domains = |dataset: &TokenDataset| -> Vec<_> {
        let domains = dataset.domains.iter();
        let json = |domain: &Domain| {
            let Domain { name, weight, counts, kinds, .. } = domain;
            json!({ "name": name, "weight": weight, "counts": counts, "kinds": kinds })
        };
        domains.map(json).collect()
    };
    if json {
        let json = json!({
            "config": config,
            "targets": targets,
            "experts": experts_json(config, specs),
            "parameters": counts,
            "trainable_share": counts.trainable_share(),
            "memory_bytes": memory,
            "steps": steps,
            "train": domains(&data.train),
            "validation": domains(&data.validation),
        });
        print_result(&Schema::DryRun.text(json))?;
        return Ok(());
    }
    print_result(&config::load::to_toml(config))?;
    if !targets.is_empty() {
        print_result(&format!("{}\n", targets_table(targets)))?;
    }
    if !specs.is_empty() {
        print_result(&format!("{}\n", experts_table(config, specs)))?;
    }
    print_result(&format!("{}\n", parameters_table(&counts)))?;
    print_result(&format!("{}\n", memory_table(&memory)))?;
    print_result(&format!("{}\n", data_table(data)))?;
    print_result(&format!("{} steps", table::count(steps)))?;
    Ok(())
}

fn parameters_table(counts: &ParameterCounts) -> String {
    let row = |name: &str, number: i64| vec![name.to_owned(), table::count(number)];
    let rows = vec![
        row("base", counts.base),
        row("lora_a", counts.lora_a),
        row("lora_b", counts.lora_b),
        row("magnitude", counts.magnitude),
        row("router", counts.router),
        row("trained", counts.trained),
        vec!["trainable share".into(), format!("{:.3} %", 100.0 * counts.trainable_share())],
    ];
    table::table(&["parameters", "number"], rows)
}

fn memory_table(memory: &MemoryEstimate) -> String {
    let rows = [
        ("base", memory.base),
        ("trained parameters, gradients, moments", memory.training),
        ("activations of a micro-batch", memory.activations),
        ("logits of a chunk", memory.logits),
        ("sum", memory.total()),
    ];
    let rows = rows.into_iter().map(|(name, n)| vec![name.to_owned(), table::bytes(n)]).collect();
    table::table(&["memory (estimate, without libtorch itself)", "size"], rows)
}

/// The names of the domains that an expert belongs to.
fn domains_of(config: &Config, expert: usize) -> Vec<&str> {
    let has = |experts: &DomainExperts| experts.experts().contains(&(expert as i64));
    let domains = config.data.domains.iter();
    let domains = domains.filter(|domain| domain.expert.as_ref().is_some_and(has));
    domains.map(|domain| domain.name.as_str()).collect()
}

/// The smallest and the largest of some numbers, as one number if they are equal.
fn range(values: impl Iterator<Item = f64>) -> String {
    let (low, high) =
        values.fold((f64::INFINITY, 0.0_f64), |(low, high), x| (low.min(x), high.max(x)));
    if low == high { low.to_string() } else { format!("{low} to {high}") }
}

/// Each expert with its domains, rank, alpha and scaling. The alpha is the one that `lora.scale`
/// has made of the config's.
fn experts_table(config: &Config, specs: &[ExpertSpec]) -> String {
    let row = |(index, spec): (usize, &ExpertSpec)| {
        let sizes = || spec.modules.values();
        let scalings = spec.modules.keys().filter_map(|path| spec.scaling(*path));
        vec![
            part_name(specs, index),
            domains_of(config, index).join(", "),
            range(sizes().map(|size| size.rank as f64)),
            range(sizes().map(|size| size.alpha)),
            config.scale_factor(index).to_string(),
            range(scalings),
        ]
    };
    let header = ["expert", "domains", "rank", "alpha", "factor", "scaling at weight 1"];
    table::table(&header, specs.iter().enumerate().map(row).collect())
}

fn experts_json(config: &Config, specs: &[ExpertSpec]) -> Vec<Value> {
    let of = |(index, spec): (usize, &ExpertSpec)| {
        json!({
            "name": part_name(specs, index),
            "domains": domains_of(config, index),
            "scale_factor": config.scale_factor(index),
            "modules": spec.modules,
        })
    };
    specs.iter().enumerate().map(of).collect()
}

/// What each name and pattern of `[lora]` matches.
fn targets_table(targets: Vec<TargetMatch>) -> String {
    let row = |target: TargetMatch| {
        let modules = target.modules.join(", ");
        vec![target.key, target.pattern, modules, table::count(target.num_layers)]
    };
    let rows = targets.into_iter().map(row).collect();
    table::table(&["key", "pattern", "matches", "layers"], rows)
}

fn data_table(data: &Datasets) -> String {
    let header = [
        "domain",
        "split",
        "records",
        "documents",
        "tokens",
        "label tokens",
        "blocks",
        "split docs",
        "skipped",
    ];
    let mut rows = vec![];
    for (split, dataset) in [("train", &data.train), ("validation", &data.validation)] {
        for domain in &dataset.domains {
            let c = &domain.counts;
            let skipped =
                c.skipped_bad + c.skipped_empty + c.skipped_other_domain + c.skipped_held_out;
            let numbers = [
                c.records,
                c.documents,
                c.tokens,
                c.label_tokens,
                c.blocks,
                c.split_documents,
                skipped,
            ];
            let names = [domain.name.clone(), split.to_owned()];
            rows.push(names.into_iter().chain(numbers.map(table::count)).collect());
        }
    }
    table::table(&header, rows)
}
