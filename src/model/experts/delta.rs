//! The update of an expert before scaling, as factors. It is `B A` or, if the expert starts from
//! the base's weight (PiSSA, OLoRA), `B A - B0 A0`:
//!
//! ```text
//! precise   (B - B0) A + B0 (A - A0)
//! plain     B A - B0 A0
//! ```
//!
//! The precise form is 0 to the bit at the start. It subtracts before it multiplies, since bf16
//! would round away the small difference of two large products. The plain form is one LoRA of twice
//! the rank, as by PEFT's `subtract_mutated_init`.
//!
//! Letters of shapes: `r` rank, `i` in, `o` out.

use tch::Tensor;

/// An expert's factors and their initial values.
#[derive(Debug)]
pub(crate) struct Delta {
    /// `A`, `[r, i]`.
    pub a: Tensor,
    /// `B^T`, `[r, o]`.
    pub b: Tensor,
    /// `A0`, `[r, i]`, and `B0^T`, `[r, o]`; `None` if the expert does not start from the base's
    /// weight.
    pub start: Option<(Tensor, Tensor)>,
}

impl Delta {
    /// `A - A0` and `(B - B0)^T`; `None` if the expert does not start from the base's weight.
    pub fn moved(&self) -> Option<(Tensor, Tensor)> {
        let (a0, b0) = self.start.as_ref()?;
        Some((&self.a - a0, &self.b - b0))
    }

    /// The update as one matrix, `[o, i]`.
    pub fn product(&self) -> Tensor {
        let product = |a: &Tensor, b: &Tensor| b.tr().matmul(a);
        match &self.start {
            Some((a0, b0)) => product(&self.a, &self.b) - product(a0, b0),
            None => product(&self.a, &self.b),
        }
    }

    /// The factors of the precise form, `[r or 2 r, i]` and `[r or 2 r, o]`.
    pub fn precise(&self) -> (Tensor, Tensor) {
        match (self.moved(), &self.start) {
            (Some((a, b)), Some((_, b0))) => {
                (Tensor::cat(&[&self.a, &a], 0), Tensor::cat(&[&b, b0], 0))
            }
            _ => (self.a.shallow_clone(), self.b.shallow_clone()),
        }
    }

    /// The factors of the plain form, `[r or 2 r, i]` and `[r or 2 r, o]`.
    pub fn plain(&self) -> (Tensor, Tensor) {
        match &self.start {
            Some((a0, b0)) => (Tensor::cat(&[&self.a, a0], 0), Tensor::cat(&[&self.b, &-b0], 0)),
            None => (self.a.shallow_clone(), self.b.shallow_clone()),
        }
    }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;

    #[test]
    fn both_forms_are_the_difference_of_two_products() {
        let new = |size: [i64; 2]| Tensor::randn(size, (Kind::Double, Device::Cpu));
        let delta =
            Delta { a: new([3, 5]), b: new([3, 7]), start: Some((new([3, 5]), new([3, 7]))) };
        let (a0, b0) = delta.start.as_ref().expect("it has one");
        let expected = delta.b.tr().matmul(&delta.a) - b0.tr().matmul(a0);
        assert!(delta.product().allclose(&expected, 1e-12, 1e-12, false));
        for (a, b) in [delta.precise(), delta.plain()] {
            assert!(b.tr().matmul(&a).allclose(&expected, 1e-12, 1e-12, false));
        }
        let fresh = Delta {
            a: a0.shallow_clone(),
            b: b0.shallow_clone(),
            start: Some((a0.copy(), b0.copy())),
        };
        let (a, b) = fresh.precise();
        assert_eq!(b.tr().matmul(&a).abs().max().double_value(&[]), 0.0);
    }
}
