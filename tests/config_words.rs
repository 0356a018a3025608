//! What a config that cannot be read is answered with: the key, the value found, the line, and what
//! would be right.

use anyhow::Result;
use dylora::cli::describe;
use dylora::config::load;

const MINIMAL: &str = r#"[base]
source = { path = "base" }

[data]
seq_len = 128

[[data.domains]]
name = "math"
train = ["math.jsonl"]
"#;

fn error(text: &str, overrides: &[&str]) -> String {
    let overrides: Vec<String> = overrides.iter().map(|item| (*item).to_owned()).collect();
    describe(&load::parse(text, &overrides).expect_err("it is refused"))
}

/// The message about `text` after [`MINIMAL`], without the lines of the file.
fn said(text: &str) -> String {
    let message = error(&format!("{MINIMAL}\n{text}\n"), &[]);
    let is_excerpt =
        |line: &&str| line.trim_start().starts_with(|c: char| c == '|' || c.is_ascii_digit());
    message.lines().filter(|line| !is_excerpt(line)).collect::<Vec<_>>().join("\n")
}

#[test]
fn the_names_of_other_programs_are_answered_with_the_key_here() {
    for (text, right) in [
        ("train.steps = 40", "train.duration = { steps = 40 }"),
        ("train.max_steps = 40", "train.duration = { steps = 40 }"),
        ("train.epochs = 3", "train.duration = { epochs = 3 }"),
        ("num_train_epochs = 3", "train.duration = { epochs = 3 }"),
        ("train.learning_rate = 2e-4", "optimizer.adapters.learning_rate = 0.0002"),
        ("optimizer.lr = 2e-4", "optimizer.adapters.learning_rate = 0.0002"),
        ("optimizer.router.lr = 1e-3", "optimizer.router.learning_rate = 0.001"),
        ("train.batch_size = 4", "train.micro_batch_size = 4"),
        ("per_device_train_batch_size = 4", "train.micro_batch_size = 4"),
        ("train.gradient_accumulation_steps = 2", "train.grad_accum_steps = 2"),
        ("lora.r = 16", "lora.rank = 16"),
        ("lora_alpha = 32", "lora.alpha = 32"),
        ("lora.lora_dropout = 0.1", "lora.dropout = 0.1"),
        (
            "model_name_or_path = 'Qwen/Qwen3-0.6B'",
            "base.source = { hub = { repo = \"Qwen/Qwen3-0.6B\" } }",
        ),
        ("base_model = './models/mine'", "base.source = { path = \"./models/mine\" }"),
        ("output_dir = 'out'", "run.dir = \"out\""),
        ("seed = 3", "run.seed"),
        ("train.seed = 3", "run.seed"),
        ("dataset = 'a.jsonl'", "data.domains = [{ name = \"NAME\", train = [\"a.jsonl\"] }]"),
        ("max_seq_length = 512", "data.seq_len = 512"),
        ("bf16 = true", "base.dtype = \"bf16\""),
        ("lora.top_k = 2", "router.top_k"),
        ("router.dropout = 0.1", "lora.dropout"),
        ("lora.alhpa = 4.0", "lora.alpha"),
        ("router.load_balancing = 0.1", "router.load_balancing_coef"),
    ] {
        // dotted keys must come before the first section
        let message = error(&format!("{text}\n{MINIMAL}"), &[]);
        let wanted = format!("did you mean `{right}`?");
        assert!(message.lines().next().is_some_and(|line| line.ends_with(&wanted)), "{message}");
    }
    let files = error(&MINIMAL.replace("128", "128\nfiles = 'a.jsonl'"), &[]);
    let right = "did you mean `data.domains = [{ name = \"NAME\", train = [\"a.jsonl\"] }]`?";
    assert!(files.contains(right), "{files}");
    let named = MINIMAL.replace("train = [\"math.jsonl\"]", "path = \"math.jsonl\"");
    let message = error(&named, &[]);
    assert!(message.contains("did you mean `train = [\"math.jsonl\"]`?"), "{message}");
    let of_hub = MINIMAL.replace("source = { path = \"base\" }", "name = \"openai/gpt2\"");
    let message = error(&of_hub, &[]);
    let right = "did you mean `base.source = { hub = { repo = \"openai/gpt2\" } }`?";
    assert!(message.contains(right), "{message}");
}

#[test]
fn faults_are_reported_together_in_the_order_of_their_lines() {
    let text = MINIMAL.replace("seq_len = 128", "seq_len = \"128\"\nloss_on = 'prompt'");
    insta::assert_snapshot!(error(&format!("stepps = 3\n{text}\n[trian]\n"), &[]), @r#"
    line 1: there is no key `stepps`; did you mean `train.duration = { steps = 3 }`?
      |
    1 | stepps = 3
      | ^^^^^^
    line 6: `data.seq_len` must be an integer, got `"128"`
      |
    6 | seq_len = "128"
      |           ^^^^^
    hint: write `seq_len = 128`, without quotes
    line 7: `data.loss_on` must be `"completion"` or `"all"`, got `"prompt"`
      |
    7 | loss_on = 'prompt'
      |           ^^^^^^^^
    line 13: there is no key `trian`; did you mean `train`?
       |
    13 | [trian]
       |  ^^^^^
    "#);
}

#[test]
fn values_of_a_wrong_type_are_shown_with_the_right_one() {
    insta::assert_snapshot!(said("[lora]\nrank = '8'"), @r#"
    line 12: `lora.rank` must be an integer, got `"8"`
    hint: write `rank = 8`, without quotes
    "#);
    insta::assert_snapshot!(said("[lora]\nrank = 8.0"), @"
    line 12: `lora.rank` must be an integer, got `8.0`
    hint: write `rank = 8`
    ");
    insta::assert_snapshot!(said("[lora]\nuse_dora = 'yes'"), @"
    line 12: `lora.use_dora` must be `true` or `false`, got `\"yes\"`
    ");
    insta::assert_snapshot!(said("[train]\nduration = 40"), @"
    line 12: `train.duration` must be one of `\"auto\"`, `{ steps = N }`, `{ epochs = N }`, `{ \
    tokens = N }`, got `40`
    hint: did you mean `duration = { steps = 40 }`?
    ");
    insta::assert_snapshot!(said("[train]\nkeep_last = -1"), @"
    line 12: `train.keep_last` must be at least 0, got -1
    ");
    insta::assert_snapshot!(said("[router]\nscope = 'Layer'"), @"
    line 12: `router.scope` must be one of `\"shared\"`, `\"layer\"`, `\"module\"`, got \
    `\"Layer\"`
    hint: did you mean `scope = \"layer\"`?
    ");
    insta::assert_snapshot!(said("[optimizer]\nbetas = [0.9]"), @"
    line 12: `optimizer.betas` must have 2 entries, got 1
    ");
    insta::assert_snapshot!(said("[optimizer]\nadapters = 1e-3"), @"
    line 12: `optimizer.adapters` must be a table, got `0.001`
    ");
    insta::assert_snapshot!(said("[lora]\ntarget_modules = [1]"), @"
    line 12: `lora.target_modules` must be a list of strings or a string, got `[1]`
    ");
    insta::assert_snapshot!(said("[[data.domains]]\nname = 'law'\ntrain = 'law.jsonl'"), @r#"
    line 13: `data.domains[1].train` must be a list of strings, got `"law.jsonl"`
    hint: write `train = ["law.jsonl"]`
    "#);
    insta::assert_snapshot!(said("[[data.domains]]\ntrain = ['law.jsonl']"), @"
    line 11: `data.domains[1].name` is missing, a string: The domain's name in tables and metrics
    ");
    let hub = MINIMAL.replace("{ path = \"base\" }", "\"openai/gpt2\"");
    insta::assert_snapshot!(error(&hub, &[]), @"
    line 2: `base.source` must be one of `{ path = \"..\" }`, `{ hub = { .. } }`, `{ random = { \
    .. } }`, got `\"openai/gpt2\"`
      |
    2 | source = \"openai/gpt2\"
      |          ^^^^^^^^^^^^^
    hint: did you mean `source = { hub = { repo = \"openai/gpt2\" } }`?
    ");
}

#[test]
fn what_only_the_parser_knows_is_shown_with_its_key_and_line() {
    insta::assert_snapshot!(error(&format!("{MINIMAL}\n[run]\ndevice = 'gpu'\n"), &[]), @"
    line 12: `run.device`: `gpu` is no device; use `auto`, `cpu`, `cuda` or `cuda:N` with N up \
    to 127
       |
    12 | device = 'gpu'
       |          ^^^^^
    ");
    insta::assert_snapshot!(error(MINIMAL, &["run.device=gpu"]), @"
    in `--set run.device=gpu`: `run.device`: `gpu` is no device; use `auto`, `cpu`, `cuda` or \
    `cuda:N` with N up to 127
    ");
}

#[test]
fn an_empty_config_is_told_what_it_needs() {
    insta::assert_snapshot!(error("", &[]), @"
    `base.source` is missing, one of `{ path = \"..\" }`, `{ hub = { .. } }`, `{ random = { .. \
    } }`: Where the base comes from
    `data.seq_len` is missing, an integer: Length of a block, in tokens
    `data.domains` is missing, a list of tables: the kinds of text
    ");
    insta::assert_snapshot!(error("", &["data.seq_len=8"]), @"
    `data.domains` is missing, a list of tables: the kinds of text
    `base.source` is missing, one of `{ path = \"..\" }`, `{ hub = { .. } }`, `{ random = { .. \
    } }`: Where the base comes from
    ");
}

#[test]
fn a_text_that_is_no_toml_is_shown_with_its_line() {
    insta::assert_snapshot!(error("[base]\ndtype = bf16\n", &[]), @"
    line 2: this is no TOML: string values must be quoted, expected literal string
      |
    2 | dtype = bf16
      |         ^^^^
    ");
}

#[test]
fn an_override_sets_the_entry_of_a_list() -> Result<()> {
    let config = load::parse(MINIMAL, &["data.domains.0.weight=2".to_owned()])?;
    assert_eq!(config.data.domains[0].weight, 2.0);
    insta::assert_snapshot!(error(MINIMAL, &["data.domains.1.weight=2"]), @"
    in `--set data.domains.1.weight=2`: `data.domains` is a list whose only entry is \
    `data.domains.0`, got `1`
    ");
    insta::assert_snapshot!(error(MINIMAL, &["data.domains.0.wieght=2"]), @"
    in `--set data.domains.0.wieght=2`: there is no key `data.domains[0].wieght`; did you mean \
    `data.domains[0].weight`?
    ");
    Ok(())
}
