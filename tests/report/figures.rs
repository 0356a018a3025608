//! The numbers of a page are those of the runs' files.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use dylora::report::Reported;
use dylora::report::page::page;
use dylora::report::run::read_all;
use fancy_regex::Regex;
use serde_json::{Value, json};

use crate::{Scene, checkpoint, page_of};

/// The lines of a run's metrics by kind and step.
fn lines(dir: &Path) -> Result<BTreeMap<(String, u64), Value>> {
    let text = fs_err::read_to_string(dir.join("metrics.jsonl"))?;
    let line = |line: &str| {
        let value: Value = serde_json::from_str(line)?;
        let kind = value["kind"].as_str().context("each line has one")?.to_owned();
        let step = value["step"].as_u64().context("each line has one")?;
        Ok(((kind, step), value))
    };
    text.lines().map(line).collect()
}

/// All matches of a pattern, each as its groups.
fn all<'a>(pattern: &str, text: &'a str) -> Vec<Vec<&'a str>> {
    let pattern = Regex::new(pattern).expect("it is a pattern");
    let groups = |found: fancy_regex::Captures<'a>| {
        found.iter().skip(1).map(|group| group.map_or("", |group| group.as_str())).collect()
    };
    pattern.captures_iter(text).map(|found| groups(found.expect("it matches"))).collect()
}

/// The value that a source names.
fn value_at(line: &Value, source: &str) -> Result<Value> {
    let source: Vec<Value> = serde_json::from_str(&source.replace("&quot;", "\""))?;
    let mut value = line;
    for key in &source[1..] {
        value = match key {
            Value::Number(index) => &value[index.as_u64().context("an index")? as usize],
            key => &value[key.as_str().context("a key")?],
        };
    }
    Ok(value.clone())
}

fn kind(source: &str) -> &str {
    source.split("&quot;").nth(1).unwrap_or_default()
}

#[track_caller]
fn assert_same(shown: &str, value: &Value, place: &str) {
    match value.as_f64() {
        Some(number) => assert_eq!(shown.parse(), Ok(number), "{place}"),
        None => assert!(value.is_null() && shown == "not finite", "{place}: {shown}, {value}"),
    }
}

/// Compares the tables of series with the metrics. Returns the number of their numbers by run.
fn compare_series(html: &str, runs: &[PathBuf]) -> Result<BTreeMap<usize, usize>> {
    let lines: Vec<_> = runs.iter().map(|dir| lines(dir)).collect::<Result<_>>()?;
    let mut counts = BTreeMap::new();
    for table in all(r#"(?s)<table class="series">(.*?)</table>"#, html) {
        let heads = all(r#"<th scope="col" data-run="(\d+)" data-source="([^"]*)">"#, table[0]);
        for row in all(r#"<tr><th scope="row">(\d+)</th>(.*?)</tr>"#, table[0]) {
            let step: u64 = row[0].parse()?;
            let cells = all("<td>([^<]*)</td>", row[1]);
            assert_eq!(cells.len(), heads.len());
            for (head, cell) in heads.iter().zip(cells).filter(|(_, cell)| !cell[0].is_empty()) {
                let run: usize = head[0].parse()?;
                let line = &lines[run][&(kind(head[1]).to_owned(), step)];
                assert_same(cell[0], &value_at(line, head[1])?, &format!("{step} {}", head[1]));
                *counts.entry(run).or_default() += 1;
            }
        }
    }
    Ok(counts)
}

#[test]
fn every_point_of_every_chart_is_in_the_metrics() -> Result<()> {
    let scene = Scene::new()?;
    let runs = [scene.run("run", ["law", "code"], 6, 0.0)?];
    let html = page_of(&runs, vec![])?;
    // losses, norms, rates and speeds of steps; losses, information and entropy; loads
    let expected = 6 * (3 + 1 + 1 + 1) + 3 * (3 + 2) + 3 * 3;
    assert_eq!(compare_series(&html, &runs)?, [(0, expected)].into());
    assert!(html.contains("<td>not finite</td>") && !html.contains("NaN"));
    Ok(())
}

#[test]
fn the_rows_of_routing_are_those_of_the_last_window() -> Result<()> {
    let scene = Scene::new()?;
    let run = scene.run("run", ["law", "code"], 5, 0.0)?;
    let html = page_of(std::slice::from_ref(&run), vec![])?;
    let window = &lines(&run)?[&("window".to_owned(), 4)];
    let rows = all(r#"(?s)<tr data-source="([^"]*)">(.*?)</tr>"#, &html);
    // two domains, all and load; two domains at each of two routers
    assert_eq!(rows.len(), 4 + 4);
    for row in rows {
        let own = row[1].split("<td data-run").next().unwrap_or_default();
        let cells = all(r#" data-value="([^"]*)""#, own);
        let value = value_at(window, row[0])?;
        let list = value.as_array().context("it is a list")?;
        assert_eq!(cells.len(), list.len(), "{}", row[0]);
        for (cell, value) in cells.iter().zip(list) {
            assert_same(cell[0], value, row[0]);
        }
    }
    // a heat map for each domain, with a cell for each expert of each router
    assert_eq!(html.matches("<svg class=\"heat\"").count(), 2);
    assert_eq!(html.matches("<rect class=\"h").count(), 2 * (3 + 2));
    Ok(())
}

#[test]
fn several_runs_are_drawn_into_the_same_charts() -> Result<()> {
    let scene = Scene::new()?;
    let runs = [
        scene.run("a/mixture", ["law", "code"], 6, 0.0)?,
        scene.run("b/mixture", ["law", "verse"], 4, 1.0)?,
    ];
    let html = page_of(&runs, vec![])?;
    let counts = compare_series(&html, &runs)?;
    assert_eq!(counts[&0], 6 * 6 + 3 * 5 + 3 * 3);
    assert_eq!(counts[&1], 4 * 6 + 2 * 5 + 2 * 3);
    assert!(html.contains("A a/mixture, validation") && html.contains("B b/mixture, validation"));
    // a chart for each domain of any run, and one for all
    let charts = all(r#"<svg viewBox="[^"]*" role="img" aria-labelledby="(loss\d+)-t"#, &html);
    assert_eq!(charts.len(), 4);
    Ok(())
}

#[test]
fn the_forgetting_matrix_is_that_of_the_stages() -> Result<()> {
    let scene = Scene::new()?;
    let dir = scene.run("run", ["law", "code"], 4, 0.0)?;
    let stages = json!([
        {"name": "train", "learned": ["law"], "num_experts": 1, "step": 4,
         "losses": {"law": 1.1234567890123456, "code": 2.5}},
        {"name": "add code", "learned": ["code"], "num_experts": 2, "step": 8,
         "losses": {"law": 1.25, "code": 0.7000000000000001}},
    ]);
    let mut runs = read_all(std::slice::from_ref(&dir))?;
    runs[0].checkpoint = Ok(checkpoint(&dir, stages.clone())?);
    let report = |run| Reported { run, moved: None, samples: Err("none".into()) };
    let html = page(&runs.into_iter().map(report).collect::<Vec<_>>());
    for (index, stage) in stages.as_array().context("a list")?.iter().enumerate() {
        let row = format!(r#"<tr data-stage="{index}">"#);
        let row = html.split(&row).nth(1).and_then(|rest| rest.split("</tr>").next());
        let row = row.context("each stage has a row")?;
        for (domain, loss) in stage["losses"].as_object().context("a map")? {
            let cell = format!(r#"data-domain="{domain}" data-value="{loss}""#);
            assert!(row.contains(&cell), "{cell} {row}");
        }
    }
    let risen = 1.25 - 1.1234567890123456;
    assert!(html.contains(&format!(r#"data-value="{risen}">+0.1265 ▲"#)), "forgotten");
    assert!(html.contains(r#"data-value="0">+0.0000<"#), "just learned");
    Ok(())
}
