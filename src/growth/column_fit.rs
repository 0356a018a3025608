//! The router column that best tells the tokens of a new domain from others.
//!
//! Let `h_n` be the features of token n that the scores of a router are linear in, `o_n` its offset
//! and `T` the temperature. With the column `(w, b)`, the probability of the new expert is the
//! logistic function of
//!
//! ```text
//! z_n = (w h_n + b) / T - o_n,       o_n = logsumexp(l_n / T) of the old experts' scores l_n
//! ```
//!
//! so the column is a logistic regression with an offset, whose loss is convex:
//!
//! ```text
//! sum over new tokens of s_n softplus(-z_n) + sum over the others of s_n softplus(z_n)
//!     + RIDGE |v|^2 / 2
//! ```
//!
//! where `s_n` are the tokens' shares in the loss and `v` are the weights for features of mean 0
//! and standard deviation 1. It is minimised by Newton's method with a line search, in f64. The
//! result depends neither on a learning rate nor on the scale of the features.
//!
//! Letters of shapes: `n` tokens, `w` width of the features, `v` the same and 1 for the bias.

use anyhow::{Result, bail};
use tch::{Device, Kind, Tensor};

/// Factor of the squared norm of the weights.
pub const RIDGE: f64 = 1e-3;
/// The same for the bias: it only keeps the equations solvable where every token is certain.
const BIAS_RIDGE: f64 = 1e-12;
/// The fit has converged when a step promises to lower the loss by less than this, in nats.
const TOLERANCE: f64 = 1e-12;
/// Largest number of Newton's steps. Some ten are usual.
const MAX_STEPS: usize = 100;
/// Largest number of times that a step is halved.
const MAX_HALVINGS: usize = 60;
/// A feature whose standard deviation is below this part of its root mean square is constant.
const CONSTANT: f64 = 1e-6;

/// A column of a router.
#[derive(Debug)]
pub struct Column {
    /// The row of the router's weight, `[w]`, f64.
    pub weight: Tensor,
    /// The bias.
    pub bias: f64,
}

/// The tokens by which a column is fitted, and how.
#[derive(Debug)]
pub struct ColumnFit<'a> {
    /// `h`, `[n, w]`, f64.
    pub features: &'a Tensor,
    /// `o`, `[n]`, f64.
    pub offsets: &'a Tensor,
    /// 1 for tokens of the new domain and 0 for the others, `[n]`, f64; both occur.
    pub is_new: &'a Tensor,
    /// `s`, which sum to 1, `[n]`, f64.
    pub shares: &'a Tensor,
    /// The temperature of the softmax.
    pub temperature: f64,
}

impl ColumnFit<'_> {
    /// The column that minimises the loss.
    ///
    /// # Errors
    /// Fails if features or offsets are not finite.
    pub fn column(&self) -> Result<Column> {
        let is_finite = |x: &Tensor| bool::try_from(x.isfinite().all());
        if !(is_finite(self.features)? && is_finite(self.offsets)?) {
            bail!("the router's features are not finite, so that its new column cannot be fitted");
        }
        let standard = Standardized::new(self.features);
        let v = self.minimum(&Problem::new(self, &standard));
        let width = self.features.size()[1];
        let weight = v.narrow(0, 0, width) * &standard.per_std_w;
        let bias = v.get(width).double_value(&[]) - weight.dot(&standard.mean_w).double_value(&[]);
        Ok(Column { weight: weight * self.temperature, bias: bias * self.temperature })
    }

    /// The minimum of a problem, `[v]`.
    fn minimum(&self, problem: &Problem) -> Tensor {
        let mut v = problem.ridge_v.zeros_like();
        // the bias starts where the new expert has about the probability of all old ones together
        v.get(-1).copy_(&self.offsets.mean(Kind::Double));
        let mut loss = problem.loss(&v);
        for _ in 0..MAX_STEPS {
            let (gradient, direction) = problem.newton(&v);
            let promised = -gradient.dot(&direction).double_value(&[]) / 2.0;
            if promised < TOLERANCE {
                break;
            }
            // Armijo's rule: a step must bring a part of what the gradient promises
            let lower = (0..MAX_HALVINGS).find_map(|halvings| {
                let size = 0.5_f64.powi(halvings as i32);
                let next = &v + &direction * size;
                let next_loss = problem.loss(&next);
                (next_loss <= loss - 2e-4 * size * promised).then_some((next, next_loss))
            });
            // near the minimum, what is left is smaller than the rounding of the loss
            let Some((next, next_loss)) = lower else { break };
            (v, loss) = (next, next_loss);
        }
        v
    }
}

/// Features of mean 0 and standard deviation 1.
struct Standardized {
    mean_w: Tensor,
    /// 1 / standard deviation; 0 for a constant feature, whose weight is then 0.
    per_std_w: Tensor,
    features_nw: Tensor,
}

impl Standardized {
    fn new(features_nw: &Tensor) -> Self {
        let mean = |x: &Tensor| x.mean_dim(&[0_i64][..], false, Kind::Double);
        let mean_w = mean(features_nw);
        let centered_nw = features_nw - &mean_w;
        let std_w = mean(&centered_nw.square()).sqrt();
        let rms_w = mean(&features_nw.square()).sqrt();
        let varies_w = std_w.gt_tensor(&(rms_w * CONSTANT));
        let per_std_w = std_w.reciprocal().where_scalarother(&varies_w, 0.0);
        Self { features_nw: centered_nw * &per_std_w, mean_w, per_std_w }
    }
}

/// The loss as a function of `v`.
struct Problem {
    /// The features and a 1, `[n, v]`.
    x_nv: Tensor,
    offsets_n: Tensor,
    is_new_n: Tensor,
    shares_n: Tensor,
    ridge_v: Tensor,
}

impl Problem {
    fn new(fit: &ColumnFit<'_>, standard: &Standardized) -> Self {
        let ridge_w = standard.mean_w.full_like(RIDGE);
        let ridge_1 = ridge_w.new_full([1], BIAS_RIDGE, (Kind::Double, ridge_w.device()));
        Self {
            x_nv: Tensor::cat(&[&standard.features_nw, &fit.is_new.ones_like().unsqueeze(-1)], -1),
            offsets_n: fit.offsets.shallow_clone(),
            is_new_n: fit.is_new.shallow_clone(),
            shares_n: fit.shares.shallow_clone(),
            ridge_v: Tensor::cat(&[ridge_w, ridge_1], 0),
        }
    }

    fn z(&self, v: &Tensor) -> Tensor {
        self.x_nv.mv(v) - &self.offsets_n
    }

    fn loss(&self, v: &Tensor) -> f64 {
        // softplus(-z) for new tokens and softplus(z) for the others, exact for large z
        let sign_n: Tensor = &self.is_new_n * 2.0 - 1.0;
        let of_tokens = -(self.z(v) * sign_n).log_sigmoid().dot(&self.shares_n);
        let of_weights = (v.square() * &self.ridge_v).sum(Kind::Double) / 2.0;
        (of_tokens + of_weights).double_value(&[])
    }

    /// The gradient at `v` and the step to the minimum of the second-order expansion there.
    fn newton(&self, v: &Tensor) -> (Tensor, Tensor) {
        let p_n = self.z(v).sigmoid();
        let residual_n = (&p_n - &self.is_new_n) * &self.shares_n;
        let gradient = self.x_nv.tr().mv(&residual_n) + &self.ridge_v * v;
        let curvature_n: Tensor = (1.0 - &p_n) * &p_n * &self.shares_n;
        let scaled_nv = &self.x_nv * curvature_n.sqrt().unsqueeze(-1);
        let hessian_vv = scaled_nv.tr().matmul(&scaled_nv) + self.ridge_v.diag(0);
        // the system is small, and the CPU's libtorch always has a solver
        let lower_vv = hessian_vv.to_device(Device::Cpu).linalg_cholesky(false);
        let right_v1 = (-&gradient).to_device(Device::Cpu).unsqueeze(-1);
        let direction = right_v1.cholesky_solve(&lower_vv, false).squeeze_dim(-1);
        (gradient, direction.to_device(v.device()))
    }
}
