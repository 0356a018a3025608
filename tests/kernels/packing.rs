//! The packed matrices of products, which only kernels read, against the layers that they hold.

use std::collections::BTreeMap;

use anyhow::Result;
use dylora::config::{LoraConfig, ModulePath, TargetModule};
use dylora::model::RoutedModel;
use dylora::model::experts::spec::ExpertSpec;
use dylora::model::fused::pack::FusedProduct;
use dylora::model::routing::router::RouterSpec;
use tch::{Device, Kind, Tensor};

use crate::common::{family_specs, plain_router, randomize, seed, tiny_base};

/// `[x | v] [W; B^T]`, where `v` is `x A^T` times each column's scaling and routing weight, is the
/// output of each member with its experts, beside those of the others. The ranks are no multiples
/// of what columns are rounded up to.
#[test]
fn one_product_with_a_packed_matrix_is_its_members_with_their_experts() -> Result<()> {
    let _generator = seed(920);
    let _no_grad = tch::no_grad_guard();
    for (family, spec) in family_specs() {
        let lora = LoraConfig { num_experts: 3, rank: 5, alpha: 7.5, ..LoraConfig::default() };
        let base = tiny_base(spec.clone());
        let (specs, router) = (ExpertSpec::all(&lora, &spec)?, RouterSpec::from(&plain_router()));
        let model = RoutedModel::with_experts(&base, &specs, &router, Device::Cpu, Kind::Double);
        randomize(&model)?;
        let experts = model.modules().filter(|(path, _)| path.layer == 0);
        let experts: BTreeMap<_, _> =
            experts.map(|(path, experts)| (path.module, experts.shallow_clone())).collect();
        let tensors: BTreeMap<_, _> = model.tensors().into_iter().collect();
        // A, [R, i], or B, [o, R], of all experts of a module
        let stacked = |module: TargetModule, key: &str, dim: i64| {
            let path = ModulePath { layer: 0, module };
            let of = |e: usize| &tensors[&format!("{path}.expert_{e}.{key}")];
            Tensor::cat(&[of(0), of(1), of(2)], dim)
        };
        let mut block = base.blocks[0].shallow_clone();
        for members in spec.products() {
            let mut product = FusedProduct::new(members, &experts, 3, Kind::Double);
            product.pack(&mut block, &experts);
            for (module, [down, up]) in product.places() {
                down.narrow(1, 0, 15).copy_(&stacked(module, "lora_a", 0).tr());
                up.narrow(0, 0, 15).copy_(&stacked(module, "lora_b", 1).tr());
            }
            let i = spec.linear_shape(members[0]).0;
            let x = Tensor::randn([4, i], (Kind::Double, Device::Cpu));
            let g = Tensor::rand([4, 3], (Kind::Double, Device::Cpu));
            let packed = product.packed().expect("a product with experts is packed");
            let padding = product.row_padding();
            let o = packed.matrix.size()[1] - padding;
            let u = x.matmul(&packed.matrix.narrow(0, 0, i).narrow(1, o, padding));
            let of_column = g.index_select(1, &packed.columns.expert_of);
            let v = u * of_column * packed.columns.scaling.to_kind(Kind::Double);
            let found = Tensor::cat(&[&x, &v], 1).matmul(&packed.matrix.narrow(1, 0, o));
            let expected = members.iter().map(|&module| {
                let linear = &base.blocks[0].linears[&module];
                let f = g.repeat_interleave_self_int(5, 1, 15) * 1.5;
                let v = x.matmul(&stacked(module, "lora_a", 0).tr()) * f;
                x.matmul(&linear.weight()) + v.matmul(&stacked(module, "lora_b", 1).tr())
            });
            let expected = Tensor::cat(&expected.collect::<Vec<_>>(), 1);
            let apart = (found - expected).abs().max().double_value(&[]);
            assert!(apart < 1e-12, "{family}, {members:?}: {apart:e}");
            for module in members {
                let (own, before) = (&block.linears[module], &base.blocks[0].linears[module]);
                assert_eq!(own.weight(), before.weight(), "{family}, {module:?}");
            }
        }
    }
    Ok(())
}
