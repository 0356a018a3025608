//! Texts of the engine.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::Result;
use dylora::config::{RouterConfig, RouterInput, RouterScope, RoutingLevel};
use dylora::generate::{Engine, EngineLimits, Event, Finish, Request, Route, Sampling};
use dylora::model::{ForwardMode, Inputs, RoutedModel, RoutingSource};
use tch::{Device, Kind, Tensor};

use crate::common::{
    family_specs, new_model, plain_router, randomize, seed, tiny_base, tiny_lora, tiny_model,
};

const PROMPTS: [&[i64]; 4] = [&[3, 14, 15, 9, 26], &[27], &[1, 33, 40], &[5, 6, 7, 8, 9, 10, 11]];

fn request(key: usize, prompt: &[i64]) -> Request {
    Request {
        key: key as u64,
        prompt: prompt.to_vec(),
        max_new_tokens: 8,
        sampling: Sampling::GREEDY,
        route: Route::Router,
        end_tokens: Arc::new([]),
        num_alternatives: 0,
        wants_weights: true,
    }
}

/// The events of each text, by its number.
fn run(
    model: &RoutedModel,
    requests: Vec<Request>,
    max_texts: usize,
) -> Result<BTreeMap<u64, Vec<Event>>> {
    let mut engine = Engine::new(model, EngineLimits { max_texts, context: 32 })?;
    for request in requests {
        engine.add(request)?;
    }
    let mut events: BTreeMap<u64, Vec<Event>> = BTreeMap::new();
    while !engine.is_idle() {
        for event in engine.step() {
            events.entry(event.text).or_default().push(event);
        }
    }
    Ok(events)
}

fn ids(events: &[Event]) -> Vec<i64> {
    events.iter().map(|event| event.token.id).collect()
}

/// The greedy continuation of a prompt by whole forward passes, with the logarithms of the
/// probabilities and the mean routing weights.
fn by_whole_passes(
    model: &RoutedModel,
    prompt: &[i64],
    source: &RoutingSource,
) -> Vec<(i64, f64, Vec<f64>)> {
    let mut tokens = prompt.to_vec();
    let mut found = vec![];
    for _ in 0..8 {
        let inputs = Inputs::document(&tokens, Device::Cpu);
        let output = model.forward(&inputs, source, ForwardMode::EVAL, None);
        let last = tokens.len() as i64 - 1;
        let log_probs = model.logits(&output.hidden).get(0).get(last).log_softmax(0, Kind::Double);
        let id = log_probs.argmax(0, false).int64_value(&[]);
        let sites: Vec<Tensor> = output
            .weights
            .iter()
            .filter_map(|weights| match weights {
                dylora::model::experts::weights::RoutingWeights::PerToken(x) => {
                    Some(x.get(0).get(last))
                }
                _ => None,
            })
            .collect();
        let weights = match sites.is_empty() {
            true => vec![],
            false => Vec::try_from(Tensor::stack(&sites, 0).mean_dim(0, false, None))
                .expect("weights are numbers"),
        };
        found.push((id, log_probs.double_value(&[id]), weights));
        tokens.push(id);
    }
    found
}

#[test]
fn greedy_texts_equal_whole_passes_in_every_family_whatever_they_are_computed_with() -> Result<()> {
    let _guard = seed(1);
    for (family, spec) in family_specs() {
        let model = new_model(&tiny_base(spec), &tiny_lora(), &plain_router(), Kind::Double);
        randomize(&model)?;
        for max_texts in [1, 3, 8] {
            let requests = PROMPTS.iter().enumerate().map(|(key, prompt)| request(key, prompt));
            let events = run(&model, requests.collect(), max_texts)?;
            for (events, prompt) in events.values().zip(PROMPTS) {
                let expected = by_whole_passes(&model, prompt, &RoutingSource::Router);
                assert_eq!(events.len(), expected.len(), "{family}");
                for (event, (id, log_prob, weights)) in events.iter().zip(&expected) {
                    assert_eq!(event.token.id, *id, "{family}, {max_texts} texts");
                    // the engine chooses in f32
                    assert!((event.token.log_prob - log_prob).abs() < 1e-5, "{family}");
                    for (a, b) in event.token.weights.iter().zip(weights) {
                        assert!((a - b).abs() < 1e-9, "{family}");
                    }
                }
                let (last, others) = events.split_last().expect("there are events");
                assert_eq!(last.finish, Some(Finish::Length));
                assert!(others.iter().all(|event| event.finish.is_none()));
            }
        }
    }
    Ok(())
}

#[test]
fn each_text_of_a_batch_has_its_own_route() -> Result<()> {
    let _guard = seed(2);
    let router = RouterConfig {
        input: RouterInput::LayerInput,
        scope: RouterScope::Layer,
        ..plain_router()
    };
    let lora = dylora::config::LoraConfig { shared_rank: 2, ..tiny_lora() };
    let model = tiny_model(&lora, &router, Kind::Double)?;
    let routes = [
        (Route::Router, RoutingSource::Router),
        (Route::Fixed(vec![0.0; 3]), RoutingSource::Base),
        (Route::Fixed(vec![0.0, 1.0, 0.0]), RoutingSource::Expert(1)),
        (Route::Fixed(vec![1.0 / 3.0; 3]), RoutingSource::Uniform),
    ];
    let requests = routes
        .iter()
        .enumerate()
        .map(|(key, (route, _))| Request { route: route.clone(), ..request(key, PROMPTS[0]) });
    let requests: Vec<Request> = requests.collect();
    let together = run(&model, requests.clone(), 4)?;
    for (index, (events, (_, source))) in together.values().zip(&routes).enumerate() {
        let expected = by_whole_passes(&model, PROMPTS[0], source);
        let expected: Vec<i64> = expected.iter().map(|(id, ..)| *id).collect();
        assert_eq!(ids(events), expected, "{source:?}");
        let alone = run(&model, vec![requests[index].clone()], 1)?;
        assert_eq!(ids(&alone[&1]), expected, "{source:?} alone");
    }
    Ok(())
}

#[test]
fn texts_of_the_base_stand_beside_texts_of_invoked_experts() -> Result<()> {
    let _guard = seed(7);
    let own = "num_experts = 3\nrank = 4\nexperts = [{ alora_invocation_tokens = [15, 9] }]";
    let model = tiny_model(&toml::from_str(own)?, &plain_router(), Kind::Double)?;
    let routes = [
        (Route::Fixed(vec![0.0; 3]), RoutingSource::Base),
        (Route::Router, RoutingSource::Router),
        (Route::Fixed(vec![0.0; 3]), RoutingSource::Base),
        (Route::Fixed(vec![1.0, 0.0, 0.0]), RoutingSource::Expert(0)),
    ];
    let requests = routes
        .iter()
        .enumerate()
        .map(|(key, (route, _))| Request { route: route.clone(), ..request(key, PROMPTS[0]) });
    let together = run(&model, requests.collect(), 4)?;
    for (events, (_, source)) in together.values().zip(&routes) {
        let expected = by_whole_passes(&model, PROMPTS[0], source);
        let expected: Vec<i64> = expected.iter().map(|(id, ..)| *id).collect();
        assert_eq!(ids(events), expected, "{source:?}");
    }
    Ok(())
}

#[test]
fn samples_do_not_depend_on_the_batch() -> Result<()> {
    let _guard = seed(3);
    let model = tiny_model(&tiny_lora(), &plain_router(), Kind::Float)?;
    let sampling = Sampling { temperature: 1.5, top_k: 20, top_p: 0.9, ..Sampling::GREEDY };
    let of = |key: usize| Request { sampling, ..request(key, PROMPTS[key % 4]) };
    let together = run(&model, (0..12).map(of).collect(), 5)?;
    for key in 0..12 {
        let alone = run(&model, vec![of(key)], 1)?;
        assert_eq!(ids(&alone[&1]), ids(&together[&(key as u64 + 1)]), "text {key}");
    }
    // the same prompt has other samples under another key or seed
    let other = Request { key: 99, ..of(0) };
    assert_ne!(ids(&run(&model, vec![other], 1)?[&1]), ids(&together[&1]));
    let other = Request { sampling: Sampling { seed: 7, ..sampling }, ..of(0) };
    assert_ne!(ids(&run(&model, vec![other], 1)?[&1]), ids(&together[&1]));
    Ok(())
}

#[test]
fn a_text_ends_at_an_end_token_or_when_the_context_is_full() -> Result<()> {
    let _guard = seed(4);
    let model = tiny_model(&tiny_lora(), &plain_router(), Kind::Float)?;
    let text = ids(&run(&model, vec![request(0, PROMPTS[0])], 1)?[&1]);
    let end = text[4];
    let expected = text.iter().position(|id| *id == end).expect("it is in there") + 1;
    let ended = Request { end_tokens: Arc::new([end]), ..request(0, PROMPTS[0]) };
    let events = run(&model, vec![ended], 1)?.remove(&1).expect("there is a text");
    assert_eq!(ids(&events), text[..expected]);
    assert_eq!(events[expected - 1].finish, Some(Finish::Stop));

    // 32 positions: the prompt's 5, 27 tokens behind them, and the last, which needs none
    let long = Request { max_new_tokens: 1000, ..request(0, PROMPTS[0]) };
    let events = run(&model, vec![long], 1)?.remove(&1).expect("there is a text");
    assert_eq!(events.len(), 28);
    assert_eq!(events[27].finish, Some(Finish::Length));
    Ok(())
}

#[test]
fn requests_that_cannot_be_met_are_refused() -> Result<()> {
    let _guard = seed(5);
    let model = tiny_model(&tiny_lora(), &plain_router(), Kind::Float)?;
    let mut engine = Engine::new(&model, EngineLimits { max_texts: 2, context: 6 })?;
    let good = request(0, PROMPTS[0]);
    let sampling = Sampling { top_p: 0.0, ..Sampling::GREEDY };
    let cases = [
        (Request { prompt: vec![], ..good.clone() }, "the prompt has no token"),
        (request(0, PROMPTS[3]), "the prompt has 7 tokens, but the context is 6 positions long"),
        (
            Request { prompt: vec![61], ..good.clone() },
            "the prompt has the token 61, but the base has 61 tokens",
        ),
        (
            Request { route: Route::Fixed(vec![1.0]), ..good.clone() },
            "there are 1 routing weights, but 3 experts",
        ),
        (
            Request { max_new_tokens: 0, ..good.clone() },
            "the number of new tokens must be at least 1",
        ),
        (Request { sampling, ..good }, "`top_p` must be above 0 and at most 1, got 0"),
    ];
    for (request, message) in cases {
        assert_eq!(engine.add(request).unwrap_err().to_string(), message);
    }
    let error = Engine::new(&model, EngineLimits { max_texts: 2, context: 33 }).unwrap_err();
    let message = "the base has 32 positions, so a context cannot have 33";
    assert_eq!(error.to_string(), message);
    Ok(())
}

#[test]
fn a_cancelled_text_leaves_the_others_as_they_are() -> Result<()> {
    let _guard = seed(6);
    let router = RouterConfig {
        input: RouterInput::BaseHidden,
        level: RoutingLevel::Sequence,
        ..plain_router()
    };
    let model = tiny_model(&tiny_lora(), &router, Kind::Double)?;
    let expected = run(&model, PROMPTS.map(|prompt| request(0, prompt)).to_vec(), 4)?;
    let mut engine = Engine::new(&model, EngineLimits { max_texts: 4, context: 32 })?;
    for prompt in PROMPTS {
        engine.add(request(0, prompt))?;
    }
    let mut found: BTreeMap<u64, Vec<i64>> = BTreeMap::new();
    let mut steps = 0;
    while !engine.is_idle() {
        for event in engine.step() {
            found.entry(event.text).or_default().push(event.token.id);
        }
        steps += 1;
        if steps == 3 {
            engine.cancel(1);
            engine.cancel(1);
            assert_eq!(engine.num_texts(), (3, 0));
        }
    }
    assert_eq!(found[&1].len(), 3);
    for text in 2..=4 {
        assert_eq!(found[&text], ids(&expected[&text]), "text {text}");
    }
    Ok(())
}
