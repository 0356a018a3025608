//! The dtype of numbers that must be precise.

use tch::Kind;

/// The dtype of trained parameters, and of other numbers that must be precise, in a model that
/// computes in `kind`: f64 if `kind` is f64, otherwise f32.
pub fn wide(kind: Kind) -> Kind {
    if kind == Kind::Double { Kind::Double } else { Kind::Float }
}
