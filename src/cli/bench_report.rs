//! What `dylora bench` prints: the setting and the rows, as lines of JSON or as a table.

use std::io::Write;

use anyhow::Result;
use clap::ValueEnum;
use serde::Serialize;
use serde_json::Value;
use tch::Device;

use super::open::device_name;
use super::results::Schema;
use super::table;
use crate::bench::data::LENGTH_SIGMA;
use crate::bench::{BenchSettings, Figures, Header, Row, RowReport, flops};
use crate::config::Dtype;
use crate::ffi;
use crate::model::decoder::spec::DecoderSpec;
use crate::model::families;

/// What the rows are measured on.
pub struct Place {
    pub device: Device,
    /// The device's name as its maker gives it.
    pub device_model: String,
    /// Number of processes, each with a device of its own.
    pub num_processes: usize,
}

/// The header of the report, which says what holds for all rows.
///
/// - `base`: the base's name for people
/// - `spec`: the base's shape
pub fn header(settings: &BenchSettings, base: String, spec: &DecoderSpec, place: Place) -> Header {
    let Place { device, device_model, num_processes } = place;
    let config = &settings.config;
    let torch_dtype = match config.base.dtype {
        Dtype::F32 => "float32",
        Dtype::Bf16 => "bfloat16",
    };
    Header {
        dylora_version: env!("CARGO_PKG_VERSION"),
        libtorch_version: ffi::torch_version(),
        device: device_name(device),
        device_model,
        processes: num_processes,
        threads: tch::get_num_threads(),
        base,
        shape: families::to_json(spec, torch_dtype),
        dtype: config.base.dtype,
        seq_len: config.data.seq_len,
        document_median: settings.document_median,
        document_sigma: settings.document_median.map(|_| LENGTH_SIGMA),
        warmup: settings.warmup,
        steps: settings.steps,
        seed: config.run.seed,
        peak_tflops: settings.peak_flops.map(|flops| flops / 1e12),
        mfu_formula: flops::FORMULA,
        lora: config.lora.clone(),
        router: config.router.clone(),
        train: config.train.clone(),
        optimizer: config.optimizer.clone(),
    }
}

/// Prints a line of JSON, and flushes it for a program that waits for each line.
pub fn print_line(line: &impl Serialize) -> Result<()> {
    let line = Schema::Bench.mark(serde_json::to_value(line)?);
    let mut out = std::io::stdout().lock();
    Ok(writeln!(out, "{line}").and_then(|()| out.flush())?)
}

/// The name of a choice on the command line.
pub fn name(choice: impl ValueEnum) -> String {
    choice.to_possible_value().expect("no choice is skipped").get_name().to_owned()
}

/// The report as text: the setting, the table of the rows, their errors, and what the mixture
/// costs.
pub fn as_text(header: &Header, reports: &[RowReport]) -> String {
    const COLUMNS: [&str; 13] = [
        "row",
        "batch",
        "tokens/s",
        "ms a step",
        "min",
        "max",
        "peak",
        "over base",
        "MFU %",
        "compile, ms",
        "first step",
        "capture",
        "first loss",
    ];
    let rows = reports.iter().map(|report| {
        let head = [name(report.row), report.micro_batch_size.to_string()];
        let figures = match &report.outcome {
            Ok(figures) => cells(figures),
            Err(_) => vec!["-".into(); COLUMNS.len() - head.len()],
        };
        head.into_iter().chain(figures).collect()
    });
    let mut out = format!("{}\n\n{}", setting(header), table::table(&COLUMNS, rows.collect()));
    for report in reports {
        if let Err(error) = &report.outcome {
            out += &format!("\n{} at batch {}: {error}", name(report.row), report.micro_batch_size);
        }
    }
    for cost in mixture_costs(reports) {
        out += &format!("\n{cost}");
    }
    match header.peak_tflops {
        Some(peak) => out + &format!("\n{}; peak {peak} TFLOP/s", header.mfu_formula),
        None => out,
    }
}

/// The header in words.
fn setting(header: &Header) -> String {
    let Header { dylora_version, libtorch_version, device, device_model, .. } = header;
    let Header { processes, threads, .. } = header;
    let Header { base, seq_len, steps, warmup, lora, router, train, .. } = header;
    let documents = match header.document_median {
        None => "one document a block".into(),
        Some(median) => format!("packed documents of median {median} tokens"),
    };
    let modules: Vec<String> = lora.target_modules.0.iter().copied().map(String::from).collect();
    let lines = [
        format!(
            "dylora {dylora_version}, libtorch {libtorch_version}, {device} ({device_model}), \
             {processes} process(es), {threads} thread(s)"
        ),
        format!(
            "{base} in {}, {seq_len} tokens a block, {documents}, {} forward(s) a step",
            name(header.dtype),
            train.grad_accum_steps,
        ),
        format!(
            "{} expert(s) of rank {}, alpha {}, dropout {} on {}; routers: {}",
            lora.num_experts,
            lora.rank,
            // whole numbers have a decimal point, as in JSON
            Value::from(lora.alpha),
            Value::from(lora.dropout),
            modules.join(", "),
            name(router.scope),
        ),
        format!("{steps} steps after {warmup} to warm up"),
    ];
    lines.join("\n")
}

/// The cells of a row, beginning with its speed.
fn cells(figures: &Figures) -> Vec<String> {
    let ms = |ms: f64| format!("{ms:.2}");
    let memory = |bytes: Option<u64>| bytes.map_or("-".into(), |n| table::bytes(n as i64));
    vec![
        table::count(figures.tokens_per_sec.round() as u64),
        ms(figures.step_ms),
        ms(figures.min_step_ms),
        ms(figures.max_step_ms),
        memory(figures.peak_memory_bytes),
        memory(figures.extra_memory_bytes),
        figures.mfu.map_or("-".into(), |mfu| format!("{:.1}", 100.0 * mfu)),
        format!("{:.0}", figures.compile_ms),
        format!("{:.0}", figures.first_step_ms),
        format!("{:.0}", figures.capture_ms),
        format!("{:.4}", figures.first_loss),
    ]
}

/// How much longer a step of the mixture takes than one of a single LoRA, at each batch size.
fn mixture_costs(reports: &[RowReport]) -> Vec<String> {
    let step_ms = |row: Row, batch: usize| {
        let report = reports.iter().find(|r| r.row == row && r.micro_batch_size == batch)?;
        Some(report.outcome.as_ref().ok()?.step_ms)
    };
    let mut batches: Vec<usize> = reports.iter().map(|report| report.micro_batch_size).collect();
    batches.dedup();
    let cost = |batch| {
        let ratio = step_ms(Row::OnePass, batch)? / step_ms(Row::SingleLora, batch)?;
        Some(format!("at batch {batch}, one_pass takes {ratio:.3} times as long as single_lora"))
    };
    batches.into_iter().filter_map(cost).collect()
}
