//! The hashes that say whether what is frozen has stayed as it was.

use std::thread::JoinHandle;

use anyhow::Result;
use tch::{Device, Kind};

use crate::model::RoutedModel;
use crate::model::decoder::Decoder;

/// The hashes of a base on the CPU, which threads compute while its weights go to the device.
pub(super) struct BaseHashes {
    in_f32: JoinHandle<Result<String>>,
    /// In the dtype that the model computes in; `None` if that is f32.
    in_own: Option<JoinHandle<Result<String>>>,
}

impl BaseHashes {
    /// Starts the threads. `own` is the dtype that the model computes in.
    pub fn start(weights: &Decoder, own: Kind) -> Self {
        let spawn = |kind| {
            let weights = weights.shallow_clone();
            std::thread::spawn(move || weights.hash_in(kind))
        };
        Self { in_f32: spawn(Kind::Float), in_own: (own != Kind::Float).then(|| spawn(own)) }
    }

    /// The hash in f32, and that in the dtype that the model computes in.
    pub fn wait(self) -> Result<(String, String)> {
        let joined = |thread: JoinHandle<Result<String>>| {
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        let in_f32 = joined(self.in_f32)?;
        let in_own = self.in_own.map_or_else(|| Ok(in_f32.clone()), joined)?;
        Ok((in_f32, in_own))
    }
}

/// BLAKE3 of everything frozen. `base_hash` is the hash of the base as it was read, in f32 on the
/// CPU, if that is known.
pub(super) fn frozen_hash(model: &RoutedModel, base_hash: Option<String>) -> Result<String> {
    let embedding = &model.base().embedding;
    match base_hash {
        // the model computes with exactly the numbers that were read
        Some(hash) if (embedding.device(), embedding.kind()) == (Device::Cpu, Kind::Float) => {
            model.frozen_hash_beside(hash)
        }
        _ => model.frozen_hash(),
    }
}
