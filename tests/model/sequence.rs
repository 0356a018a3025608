//! Routing by the prompt: a token is routed by the mean of the router's inputs over its document's
//! prompt, up to this token.

use anyhow::Result;
use dylora::config::{LossOn, RouterConfig, RouterInput, RouterScope, RoutingLevel};
use dylora::data::{MemoryDocument, MemoryDomain, TokenDataset};
use dylora::model::{ForwardMode, Inputs, RoutedModel, RoutingSource, Rows};
use tch::{Device, Kind, Tensor};

use crate::common::{
    ROUTER_INPUTS, SCOPES, assert_close, assert_same_gradients, gradients, logits, max_difference,
    mean_loss, plain_router, seed, tiny_lora, tiny_model,
};

/// Documents with the lengths of their prompts. The last has no completion.
const DOCUMENTS: [(&[i64], usize); 4] =
    [(&[3, 14, 15, 9, 26], 2), (&[5, 35], 1), (&[27, 18, 28, 18, 28, 45], 4), (&[9, 8, 7], 3)];

/// Routers of every scope and input that route by the prompt.
fn routers() -> impl Iterator<Item = RouterConfig> {
    SCOPES.into_iter().flat_map(|scope| ROUTER_INPUTS.map(|input| (scope, input))).map(
        |(scope, input)| RouterConfig {
            scope,
            input,
            level: RoutingLevel::Sequence,
            ..plain_router()
        },
    )
}

/// Packs the documents of each row one after another, and pads the rows to the longest one.
fn packed(rows: &[&[(&[i64], usize)]]) -> Inputs {
    let row_len = |row: &&[(&[i64], usize)]| row.iter().map(|(tokens, _)| tokens.len()).sum();
    let seq_len: usize = rows.iter().map(row_len).max().expect("there is a row");
    let (mut ids, mut labels, mut positions) = (vec![], vec![], vec![]);
    let (mut documents, mut prompt) = (vec![], vec![]);
    for row in rows {
        for (document, (tokens, prompt_len)) in row.iter().enumerate() {
            ids.extend_from_slice(tokens);
            labels.extend_from_slice(&tokens[1..]);
            labels.push(-100);
            positions.extend(0..tokens.len() as i64);
            documents.extend(vec![document as i64; tokens.len()]);
            prompt.extend((0..tokens.len()).map(|t| t < *prompt_len));
        }
        let padding = seq_len - row_len(row);
        ids.extend(vec![0; padding]);
        labels.extend(vec![-100; padding]);
        positions.extend(vec![0; padding]);
        documents.extend(vec![-1; padding]);
        prompt.extend(vec![false; padding]);
    }
    let rows = Rows {
        num_rows: rows.len(),
        seq_len,
        input_ids: &ids,
        labels: &labels,
        position_ids: &positions,
        document_ids: &documents,
        expert_ids: None,
        prompt: Some(&prompt),
    };
    Inputs::new(rows, Device::Cpu)
}

/// A batch of a single document.
fn single(tokens: &[i64], prompt_len: usize) -> Inputs {
    packed(&[&[(tokens, prompt_len)]])
}

/// The routing weights of all sites side by side, `[b, t, sites e]`.
fn weights(model: &RoutedModel, inputs: &Inputs) -> Tensor {
    let routing = model.routing(inputs, ForwardMode::EVAL);
    Tensor::cat(&routing.iter().map(|routing| &routing.weights).collect::<Vec<_>>(), 2)
}

/// Reference: the mean of the prompt's embeddings up to each token, summed token by token.
#[test]
fn weights_are_those_of_the_prompts_mean_embedding_so_far() -> Result<()> {
    let _generator = seed(250);
    let router = routers().next().expect("the first reads embeddings");
    assert_eq!((router.scope, router.input), (RouterScope::Shared, RouterInput::Embeddings));
    let model = tiny_model(&tiny_lora(), &router, Kind::Double)?;
    let base = model.base();
    let [of_router] = model.routers() else { panic!("one router for all layers") };
    for (tokens, prompt_len) in DOCUMENTS {
        let found = weights(&model, &single(tokens, prompt_len));
        let mut sum = Tensor::zeros([16], crate::common::DOUBLE);
        for (t, &token) in tokens.iter().enumerate() {
            if t < prompt_len {
                sum = &sum
                    + base.embedding.get(token)
                    + base.positions.as_ref().expect("GPT-2").get(t as i64);
            }
            let mean = &sum / (t + 1).min(prompt_len) as f64;
            let scores = of_router.weight.mv(&mean) + &of_router.bias;
            let expected = scores.softmax(-1, Kind::Double);
            assert_close(&format!("position {t}"), &found.get(0).get(t as i64), &expected, 1e-13);
        }
    }
    Ok(())
}

#[test]
fn all_of_a_completion_has_the_weights_of_its_whole_prompt() -> Result<()> {
    let _generator = seed(251);
    for router in routers() {
        let model = tiny_model(&tiny_lora(), &router, Kind::Double)?;
        for (tokens, prompt_len) in DOCUMENTS {
            let weights = weights(&model, &single(tokens, prompt_len)).get(0);
            let last = weights.get(prompt_len as i64 - 1);
            for t in prompt_len..tokens.len() {
                assert_close(&format!("{router:?}"), &weights.get(t as i64), &last, 1e-13);
            }
            for t in 1..prompt_len {
                let moved = max_difference(&weights.get(t as i64), &weights.get(t as i64 - 1));
                assert!(moved > 1e-4, "the prompt's tokens each move the mean");
            }
        }
    }
    Ok(())
}

#[test]
fn no_token_of_a_completion_changes_any_weight() -> Result<()> {
    let _generator = seed(252);
    for router in routers() {
        let model = tiny_model(&tiny_lora(), &router, Kind::Double)?;
        for (tokens, prompt_len) in DOCUMENTS {
            let before = weights(&model, &single(tokens, prompt_len));
            for t in prompt_len..tokens.len() {
                let mut changed = tokens.to_vec();
                changed[t] = 57;
                let after = weights(&model, &single(&changed, prompt_len));
                assert_close(&format!("{router:?}, token {t}"), &after, &before, 0.0);
            }
        }
    }
    Ok(())
}

#[test]
fn a_token_of_the_prompt_changes_the_weights_from_it_on() -> Result<()> {
    let _generator = seed(253);
    for router in routers() {
        let model = tiny_model(&tiny_lora(), &router, Kind::Double)?;
        for (tokens, prompt_len) in DOCUMENTS {
            let before = weights(&model, &single(tokens, prompt_len));
            for t in 0..prompt_len {
                let mut changed = tokens.to_vec();
                changed[t] = 57;
                let after = weights(&model, &single(&changed, prompt_len));
                let what = format!("{router:?}, token {t}");
                let until = |x: &Tensor| x.narrow(1, 0, t as i64);
                assert_close(&what, &until(&after), &until(&before), 1e-13);
                for later in t..tokens.len() {
                    let at = |x: &Tensor| x.narrow(1, later as i64, 1);
                    assert!(max_difference(&at(&after), &at(&before)) > 1e-5, "{what}, {later}");
                }
            }
        }
    }
    Ok(())
}

#[test]
fn packed_documents_have_the_weights_losses_and_gradients_of_separate_ones() -> Result<()> {
    let _generator = seed(254);
    let [a, b, c, d] = DOCUMENTS;
    for router in routers() {
        let router = RouterConfig { top_k: Some(2), ..router };
        let what = format!("{router:?}");
        let model = tiny_model(&tiny_lora(), &router, Kind::Double)?;
        let together = packed(&[&[a, b], &[c, d]]);
        let of_rows = weights(&model, &together);
        let run = |inputs: &Inputs| {
            let source = &RoutingSource::Router;
            model.loss(inputs, source, ForwardMode::EVAL, mean_loss(12)).0.loss
        };
        let mut sum = Tensor::zeros([0i64; 0], crate::common::DOUBLE);
        for ((tokens, prompt_len), (row, start)) in
            [a, b, c, d].into_iter().zip([(0, 0), (0, 5), (1, 0), (1, 6)])
        {
            let alone = single(tokens, prompt_len);
            let expected = weights(&model, &alone).get(0);
            let found = of_rows.get(row).narrow(0, start, tokens.len() as i64);
            assert_close(&what, &found, &expected, 1e-13);
            sum = &sum + run(&alone);
        }
        let loss = run(&together);
        assert_close(&what, &loss, &sum, 1e-12);
        assert_same_gradients(&gradients(&model, &loss), &gradients(&model, &sum), 1e-11);
    }
    Ok(())
}

#[test]
fn a_document_without_a_prompt_counts_as_one() -> Result<()> {
    let _generator = seed(255);
    for router in routers() {
        let model = tiny_model(&tiny_lora(), &router, Kind::Double)?;
        for (tokens, _) in DOCUMENTS {
            let unmarked = Inputs::document(tokens, Device::Cpu);
            let marked = single(tokens, tokens.len());
            let source = &RoutingSource::Router;
            let [a, b] = [&unmarked, &marked].map(|inputs| logits(&model, inputs, source));
            assert_eq!(max_difference(&a, &b), 0.0, "{router:?}");
        }
    }
    Ok(())
}

/// The mean over a single token is that of the token itself.
#[test]
fn the_first_token_is_routed_as_with_token_routing() -> Result<()> {
    let _generator = seed(256);
    for router in routers() {
        let by_prompt = tiny_model(&tiny_lora(), &router, Kind::Double)?;
        let router = RouterConfig { level: RoutingLevel::Token, ..router };
        let by_token =
            crate::common::new_model(by_prompt.base(), &tiny_lora(), &router, Kind::Double);
        by_token.load(&by_prompt.tensors())?;
        let inputs = single(DOCUMENTS[2].0, 4);
        let [a, b] = [&by_prompt, &by_token].map(|model| weights(model, &inputs));
        let first = |x: &Tensor| x.narrow(1, 0, 1);
        assert_close(&format!("{router:?}"), &first(&a), &first(&b), 1e-13);
        let rest = |x: &Tensor| x.narrow(1, 1, 5);
        assert!(max_difference(&rest(&a), &rest(&b)) > 1e-3);
    }
    Ok(())
}

/// The prompts are those of the records in a dataset, with a loss on the completion or on all
/// tokens.
#[test]
fn a_datasets_records_are_routed_by_their_prompts() -> Result<()> {
    let _generator = seed(257);
    let router = RouterConfig { level: RoutingLevel::Sequence, ..plain_router() };
    let model = tiny_model(&tiny_lora(), &router, Kind::Double)?;
    let weights_of = |completion: [u32; 3], loss_on| {
        let document = |prompt: &[u32]| MemoryDocument {
            tokens: [prompt, &completion].concat(),
            prompt_len: prompt.len() as u32,
            expert: None,
        };
        let documents = vec![document(&[7, 9, 4]), document(&[5, 6])];
        let domain = MemoryDomain { name: "all".into(), weight: 1.0, documents };
        let dataset = TokenDataset::in_memory(16, loss_on, vec![domain]);
        let batch = dataset.batch(&dataset.eval_order());
        weights(&model, &Inputs::of_batch(&batch, false, Device::Cpu))
    };
    for loss_on in [LossOn::Completion, LossOn::All] {
        let found = weights_of([1, 2, 3], loss_on);
        assert_close("weights", &weights_of([51, 52, 53], loss_on), &found, 0.0);
        // positions 0 to 4 read the first document and 5 to 8 the second, without their last tokens
        let documents = [(0, [7, 9, 4].as_slice(), 5), (5, [5, 6].as_slice(), 4)];
        for (start, prompt, len) in documents {
            let alone = single(&[prompt, &[1, 2]].concat(), prompt.len());
            let expected = weights(&model, &alone);
            assert_close("alone", &found.narrow(1, start, len), &expected, 1e-13);
        }
    }
    Ok(())
}
