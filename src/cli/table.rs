//! Tables and numbers for people.

use super::fit::fitted;
use super::terminal;
pub use crate::data::count;
use crate::data::visible;
use crate::eval::experts::ExpertReport;
use crate::eval::{DomainReport, EvalReport, RoutingReport, SiteReport};
use crate::growth::stages::{self, Stage};

/// A table whose first column is text and whose other columns are numbers. Names of domains come
/// from data and configs, so that control characters in them are made visible. The table fits the
/// terminal.
pub fn table(header: &[&str], rows: Vec<Vec<String>>) -> String {
    let header: Vec<String> = header.iter().map(|cell| visible(cell)).collect();
    let visible = |row: &Vec<String>| row.iter().map(|cell| visible(cell)).collect();
    fitted(&header, &rows.iter().map(visible).collect::<Vec<_>>(), terminal::width())
}

/// A number of bytes in GiB or MiB.
pub fn bytes(number: i64) -> String {
    let mib = number as f64 / f64::from(1 << 20);
    if mib >= 1024.0 { format!("{:.2} GiB", mib / 1024.0) } else { format!("{mib:.1} MiB") }
}

/// The loss and perplexity of each domain, each expert's mean routing weight on it, and the figures
/// of each site if there are several.
pub fn report(report: &EvalReport) -> String {
    let mut rows: Vec<Vec<String>> = report
        .domains
        .iter()
        .map(|domain| {
            vec![
                domain.name.clone(),
                count(domain.documents),
                count(domain.label_tokens),
                format!("{:.4}", domain.loss),
                format!("{:.3}", domain.perplexity),
            ]
        })
        .collect();
    let documents = report.domains.iter().map(|domain| domain.documents).sum::<u64>();
    rows.push(vec![
        "all tokens".into(),
        count(documents),
        count(report.label_tokens),
        format!("{:.4}", report.token_loss),
        format!("{:.3}", report.token_perplexity),
    ]);
    rows.push(vec![
        "mean of domains".into(),
        String::new(),
        String::new(),
        format!("{:.4}", report.loss),
        format!("{:.3}", report.perplexity),
    ]);
    let losses = table(&["domain", "documents", "label tokens", "loss (nats)", "perplexity"], rows);
    let protocol = format!(
        "windows of at most {} tokens, stride {}; context: what precedes within the window",
        report.seq_len, report.stride
    );
    let mut text = format!("{losses}\n{protocol}");
    if let (Some(router), Some(routing)) = (router_table(report), &report.routing) {
        text += &format!("\n\nmean routing weight by domain, and entropy in nats\n{router}");
        if let Some(loss) = report.domain_supervision {
            text += &format!(
                "\naccuracy: share of all tokens, prompts included, whose most probable expert is \
                 their domain's\ndomain supervision: {loss:.4} nats"
            );
        }
        if let Some(information) = routing.mutual_information {
            let most = domain_entropy(report).min((routing.expert_load.len() as f64).ln());
            text += &format!(
                "\nexpert and domain share {information:.3} nats of at most {most:.3} (mutual \
                 information)"
            );
        }
        if routing.sites.len() > 1 {
            text += &format!("\n\nthe routers\n{}", site_table(routing));
        }
    }
    text
}

/// The entropy of the domain of a label token, in nats; 0 for one domain.
fn domain_entropy(report: &EvalReport) -> f64 {
    let share = |domain: &DomainReport| domain.label_tokens as f64 / report.label_tokens as f64;
    report.domains.iter().map(share).map(|share| share * (1.0 / share).ln()).sum()
}

/// The routing figures of each site.
fn site_table(routing: &RoutingReport) -> String {
    let knows = |site: &SiteReport| site.domain_accuracy.is_some();
    let row = |site: &SiteReport| {
        let (expert, weight) = site.largest();
        let loads = site.expert_load.iter().map(|load| format!("{load:.2}"));
        let mut row = vec![
            site.site.clone(),
            site.experts.len().to_string(),
            format!("expert_{expert} {weight:.3}"),
            site.dead_experts.len().to_string(),
            format!("{:.3}", site.routing_entropy),
            format!("{:.3}", site.mutual_information.unwrap_or(0.0)),
            loads.collect::<Vec<_>>().join(" "),
        ];
        row.extend(site.domain_accuracy.map(|accuracy| format!("{accuracy:.3}")));
        row
    };
    let mut header =
        vec!["router", "experts", "largest weight", "dead", "entropy", "information", "load"];
    header.extend(routing.sites.iter().any(knows).then_some("accuracy"));
    table(&header, routing.sites.iter().map(row).collect())
}

/// How far each expert has moved from its start.
pub fn experts(experts: &[ExpertReport]) -> String {
    let row = |expert: &ExpertReport| {
        let relative = format!("{:.3} %", 100.0 * expert.relative_norm);
        vec![expert.name.clone(), format!("{:.4}", expert.update_norm), relative]
    };
    let header = ["expert", "update norm", "relative to the base's weights"];
    table(&header, experts.iter().map(row).collect())
}

/// A routing rule in words.
pub fn rule(top_k: Option<i64>) -> String {
    top_k.map_or("dense".into(), |k| format!("top {k}"))
}

/// The loss of each domain in two evaluations, and the gap between them.
///
/// - `names`: what to call the two evaluations
pub fn rules(names: &[String; 2], by_training: &EvalReport, by_eval: &EvalReport) -> String {
    let row = |name: &str, a: f64, b: f64| {
        vec![name.to_owned(), format!("{a:.4}"), format!("{b:.4}"), format!("{:+.4}", b - a)]
    };
    let domains = by_training.domains.iter().zip(&by_eval.domains);
    let mut rows: Vec<_> = domains.map(|(a, b)| row(&a.name, a.loss, b.loss)).collect();
    rows.push(row("mean of domains", by_training.loss, by_eval.loss));
    let header = ["domain".to_owned(), names[0].clone(), names[1].clone(), "gap".to_owned()];
    table(&header.each_ref().map(String::as_str), rows)
}

/// The forgetting matrix: the loss of each domain after each stage, and how much it has risen since
/// the stage that learned the domain.
pub fn forgetting(stages: &[Stage]) -> String {
    let mut domains: Vec<&String> = vec![];
    for domain in stages.iter().flat_map(|stage| stage.learned.iter().chain(stage.losses.keys())) {
        if !domains.contains(&domain) {
            domains.push(domain);
        }
    }
    let mut rows = vec![];
    for (i, stage) in stages.iter().enumerate() {
        let losses = domains.iter().map(|domain| match stage.losses.get(*domain) {
            Some(loss) => format!("{loss:.4}"),
            None => "-".into(),
        });
        let head = [format!("{} {}", i + 1, stage.name), stage.num_experts.to_string()];
        rows.push(head.into_iter().chain(losses).collect());
    }
    let risen = stages::forgetting(stages);
    let changes = domains.iter().map(|domain| match risen.get(*domain) {
        Some(rise) => format!("{rise:+.4}"),
        None => "-".into(),
    });
    let head = ["since it was learned".to_owned(), String::new()];
    rows.push(head.into_iter().chain(changes).collect());
    let names = domains.iter().map(|domain| domain.as_str());
    let header: Vec<&str> = ["stage", "experts"].into_iter().chain(names).collect();
    table(&header, rows)
}

/// The mean routing weight of each expert on each domain, the routing entropy and, where domains
/// have experts, the accuracy. There is none without a router.
fn router_table(report: &EvalReport) -> Option<String> {
    let overall = report.routing.as_ref()?;
    let knows = report.domain_accuracy.is_some();
    let experts = (0..overall.mean_routing_weights.len()).map(|e| format!("expert_{e}"));
    let mut header: Vec<String> =
        std::iter::once("domain".into()).chain(experts).chain(["entropy".into()]).collect();
    header.extend(knows.then(|| "accuracy".into()));
    let number = |x: f64| format!("{x:.3}");
    let row = |name: &str, routing: &RoutingReport, accuracy: Option<f64>| {
        let weights = routing.mean_routing_weights.iter().copied().chain([routing.routing_entropy]);
        let accuracy = knows.then(|| accuracy.map_or("-".into(), number));
        let numbers = weights.map(number).chain(accuracy);
        std::iter::once(name.to_owned()).chain(numbers).collect::<Vec<_>>()
    };
    let of_domain = |domain: &DomainReport| {
        Some(row(&domain.name, domain.routing.as_ref()?, domain.domain_accuracy))
    };
    let mut rows: Vec<Vec<String>> = report.domains.iter().filter_map(of_domain).collect();
    rows.push(row("all", overall, report.domain_accuracy));
    let load = overall.expert_load.iter().copied().map(number);
    rows.push(std::iter::once("expert load".to_owned()).chain(load).collect());
    let header: Vec<&str> = header.iter().map(String::as_str).collect();
    Some(table(&header, rows))
}
