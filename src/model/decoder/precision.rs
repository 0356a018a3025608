//! The dtype of what must be precise.

use tch::Kind;

/// The dtype of what is trained and of what must be precise beside a model that computes in `kind`: f32,
/// or f64 beside f64.
pub fn wide(kind: Kind) -> Kind {
    if kind == Kind::Double { Kind::Double } else { Kind::Float }
}
