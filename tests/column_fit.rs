//! The fit of a new router column, against solutions that are computed here by other means.

#[path = "common/mod.rs"]
mod common;

use anyhow::Result;
use dylora::growth::column_fit::{Column, ColumnFit, RIDGE};
use tch::{Kind, Tensor};

use crate::common::{DOUBLE, assert_close, max_difference, seed};

/// Tokens of a new domain and of others.
struct Tokens {
    features: Tensor,
    offsets: Tensor,
    is_new: Tensor,
    shares: Tensor,
}

impl Tokens {
    /// `num_new` tokens of the new domain and `num_old` others, whose features are correlated, of
    /// different size and not centered. The domains differ by `distance`. The new domain has the
    /// share 1/4.
    fn random(num_new: i64, num_old: i64, width: i64, distance: f64) -> Self {
        let n = num_new + num_old;
        let is_new =
            Tensor::cat(&[Tensor::ones([num_new], DOUBLE), Tensor::zeros([num_old], DOUBLE)], 0);
        let mix = Tensor::randn([width, width], DOUBLE) / (width as f64).sqrt();
        let own = Tensor::randn([n, width], DOUBLE);
        let side = is_new.unsqueeze(-1) * Tensor::randn([1, width], DOUBLE) * distance;
        let sizes = Tensor::logspace(-2.0, 2.0, width, 10.0, DOUBLE);
        // a part that all features share makes them strongly correlated
        let common = own.narrow(1, 0, 1) * 5.0;
        let features = ((own + side).matmul(&mix) + common + 3.0) * sizes;
        let shares = &is_new * (0.25 / num_new as f64) + (1.0 - &is_new) * (0.75 / num_old as f64);
        Self { features, offsets: Tensor::randn([n], DOUBLE) * 2.0, is_new, shares }
    }

    fn fit(&self, temperature: f64) -> Result<Column> {
        let Self { features, offsets, is_new, shares } = self;
        ColumnFit { features, offsets, is_new, shares, temperature }.column()
    }

    /// The loss of a column by its formula, and its gradient by the weights, `[w]`, and the bias.
    fn loss(&self, weight: &Tensor, bias: f64, temperature: f64) -> (f64, Tensor, f64) {
        let weight = weight.detach().copy().set_requires_grad(true);
        let bias = Tensor::from(bias).set_requires_grad(true);
        let z = (self.features.mv(&weight) + &bias) / temperature - &self.offsets;
        let losses = &self.is_new * (-&z).softplus() + (1.0 - &self.is_new) * z.softplus();
        let std = self.features.std_dim(&[0_i64][..], false, false);
        let ridge = (&weight * std / temperature).square().sum(Kind::Double) * (RIDGE / 2.0);
        let of_tokens: Tensor = losses * &self.shares;
        let loss = of_tokens.sum(Kind::Double) + ridge;
        loss.backward();
        (loss.double_value(&[]), weight.grad(), bias.grad().double_value(&[]))
    }

    /// The minimum by Newton's method, in plain numbers on features of standard deviation 1: the
    /// weights of the features and the bias.
    fn minimum(&self, temperature: f64) -> (Vec<f64>, f64) {
        let std = self.features.std_dim(&[0_i64][..], false, false);
        let rows: Vec<Vec<f64>> = Vec::try_from(&self.features / &std).expect("[n, w]");
        let list = |x: &Tensor| Vec::<f64>::try_from(x).expect("it is a list");
        let (offsets, is_new, shares) =
            (list(&self.offsets), list(&self.is_new), list(&self.shares));
        let size = rows[0].len() + 1;
        let mut v = vec![0.0; size];
        for _ in 0..60 {
            let mut gradient = vec![0.0; size];
            let mut hessian = vec![vec![0.0; size]; size];
            for i in 0..size - 1 {
                gradient[i] = RIDGE * v[i];
                hessian[i][i] = RIDGE;
            }
            for (n, row) in rows.iter().enumerate() {
                let x = |i: usize| row.get(i).copied().unwrap_or(1.0);
                let z = (0..size).map(|i| v[i] * x(i)).sum::<f64>() - offsets[n];
                let p = 1.0 / (1.0 + (-z).exp());
                for i in 0..size {
                    gradient[i] += shares[n] * (p - is_new[n]) * x(i);
                    for (j, entry) in hessian[i].iter_mut().enumerate() {
                        *entry += shares[n] * p * (1.0 - p) * x(i) * x(j);
                    }
                }
            }
            let step = solve(hessian, gradient);
            // half a step at a time, which never leaves the region where the method converges
            v.iter_mut().zip(step).for_each(|(v, step)| *v -= 0.5 * step);
        }
        let weights = list(&(Tensor::from_slice(&v[..size - 1]) / std * temperature));
        (weights, v[size - 1] * temperature)
    }
}

/// The solution of `a x = b` by Gauss's elimination with pivots.
fn solve(mut a: Vec<Vec<f64>>, mut b: Vec<f64>) -> Vec<f64> {
    let size = b.len();
    for column in 0..size {
        let largest = |&i: &usize, &j: &usize| a[i][column].abs().total_cmp(&a[j][column].abs());
        let pivot = (column..size).max_by(largest).expect("there is a row");
        a.swap(column, pivot);
        b.swap(column, pivot);
        for row in column + 1..size {
            let factor = a[row][column] / a[column][column];
            let above = a[column].clone();
            a[row].iter_mut().zip(above).for_each(|(entry, above)| *entry -= factor * above);
            b[row] -= factor * b[column];
        }
    }
    for row in (0..size).rev() {
        let known: f64 = (row + 1..size).map(|j| a[row][j] * b[j]).sum();
        b[row] = (b[row] - known) / a[row][row];
    }
    b
}

#[test]
fn a_column_is_the_minimum_that_newtons_method_finds_in_plain_numbers() -> Result<()> {
    let _generator = seed(500);
    for (num_new, num_old, distance, temperature) in
        [(40, 110, 0.7, 1.0), (150, 60, 0.2, 0.5), (60, 60, 6.0, 1.7), (5, 5, 1.0, 1.0)]
    {
        let tokens = Tokens::random(num_new, num_old, 7, distance);
        let found = tokens.fit(temperature)?;
        let (weights, bias) = tokens.minimum(temperature);
        let weights = Tensor::from_slice(&weights);
        let loss = |weight: &Tensor, bias| tokens.loss(weight, bias, temperature).0;
        let (found_loss, least) = (loss(&found.weight, found.bias), loss(&weights, bias));
        let what = format!("{num_new}, {num_old}, {distance}: {found_loss} and {least}");
        assert!((found_loss - least).abs() < 1e-6, "{what}");
        // in units of the features
        let std = tokens.features.std_dim(&[0_i64][..], false, false);
        assert_close(&what, &(&found.weight * &std), &(weights * &std), 1e-3);
        assert!((found.bias - bias).abs() < 1e-3 * bias.abs().max(1.0), "{what}");
    }
    Ok(())
}

/// The loss is convex, so its minimum is where the gradient is zero. Features of a wide base, some
/// of which say the same, are the hard case.
#[test]
fn the_gradient_of_the_loss_is_zero_at_a_fitted_column() -> Result<()> {
    let _generator = seed(501);
    for (width, distance) in [(3, 0.5), (120, 0.1), (120, 3.0)] {
        let mut tokens = Tokens::random(200, 260, width, distance);
        let copies = tokens.features.narrow(1, 0, width / 2) * -2.0;
        tokens.features = Tensor::cat(&[&tokens.features, &copies], -1);
        let column = tokens.fit(1.3)?;
        let (loss, by_weight, by_bias) = tokens.loss(&column.weight, column.bias, 1.3);
        let std = tokens.features.std_dim(&[0_i64][..], false, false);
        // in units of the features of standard deviation 1
        let largest = (by_weight / std).abs().max().double_value(&[]).max(by_bias.abs());
        assert!(largest < 1e-6, "width {width}, {distance}: {largest:e}");
        assert!(loss < 0.6, "width {width}, {distance}: {loss}");
    }
    Ok(())
}

#[test]
fn features_of_another_scale_give_weights_of_the_inverse_scale() -> Result<()> {
    let _generator = seed(502);
    let mut tokens = Tokens::random(50, 70, 9, 0.8);
    let column = tokens.fit(1.0)?;
    for scale in [1e-9, 1e3] {
        let features = tokens.features.shallow_clone();
        tokens.features = &features * scale;
        let scaled = tokens.fit(1.0)?;
        let (large, small) = (&scaled.weight * scale, &column.weight);
        assert!(max_difference(&large, small) < 1e-9 * small.abs().max().double_value(&[]));
        assert!((scaled.bias - column.bias).abs() < 1e-9 * column.bias.abs().max(1.0));
        tokens.features = features;
    }
    Ok(())
}

/// With offsets that are a linear function of the features, the column follows that function: its
/// scores minus the offsets are as if there were none.
#[test]
fn a_column_makes_up_for_its_offsets() -> Result<()> {
    let _generator = seed(503);
    let mut tokens = Tokens::random(60, 60, 5, 0.3);
    tokens.offsets = tokens.offsets.zeros_like();
    let column = tokens.fit(1.0)?;
    tokens.offsets = tokens.offsets.full_like(7.5);
    let higher = tokens.fit(1.0)?;
    let size = column.weight.abs().max().double_value(&[]);
    assert_close("weights", &higher.weight, &column.weight, 1e-9 * size);
    assert!((higher.bias - column.bias - 7.5).abs() < 1e-6, "{} {}", higher.bias, column.bias);
    // one token that the old experts are very sure of does not spoil the rest
    let _ = tokens.offsets.get(-1).fill_(400.0);
    let (loss, ..) = {
        let column = tokens.fit(1.0)?;
        tokens.loss(&column.weight, column.bias, 1.0)
    };
    let (before, ..) = tokens.loss(&higher.weight, higher.bias, 1.0);
    assert!(loss <= before, "{loss} {before}");
    Ok(())
}

/// Where features say nothing, the probability of the new expert is the new domain's share.
#[test]
fn without_telling_features_the_new_expert_gets_the_share_of_its_domain() -> Result<()> {
    let _generator = seed(504);
    for share in [0.1, 0.5, 0.9] {
        let mut tokens = Tokens::random(30, 90, 4, 0.0);
        tokens.features = tokens.features.ones_like() * 3.0;
        tokens.offsets = tokens.offsets.full_like(-1.25);
        tokens.shares =
            &tokens.is_new * (share / 30.0) + (1.0 - &tokens.is_new) * ((1.0 - share) / 90.0);
        let column = tokens.fit(0.5)?;
        assert_eq!(column.weight.abs().max().double_value(&[]), 0.0);
        let z = column.bias / 0.5 + 1.25;
        let p = 1.0 / (1.0 + (-z).exp());
        assert!((p - share).abs() < 1e-6, "{p} is not {share}");
    }
    Ok(())
}

#[test]
fn features_that_are_not_finite_are_refused() {
    let _generator = seed(505);
    let tokens = Tokens::random(5, 5, 3, 1.0);
    let _ = tokens.features.get(2).fill_(f64::NAN);
    let error = tokens.fit(1.0).unwrap_err().to_string();
    assert!(error.contains("are not finite"), "{error}");
}
