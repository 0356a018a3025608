//! How tokens are routed: load and mutual information over time, the router x domain table, heat
//! maps of each router, and how far each expert has moved.

use maud::{Markup, html};
use serde_json::{Value, json};

use super::{run_heading, scrolling, section};
use crate::eval::SiteReport;
use crate::report::Reported;
use crate::report::chart::bars::{Bar, bars};
use crate::report::chart::heat::HeatMap;
use crate::report::chart::{Line, LineChart, Mark};
use crate::report::palette::{HUES, level};
use crate::report::run::{Moved, Run};
use crate::report::text::{exact, letter, short};
use crate::train::metrics::{ValidationMetrics, WindowMetrics};

/// The section.
pub fn routing(runs: &[Reported]) -> Markup {
    let num_runs = runs.len();
    let over_time = over_time(runs);
    let has_points = |chart: &&LineChart| chart.lines.iter().any(|line| !line.points.is_empty());
    let shown: Vec<&LineChart> = over_time.iter().filter(has_points).collect();
    let content = html! {
        @if !shown.is_empty() {
            p class="note" {
                "Mutual information says how much the expert tells about the domain: 0 if every \
                 domain is routed alike. The load is each expert's share of the assignments of a \
                 window of steps; a line ends with the number of its expert."
            }
            div class="grid" {
                @for (index, chart) in shown.iter().enumerate() {
                    (chart.render(&format!("route{index}")))
                }
            }
        }
        @for (index, run) in runs.iter().enumerate() {
            @let moved = moved(run);
            @if run.run.last_routed().is_some() || !moved.is_empty() {
                (run_heading(index, &run.run.name, num_runs))
                @if let Some(window) = run.run.last_routed() {
                    (of_window(index, &run.run, window))
                }
                (experts(index, &moved))
            }
        }
    };
    section("routing", "Routing and experts", content)
}

/// The charts over time: those of all runs, and the load of each run.
fn over_time(runs: &[Reported]) -> Vec<LineChart> {
    let passes = |title: &str, unit: &str, key: &str, of: fn(&ValidationMetrics) -> Option<f64>| {
        let line = |(index, run): (usize, &Reported)| Line {
            name: format!("{} {}", letter(index), run.run.name),
            label: letter(index),
            hue: index,
            mark: Mark::Dots,
            run: index,
            source: vec![json!("validation"), json!(key)],
            points: run
                .run
                .validations
                .iter()
                .filter_map(|pass| Some((pass.step, of(pass)?)))
                .collect(),
        };
        let lines = runs.iter().enumerate().map(line).collect();
        LineChart { title: title.into(), unit: unit.into(), lines }
    };
    let mut charts = vec![
        passes("Mutual information on validation data", "nats", "mutual_information", |pass| {
            pass.mutual_information
        }),
        passes("Routing entropy on validation data", "nats", "routing_entropy", |pass| {
            pass.routing_entropy
        }),
    ];
    charts.extend(runs.iter().enumerate().map(|(index, run)| load(index, &run.run, runs.len())));
    charts
}

/// The load of each expert over the windows of a run.
fn load(index: usize, run: &Run, num_runs: usize) -> LineChart {
    let of_window =
        |window: &WindowMetrics| Some((window.step, window.routing.as_ref()?.expert_load.clone()));
    let loads: Vec<(u64, Vec<f64>)> = run.windows.iter().filter_map(of_window).collect();
    let count = loads.first().map_or(0, |(_, load)| load.len());
    let names = run.expert_names(count);
    let line = |(expert, name): (usize, &String)| Line {
        name: name.clone(),
        label: expert.to_string(),
        hue: expert,
        mark: Mark::Dots,
        run: index,
        source: vec![json!("window"), json!("routing"), json!("expert_load"), json!(expert)],
        points: loads.iter().filter_map(|(step, load)| Some((*step, *load.get(expert)?))).collect(),
    };
    let lines = names.iter().enumerate().map(line).collect();
    let of_run = if num_runs > 1 { format!(" of {}", letter(index)) } else { String::new() };
    LineChart { title: format!("Expert load{of_run}"), unit: "share".into(), lines }
}

/// The last window of a run: the router x domain table, and the heat maps of its routers.
fn of_window(index: usize, run: &Run, window: &WindowMetrics) -> Markup {
    let Some(routing) = &window.routing else { return html! {} };
    let names = run.expert_names(routing.mean_routing_weights.len());
    let heads: Vec<String> = names.clone();
    let step = window.step;
    html! {
        h4 { "Mean routing weight by domain" }
        p class="note" {
            "Label tokens of the " (window.window_steps) " training steps up to step " (step)
            ", as a mean over the routers."
        }
        @if !window.domain_routing_weights.is_empty() {
            (scrolling(html! {
                table class="shaded" data-run=(index) data-step=(step) {
                    thead { tr {
                        th scope="col" { "domain" }
                        @for name in &heads { th scope="col" { (name) } }
                    } }
                    tbody {
                        @for (domain, weights) in run.in_order(&window.domain_routing_weights) {
                            (weight_row(domain, weights, &["domain_routing_weights", domain]))
                        }
                        (weight_row("all", &routing.mean_routing_weights,
                            &["routing", "mean_routing_weights"]))
                        (weight_row("load", &routing.expert_load, &["routing", "expert_load"]))
                    }
                }
            }))
        }
        (collapse(run))
        (sites(index, run, window, names.len()))
    }
}

/// The windows in which the routing had collapsed.
fn collapse(run: &Run) -> Markup {
    let windows = || run.windows.iter().filter(|window| !window.collapse.is_empty());
    html! {
        @if let Some(last) = windows().next_back() {
            p {
                strong { "The routing had collapsed" } " in " (windows().count()) " of "
                (run.windows.len()) " windows, the last time up to step " (last.step) ": "
                (last.collapse.join("; ")) "."
            }
        }
    }
}

/// A row of weights, each with its shade.
fn weight_row(name: &str, weights: &[f64], keys: &[&str]) -> Markup {
    let source: Vec<Value> =
        [json!("window")].into_iter().chain(keys.iter().map(|key| json!(key))).collect();
    html! {
        tr data-source=(json!(source)) {
            th scope="row" { (name) }
            @for weight in weights {
                @let shade = level(*weight, 1.0);
                td class={ "b" (shade) " t" (shade) } data-value=(exact(*weight))
                    title=(exact(*weight)) { (format!("{weight:.3}")) }
            }
        }
    }
}

/// The heat map of each domain: a row for each router, a column for each expert.
fn sites(index: usize, run: &Run, window: &WindowMetrics, num_experts: usize) -> Markup {
    let Some(routing) = &window.routing else { return html! {} };
    if window.site_routing_weights.len() < 2 {
        return html! {};
    }
    let columns: Vec<String> = (0..num_experts).map(|expert| expert.to_string()).collect();
    let map = |domain: &str| {
        let row = |site: &SiteReport| {
            let weights = window.site_routing_weights.get(&site.site)?.get(domain)?;
            let mut cells = vec![None; num_experts];
            for (expert, weight) in site.experts.iter().zip(weights) {
                *cells.get_mut(*expert)? = Some(*weight);
            }
            Some((site.site.clone(), cells))
        };
        let rows: Vec<_> = routing.sites.iter().filter_map(row).collect();
        let title = format!("Routing weights of {domain}: router x expert");
        HeatMap { title, columns: columns.clone(), rows }
    };
    html! {
        h4 { "Routers: layer x expert x domain" }
        p class="note" {
            "A row is a router, a column is an expert, and a cell is its mean weight on the \
             domain's tokens in the same window. Darker on a light page, and lighter on a dark \
             one, is more."
        }
        div class="grid" {
            @for (at, (domain, _)) in run.in_order(&window.domain_routing_weights).into_iter()
                .enumerate() {
                @let map = map(domain);
                figure class={ "chart" @if map.is_wide() { " row" } } {
                    figcaption { (domain) }
                    (scrolling(map.render(&format!("heat{index}-{at}"))))
                }
            }
        }
        details {
            summary { "Numbers: all routers" }
            (scrolling(site_table(index, run, window, num_experts)))
        }
    }
}

fn site_table(index: usize, run: &Run, window: &WindowMetrics, num_experts: usize) -> Markup {
    let sites = window.routing.iter().flat_map(|routing| &routing.sites).enumerate();
    html! {
        table data-run=(index) data-step=(window.step) {
            thead { tr {
                th scope="col" { "router, domain" }
                @for expert in 0..num_experts { th scope="col" { (expert) } }
                th scope="col" { "mutual information" }
            } }
            tbody {
                @for (at, site) in sites {
                    @if let Some(domains) = window.site_routing_weights.get(&site.site) {
                        @for (domain, weights) in run.in_order(domains) {
                            (site_row(domain, site, weights, num_experts))
                        }
                        tr {
                            th scope="row" { (site.site) }
                            @for _ in 0..num_experts { td {} }
                            (information(index, window.step, at, site))
                        }
                    }
                }
            }
        }
    }
}

/// The weights of a domain at a site, with gaps for experts that the site does not have.
fn site_row(domain: &str, site: &SiteReport, weights: &[f64], num_experts: usize) -> Markup {
    html! {
        tr data-source=(json!(["window", "site_routing_weights", site.site, domain])) {
            th scope="row" { (site.site) ", " (domain) }
            @for expert in 0..num_experts {
                @match site.experts.iter().zip(weights).find(|(own, _)| **own == expert) {
                    None => td {},
                    Some((_, weight)) => td data-value=(exact(*weight)) { (exact(*weight)) },
                }
            }
            td {}
        }
    }
}

/// The mutual information at a site.
fn information(run: usize, step: u64, at: usize, site: &SiteReport) -> Markup {
    html! {
        @match site.mutual_information {
            None => td {},
            Some(information) => {
                td data-run=(run) data-step=(step) data-value=(exact(information))
                    data-source=(json!(["window", "routing", "sites", at, "mutual_information"])) {
                    (exact(information))
                }
            }
        }
    }
}

/// How far the experts have moved: by the model if there is one, else by the checkpoint's files.
fn moved(run: &Reported) -> Vec<Moved> {
    match (&run.moved, &run.run.checkpoint) {
        (Some(moved), _) => moved.clone(),
        (None, Ok(facts)) => facts.moved.clone(),
        (None, Err(_)) => vec![],
    }
}

fn experts(index: usize, moved: &[Moved]) -> Markup {
    let bar = |(expert, moved): (usize, &Moved)| {
        let value = moved.update_norm?;
        Some(Bar { name: moved.name.clone(), value, hue: expert })
    };
    let known: Vec<Bar> = moved.iter().enumerate().filter_map(bar).collect();
    html! {
        @if !moved.is_empty() {
            h4 { "How far each expert has moved" }
            p class="note" {
                "The Frobenius norm of an expert's update over all of its modules, at the \
                 checkpoint. An expert of 0 changes no output of the base."
            }
            figure class="chart wide" {
                (bars(&format!("moved{index}"), "How far each expert has moved", &known))
                (scrolling(html! {
                    table {
                        thead { tr {
                            th scope="col" { "expert" }
                            th scope="col" { "norm of the update" }
                            th scope="col" { "relative to the base's weights" }
                        } }
                        tbody {
                            @for (at, row) in moved.iter().enumerate() {
                                (moved_row(at, row))
                            }
                        }
                    }
                }))
            }
        }
    }
}

fn moved_row(at: usize, row: &Moved) -> Markup {
    html! {
        tr data-expert=(row.name) {
            th scope="row" {
                // the part that is always on has no number
                @if let Some(number) = row.name.strip_prefix("expert_") {
                    span class={ "mark k" (at % HUES.len()) } { (number) } " "
                }
                (row.name)
            }
            td data-value=[row.update_norm.map(exact)] {
                (row.update_norm.map_or("needs the base".into(), short))
            }
            td { (percent(row.relative_norm)) }
        }
    }
}

fn percent(share: Option<f64>) -> String {
    share.map_or("needs the base".into(), |share| format!("{:.3} %", 100.0 * share))
}
