//! No token depends on later tokens or on other documents.

use anyhow::Result;
use dylora::config::RouterConfig;
use dylora::model::experts::spec::ExpertSpec;
use dylora::model::experts::weights::RoutingWeights;
use dylora::model::routing::router::RouterSpec;
use dylora::model::routing::totals::RoutingTotals;
use dylora::model::{ForwardMode, Inputs, RoutedModel, RoutingSource, Rows};
use tch::{Device, Kind, Tensor};

use crate::common::{
    ROUTER_INPUTS, add_of_one_domain, assert_close, assert_same_gradients, gradients, logits,
    losses_of, max_difference, mean_loss, plain_router, rows, seed, tiny_base, tiny_config,
    tiny_lora, tiny_model,
};

const DOCUMENTS: [&[i64]; 4] = [&[3, 14, 15, 9], &[26, 5, 35], &[27, 18, 28, 18, 28], &[45, 9]];

/// The documents in two rows of eight positions, the last of which is padding.
fn packed() -> Inputs {
    let [a, b, c, d] = DOCUMENTS;
    let rows = Rows {
        num_rows: 2,
        seq_len: 8,
        input_ids: &[a, b, &[0], c, d, &[0]].concat(),
        labels: &[
            14, 15, 9, -100, 5, 35, -100, -100, //
            18, 28, 18, 28, -100, 9, -100, -100,
        ],
        position_ids: &[0, 1, 2, 3, 0, 1, 2, 0, 0, 1, 2, 3, 4, 0, 1, 0],
        document_ids: &[0, 0, 0, 0, 1, 1, 1, -1, 0, 0, 0, 0, 0, 1, 1, -1],
        expert_ids: None,
        prompt: None,
    };
    Inputs::new(rows, Device::Cpu)
}

fn token_losses(model: &RoutedModel, inputs: &Inputs) -> (Tensor, Tensor) {
    let (loss, _) = model.loss(inputs, &RoutingSource::Router, ForwardMode::EVAL, mean_loss(10));
    (loss.loss, loss.token_losses)
}

#[test]
fn packed_documents_have_the_losses_and_gradients_of_separate_ones() -> Result<()> {
    let _generator = seed(40);
    let kinds = [(Kind::Float, 1e-5), (Kind::Double, 1e-12)];
    for (input, (kind, tolerance)) in ROUTER_INPUTS.into_iter().flat_map(|i| kinds.map(|k| (i, k)))
    {
        let router = RouterConfig { input, top_k: Some(2), ..plain_router() };
        let model = tiny_model(&tiny_lora(), &router, kind)?;
        let (packed_loss, packed) = token_losses(&model, &packed());
        let separate = DOCUMENTS.map(|document| token_losses(&model, &rows(&[document])));
        let losses: Vec<_> = separate.iter().map(|(_, losses)| losses).collect();
        assert_close("token losses", &packed, &Tensor::cat(&losses, 0), tolerance * 10.0);
        let sum: Tensor = separate.iter().map(|(loss, _)| loss).sum();
        assert_close("loss", &packed_loss, &sum, tolerance);
        let expected = gradients(&model, &sum);
        assert_same_gradients(&gradients(&model, &packed_loss), &expected, tolerance);
    }
    Ok(())
}

/// One document with padding before and after it.
fn padded(before: usize, behind: usize) -> Inputs {
    let document = DOCUMENTS[0];
    let pad = |value: i64, middle: Vec<i64>| -> Vec<i64> {
        [vec![value; before], middle, vec![value; behind]].concat()
    };
    let labels = [&document[1..], &[-100]].concat();
    let rows = Rows {
        num_rows: 1,
        seq_len: before + document.len() + behind,
        input_ids: &pad(0, document.to_vec()),
        labels: &pad(-100, labels),
        position_ids: &pad(0, (0..document.len() as i64).collect()),
        document_ids: &pad(-1, vec![0; document.len()]),
        expert_ids: None,
        prompt: None,
    };
    Inputs::new(rows, Device::Cpu)
}

/// Compares the token losses, the gradients, the expert loads and the load-balancing loss, for
/// every input of the router.
#[test]
fn padding_before_and_behind_a_document_changes_nothing() -> Result<()> {
    let _generator = seed(41);
    for (input, top_k) in
        ROUTER_INPUTS.into_iter().flat_map(|input| [(input, None), (input, Some(2))])
    {
        let router = RouterConfig { input, top_k, ..plain_router() };
        let model = tiny_model(&tiny_lora(), &router, Kind::Double)?;
        let run = |inputs: &Inputs| {
            let source = &RoutingSource::Router;
            let (loss, routing) = model.loss(inputs, source, ForwardMode::EVAL, mean_loss(3));
            let mut totals = vec![];
            add_of_one_domain(&mut totals, &routing, &inputs.labelled);
            let balance = Tensor::from(losses_of(&totals).load_balancing_loss);
            let loads: Vec<_> = totals.iter().map(RoutingTotals::expert_load).collect();
            let statistics = Tensor::cat(&[balance.view([1]), Tensor::cat(&loads, 0)], 0);
            (loss.token_losses, gradients(&model, &loss.loss), statistics)
        };
        let (losses, grads, statistics) = run(&padded(0, 0));
        for (before, behind) in [(0, 2), (2, 0), (1, 3)] {
            let what = format!("{input:?}, top_k {top_k:?}, padding {before} and {behind}");
            let (padded_losses, padded_grads, padded_statistics) = run(&padded(before, behind));
            assert_close(&what, &padded_losses, &losses, 1e-12);
            assert_close(&what, &padded_statistics, &statistics, 1e-12);
            assert_same_gradients(&padded_grads, &grads, 1e-11);
        }
    }
    Ok(())
}

/// Checked for every input of the router, with dense and top-k routing.
#[test]
fn a_token_changes_neither_weights_nor_logits_before_it() -> Result<()> {
    let _generator = seed(42);
    let tokens = [3, 14, 15, 9, 26, 5, 35];
    let top_ks = [None, Some(1), Some(2)];
    for (input, top_k) in
        ROUTER_INPUTS.into_iter().flat_map(|input| top_ks.map(|top_k| (input, top_k)))
    {
        let router = RouterConfig { input, top_k, ..plain_router() };
        let model = tiny_model(&tiny_lora(), &router, Kind::Double)?;
        let run = |tokens: &[i64]| {
            let inputs = rows(&[tokens]);
            let routing = model.routing(&inputs, ForwardMode::EVAL);
            let weights: Vec<_> = routing.iter().map(|routing| &routing.weights).collect();
            (Tensor::cat(&weights, 2), logits(&model, &inputs, &RoutingSource::Router))
        };
        let (weights, all_logits) = run(&tokens);
        for t in 0..tokens.len() {
            let mut changed = tokens;
            changed[t] = 57;
            let (changed_weights, changed_logits) = run(&changed);
            let before = |x: &Tensor| x.narrow(1, 0, t as i64);
            assert_close("weights", &before(&changed_weights), &before(&weights), 1e-12);
            assert_close("logits", &before(&changed_logits), &before(&all_logits), 1e-12);
            let from = |x: &Tensor| x.narrow(1, t as i64, 1);
            assert!(max_difference(&from(&changed_logits), &from(&all_logits)) > 1e-3);
        }
    }
    Ok(())
}

/// `trace` reads its text through `Inputs::document`.
#[test]
fn an_unpacked_document_has_the_logits_of_its_row() -> Result<()> {
    let _generator = seed(43);
    let model = tiny_model(&tiny_lora(), &plain_router(), Kind::Double)?;
    let document = Inputs::document(DOCUMENTS[2], Device::Cpu);
    let row = rows(&[DOCUMENTS[2]]);
    let source = &RoutingSource::Router;
    assert_eq!(
        max_difference(&logits(&model, &document, source), &logits(&model, &row, source)),
        0.0
    );
    assert_eq!(document.labelled.size(), [0]);
    Ok(())
}

/// Reference: PEFT's rule, applied to each document. An expert is active from the last occurrence
/// of its invocation tokens on, and never without one.
#[test]
fn an_invocation_counts_within_its_own_document() -> Result<()> {
    let _generator = seed(44);
    let base = tiny_base(tiny_config());
    let mut specs = ExpertSpec::all(&tiny_lora(), &base.spec)?;
    let wanted: [&[i64]; 3] = [&[1, 2], &[], &[2, 1, 2]];
    for (spec, wanted) in specs.iter_mut().zip(wanted) {
        spec.alora_invocation_tokens = wanted.to_vec();
    }
    let router = RouterSpec::default();
    let model = RoutedModel::with_experts(&base, &specs, &router, Device::Cpu, Kind::Double);
    let (mut found_any, mut found_none) = (false, false);
    for _ in 0..40 {
        let tokens = Tensor::randint_low(1, 3, [2, 12], (Kind::Int64, Device::Cpu));
        let tokens = Vec::<i64>::try_from(tokens.view([-1]))?;
        let rows = Rows {
            num_rows: 2,
            seq_len: 12,
            input_ids: &tokens,
            labels: &[-100; 24],
            position_ids: &[0; 24],
            document_ids: &[
                0, 0, 0, 0, 0, 1, 1, 2, 2, 2, 2, -1, //
                -1, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, -1,
            ],
            expert_ids: None,
            prompt: None,
        };
        let inputs = Inputs::new(rows, Device::Cpu);
        let output = model.forward(&inputs, &RoutingSource::All, ForwardMode::EVAL, None);
        let [RoutingWeights::PerToken(active)] = &output.weights[..] else { panic!("masked") };
        let mut expected = vec![1f64; 24 * 3];
        for (start, end) in [(0, 5), (5, 7), (7, 11), (13, 16), (16, 23)] {
            for (expert, wanted) in wanted.iter().enumerate().filter(|(_, w)| !w.is_empty()) {
                let document = &tokens[start..end];
                let last = document.windows(wanted.len()).rposition(|window| window == *wanted);
                let inactive = last.unwrap_or(document.len());
                (found_any, found_none) = (found_any | last.is_some(), found_none | last.is_none());
                (start..start + inactive).for_each(|at| expected[at * 3 + expert] = 0.0);
            }
        }
        let expected = Tensor::from_slice(&expected).view([2, 12, 3]);
        assert_eq!(max_difference(active, &expected), 0.0, "{tokens:?}");
    }
    assert!(found_any && found_none);
    Ok(())
}
