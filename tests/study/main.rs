//! Studies: the configs of their arms, what they report, and whole studies of a tiny base.

mod arms;
mod report;
mod whole;
