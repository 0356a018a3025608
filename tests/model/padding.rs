//! Fillers, which round the sizes of a batch up, do not change any result.

use anyhow::Result;
use dylora::config::{LossOn, Maturity, Plateau, RouterConfig, RoutingChoice};
use dylora::data::{Batch, MemoryDocument, MemoryDomain, TokenDataset};
use dylora::model::batch::{Extent, HostInputs};
use dylora::model::decoder::context::AttentionMask;
use dylora::model::routing::totals::RoutingTotals;
use dylora::model::{Inputs, RoutedModel, Rows};
use dylora::train::gradients::gradients_of;
use dylora::train::prepared::{Prepared, SeedingPhase, StepTensors};
use dylora::train::step::StepGradients;
use tch::{Device, Kind, Tensor};

use crate::accumulation::{config, cut, routers};
use crate::common::{assert_close, seed, tiny_lora, tiny_model};

/// Two domains of documents in blocks of 16. Unless `is_packed`, the documents have 13 to 16
/// positions, so that each has a block of its own.
fn dataset(is_packed: bool) -> TokenDataset {
    let document = |n: u32| MemoryDocument {
        tokens: (0..if is_packed { 3 + n } else { 14 + n % 4 })
            .map(|i| (n * 7 + i * (n + 3)) % 61)
            .collect(),
        prompt_len: n / 3,
        expert: None,
    };
    let domain = |name: &str, first| MemoryDomain {
        name: name.into(),
        weight: 1.0,
        documents: (first..first + 5).map(document).collect(),
    };
    let domains = vec![domain("old", 0), domain("new", 5)];
    TokenDataset::in_memory(16, LossOn::Completion, domains)
}

fn tensors(
    model: &RoutedModel,
    router: &RouterConfig,
    batches: &[Batch],
    seeding: Option<SeedingPhase>,
    is_rounded: bool,
) -> Result<(StepTensors, StepGradients)> {
    let mut config = config(router, &[])?;
    config.train.label_smoothing = 0.1;
    config.train.loss_chunk_tokens = 7;
    if seeding.is_some() {
        config.growth = Some(crate::seeding::growth(1.5));
    }
    let trained = model.trained(RoutingChoice::Router, None);
    let step = Prepared::new(model, &config, batches, seeding, 2, is_rounded);
    let tensors = step.tensors(&step.flats(), &step.scalars(&[]));
    let gradients = gradients_of(model, &trained, &config, &tensors)?;
    Ok((tensors, gradients))
}

/// Checked with every loss, rule, input and scope, with a plateau as the criterion of maturity, and
/// also in the seeding phase of a new expert.
#[test]
fn fillers_change_no_gradient_no_loss_and_no_total() -> Result<()> {
    let _generator = seed(90);
    let plateau = Plateau { window_steps: 2, min_delta: 0.1 };
    let phase = SeedingPhase { expert: 2, domain: 1 };
    for router in routers() {
        let router = RouterConfig { hybrid: Some(Maturity::Plateau(plateau)), ..router };
        let model = tiny_model(&tiny_lora(), &router, Kind::Double)?;
        for (is_packed, sizes, seeding) in
            [(true, [2, 9], None), (false, [1, 9], None), (true, [9, 0], Some(phase))]
        {
            let batches = cut(&dataset(is_packed), &sizes, false);
            let (own, expected) = tensors(&model, &router, &batches, seeding, false)?;
            let (rounded, found) = tensors(&model, &router, &batches, seeding, true)?;
            let what = format!("{router:?}, packed {is_packed}, seeding {}", seeding.is_some());
            for (own, rounded) in own.micro_batches.iter().zip(&rounded.micro_batches) {
                assert!(rounded.labelled.size()[0] >= own.labelled.size()[0].max(64), "{what}");
                let stops = |inputs: &Inputs| matches!(inputs.mask, AttentionMask::Documents(_));
                assert_eq!((stops(own), stops(rounded)), (is_packed, is_packed), "{what}");
            }
            let totals = |of: &StepGradients| {
                Tensor::cat(&of.routing.iter().map(RoutingTotals::flat).collect::<Vec<_>>(), 0)
            };
            assert_close(&what, &found.domain_sums, &expected.domain_sums, 1e-12);
            assert_close(&what, &totals(&found), &totals(&expected), 1e-12);
            let losses = |of: &StepGradients| of.expert_losses.as_ref().unwrap().shallow_clone();
            assert_close(&what, &losses(&found), &losses(&expected), 1e-12);
            assert!(losses(&found).max().double_value(&[]) > 0.0, "{what}");
            for (a, b) in found.grads.iter().zip(&expected.grads) {
                let scale = b.abs().max().double_value(&[]).max(1e-3);
                assert_close(&what, a, b, 1e-12 * scale.max(1.0));
            }
        }
    }
    Ok(())
}

fn host(batch: &Batch, extent: Option<Extent>) -> Inputs {
    let rows = rows(batch);
    let extent = extent.unwrap_or_else(|| Extent::of(&rows));
    Inputs::of(&HostInputs::new(rows, extent, &batch.domains, None, Device::Cpu), Device::Cpu)
}

fn rows(batch: &Batch) -> Rows<'_> {
    Rows::of_batch(batch, false)
}

/// A run of padding is a document of its own. If sizes are rounded up, documents of length 0
/// follow.
#[test]
fn packed_documents_have_their_bounds_on_the_device() {
    let batch = &cut(&dataset(true), &[], false)[0];
    let ids = batch.document_ids.chunks(16).flat_map(|row| row.chunk_by(|a, b| a == b));
    let lengths: Vec<i64> = ids.map(|run| run.len() as i64).collect();
    let total = batch.input_ids.len() as i64;
    for extent in [None, Some(Extent::rounded(&[rows(batch)]))] {
        let inputs = host(batch, extent);
        let AttentionMask::Documents(documents) = &inputs.mask else { panic!("it is packed") };
        assert_eq!(documents.cu_seqlens.kind(), Kind::Int);
        let bounds = Vec::<i64>::try_from(documents.cu_seqlens.to_kind(Kind::Int64)).unwrap();
        let found: Vec<i64> = bounds.windows(2).map(|pair| pair[1] - pair[0]).collect();
        assert_eq!(found[..lengths.len()], lengths);
        assert!(found[lengths.len()..].iter().all(|&length| length == 0));
        assert_eq!((bounds[0], bounds.last()), (0, Some(&total)));
        assert!(documents.max_len >= *lengths.iter().max().unwrap() && documents.max_len <= 16);
        if extent.is_some() {
            assert!((bounds.len() - 1).is_power_of_two() && bounds.len() > 16);
        }
    }
}

/// Rounding leaves at most 8 different numbers of labelled positions.
#[test]
fn sizes_are_rounded_to_eighths_of_all_positions() {
    let documents = |n: u32| MemoryDocument {
        tokens: (0..1 + n).map(|i| i % 61).collect(),
        prompt_len: 0,
        expert: None,
    };
    let mut sizes = std::collections::BTreeSet::new();
    for n in 1..=128 {
        let domain = MemoryDomain { name: "x".into(), weight: 1.0, documents: vec![documents(n)] };
        let dataset = TokenDataset::in_memory(128, LossOn::Completion, vec![domain]);
        let batch = dataset.batch(&dataset.eval_order());
        // a batch of eight copies of the row
        let long = Batch {
            num_rows: 8,
            input_ids: batch.input_ids.repeat(8),
            labels: batch.labels.repeat(8),
            position_ids: batch.position_ids.repeat(8),
            document_ids: batch.document_ids.repeat(8),
            expert_ids: batch.expert_ids.repeat(8),
            prompt: batch.prompt.repeat(8),
            domains: batch.domains.repeat(8),
            ..batch
        };
        let extent = Extent::rounded(&[rows(&long)]);
        assert!(extent.num_labelled >= 8 * n as usize && extent.num_labelled <= 1024);
        sizes.insert(extent.num_labelled);
        let inputs = host(&long, Some(extent));
        let counted = inputs.counted.expect("it is rounded").sum(Kind::Int64).int64_value(&[]);
        assert_eq!(counted, 8 * i64::from(n));
    }
    assert_eq!(sizes.into_iter().collect::<Vec<_>>(), (1..=8).map(|i| i * 128).collect::<Vec<_>>());
}
