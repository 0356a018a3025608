//! A study: whether routing helps on given data, by arms that get the same chances.
pub mod arms;
pub mod statistics;
