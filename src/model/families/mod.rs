//! The families of bases: how each family writes its `config.json`, names its tensors and lays them
//! out.

pub mod gpt2;
pub mod load;
