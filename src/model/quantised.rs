//! The base's products in 8 bits (`train.base_products`).

use anyhow::{Result, bail};
use tch::Device;

use super::RoutedModel;
use super::block::RoutedBlock;
use super::fused::pack::QUANTISED_COLUMNS;
use crate::ffi;

impl RoutedModel {
    /// Quantises the base's linear layers for forward passes with [`BaseProducts::Fp8`], beside the
    /// weights themselves. This takes two bytes for each of their numbers.
    ///
    /// [`BaseProducts::Fp8`]: crate::config::BaseProducts::Fp8
    ///
    /// # Errors
    /// If the fused operations do not compute all blocks, or if the device has no products in FP8
    /// for these widths.
    pub fn quantise_base(&mut self) -> Result<()> {
        let _no_grad = tch::no_grad_guard();
        if let Some(reason) = self.why_not_quantised()? {
            bail!("`train.base_products = \"fp8\"` does not work here: {reason}");
        }
        for (block, experts) in self.decoder.blocks.iter().zip(&mut self.experts) {
            for product in experts.fused.iter_mut().flatten() {
                product.quantise(block)?;
            }
        }
        Ok(())
    }

    /// Why the base's products cannot be computed in FP8; `None` if they can.
    fn why_not_quantised(&self) -> Result<Option<String>> {
        if !self.fuses_blocks() {
            return Ok(Some("it needs a GPU, or a GPT-2 on the CPU".into()));
        }
        if self.routed_blocks().any(RoutedBlock::has_dora) {
            return Ok(Some("some experts are DoRA experts".into()));
        }
        if self.skips_experts() {
            return Ok(Some("top-k routing skips experts on this device".into()));
        }
        let Device::Cuda(device) = self.device() else {
            tracing::warn!("on the CPU, products in FP8 are simulated, and slower than exact ones");
            return Ok(None);
        };
        let [major, minor] = ffi::cuda::capability(device)?;
        if [major, minor] < [8, 9] {
            return Ok(Some(format!(
                "it needs a GPU of compute capability 8.9 or higher, and cuda:{device} has \
                 {major}.{minor}"
            )));
        }
        let spec = &self.decoder.spec;
        let sizes = spec.modules().iter().map(|&module| spec.linear_shape(module));
        let odd = sizes.flat_map(|(i, o)| [i, o]).find(|size| size % QUANTISED_COLUMNS != 0);
        Ok(odd.map(|size| {
            format!(
                "the sizes of the base's linear layers must be multiples of {QUANTISED_COLUMNS}, \
                 and one is {size}"
            )
        }))
    }
}
