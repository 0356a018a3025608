//! Tables and numbers as people read them.

use comfy_table::{CellAlignment, Table, presets};

use crate::eval::EvalReport;

/// A table whose first column is text and whose others are numbers.
pub fn table(header: &[&str], rows: Vec<Vec<String>>) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::ASCII_MARKDOWN).set_header(header.to_vec());
    table.add_rows(rows);
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

/// `1234567` as `1,234,567`.
pub fn count(number: impl TryInto<u64>) -> String {
    let digits = number.try_into().unwrap_or(0).to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i) % 3 == 0 {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Bytes in GiB or MiB.
pub fn bytes(number: i64) -> String {
    let mib = number as f64 / (1 << 20) as f64;
    if mib >= 1024.0 { format!("{:.2} GiB", mib / 1024.0) } else { format!("{mib:.1} MiB") }
}

/// Loss and perplexity by domain, and the router x domain table.
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
        format!("{:.3}", report.perplexity),
    ]);
    rows.push(vec![
        "mean of domains".into(),
        String::new(),
        String::new(),
        format!("{:.4}", report.loss),
        format!("{:.3}", report.loss.exp()),
    ]);
    let losses = table(&["domain", "documents", "label tokens", "loss (nats)", "perplexity"], rows);
    let protocol = format!(
        "windows of at most {} tokens, stride {}; context: what precedes within the window",
        report.seq_len, report.stride
    );
    match router_table(report) {
        None => format!("{losses}\n{protocol}"),
        Some(router) => format!("{losses}\n{protocol}\n\nmean routing weight by domain\n{router}"),
    }
}

/// Mean routing weight of each expert on each domain.
fn router_table(report: &EvalReport) -> Option<Table> {
    let overall = report.routing.as_ref()?;
    let experts = (0..overall.mean_routing_weights.len()).map(|e| format!("expert_{e}"));
    let header: Vec<String> =
        std::iter::once("domain".into()).chain(experts).chain(["entropy (nats)".into()]).collect();
    let row = |name: &str, weights: &[f64], entropy: Option<f64>| {
        let numbers = weights.iter().copied().chain(entropy).map(|x| format!("{x:.3}"));
        std::iter::once(name.to_owned()).chain(numbers).collect::<Vec<_>>()
    };
    let mut rows: Vec<Vec<String>> = report
        .domains
        .iter()
        .filter_map(|domain| {
            let routing = domain.routing.as_ref()?;
            Some(row(&domain.name, &routing.mean_routing_weights, Some(routing.routing_entropy)))
        })
        .collect();
    rows.push(row("all", &overall.mean_routing_weights, Some(overall.routing_entropy)));
    rows.push(row("expert load", &overall.expert_load, None));
    let header: Vec<&str> = header.iter().map(String::as_str).collect();
    Some(table(&header, rows))
}
