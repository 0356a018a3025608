//! The operations of a world.

use anyhow::Result;
use dylora::dist::Limits;
use tch::{Device, Kind, Tensor};

use crate::processes::{own_world, run};

#[test]
fn sums_and_copies_are_the_same_in_all_processes() -> Result<()> {
    for size in 1..=4 {
        run(size, "operations", tempfile::tempdir()?.path())?;
    }
    Ok(())
}

/// Adds up, copies and exchanges what depends on the rank.
pub fn work() -> Result<()> {
    let world = own_world(Limits::default())?;
    let (dist_rank, size) = (world.dist_rank() as i64, world.size() as i64);
    for kind in [Kind::Float, Kind::Double, Kind::Int64] {
        let tensors: Vec<Tensor> =
            [3, 1000].map(|n| Tensor::ones([n], (kind, Device::Cpu)) * (dist_rank + 1)).into();
        world.all_reduce(&tensors)?;
        for tensor in &tensors {
            assert_eq!(tensor.min().int64_value(&[]), size * (size + 1) / 2);
            assert_eq!(tensor.max().int64_value(&[]), size * (size + 1) / 2);
        }
        let tensor = Tensor::full([5], dist_rank + 7, (kind, Device::Cpu));
        world.spread(std::slice::from_ref(&tensor))?;
        assert_eq!(tensor.sum(Kind::Int64).int64_value(&[]), 35);
    }
    // a process without numbers counts as zeros
    let mut numbers = if dist_rank == 0 && size > 1 { vec![] } else { vec![1.5, 2.0] };
    world.sum(&mut numbers)?;
    let factor = (size - 1).max(1) as f64;
    assert_eq!(numbers, [1.5 * factor, 2.0 * factor]);
    assert!(world.any(dist_rank == size - 1)?);
    assert!(!world.any(false)?);
    assert_eq!(world.first(dist_rank as f64 + 0.5)?, 0.5);
    for round in 0..4 {
        let values = world.exchange(format!("{round} {dist_rank}").as_bytes())?;
        for (other, value) in values.iter().enumerate() {
            assert_eq!(*value, format!("{round} {other}").as_bytes());
        }
    }
    let facts = |own: i64| [("version", "1".to_owned()), ("config", format!("a = {own}"))];
    world.agree(&facts(3))?;
    if size > 1 {
        let error = world.agree(&facts(i64::from(dist_rank == size - 1))).expect_err("they differ");
        let expected = format!("rank {} differs from rank 0 in its config: `a = 1`", size - 1);
        assert!(error.to_string().starts_with(&expected), "{error}");
    }
    world.leave(None)
}
