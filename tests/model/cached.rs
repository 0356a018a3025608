//! Generation with a cache: each step computes what one forward pass over the whole text computes.

use anyhow::Result;
use dylora::config::{LoraConfig, RouterConfig, RouterInput, RouterScope, RoutingLevel};
use dylora::model::batch::{GenerationCache, StepRow};
use dylora::model::routing::source::active_from;
use dylora::model::{Inputs, RoutedModel, RoutingSource, RowSources, Rows};
use tch::{Device, Kind, Tensor};

use crate::common::{
    ROUTER_INPUTS, SCOPES, assert_close, family_specs, logits, new_model, plain_router, randomize,
    seed, tiny_base, tiny_lora, tiny_model,
};

/// Texts with the lengths of their prompts. Tokens 18 and 28 invoke an aLoRA expert.
const TEXTS: [(&[i64], usize); 3] = [
    (&[3, 14, 18, 28, 9, 26, 5, 35, 11, 2, 60, 7], 5),
    (&[27, 18, 28, 18, 28, 45, 9, 8, 7, 6], 6),
    (&[1, 33, 19, 29, 40, 50, 51, 52, 53], 2),
];

/// The distance between 1 and the next number in bf16.
const BF16_EPS: f64 = 1.0 / 128.0;

/// How many positions each text has after each step.
const STEPS: [[usize; 3]; 5] = [[5, 6, 2], [6, 7, 3], [9, 8, 6], [10, 9, 7], [12, 10, 9]];

/// The logits of a text by one forward pass, `[t, v]`. The prompt alone can invoke an expert.
fn whole(model: &RoutedModel, tokens: &[i64], prompt_len: usize, source: &RoutingSource) -> Tensor {
    let len = tokens.len();
    let prompt: Vec<bool> = (0..len).map(|t| t < prompt_len).collect();
    let inputs = Inputs::new(
        Rows {
            num_rows: 1,
            seq_len: len,
            input_ids: tokens,
            labels: &vec![-100; len],
            position_ids: &(0..len as i64).collect::<Vec<_>>(),
            document_ids: &vec![0; len],
            expert_ids: None,
            prompt: Some(&prompt),
        },
        Device::Cpu,
    );
    logits(model, &inputs, source).get(0)
}

/// Appends to each row what lies between two steps, and returns the new logits of each row.
fn step(
    model: &RoutedModel,
    cache: &GenerationCache,
    first_row: usize,
    texts: &[(&[i64], usize)],
    [past, len]: [&[usize]; 2],
    source: &RoutingSource,
) -> Vec<Tensor> {
    let active: Vec<_> = texts
        .iter()
        .map(|(tokens, prompt_len)| active_from(model.specs(), &tokens[..*prompt_len]))
        .collect();
    let rows: Vec<StepRow<'_>> = (0..texts.len())
        .map(|row| StepRow {
            past: past[row],
            tokens: &texts[row].0[past[row]..len[row]],
            prompt_len: texts[row].1,
            active_from: &active[row],
        })
        .collect();
    let inputs = cache.inputs(first_row, &rows, Device::Cpu);
    let all = logits(model, &inputs, source);
    let new = |row: usize| all.get(row as i64).narrow(0, 0, (len[row] - past[row]) as i64);
    (0..texts.len()).map(new).collect()
}

/// Compares all steps with whole passes. The cache has a row in front of those that are used, and
/// grows after the first step.
fn check(what: &str, model: &RoutedModel, source: &RoutingSource) {
    let mut cache = model.generation_cache(4, 6);
    let expected: Vec<Tensor> = TEXTS
        .iter()
        .map(|(tokens, prompt_len)| whole(model, tokens, *prompt_len, source))
        .collect();
    let mut past = [0; 3];
    for (index, len) in STEPS.into_iter().enumerate() {
        let found = step(model, &cache, 1, &TEXTS, [&past, &len], source);
        for (row, found) in found.iter().enumerate() {
            let new = (len[row] - past[row]) as i64;
            let expected = expected[row].narrow(0, past[row] as i64, new);
            assert_close(&format!("{what}, step {index}, row {row}"), found, &expected, 1e-11);
        }
        if index == 0 {
            cache.reserve(5, 12);
        }
        past = len;
    }
}

#[test]
fn each_step_equals_the_whole_pass_in_every_family() -> Result<()> {
    let _guard = seed(1);
    for (family, spec) in family_specs() {
        let model = new_model(&tiny_base(spec), &tiny_lora(), &plain_router(), Kind::Double);
        randomize(&model)?;
        check(family, &model, &RoutingSource::Router);
        check(family, &model, &RoutingSource::Base);
        check(family, &model, &RoutingSource::Expert(1));
    }
    Ok(())
}

/// Routers of every input, scope and level.
fn routers() -> Vec<RouterConfig> {
    let mut all = vec![];
    for level in [RoutingLevel::Token, RoutingLevel::Sequence] {
        let of = |input, scope| RouterConfig { input, scope, level, ..plain_router() };
        all.extend(
            SCOPES.into_iter().flat_map(|scope| ROUTER_INPUTS.map(|input| of(input, scope))),
        );
        all.push(of(RouterInput::ModuleInput, RouterScope::Module));
    }
    all.push(RouterConfig { top_k: Some(1), ..plain_router() });
    all
}

/// Settings of the experts: plain ones, with a part that is always on, and with an aLoRA expert.
fn experts() -> Result<[LoraConfig; 3]> {
    let alora = toml::from_str("experts = [{ alora_invocation_tokens = [18, 28] }]\nrank = 4")?;
    let shared = LoraConfig { shared_rank: 3, ..tiny_lora() };
    Ok([tiny_lora(), shared, LoraConfig { num_experts: 3, ..alora }])
}

#[test]
fn each_step_equals_the_whole_pass_with_every_router() -> Result<()> {
    let _guard = seed(2);
    for lora in experts()? {
        for router in routers() {
            let model = tiny_model(&lora, &router, Kind::Double)?;
            let what = format!("{router:?}, shared {}", lora.shared_rank);
            check(&what, &model, &RoutingSource::Router);
        }
    }
    Ok(())
}

#[test]
fn rows_of_one_batch_have_sources_of_their_own() -> Result<()> {
    let _guard = seed(3);
    for lora in experts()? {
        for router in routers() {
            let model = tiny_model(&lora, &router, Kind::Double)?;
            let what = format!("{router:?}, shared {}", lora.shared_rank);
            // the router, expert 1 with the shared part, and the base
            let num_parts = model.specs().len();
            let mut fixed = vec![0.0; 3 * num_parts];
            fixed[num_parts + 1] = 1.0;
            if num_parts > 3 {
                fixed[num_parts + 3] = 1.0;
            }
            let fixed = Tensor::from_slice(&fixed).view([3, -1]);
            let by_router = Some(Tensor::from_slice(&[true, false, false]));
            let rows = RoutingSource::Rows(RowSources { fixed, by_router });
            let own = [RoutingSource::Router, RoutingSource::Expert(1), RoutingSource::Base];
            let expected: Vec<Tensor> = TEXTS
                .iter()
                .zip(&own)
                .map(|((tokens, prompt_len), source)| whole(&model, tokens, *prompt_len, source))
                .collect();
            let cache = model.generation_cache(3, 12);
            let mut past = [0; 3];
            for len in STEPS {
                let found = step(&model, &cache, 0, &TEXTS, [&past, &len], &rows);
                for (row, found) in found.iter().enumerate() {
                    let new = (len[row] - past[row]) as i64;
                    let expected = expected[row].narrow(0, past[row] as i64, new);
                    assert_close(&format!("{what}, row {row}"), found, &expected, 1e-11);
                }
                past = len;
            }
            // without a row that the router decides
            let fixed = Tensor::zeros([1, num_parts as i64], (Kind::Double, Device::Cpu));
            let base = RoutingSource::Rows(RowSources { fixed, by_router: None });
            let (tokens, prompt_len) = TEXTS[0];
            let found = whole(&model, tokens, prompt_len, &base);
            let expected = whole(&model, tokens, prompt_len, &RoutingSource::Base);
            assert_close(&what, &found, &expected, 1e-11);
        }
    }
    Ok(())
}

#[test]
fn a_text_can_move_to_another_row() -> Result<()> {
    let _guard = seed(4);
    let router = RouterConfig {
        input: RouterInput::BaseHidden,
        level: RoutingLevel::Sequence,
        ..plain_router()
    };
    let model = tiny_model(&tiny_lora(), &router, Kind::Double)?;
    let source = &RoutingSource::Router;
    let mut cache = model.generation_cache(3, 12);
    step(&model, &cache, 0, &TEXTS, [&[0; 3], &STEPS[0]], source);
    cache.copy_row(2, 0, STEPS[0][2]);
    let (tokens, prompt_len) = TEXTS[2];
    let found = step(&model, &cache, 0, &TEXTS[2..], [&[2], &[9]], source).remove(0);
    let expected = whole(&model, tokens, prompt_len, source).narrow(0, 2, 7);
    assert_close("the moved text", &found, &expected, 1e-11);
    Ok(())
}

#[test]
fn in_bf16_a_text_in_a_batch_stays_within_a_bound_of_the_text_alone() -> Result<()> {
    let _guard = seed(5);
    for (family, spec) in family_specs() {
        let model = new_model(&tiny_base(spec), &tiny_lora(), &plain_router(), Kind::BFloat16);
        randomize(&model)?;
        let (mut past, source) = ([0; 3], &RoutingSource::Router);
        let together = model.generation_cache(3, 12);
        let alone = [(); 3].map(|()| model.generation_cache(1, 12));
        for len in STEPS {
            let found = step(&model, &together, 0, &TEXTS, [&past, &len], source);
            for (row, found) in found.iter().enumerate() {
                let (own, past, len) = (&TEXTS[row..=row], [past[row]], [len[row]]);
                let expected = step(&model, &alone[row], 0, own, [&past, &len], source).remove(0);
                // two units of the last place of the largest logit
                let bound = 2.0 * BF16_EPS * expected.abs().max().double_value(&[]);
                let what = format!("{family}, row {row}");
                assert_close(&what, &found.to_kind(Kind::Double), &expected, bound);
            }
            past = len;
        }
    }
    Ok(())
}
