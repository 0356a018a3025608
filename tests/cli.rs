//! What a user sees of the config: errors with their line and key, and overrides by `--set`.

use std::path::PathBuf;

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
    let result = load::parse(text, &overrides).and_then(|config| load::validate(&config));
    dylora::cli::describe(&result.expect_err("it is refused"))
}

#[test]
fn an_unknown_key_is_shown_with_its_line_and_the_right_keys() {
    insta::assert_snapshot!(error(&format!("{MINIMAL}\n[lora]\nrnak = 8\n"), &[]), @"
    line 12: there is no key `lora.rnak`; did you mean `lora.rank`?
       |
    12 | rnak = 8
       | ^^^^
    ");
}

#[test]
fn a_mistyped_value_is_shown_with_its_line() {
    insta::assert_snapshot!(error(&format!("{MINIMAL}\n[lora]\nrank = \"8\"\n"), &[]), @r#"
    line 12: `lora.rank` must be an integer, got `"8"`
       |
    12 | rank = "8"
       |        ^^^
    hint: write `rank = 8`, without quotes
    "#);
}

#[test]
fn an_unknown_target_module_is_answered_with_the_names() {
    let text = format!("{MINIMAL}\n[lora]\ntarget_modules = [\"attention\"]\n");
    insta::assert_snapshot!(error(&text, &[]), @"
    line 12: `lora.target_modules[0]`: `attention` names no linear layer
       |
    12 | target_modules = [\"attention\"]
       |                   ^^^^^^^^^^^
    hint: the layers are `attn.c_attn`, `attn.c_proj`, `mlp.c_fc`, `mlp.c_proj`, \
    `self_attn.q_proj`, `self_attn.k_proj`, `self_attn.v_proj`, `self_attn.o_proj`, \
    `mlp.gate_proj`, `mlp.up_proj`, `mlp.down_proj`; the last part of a name is enough, and \
    `all-linear` names them all
    ");
}

#[test]
fn target_modules_hold_names_and_nothing_else() {
    for (value, expected) in [
        ("[[]]", "must be a list of strings or a string, got `[[]]`"),
        ("[[\"q_proj\"]]", "must be a list of strings or a string, got `[[\"q_proj\"]]`"),
        ("[1]", "must be a list of strings or a string, got `[1]`"),
        ("{ q_proj = 1 }", "must be a list of strings or a string, got `{ q_proj = 1 }`"),
    ] {
        let found = error(&format!("{MINIMAL}\n[lora]\ntarget_modules = {value}\n"), &[]);
        assert!(found.contains(expected), "{value}: {found}");
    }
}

#[test]
fn all_faults_are_reported_at_once_with_their_paths() {
    let text = format!(
        "{MINIMAL}\n[lora]\nrank = 0\ndropout = 1.5\n[router]\ntop_k = 9\n\
         [train]\nduration = {{ steps = 0 }}\n"
    );
    insta::assert_snapshot!(error(&text, &["optimizer.betas=[0.9, 1.0]"]), @r#"
    `lora.dropout` must be at least 0 and below 1, got 1.5
    `lora.rank` must be at least 1, got 0
    `router.top_k` must be from 1 to `lora.num_experts` 4, got 9
    `train.duration.steps` must be at least 1, got 0
    `optimizer.betas[1]` must be at least 0 and below 1, got 1
    "#);
}

#[test]
fn faults_of_single_experts_name_them() {
    let text = format!(
        "{MINIMAL}\n[train]\nrouting = \"expert:1\"\n[router]\nload_balancing_coef = 0.1\n\
         [lora]\nnum_experts = 2\ntarget_modules = [\"c_attn\"]\n\
         rank_pattern = {{ \"mlp.c_fc\" = 0 }}\n\
         [[lora.experts]]\nrank = 0\nalpha_pattern = {{ \"h.1.attn.c_attn\" = -1.0 }}\n\
         [[lora.experts]]\nsource = {{ path = \"a\" }}\nrank = 4\ntrainable = false\n\
         [[lora.experts]]\nalora_invocation_tokens = [-1]\n"
    );
    insta::assert_snapshot!(error(&text, &[]), @r#"
    `lora.rank_pattern."mlp.c_fc"` must be at least 1, got 0
    `lora.rank_pattern."mlp.c_fc"` names no target module
    `lora.experts` must have at most `lora.num_experts` 2 entries, got 3
    `lora.experts[0].rank` must be at least 1, got 0
    `lora.experts[0].alpha_pattern."h.1.attn.c_attn"` must be a number above 0, got -1
    `lora.experts[1].rank` is the adapter's own with a `source`
    `lora.experts[2].alora_invocation_tokens` must be token ids of at least 0, got -1
    `router.load_balancing_coef` must be 0 where the router does not decide, by `expert:1`
    `train.routing` must reach an expert that is trainable, got `expert:1`
    "#);
}

/// The README's example in short: a shared pattern may name modules that only some experts target.
#[test]
fn a_pattern_may_be_about_the_modules_of_one_expert() {
    let text = format!(
        "{MINIMAL}\n[lora]\ntarget_modules = [\"c_attn\"]\nrank_pattern = {{ \"mlp.c_fc\" = 4 }}\n\
         [[lora.experts]]\ntarget_modules = [\"mlp.c_fc\"]\n"
    );
    let config = load::parse(&text, &[]).unwrap();
    load::validate(&config).unwrap();
    let without = error(&text.replace("[\"mlp.c_fc\"]", "[\"mlp.c_proj\"]"), &[]);
    insta::assert_snapshot!(without, @r#"
    `lora.rank_pattern."mlp.c_fc"` names no target module
    "#);
    insta::assert_snapshot!(error(&format!("{MINIMAL}\n[train]\nrouting = \"best\"\n"), &[]), @"
    line 12: `train.routing`: must be `router`, `uniform`, `all`, `expert:N`, `record`, \
    `domain` or `none`, got `best`
       |
    12 | routing = \"best\"
       |           ^^^^^^
    ");
    insta::assert_snapshot!(error(&text.replace("mlp.c_fc\" =", "mlp.fc\" ="), &[]), @"
    line 13: `lora.rank_pattern.\"mlp.fc\"`: `mlp.fc` is neither a module, as `q_proj`, nor one \
    of a layer, as `layers.0.self_attn.q_proj`
       |
    13 | rank_pattern = { \"mlp.fc\" = 4 }
       |                  ^^^^^^^^
    ");
}

#[test]
fn a_bad_override_names_itself() {
    insta::assert_snapshot!(error(MINIMAL, &["lora.rank=16", "lora.rnak=8"]), @"
    in `--set lora.rnak=8`: there is no key `lora.rnak`; did you mean `lora.rank`?
    ");
    insta::assert_snapshot!(
        error(MINIMAL, &["lora.rank"]),
        @"`--set lora.rank` has no `=`; write `--set lora.rank=16`"
    );
    insta::assert_snapshot!(error(MINIMAL, &["lora.rank.x=8"]), @"
    in `--set lora.rank.x=8`: `lora.rank` must be an integer, got `{ x = 8 }`
    ");
}

#[test]
fn overrides_win_and_take_bare_words() {
    let overrides =
        ["lora.rank=16", "base.dtype=bf16", "train.duration={epochs=2}"].map(String::from);
    let config = load::parse(MINIMAL, &overrides).unwrap();
    assert_eq!(config.lora.rank, 16);
    assert_eq!(config.base.dtype, dylora::config::Dtype::Bf16);
    assert_eq!(config.train.duration, dylora::config::Duration::Epochs(2));
}

#[test]
fn a_resolved_config_reads_back_as_itself() {
    let config = load::parse(MINIMAL, &[]).unwrap();
    let resolved = load::to_toml(&config);
    assert_eq!(load::parse(&resolved, &[]).unwrap(), config);
}

#[test]
fn every_shipped_config_is_valid_and_opens_with_its_command() {
    let configs = fs_err::read_dir("configs").unwrap().map(|entry| entry.unwrap().path());
    let configs: Vec<PathBuf> = configs.filter(|path| path.extension().is_some()).collect();
    assert!(configs.len() >= 6, "{configs:?}");
    for path in configs {
        let text = fs_err::read_to_string(&path).unwrap();
        load::load(&path, &[]).unwrap();
        assert!(text.starts_with("# "), "{}", path.display());
        let commands = ["dylora train --config", "dylora study --config", "scripts/"];
        let opens = |command: &&str| text.contains(&format!("#     {command}"));
        assert!(commands.iter().any(opens), "{}", path.display());
    }
}

#[test]
fn faults_of_the_router_are_reported_with_their_paths() {
    let router = |text: &str| error(&format!("{MINIMAL}\n[router]\n{text}\n"), &[]);
    let numbers = "temperature = 0.0\ntemperature_schedule = { start = -1.0, steps = 0 }\n\
                   hidden_layers = 9\nhidden_width = 0\nnoise = { gaussian = 0.0 }\n\
                   load_balancing_coef = -0.1\nuniform_mse_coef = -1.0\nz_loss_coef = nan\n\
                   entropy_coef = inf\nbalance_bias_rate = -0.5\nwindow_steps = 0\n\
                   collapse_share = 1.5\ndead_share = 0.0\neval = { top_k = 5 }\ntop_k = 0";
    insta::assert_snapshot!(router(numbers), @r#"
    `router.temperature` must be a number above 0, got 0
    `router.temperature_schedule.start` must be a number above 0, got -1
    `router.temperature_schedule.steps` must be at least 1, got 0
    `router.load_balancing_coef` must be a number of at least 0, got -0.1
    `router.uniform_mse_coef` must be a number of at least 0, got -1
    `router.z_loss_coef` must be a number of at least 0, got NaN
    `router.entropy_coef` must be a number, got inf
    `router.balance_bias_rate` must be a number of at least 0, got -0.5
    `router.collapse_share` must be a number above 0, at most 1, got 1.5
    `router.dead_share` must be a number above 0, at most 1, got 0
    `router.window_steps` must be at least 1, got 0
    `router.hidden_layers` must be from 0 to 8, got 9
    `router.hidden_width` must be at least 1, got 0
    `router.noise.gaussian` must be a number above 0, got 0
    `router.top_k` must be from 1 to `lora.num_experts` 4, got 0
    `router.eval.top_k` must be from 1 to `lora.num_experts` 4, got 5
    "#);
    insta::assert_snapshot!(
        router("noise = { jitter = 1.0 }"),
        @"`router.noise.jitter` must be between 0 and 1, got 1"
    );
    insta::assert_snapshot!(router("hybrid = { tokens = 0 }"), @r#"
    `router.hybrid` needs a `router.top_k` below `lora.num_experts` 4
    `router.hybrid.tokens` must be at least 1, got 0
    "#);
    let plateau = "top_k = 1\nhybrid = { plateau = { window_steps = 0, min_delta = -1.0 } }";
    insta::assert_snapshot!(router(plateau), @r#"
    `router.hybrid.plateau.window_steps` must be at least 1, got 0
    `router.hybrid.plateau.min_delta` must be a number of at least 0, got -1
    "#);
    insta::assert_snapshot!(
        router("balance_bias_rate = 0.1"),
        @"`router.balance_bias_rate` needs a `router.top_k` below `lora.num_experts` 4"
    );
    insta::assert_snapshot!(
        router("top_k = 4\nbalance_bias_rate = 0.1"),
        @"`router.balance_bias_rate` needs a `router.top_k` below `lora.num_experts` 4"
    );
    insta::assert_snapshot!(
        router("level = 'sequence'\nnoise = { jitter = 0.1 }"),
        @"`router.noise` is drawn for each token, and does not go with \
          `router.level = \"sequence\"`"
    );
}

#[test]
fn an_unknown_choice_of_the_router_is_answered_with_the_known_ones() {
    let said = |text: &str| {
        let message = error(&format!("{MINIMAL}\n[router]\n{text}\n"), &[]);
        message.lines().next().expect("it has lines").replacen("line 12: ", "", 1)
    };
    let wrong = [
        "scope = 'expert'",
        "level = 'document'",
        "noise = 'some'",
        "noise = { uniform = 0.1 }",
        "eval = { top_p = 0.9 }",
        "hybrid = { steps = 3 }",
        "hybrid = { plateau = { window_steps = 3 } }",
        "temperature_schedule = { start = 2.0 }",
        "on_collapse = 'ignore'",
        "hidden = 2",
    ];
    insta::assert_snapshot!(wrong.map(said).join("\n"), @"
    `router.scope` must be one of `\"shared\"`, `\"layer\"`, `\"module\"`, got `\"expert\"`
    `router.level` must be `\"token\"` or `\"sequence\"`, got `\"document\"`
    `router.noise` must be one of `\"none\"`, `{ gaussian = X }`, `{ jitter = X }`, got \
    `\"some\"`
    `router.noise` must be one of `\"none\"`, `{ gaussian = X }`, `{ jitter = X }`, got `{ \
    uniform = 0.1 }`
    `router.eval` must be `\"dense\"` or `{ top_k = N }`, got `{ top_p = 0.9 }`
    `router.hybrid` must be `{ tokens = N }` or `{ plateau = { .. } }`, got `{ steps = 3 }`
    `router.hybrid.plateau.min_delta` is missing, a number: The smallest fall of the loss that \
    counts, in nats
    `router.temperature_schedule.steps` is missing, an integer: Number of steps until \
    `router.temperature` is reached
    `router.on_collapse` must be `\"warn\"` or `\"stop\"`, got `\"ignore\"`
    there is no key `router.hidden`; the keys of `router` are `input`, `scope`, `level`, \
    `normalize_input`, `detach_input`, `init`, `trainable`, `hidden_layers`, `hidden_width`, \
    `temperature`, `temperature_schedule`, `top_k`, `renormalize`, `hybrid`, `noise`, `eval`, \
    `load_balancing_coef`, `uniform_mse_coef`, `z_loss_coef`, `entropy_coef`, \
    `domain_supervision`, `balance_bias_rate`, `window_steps`, `on_collapse`, `collapse_share`, \
    `dead_share`, `source`
    ");
}

#[test]
fn the_losses_of_routers_need_a_router_that_decides() {
    let text = format!(
        "{MINIMAL}\n[train]\nrouting = \"uniform\"\n[router]\ntop_k = 2\n\
         load_balancing_coef = 0.1\nuniform_mse_coef = 0.1\nz_loss_coef = 0.1\n\
         entropy_coef = -0.1\nbalance_bias_rate = 0.1\n"
    );
    insta::assert_snapshot!(error(&text, &[]), @r#"
    `router.load_balancing_coef` must be 0 where the router does not decide, by `uniform`
    `router.uniform_mse_coef` must be 0 where the router does not decide, by `uniform`
    `router.z_loss_coef` must be 0 where the router does not decide, by `uniform`
    `router.entropy_coef` must be 0 where the router does not decide, by `uniform`
    `router.balance_bias_rate` must be 0 where the router does not decide, by `uniform`
    "#);
}

#[test]
fn faults_of_experts_per_layer_and_of_orthogonality_are_reported() {
    let lora = |text: &str| error(&format!("{MINIMAL}\n[lora]\n{text}\n"), &[]);
    insta::assert_snapshot!(lora("experts_per_layer = [0, 5, 4]"), @r#"
    `lora.experts_per_layer[0]` must be from 1 to `lora.num_experts` 4, got 0
    `lora.experts_per_layer[1]` must be from 1 to `lora.num_experts` 4, got 5
    "#);
    insta::assert_snapshot!(
        lora("experts_per_layer = [1, 3, 2]"),
        @"`lora.experts_per_layer` leaves expert 3 without a layer"
    );
    insta::assert_snapshot!(
        lora("experts_per_layer = [4]\nexperts = [{ source = { path = 'a' } }]"),
        @"`lora.experts_per_layer` goes with new experts, not with those from a `source`"
    );
    insta::assert_snapshot!(
        lora("orthogonality = { a = -1.0 }"),
        @"`lora.orthogonality` must be a number of at least 0, got -1"
    );
    insta::assert_snapshot!(lora("orthogonality = { b = 1.0 }"), @"
    line 12: `lora.orthogonality` must be `{ a = X }` or `{ ba = X }`, got `{ b = 1.0 }`
       |
    12 | orthogonality = { b = 1.0 }
       |                 ^^^^^^^^^^^
    ");
}

#[test]
fn the_settings_of_a_router_read_back_as_they_are_written() {
    let text = format!(
        "{MINIMAL}\n[lora]\northogonality = {{ ba = 0.5 }}\nexperts_per_layer = [2, 4]\n[router]\n\
         input = 'layer_input'\nscope = 'module'\nhidden_layers = 2\ntop_k = 2\n\
         temperature_schedule = {{ start = 4.0, steps = 500 }}\nnoise = {{ jitter = 0.01 }}\n\
         hybrid = {{ plateau = {{ window_steps = 100, min_delta = 0.01 }} }}\neval = 'dense'\n\
         entropy_coef = -0.01\non_collapse = 'stop'\n"
    );
    let config = load::parse(&text, &[]).unwrap();
    load::validate(&config).unwrap();
    // a run saves its config in this form, with every default filled in
    let again = load::parse(&load::to_toml(&config), &[]).unwrap();
    assert_eq!(again, config);
    assert_eq!(config.router.entropy_coef, -0.01);
}
