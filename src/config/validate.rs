//! Checks what the types of a [`Config`] cannot.

use anyhow::Result;

use super::bounds::check_bounds;
use super::faults::Faults;
use super::validate_lora::{check_layers, check_lora};
use super::{
    BaseProducts, BaseSource, Config, DomainConfig, DomainExperts, DropoutMasks, Dtype, Duration,
    EvalRule, Family, GroupConfig, Kernels, Maturity, Method, Mixing, RandomBase, RouterConfig,
    RouterInit, RouterInput, RouterNoise, RouterScope, RoutingChoice, RoutingLevel, Validation,
};

/// Checks what types cannot.
///
/// # Errors
/// The error lists all faults, each with the dotted path of its key.
pub fn validate(config: &Config) -> Result<()> {
    let mut faults = Faults::default();
    check_data(config, &mut faults);
    check_lora(config, &mut faults);
    check_domain_experts(config, &mut faults);
    check_router(config, &mut faults);
    check_growth(config, &mut faults);
    check_train(config, &mut faults);
    check_optimizer(config, &mut faults);
    check_bounds(config, &mut faults);
    if let BaseSource::Random(shape) = &config.base.source {
        check_random(shape, &mut faults);
        if config.method == Method::RoutedLora {
            faults.add("base.source", "random weights are for `method = \"full\"` only".into());
        }
        if config.base.tokenizer.is_none() {
            faults.add("base.tokenizer", "is needed with random weights".into());
        }
    }
    faults.into_result()
}

/// The largest size of a random base.
const MAX_SIZE: i64 = 1 << 20;

/// Checks the shape of a random base.
fn check_random(shape: &RandomBase, faults: &mut Faults) {
    let key = |field: &str| format!("base.source.random.{field}");
    let optional =
        [("n_kv_head", shape.n_kv_head), ("head_dim", shape.head_dim), ("n_inner", shape.n_inner)];
    let needed = [
        ("n_layer", shape.n_layer),
        ("n_head", shape.n_head),
        ("n_embd", shape.n_embd),
        ("n_positions", shape.n_positions),
    ];
    let set = optional.iter().filter_map(|(field, value)| Some((*field, (*value)?)));
    let is_size = |value: i64| (1..=MAX_SIZE).contains(&value);
    let sizes: Vec<(&str, i64)> = needed.into_iter().chain(set).collect();
    for (field, value) in sizes.iter().filter(|(_, value)| !is_size(*value)) {
        faults.add(&key(field), format!("must be from 1 to {MAX_SIZE}, got {value}"));
    }
    for (field, value) in &optional[..2] {
        if shape.family == Family::Gpt2 && value.is_some() {
            faults.add(&key(field), "is no setting of the family `gpt2`".into());
        }
    }
    if sizes.iter().any(|(_, value)| !is_size(*value)) {
        return;
    }
    let multiple = |n: i64, of: i64| n.rem_euclid(of) == 0;
    if shape.head_dim.is_none() && !multiple(shape.n_embd, shape.n_head) {
        let fault =
            format!("must be a multiple of `n_head` {}, got {}", shape.n_head, shape.n_embd);
        faults.add(&key("n_embd"), fault);
    }
    if let Some(kv) = shape.n_kv_head.filter(|kv| !multiple(shape.n_head, *kv)) {
        faults.add(&key("n_kv_head"), format!("must divide `n_head` {}, got {kv}", shape.n_head));
    }
    let head_dim = shape.head_dim.unwrap_or(shape.n_embd / shape.n_head);
    if shape.family != Family::Gpt2 && head_dim % 2 != 0 {
        faults.add(&key("head_dim"), format!("must be even, because of RoPE, got {head_dim}"));
    }
}

fn check_data(config: &Config, faults: &mut Faults) {
    let data = &config.data;
    if data.seq_len < 2 {
        faults.add("data.seq_len", format!("must be at least 2, got {}", data.seq_len));
    }
    if data.domains.is_empty() {
        faults.add("data.domains", "must have at least one domain, got none".into());
    }
    if let Mixing::Temperature(temperature) = data.mixing {
        faults.above_zero("data.mixing.temperature", temperature);
    }
    if !data.domains.is_empty() && data.domains.iter().all(|domain| domain.weight == 0.0) {
        faults.add("data.domains", "must have one whose `weight` is above 0".into());
    }
    for (i, domain) in data.domains.iter().enumerate() {
        let key = |field: &str| format!("data.domains[{i}].{field}");
        let is_odd = |c: char| c == '/' || c == '=' || c.is_control();
        if domain.name.is_empty() || domain.name.contains(is_odd) {
            let what = "a name without `/`, `=` and control characters";
            faults.add(&key("name"), format!("must be {what}, got `{}`", domain.name));
        }
        if data.domains[..i].iter().any(|other| other.name == domain.name) {
            faults.add(&key("name"), format!("`{}` is already taken", domain.name));
        }
        match (&domain.hub, domain.train.is_empty()) {
            (None, true) => {
                let what = "must name at least one file, unless there is `hub`";
                faults.add(&key("train"), what.into());
            }
            (Some(_), false) => {
                faults
                    .add(&key("hub"), "does not go with `train`; leave one of the two out".into());
            }
            _ => {}
        }
        if let Err((field, fault)) = domain.records().known_shape() {
            faults.add(&key(field), fault);
        }
        match data.mixing {
            Mixing::Interleaved => {
                let what = "1 with `data.mixing = \"interleaved\"`";
                faults.in_range(&key("weight"), domain.weight, domain.weight == 1.0, what);
            }
            _ => faults.at_least_zero(&key("weight"), domain.weight),
        }
        match &domain.validation {
            Some(Validation::Fraction(fraction)) => {
                let ok = *fraction >= 1e-9 && *fraction < 1.0;
                let what = "at least 1e-9 and below 1";
                faults.in_range(&key("validation.fraction"), *fraction, ok, what);
            }
            Some(Validation::Files(files)) if files.is_empty() => {
                faults.add(&key("validation.files"), "must name at least one file".into());
            }
            _ => {}
        }
    }
}

fn check_router(config: &Config, faults: &mut Faults) {
    let (router, num_experts) = (&config.router, config.lora.num_experts);
    faults.above_zero("router.temperature", router.temperature);
    if let Some(schedule) = router.temperature_schedule {
        faults.above_zero("router.temperature_schedule.start", schedule.start);
        faults.at_least_one("router.temperature_schedule.steps", schedule.steps as i64);
    }
    for (key, coef, may_be_negative) in router.loss_coefs() {
        let key = format!("router.{key}");
        match may_be_negative {
            true => faults.in_range(&key, coef, coef.is_finite(), "a number"),
            false => faults.at_least_zero(&key, coef),
        }
    }
    faults.at_least_zero("router.balance_bias_rate", router.balance_bias_rate);
    if let Some(orthogonality) = config.lora.orthogonality {
        faults.at_least_zero("lora.orthogonality", orthogonality.coef());
    }
    let share = |share: f64| share > 0.0 && share <= 1.0;
    for (key, value) in
        [("collapse_share", router.collapse_share), ("dead_share", router.dead_share)]
    {
        let what = "a number above 0, at most 1";
        faults.in_range(&format!("router.{key}"), value, share(value), what);
    }
    faults.at_least_one("router.window_steps", router.window_steps as i64);
    if !(0..=8).contains(&router.hidden_layers) {
        let fault = format!("must be from 0 to 8, got {}", router.hidden_layers);
        faults.add("router.hidden_layers", fault);
    }
    faults.at_least_one("router.hidden_width", router.hidden_width);
    if router.noise != RouterNoise::None && router.level == RoutingLevel::Sequence {
        let fault = "is drawn for each token, and does not go with `router.level = \"sequence\"`";
        faults.add("router.noise", fault.into());
    }
    match router.noise {
        RouterNoise::None => {}
        RouterNoise::Gaussian(std) => faults.above_zero("router.noise.gaussian", std),
        RouterNoise::Jitter(eps) => {
            let ok = eps > 0.0 && eps < 1.0;
            faults.in_range("router.noise.jitter", eps, ok, "between 0 and 1");
        }
    }
    if router.source.is_some() && num_experts == 1 {
        faults.add("router.source", "needs more than one expert: one has no router".into());
    }
    check_rule(router, num_experts, faults);
    check_input(config, faults);
    check_frozen_router(config, faults);
    check_layers(&config.lora, faults);
}

/// Checks what the router reads, how it starts and by what it is supervised.
fn check_input(config: &Config, faults: &mut Faults) {
    let router = &config.router;
    let coef = router.supervision();
    faults.at_least_zero("router.domain_supervision", coef);
    if let Some(reason) = config.why_unsupervised().filter(|_| coef > 0.0) {
        let fault = format!("must be 0 where {reason}, got {coef}");
        faults.add("router.domain_supervision", fault);
    }
    let chooses = router.top_k.is_some_and(|k| k < config.lora.num_experts);
    if router.init == RouterInit::Zero && chooses && coef == 0.0 {
        let fault = "gives all experts the same score, of which `router.top_k` always takes the \
                     first; it needs `router.domain_supervision`";
        faults.add("router.init", fault.into());
    }
    if router.input == RouterInput::ModuleInput {
        if router.scope != RouterScope::Module {
            let fault = "must be `module` with `router.input = \"module_input\"`";
            faults.add("router.scope", fault.into());
        }
        if config.train.gradient_checkpointing {
            let fault = "does not go with `router.input = \"module_input\"`";
            faults.add("train.gradient_checkpointing", fault.into());
        }
    }
}

/// Checks that a router that is not trained decides, and that nothing is set that would train it.
fn check_frozen_router(config: &Config, faults: &mut Faults) {
    let router = &config.router;
    if router.trainable {
        return;
    }
    let reason = if config.method == Method::Full || config.lora.num_experts < 2 {
        Some("there is no router")
    } else if config.train.routing != RoutingChoice::Router {
        Some("the router does not decide")
    } else if config.growth.is_some() {
        Some("an expert is added, whose column of the router has to learn")
    } else {
        None
    };
    if let Some(reason) = reason {
        faults.add("router.trainable", format!("must be true where {reason}"));
        return;
    }
    for (key, coef, _) in router.loss_coefs() {
        if coef != 0.0 {
            let fault = format!("must be 0 with `router.trainable = false`, got {coef}");
            faults.add(&format!("router.{key}"), fault);
        }
    }
    if router.init == RouterInit::Zero && router.source.is_none() {
        let fault = "gives each expert the same weight for ever with `router.trainable = false`; \
                     `train.routing = \"uniform\"` does the same without a router";
        faults.add("router.init", fault.into());
    }
}

/// Checks which experts domains have.
fn check_domain_experts(config: &Config, faults: &mut Faults) {
    let num_experts = config.lora.num_experts;
    for (i, domain) in config.data.domains.iter().enumerate() {
        let key = format!("data.domains[{i}].expert");
        let Some(experts) = domain.expert.as_ref().map(DomainExperts::experts) else { continue };
        if experts.is_empty() {
            faults.add(&key, "must name at least one expert, got none".into());
        }
        for (at, &expert) in experts.iter().enumerate() {
            if !(0..num_experts).contains(&expert) {
                let range = format!("at least 0 and below `lora.num_experts` {num_experts}");
                let fault = format!("must be {range}, got {expert}");
                faults.add(&key, fault);
            }
            if experts[..at].contains(&expert) {
                faults.add(&key, format!("names expert {expert} twice"));
            }
        }
    }
    let has = |(_, domain): &(usize, &DomainConfig)| domain.expert.is_some();
    if config.trained_domains().any(|domain| has(&domain))
        && let Some((i, _)) = config.trained_domains().find(|domain| !has(domain))
    {
        let fault = "is missing, while other trained domains have it";
        faults.add(&format!("data.domains[{i}].expert"), fault.into());
    }
}

/// Checks the rule that turns scores into weights.
fn check_rule(router: &RouterConfig, num_experts: i64, faults: &mut Faults) {
    let top_k = router.top_k.map(|k| ("router.top_k", k));
    let eval_k = router.eval.and_then(EvalRule::top_k).map(|k| ("router.eval.top_k", k));
    for (key, k) in top_k.into_iter().chain(eval_k) {
        if !(1..=num_experts).contains(&k) {
            let range = format!("from 1 to `lora.num_experts` {num_experts}");
            faults.add(key, format!("must be {range}, got {k}"));
        }
    }
    let needs_top_k = [
        ("hybrid", router.hybrid.is_some()),
        ("balance_bias_rate", router.balance_bias_rate > 0.0),
    ];
    for (key, is_set) in needs_top_k {
        if is_set && router.top_k.is_none_or(|k| k >= num_experts) {
            let fault = format!("needs a `router.top_k` below `lora.num_experts` {num_experts}");
            faults.add(&format!("router.{key}"), fault);
        }
    }
    match router.hybrid {
        Some(Maturity::Tokens(tokens)) => {
            faults.at_least_one("router.hybrid.tokens", tokens as i64);
        }
        Some(Maturity::Plateau(plateau)) => {
            let key = |field: &str| format!("router.hybrid.plateau.{field}");
            faults.at_least_one(&key("window_steps"), plateau.window_steps as i64);
            faults.at_least_zero(&key("min_delta"), plateau.min_delta);
        }
        None => {}
    }
}

fn check_growth(config: &Config, faults: &mut Faults) {
    let Some(growth) = &config.growth else { return };
    if !config.data.domains.iter().any(|domain| domain.name == growth.domain) {
        let fault = format!("must name one of `data.domains`, got `{}`", growth.domain);
        faults.add("growth.domain", fault);
    }
    if config.method == Method::Full {
        faults.add("growth", "is for `method = \"routed_lora\"`".into());
    }
    if config.lora.experts_per_layer.is_some() {
        let fault = "does not go with `lora.experts_per_layer`, of which a new expert has no part";
        faults.add("growth", fault.into());
    }
    if growth.seed_steps == 0 {
        faults.add("growth.seed_steps", "must be at least 1, got 0".into());
    }
    if config.lora.num_experts < 2 {
        let fault = format!("needs an old and a new expert, got {}", config.lora.num_experts);
        faults.add("lora.num_experts", fault);
    }
    for (key, rate) in [
        ("old_experts_rate", growth.old_experts_rate),
        ("old_columns_rate", growth.old_columns_rate),
        ("seed_router_coef", growth.seed_router_coef),
    ] {
        faults.at_least_zero(&format!("growth.{key}"), rate);
    }
    faults.above_zero("growth.consolidation_rate", growth.consolidation_rate);
    faults.above_zero("growth.column_learning_rate", growth.column_learning_rate);
    if config.train.routing != RoutingChoice::Router {
        let fault =
            format!("must be `router` where an expert is added, got `{}`", config.train.routing);
        faults.add("train.routing", fault);
    }
}

fn check_train(config: &Config, faults: &mut Faults) {
    let train = &config.train;
    let (unit, value) = match train.duration {
        Duration::Steps(value) => ("steps", value),
        Duration::Epochs(value) => ("epochs", value),
        Duration::Tokens(value) => ("tokens", value),
        Duration::Auto => ("auto", 1),
    };
    if value == 0 {
        faults.add(&format!("train.duration.{unit}"), "must be at least 1, got 0".into());
    }
    check_routing(config, faults);
    faults.at_least_one("train.micro_batch_size", train.micro_batch_size as i64);
    faults.at_least_one("train.grad_accum_steps", train.grad_accum_steps as i64);
    faults.at_least_one("train.loss_chunk_tokens", train.loss_chunk_tokens);
    faults.at_least_one("train.keep_last", train.keep_last as i64);
    check_base_products(config, faults);
    faults.in_range(
        "train.label_smoothing",
        train.label_smoothing,
        (0.0..1.0).contains(&train.label_smoothing),
        "at least 0 and below 1",
    );
    for (key, every) in [
        ("train.eval_every_steps", train.eval_every_steps),
        ("train.checkpoint_every_steps", train.checkpoint_every_steps),
    ] {
        if every == Some(0) {
            faults.add(key, "must be at least 1, got 0; leave it out for `only at the end`".into());
        }
    }
    if let Some(stopping) = train.early_stopping {
        if stopping.patience == 0 {
            faults.add("train.early_stopping.patience", "must be at least 1, got 0".into());
        }
        faults.at_least_zero("train.early_stopping.min_delta", stopping.min_delta);
        if train.eval_every_steps.is_none() {
            faults.add("train.early_stopping", "needs `train.eval_every_steps`".into());
        }
        if config.data.domains.iter().all(|domain| domain.validation.is_none()) {
            faults.add("train.early_stopping", "needs a domain with `validation`".into());
        }
    }
}

/// Checks what products of the base in FP8 need.
fn check_base_products(config: &Config, faults: &mut Faults) {
    if config.train.base_products == BaseProducts::Exact {
        return;
    }
    let (lora, method) = (&config.lora, config.method);
    let needed = [
        (method == Method::RoutedLora, "`method = \"routed_lora\"`"),
        (config.base.dtype == Dtype::Bf16, "`base.dtype = \"bf16\"`"),
        (config.train.kernels == Kernels::Auto, "`train.kernels = \"auto\"`"),
        (lora.dropout_masks == DropoutMasks::Shared, "`lora.dropout_masks = \"shared\"`"),
        (!lora.use_dora, "`lora.use_dora = false`"),
        (
            config.router.input != RouterInput::ModuleInput,
            "another `router.input` than `module_input`",
        ),
    ];
    for (_, need) in needed.iter().filter(|(is_met, _)| !is_met) {
        faults.add("train.base_products", format!("needs {need} to be `fp8`"));
    }
}

/// Checks that there is something to train with `train.routing`.
fn check_routing(config: &Config, faults: &mut Faults) {
    let (routing, num_experts) = (config.train.routing, config.lora.num_experts);
    // without experts there is a fault already
    if config.method == Method::Full || num_experts < 1 {
        return;
    }
    let trainable = |expert: i64| {
        config.lora.experts.get(expert as usize).is_none_or(|expert| expert.trainable)
    };
    let any = (0..num_experts).any(trainable);
    if routing != RoutingChoice::Router {
        if config.router.hybrid.is_some() {
            let fault = format!("must be absent where the router does not decide, by `{routing}`");
            faults.add("router.hybrid", fault);
        }
        let rate = [("balance_bias_rate", config.router.balance_bias_rate, false)];
        for (key, coef, _) in config.router.loss_coefs().into_iter().chain(rate) {
            if coef != 0.0 {
                let fault = format!("must be 0 where the router does not decide, by `{routing}`");
                faults.add(&format!("router.{key}"), fault);
            }
        }
        if config.router.source.is_some() {
            let fault = format!("is of no use where the router does not decide, by `{routing}`");
            faults.add("router.source", fault);
        }
    }
    let trains = match routing {
        RoutingChoice::None => {
            let fault = "must be a choice that trains something, got `none`";
            return faults.add("train.routing", fault.into());
        }
        RoutingChoice::Expert(expert) if !(0..num_experts).contains(&expert) => {
            let fault = format!("must name one of {num_experts} experts from 0, got `{routing}`");
            return faults.add("train.routing", fault);
        }
        RoutingChoice::Expert(expert) => trainable(expert),
        RoutingChoice::Router => any || (num_experts > 1 && config.router.trainable),
        RoutingChoice::Uniform
        | RoutingChoice::All
        | RoutingChoice::Record
        | RoutingChoice::Domain => any,
    };
    if !trains {
        let fault = format!("must reach an expert that is trainable, got `{routing}`");
        faults.add("train.routing", fault);
    }
}

fn check_optimizer(config: &Config, faults: &mut Faults) {
    let optimizer = &config.optimizer;
    let mut group = |name: &str, group: &GroupConfig| {
        let key = |field: &str| format!("optimizer.{name}.{field}");
        faults.above_zero(&key("learning_rate"), group.learning_rate);
        faults.at_least_zero(&key("weight_decay"), group.weight_decay);
        if let Some(norm) = group.max_grad_norm {
            faults.at_least_zero(&key("max_grad_norm"), norm);
        }
    };
    group("adapters", &optimizer.adapters);
    group("router", &optimizer.router);
    group("base", &optimizer.base);
    for (i, beta) in optimizer.betas.iter().enumerate() {
        let key = format!("optimizer.betas[{i}]");
        faults.in_range(&key, *beta, (0.0..1.0).contains(beta), "at least 0 and below 1");
    }
    faults.above_zero("optimizer.eps", optimizer.eps);
    faults.at_least_zero("optimizer.max_grad_norm", optimizer.max_grad_norm);
    let ratio = config.schedule.min_ratio;
    faults.in_range("schedule.min_ratio", ratio, (0.0..=1.0).contains(&ratio), "from 0 to 1");
}
