//! The base's products in 8 bits (`train.base_products`).

use anyhow::{Result, bail};
use tch::{Device, Kind};

use super::RoutedModel;
use super::decoder::spec::DecoderSpec;
use super::experts::spec::ExpertSpec;
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
        check_quantisable(&self.decoder.spec, &self.specs, self.device())?;
        if !self.fuses_blocks() {
            bail!("{REFUSED}: it needs the fused operations on a frozen base");
        }
        if self.skips_experts() {
            bail!(
                "{REFUSED}: experts that a token does not choose are skipped here\n\
                 hint: set `train.base_products = \"exact\"`, or leave out `router.top_k`"
            );
        }
        match self.device() {
            Device::Cuda(device) if self.kind == Kind::BFloat16 => self.check_products(device)?,
            Device::Cuda(_) => {}
            _ => tracing::warn!(
                "on the CPU, products in FP8 are simulated, and slower than exact ones"
            ),
        }
        for (block, experts) in self.decoder.blocks.iter().zip(&mut self.experts) {
            for product in experts.fused.iter_mut().flatten() {
                product.quantise(block)?;
            }
        }
        Ok(())
    }

    /// Checks that a GPU has products in FP8.
    fn check_products(&self, device: usize) -> Result<()> {
        if !self.has_kernels {
            bail!("{REFUSED}: there are no kernels for this base and GPU, as the log says");
        }
        let [major, minor] = ffi::cuda::capability(device)?;
        if [major, minor] < [8, 9] {
            bail!(
                "{REFUSED}: it needs a GPU of compute capability 8.9 or higher, and cuda:{device} \
                 has {major}.{minor}"
            );
        }
        Ok(())
    }
}

const REFUSED: &str = "`train.base_products = \"fp8\"` does not work here";

/// Checks what the products of a base in FP8 need of its shape, of the experts and of the device.
pub fn check_quantisable(spec: &DecoderSpec, experts: &[ExpertSpec], device: Device) -> Result<()> {
    if !spec.has_fused_blocks(device) {
        bail!("{REFUSED}: on the CPU, it needs a GPT-2");
    }
    if experts.iter().any(|expert| expert.use_dora) {
        bail!("{REFUSED}: some experts are DoRA experts");
    }
    let sizes = spec.modules().iter().map(|&module| spec.linear_shape(module));
    let odd = sizes.flat_map(|(i, o)| [i, o]).find(|size| size % QUANTISED_COLUMNS != 0);
    match odd {
        Some(size) if device.is_cuda() => bail!(
            "{REFUSED}: the sizes of the base's linear layers must be multiples of \
             {QUANTISED_COLUMNS}, and one is {size}"
        ),
        _ => Ok(()),
    }
}
