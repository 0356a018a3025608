//! The loss computed in chunks equals torch's cross entropy.

use anyhow::Result;
use dylora::model::loss::{LossSettings, chunked_cross_entropy};
use dylora::model::{ForwardMode, RoutedModel, RoutingSource};
use tch::{Device, Kind, Reduction, Tensor};

use crate::common::{
    assert_close, assert_same_gradients, gradients, labelled_rows, max_difference, mean_loss,
    plain_router, seed, tiny_base, tiny_config, tiny_lora, tiny_model, two_rows,
};

/// Hidden states `[23, 16]`, a head `[61, 16]` and labels.
fn problem(kind: Kind) -> (Tensor, Tensor, Tensor) {
    let leaf = |shape: [i64; 2]| Tensor::randn(shape, (kind, Device::Cpu)).set_requires_grad(true);
    (leaf([23, 16]), leaf([61, 16]), Tensor::randint(61, [23], (Kind::Int64, Device::Cpu)))
}

#[test]
fn chunked_loss_and_gradients_are_those_of_torchs_cross_entropy() {
    let _generator = seed(30);
    for (kind, tolerance) in [(Kind::Float, 1e-5), (Kind::Double, 1e-12)] {
        let (hidden, head, labels) = problem(kind);
        let grads = |loss: &Tensor| Tensor::run_backward(&[loss], &[&hidden, &head], true, false);
        for label_smoothing in [0.0, 0.1] {
            let logits = hidden.matmul(&head.tr());
            let sum =
                |s| logits.cross_entropy_loss(&labels, None::<Tensor>, Reduction::Sum, -100, s);
            let expected = sum(label_smoothing) * 0.25;
            let plain =
                logits.cross_entropy_loss(&labels, None::<Tensor>, Reduction::None, -100, 0.0);
            for chunk_tokens in [1, 7, 23, 1000] {
                let settings = LossSettings {
                    chunk_tokens,
                    label_smoothing,
                    scale: 0.25.into(),
                    with_grad: true,
                };
                let what = |part: &str| format!("{part}, {chunk_tokens} a chunk, {kind:?}");
                let loss = chunked_cross_entropy(&hidden, &head, &labels, settings);
                let value = expected.double_value(&[]);
                assert_close(&what("loss"), &loss.loss, &expected, tolerance * value);
                assert_close(&what("token_losses"), &loss.token_losses, &plain, tolerance * 10.0);
                for (grad, expected) in grads(&loss.loss).iter().zip(grads(&expected)) {
                    let scale = expected.abs().max().double_value(&[]);
                    assert_close(&what("gradient"), grad, &expected, tolerance * scale);
                }
            }
        }
    }
}

#[test]
fn the_loss_does_not_depend_on_the_chunk_size() {
    let _generator = seed(31);
    let (hidden, head, labels) = problem(Kind::Float);
    let loss = |chunk_tokens| {
        let settings = LossSettings {
            chunk_tokens,
            label_smoothing: 0.1,
            scale: (1.0 / 23.0).into(),
            with_grad: true,
        };
        chunked_cross_entropy(&hidden, &head, &labels, settings).loss
    };
    let whole = loss(23);
    for chunk_tokens in [1, 2, 7, 22, 24] {
        let tolerance = 1e-6 * whole.double_value(&[]);
        assert_close(&format!("{chunk_tokens} a chunk"), &loss(chunk_tokens), &whole, tolerance);
    }
}

#[test]
fn asking_for_no_gradient_leaves_the_value() {
    let _generator = seed(32);
    let (hidden, head, labels) = problem(Kind::Float);
    let loss = |with_grad| {
        let settings = LossSettings { with_grad, ..mean_loss(23) };
        chunked_cross_entropy(&hidden, &head, &labels, settings).loss
    };
    assert_eq!(max_difference(&loss(true), &loss(false)), 0.0);
    assert!(loss(true).requires_grad() && !loss(false).requires_grad());
}

#[test]
fn rows_without_labels_cost_nothing() -> Result<()> {
    let _generator = seed(33);
    let model = tiny_model(&tiny_lora(), &plain_router(), Kind::Double)?;
    let rows: [&[i64]; 2] = [&[3, 14, 15, 9, 26], &[27, 18, 28, 18, 28]];
    let run = |labels: &[i64]| {
        let inputs = labelled_rows(&rows, labels);
        model.loss(&inputs, &RoutingSource::Router, ForwardMode::EVAL, mean_loss(4)).0
    };
    let none = run(&[-100; 10]);
    assert_eq!(none.loss.double_value(&[]), 0.0);
    assert_eq!(none.token_losses.size(), [0]);
    assert!(
        gradients(&model, &none.loss)
            .values()
            .all(|grad| grad.abs().max().double_value(&[]) == 0.0)
    );

    let half = run(&[14, 15, 9, 26, -100, -100, -100, -100, -100, -100]);
    let alone = labelled_rows(&rows[..1], &[14, 15, 9, 26, -100]);
    let (alone, _) = model.loss(&alone, &RoutingSource::Router, ForwardMode::EVAL, mean_loss(4));
    assert_close("loss", &half.loss, &alone.loss, 1e-12);
    let expected = gradients(&model, &alone.loss);
    assert_same_gradients(&gradients(&model, &half.loss), &expected, 1e-12);
    Ok(())
}

/// The gradient of a tied head is the sum of its gradients as the head and as the embeddings.
#[test]
fn a_trained_bases_gradients_are_those_of_all_its_logits() {
    let _generator = seed(34);
    for tied_head in [true, false] {
        let mut config = tiny_config();
        config.tied_head = tied_head;
        let model = RoutedModel::plain(&tiny_base(config), Device::Cpu, Kind::Double, true);
        let inputs = two_rows();
        let (loss, _) = model.loss(&inputs, &RoutingSource::Base, ForwardMode::EVAL, mean_loss(12));
        let chunked = gradients(&model, &loss.loss);
        let hidden = model.forward(&inputs, &RoutingSource::Base, ForwardMode::EVAL, None).hidden;
        let logits = model.logits(&hidden).view([14, 61]).index_select(0, &inputs.labelled);
        let all =
            logits.cross_entropy_loss(&inputs.labels, None::<Tensor>, Reduction::Mean, -100, 0.0);
        assert_close("loss", &loss.loss, &all, 1e-12);
        assert_same_gradients(&chunked, &gradients(&model, &all), 1e-12);
    }
}
