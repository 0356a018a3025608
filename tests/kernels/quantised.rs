//! The base's products in FP8 (`train.base_products = "fp8"`).

use anyhow::Result;
use dylora::config::TargetModule::{AttnCProj, MlpCFc};
use dylora::config::{BaseProducts, Family, LoraConfig, RouterConfig, RouterInput, RouterScope};
use dylora::ffi::quantised::{Quantised, quantise, quantised_product};
use tch::{Device, Kind, Tensor};

use super::shapes::{Case, Distances, Step, case, device, exact, lora, on_families, shape};
use crate::common::{plain_router, seed};

/// Mixtures whose products are computed in FP8, on GPT-2 and, on a GPU, on all other families.
pub(super) fn quantised_cases(on_gpu: bool) -> Vec<Case> {
    let all = Family::Gpt2.modules();
    let layers = RouterConfig {
        scope: RouterScope::Layer,
        input: RouterInput::LayerInput,
        ..plain_router()
    };
    let shared = LoraConfig { shared_rank: 9, ..lora(3, 4, all) };
    let wide = shape(2, 64, 53, 64);
    let gpt2 = vec![
        case("fp8"),
        Case { lora: lora(1, 4, all), ..case("fp8, E 1") },
        Case { lora: lora(4, 8, &[AttnCProj, MlpCFc]), ..case("fp8, experts on some layers") },
        Case { router: layers, ..case("fp8, routers on the layers' inputs") },
        Case { lora: shared, ..case("fp8, always on 9") },
        Case { checkpointing: true, ..case("fp8, checkpointing") },
        Case { documents: Some(vec![5, 1, 11, 7]), ..case("fp8, packed documents") },
        Case { dropout: 0.2, base: wide.clone(), ..case("fp8, dropout") },
        Case { dropout: 0.2, base: wide, lora: lora(3, 20, all), ..case("fp8, dropout, r 20") },
    ];
    let others = if on_gpu { on_families(&gpt2) } else { vec![] };
    let cases = gpt2.into_iter().chain(others);
    cases.map(|case| Case { base_products: BaseProducts::Fp8, ..case }).collect()
}

/// The numbers of a quantised matrix.
fn numbers(matrix: &Quantised) -> Tensor {
    exact(&matrix.codes) * exact(&matrix.scales)
}

/// A matrix in bf16 with rows of very different sizes, of which one is 0.
fn rows(n: i64, columns: i64, device: Device) -> Tensor {
    let x = Tensor::randn([n, columns], (Kind::Float, Device::Cpu));
    let sizes = Tensor::logspace(-6, 6, n, 10.0, (Kind::Float, Device::Cpu)).view([n, 1]);
    if n > 1 {
        let _ = sizes.get(n / 2).fill_(0.0);
    }
    (x * sizes).to_kind(Kind::BFloat16).to_device(device)
}

/// The largest code of a row is 448. Each number is off by at most half of the distance between
/// neighbours in e4m3, which is a sixteenth of it, or a 1024th of the scale for the smallest ones.
#[test]
fn each_number_becomes_the_nearest_code() -> Result<()> {
    let device = device()?;
    let _generator = seed(930);
    for (n, columns) in [(1, 16), (7, 576), (5, 4096), (3, 14336), (2, 40000)] {
        // rows with others behind them, as activations with row padding have
        let x = rows(n, columns + 24, device).narrow(1, 0, columns);
        let quantised = quantise(&x)?;
        let (x, scales) = (exact(&x), exact(&quantised.scales));
        let error = (numbers(&quantised) - &x).abs();
        // the factor of a row is rounded, so a number may be a little beyond the middle
        let bound = (x.abs() / 16.0).maximum(&(&scales / 1024.0)) * 1.000_001;
        let beyond = error.gt_tensor(&bound).sum(Kind::Int64).int64_value(&[]);
        assert_eq!(beyond, 0, "{n} x {columns}");
        let largest = exact(&quantised.codes).abs().amax([1], false);
        let is_nonzero = x.abs().amax([1], false).gt(0.0);
        let expected = is_nonzero.to_kind(Kind::Double) * 448.0;
        assert!(largest.equal(&expected), "{n} x {columns}: {largest:?}");
    }
    Ok(())
}

/// A product equals that of the same numbers in f64, up to the rounding of sums and of the output.
/// A GPU keeps 14 bits of a sum. So differences are relative to the root of the sum of the squares
/// of the terms, which is the size of a sum that does not cancel.
#[test]
fn products_of_codes_are_those_of_their_numbers() -> Result<()> {
    let device = device()?;
    let _generator = seed(931);
    for (m, i, o) in [(1, 16, 16), (48, 32, 96), (33, 576, 192), (300, 4096, 512)] {
        let x = quantise(&Tensor::randn([m, i], (Kind::BFloat16, device)))?;
        let w = quantise(&rows(o, i, device))?;
        let like = Tensor::zeros([1], (Kind::BFloat16, device));
        let found = exact(&quantised_product(&x, &w, &like)?);
        let (x, w) = (numbers(&x), numbers(&w));
        let sizes = x.square().mm(&w.square().tr()).sqrt();
        // by column, since the rows of w have very different sizes
        let norm = |x: &Tensor| x.square().sum_dim_intlist([0].as_slice(), false, None).sqrt();
        let distance = norm(&(found - x.mm(&w.tr()))) / norm(&sizes).clamp_min(1e-30);
        let worst = distance.max().double_value(&[]);
        println!("{m} x {i} x {o}: {worst:.1e}");
        assert!(worst <= 5e-3, "{m} x {i} x {o}: {worst:.1e}");
    }
    Ok(())
}

/// FP8 in f64 has a distance from exact gradients. FP8 in bf16 has about the same distance from
/// them, and is nearer to FP8 in f64 than that. The masks of dropout are others in f64. So with
/// dropout, FP8 in bf16 is compared with bf16, from which it may be a little further than without
/// dropout.
#[test]
fn steps_in_fp8_are_as_exact_as_fp8() -> Result<()> {
    let device = device()?;
    let _generator = seed(932);
    for case in quantised_cases(device.is_cuda()) {
        let plain = Case { base_products: BaseProducts::Exact, ..case.on_its_own() };
        let base = case.decoder();
        let tensors = plain.model(&base, Device::Cpu, Kind::Double, None)?.tensors();
        let inputs = case.inputs(device);
        let step = |case: &Case, kind: Kind| {
            case.step(&case.model(&base, device, kind, Some(&tensors))?, &inputs)
        };
        let found = step(&case, Kind::BFloat16)?;
        if case.dropout > 0.0 {
            let kept = |case: &Case| Case { dropout: 0.0, ..case.on_its_own() };
            let from_bf16 = |found: &Step, plain: &Case| -> Result<Distances> {
                Ok(Distances::new(&found.1, &step(plain, Kind::BFloat16)?.1))
            };
            let own = from_bf16(&found, &plain)?;
            let without = from_bf16(&step(&kept(&case), Kind::BFloat16)?, &kept(&plain))?;
            println!("{}: {own} from bf16, and {without} without dropout", case.name);
            assert!(own.experts > 0.5 * without.experts, "{}", case.name);
            assert!(own.experts < 1.6 * without.experts, "{}", case.name);
            continue;
        }
        let (in_fp8, truth) = (step(&case, Kind::Double)?, step(&plain, Kind::Double)?);
        let of_fp8 = Distances::new(&in_fp8.1, &truth.1);
        let own = Distances::new(&found.1, &truth.1);
        let between = Distances::new(&found.1, &in_fp8.1);
        println!("{}: {own} from f64, and FP8 in f64 {of_fp8}; {between} between", case.name);
        assert!(of_fp8.experts > 5e-3 && of_fp8.experts < 0.3, "{}", case.name);
        assert!(own.experts < 1.25 * of_fp8.experts, "{}", case.name);
        assert!(own.experts > 0.5 * of_fp8.experts, "{}", case.name);
        assert!(between.experts < of_fp8.experts, "{}", case.name);
        assert!((found.0 - truth.0).abs() < 5e-2, "{}: {} {}", case.name, found.0, truth.0);
    }
    Ok(())
}
