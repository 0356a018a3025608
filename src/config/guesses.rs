//! What somebody may have meant by a key that does not exist: a key that other programs call so, a
//! key of another section, or one with a similar name.

use super::document::KeyPath;
use super::keys;
use super::schema::join;

/// Names of settings in axolotl, transformers' `TrainingArguments`, PEFT, LLaMA-Factory and similar
/// programs, and how they are written here; `{}` stands for the value. The programs have changed
/// little here for years, and a name that means another thing in each is left out.
const GUESSES: [(&[&str], &str); 42] = [
    (
        &[
            "steps",
            "max_steps",
            "num_steps",
            "total_steps",
            "train_steps",
            "num_train_steps",
            "training_steps",
            "max_train_steps",
            "iterations",
            "max_iters",
            "iters",
        ],
        "train.duration = { steps = {} }",
    ),
    (
        &["epochs", "epoch", "num_epochs", "num_train_epochs", "max_epochs", "n_epochs"],
        "train.duration = { epochs = {} }",
    ),
    (&["max_tokens", "num_tokens", "total_tokens"], "train.duration = { tokens = {} }"),
    (&["lr", "learning_rate", "peak_lr"], "optimizer.adapters.learning_rate = {}"),
    (&["router_lr", "router_learning_rate"], "optimizer.router.learning_rate = {}"),
    (&["weight_decay", "wd"], "optimizer.adapters.weight_decay = {}"),
    (
        &["max_grad_norm", "grad_clip", "gradient_clipping", "clip_grad"],
        "optimizer.max_grad_norm = {}",
    ),
    (&["adam_epsilon", "adam_eps", "epsilon"], "optimizer.eps = {}"),
    (&["adam_beta1", "adam_beta2", "beta1", "beta2"], "optimizer.betas = [0.9, 0.999]"),
    (
        &[
            "batch_size",
            "per_device_train_batch_size",
            "per_device_batch_size",
            "micro_batch_size",
            "train_batch_size",
        ],
        "train.micro_batch_size = {}",
    ),
    (
        &[
            "gradient_accumulation_steps",
            "grad_accum",
            "gradient_accumulation",
            "accumulation_steps",
        ],
        "train.grad_accum_steps = {}",
    ),
    (&["gradient_checkpointing", "activation_checkpointing"], "train.gradient_checkpointing = {}"),
    (&["label_smoothing_factor"], "train.label_smoothing = {}"),
    (
        &["eval_steps", "eval_every", "eval_interval", "evals_per_epoch"],
        "train.eval_every_steps = 100",
    ),
    (&["save_steps", "save_every", "save_interval"], "train.checkpoint_every_steps = {}"),
    (&["save_total_limit"], "train.keep_last = {}"),
    (&["early_stopping_patience", "patience"], "train.early_stopping = { patience = {} }"),
    (&["lr_scheduler_type", "lr_scheduler", "scheduler"], "schedule.kind = {}"),
    (&["warmup", "warmup_ratio", "num_warmup_steps"], "schedule.warmup_steps = 50"),
    (&["warmup_steps"], "schedule.warmup_steps = {}"),
    (&["r", "lora_r", "lora_rank", "lora_dim"], "lora.rank = {}"),
    (&["lora_alpha"], "lora.alpha = {}"),
    (&["lora_dropout"], "lora.dropout = {}"),
    (&["lora_target_modules", "lora_target", "modules"], "lora.target_modules = {}"),
    (&["lora_target_linear"], "lora.target_modules = \"all-linear\""),
    (&["init_lora_weights"], "lora.init = {}"),
    (&["peft_use_rslora"], "lora.use_rslora = {}"),
    (&["peft_use_dora"], "lora.use_dora = {}"),
    (
        &["n_experts", "num_local_experts", "num_moe_experts", "moe_num_experts"],
        "lora.num_experts = {}",
    ),
    (&["num_experts_per_tok", "moe_top_k", "k"], "router.top_k = {}"),
    (
        &["router_aux_loss_coef", "aux_loss_coef", "moe_aux_loss_coef"],
        "router.load_balancing_coef = {}",
    ),
    (&["router_z_loss_coef", "z_loss"], "router.z_loss_coef = {}"),
    (
        &[
            "model",
            "model_name",
            "model_name_or_path",
            "model_path",
            "base_model",
            "base_model_name_or_path",
            "model_id",
            "pretrained_model_name_or_path",
        ],
        "base.source = {source}",
    ),
    (&["tokenizer_name", "tokenizer_path", "tokenizer_name_or_path"], "base.tokenizer = {}"),
    (&["bf16", "torch_dtype", "precision", "mixed_precision", "fp16"], "base.dtype = \"bf16\""),
    (&["output_dir", "out_dir", "save_dir", "output", "out", "run_dir"], "run.dir = {}"),
    (&["data_seed", "random_seed"], "run.seed = {}"),
    (&["device_map", "use_cpu"], "run.device = \"auto\""),
    (
        &[
            "dataset",
            "datasets",
            "train_dataset",
            "train_file",
            "train_files",
            "data_path",
            "dataset_path",
            "dataset_name",
            "data_files",
        ],
        "data.domains = [{ name = \"NAME\", train = [{file}] }]",
    ),
    (
        &[
            "val_set_size",
            "val_size",
            "test_size",
            "validation_split",
            "eval_dataset",
            "validation_file",
        ],
        "validation = { fraction = 0.1 }` in `[[data.domains]]",
    ),
    (
        &[
            "max_seq_length",
            "max_seq_len",
            "max_length",
            "seq_length",
            "sequence_len",
            "sequence_length",
            "cutoff_len",
            "block_size",
            "context_length",
        ],
        "data.seq_len = {}",
    ),
    (
        &["train_on_inputs", "train_on_prompt", "completion_only_loss"],
        "data.loss_on = \"completion\"",
    ),
];

/// The same for names that mean something in one section alone.
const IN_SECTION: [(&str, &[&str], &str); 5] = [
    ("base", &["path", "name", "repo", "hub", "id", "dir", "folder"], "base.source = {source}"),
    ("data.domains[]", &["path", "paths", "file", "files", "data", "source"], "train = [{file}]"),
    (
        "data.domains[]",
        &[
            "val",
            "valid",
            "eval",
            "test",
            "dev",
            "validation_file",
            "validation_files",
            "val_files",
        ],
        "validation = { files = [{file}] }",
    ),
    (
        "data",
        &["path", "paths", "file", "files", "train", "source"],
        "data.domains = [{ name = \"NAME\", train = [{file}] }]",
    ),
    ("lora", &["targets", "layers", "modules"], "lora.target_modules = {}"),
];

/// What to write instead of the unknown `key` of the section at `section`, as `lora.rank`.
///
/// - `value`: the value of the key
/// - `siblings`: the keys that the section has
pub(super) fn suggestion<'a>(
    section: &KeyPath,
    key: &str,
    value: &toml::Value,
    siblings: impl Iterator<Item = &'a str>,
) -> Option<String> {
    let name = key.to_lowercase().replace('-', "_");
    let siblings: Vec<&str> = siblings.collect();
    let of_section = section.of_all_entries();
    let known = IN_SECTION
        .iter()
        .find(|(at, names, _)| *at == of_section && names.contains(&name.as_str()));
    if let Some((_, _, written)) = known {
        return Some(filled(written, value));
    }
    let section = section.to_string();
    let beside = |name: &str| join(&section, name);
    if siblings.contains(&name.as_str()) {
        return Some(beside(&name));
    }
    let guess = GUESSES.iter().find(|(names, _)| names.contains(&name.as_str()));
    if let Some((_, written)) = guess {
        let (target, right) = written.split_once(" = ").unwrap_or((written, "{}"));
        let last = target.rsplit('.').next().unwrap_or_default();
        let is_beside = siblings.contains(&last) && !section.is_empty();
        let target = if is_beside { beside(last) } else { target.to_owned() };
        return Some(filled(&format!("{target} = {right}"), value));
    }
    let mut longer = siblings.iter().filter(|sibling| name.len() > 3 && sibling.starts_with(&name));
    if let (Some(only), None) = (longer.next(), longer.next()) {
        return Some(beside(only));
    }
    if let Some(near) = nearest(&name, siblings.into_iter()) {
        return Some(beside(near));
    }
    let elsewhere = || keys::all().iter().filter(|key| !key.is_section);
    let same = elsewhere().filter(|key| key.name() == name);
    let same = same.min_by_key(|key| key.path.matches('.').count());
    if let Some(same) = same {
        return Some(same.path.clone());
    }
    let known = GUESSES.iter().flat_map(|(names, _)| names.iter().copied());
    if let Some(meant) = nearest(&name, known) {
        return suggestion(&KeyPath::default(), meant, value, std::iter::empty());
    }
    let near = nearest(&name, elsewhere().map(keys::Key::name))?;
    elsewhere().find(|key| key.name() == near).map(|key| key.path.clone())
}

/// The one of `names` that is spelled most like `name`, if it is close enough to be meant.
pub(super) fn nearest<'a>(name: &str, names: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let most = match name.chars().count() {
        0..=2 => 0,
        3..=4 => 1,
        _ => 2,
    };
    let distances = names.map(|other| (strsim::damerau_levenshtein(name, other), other));
    distances.filter(|(distance, _)| *distance <= most).min().map(|(_, other)| other)
}

/// How the source of a base or an adapter is written that somebody named by a single text: a name
/// of the Hub has exactly one slash, and other texts are folders.
pub(super) fn source(text: &str) -> String {
    let is_repo = text.split('/').filter(|part| !part.is_empty()).count() == 2
        && text.matches('/').count() == 1
        && !text.starts_with(['.', '~']);
    match is_repo {
        true => format!("{{ hub = {{ repo = \"{text}\" }} }}"),
        false => format!("{{ path = \"{text}\" }}"),
    }
}

/// A guess with the value that was found.
fn filled(written: &str, value: &toml::Value) -> String {
    let text = value.as_str();
    let is_short = value.is_str() || value.is_integer() || value.is_float() || value.is_bool();
    let short = if is_short { value.to_string() } else { "..".into() };
    written
        .replace("{source}", &source(text.unwrap_or("FOLDER")))
        .replace("{file}", if text.is_some() { &short } else { "\"FILE.jsonl\"" })
        .replace("{}", &short)
}
