//! What `dylora bench` prints: the setting and a line for each row, as JSON or as people read it.

use std::io::Write;

use anyhow::Result;
use serde_json::{Value, json};
use tch::Device;

use super::open::device_name;
use super::table;
use crate::bench::data::LENGTH_SIGMA;
use crate::bench::{BenchSettings, Figures, Row, RowReport};
use crate::config::Dtype;
use crate::ffi;
use crate::model::decoder::spec::DecoderSpec;
use crate::model::families::gpt2;

/// How [`crate::bench::flops`] counts, in one line.
const FORMULA: &str = "MFU = tokens/s * FLOPs a token / peak; FLOPs a token = 4P + 3A + 6Lo \
                       in training, 2P + A + 2Lo in evaluation; P = 12 L d^2 + V d, \
                       A = 2 L T d, Lo = sum of r (in + out) over experts and modules";

/// What holds for all rows.
pub fn header(
    settings: &BenchSettings,
    label: &str,
    shape: &DecoderSpec,
    device: Device,
    device_model: &str,
) -> Value {
    let config = &settings.config;
    let mut train = json!(config.train);
    // each row has its own
    train.as_object_mut().expect("a struct is an object").shift_remove("micro_batch_size");
    json!({
        "kind": "header",
        "dylora_version": env!("CARGO_PKG_VERSION"),
        "libtorch_version": ffi::torch_version(),
        "device": device_name(device),
        "device_model": device_model,
        "threads": tch::get_num_threads(),
        "base": label,
        "shape": gpt2::to_json(shape, match config.base.dtype {
            Dtype::F32 => "float32",
            Dtype::Bf16 => "bfloat16",
        }),
        "dtype": config.base.dtype,
        "seq_len": config.data.seq_len,
        "document_median": settings.document_median,
        "document_sigma": settings.document_median.map(|_| LENGTH_SIGMA),
        "warmup": settings.warmup,
        "steps": settings.steps,
        "seed": config.run.seed,
        "peak_tflops": settings.peak_flops.map(|flops| flops / 1e12),
        "mfu_formula": FORMULA,
        "lora": config.lora,
        "router": config.router,
        "train": train,
        "optimizer": config.optimizer,
    })
}

/// A row's line, which says what it is first.
pub fn row_line(report: &RowReport) -> Result<Value> {
    let mut line = json!({ "kind": "row" });
    let (Value::Object(line_map), Value::Object(report)) =
        (&mut line, serde_json::to_value(report)?)
    else {
        unreachable!("structs are objects")
    };
    line_map.extend(report);
    Ok(line)
}

/// Prints a line at once, for whoever waits for it.
pub fn print_line(value: &Value) -> Result<()> {
    let mut out = std::io::stdout().lock();
    Ok(writeln!(out, "{value}").and_then(|()| out.flush())?)
}

/// What people read.
pub fn as_text(header: &Value, reports: &[RowReport]) -> String {
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
        let head = [report.row.to_owned(), report.micro_batch_size.to_string()];
        let figures = match &report.figures {
            Some(figures) => cells(figures),
            None => vec!["-".into(); COLUMNS.len() - head.len()],
        };
        head.into_iter().chain(figures).collect()
    });
    let mut out = format!("{}\n\n{}", setting(header), table::table(&COLUMNS, rows.collect()));
    for report in reports {
        if let Some(error) = &report.error {
            out += &format!("\n{} at batch {}: {error}", report.row, report.micro_batch_size);
        }
    }
    for cost in mixture_costs(reports) {
        out += &format!("\n{cost}");
    }
    match header["peak_tflops"].as_f64() {
        Some(peak) => out + &format!("\n{FORMULA}; peak {peak} TFLOP/s"),
        None => out,
    }
}

/// The header in words.
fn setting(header: &Value) -> String {
    let text = |value: &Value| value.as_str().unwrap_or("").to_owned();
    let lora = &header["lora"];
    let modules = lora["target_modules"].as_array().into_iter().flatten().map(text);
    let documents = match header["document_median"].as_f64() {
        None => "one document a block".into(),
        Some(median) => format!("packed documents of median {median} tokens"),
    };
    let lines = [
        format!(
            "dylora {}, libtorch {}, {} ({}), {} thread(s)",
            text(&header["dylora_version"]),
            text(&header["libtorch_version"]),
            text(&header["device"]),
            text(&header["device_model"]),
            header["threads"],
        ),
        format!(
            "{} in {}, {} tokens a block, {documents}, {} forward(s) a step",
            text(&header["base"]),
            text(&header["dtype"]),
            header["seq_len"],
            header["train"]["grad_accum_steps"],
        ),
        format!(
            "{} expert(s) of rank {}, alpha {}, dropout {} on {}; routers: {}",
            lora["num_experts"],
            lora["rank"],
            lora["alpha"],
            lora["dropout"],
            modules.collect::<Vec<_>>().join(", "),
            text(&header["router"]["scope"]),
        ),
        format!("{} steps after {} to warm up", header["steps"], header["warmup"]),
    ];
    lines.join("\n")
}

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
        let report = reports.iter().find(|r| r.row == row.name() && r.micro_batch_size == batch)?;
        Some(report.figures.as_ref()?.step_ms)
    };
    let mut batches: Vec<usize> = reports.iter().map(|report| report.micro_batch_size).collect();
    batches.dedup();
    let cost = |batch| {
        let ratio = step_ms(Row::OnePass, batch)? / step_ms(Row::SingleLora, batch)?;
        Some(format!("at batch {batch}, one_pass takes {ratio:.3} times as long as single_lora"))
    };
    batches.into_iter().filter_map(cost).collect()
}
