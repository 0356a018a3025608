//! Reads, maps, writes and hashes tensors in safetensors files. Nothing is unpickled.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, bail};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use tch::{Device, Kind, Tensor};

use crate::ffi::FileBytes;
use crate::{durable, ffi};

/// Size in bytes of the header's length, with which a safetensors file begins.
const HEADER_LEN: usize = 8;

/// A safetensors file in memory. It is mapped if its numbers are aligned in the file, and otherwise
/// read.
pub fn open(file: &Path) -> Result<FileBytes> {
    let bytes = FileBytes::map(file)?;
    // a file has the header's length, the header and the numbers; parsing reports a broken file
    let header: Option<[u8; HEADER_LEN]> = bytes.get(..HEADER_LEN).and_then(|b| b.try_into().ok());
    let start = header.map_or(0, u64::from_le_bytes).saturating_add(HEADER_LEN as u64);
    match usize::try_from(start) {
        Ok(start) if start < bytes.len() && !start.is_multiple_of(HEADER_LEN) => {
            FileBytes::read(file, start)
        }
        _ => Ok(bytes),
    }
}

/// Passes each tensor of a safetensors file to `take`, in the order of names.
pub(crate) fn for_each_tensor(
    bytes: &[u8],
    file: &Path,
    mut take: impl FnMut(&str, &TensorView<'_>) -> Result<()>,
) -> Result<()> {
    let parsed = SafeTensors::deserialize(bytes)
        .with_context(|| format!("`{}` is no whole safetensors file", file.display()))?;
    let mut views: Vec<_> = parsed.iter().collect();
    views.sort_unstable_by_key(|(name, _)| *name);
    for (name, view) in views {
        take(name, &view)?;
    }
    Ok(())
}

/// Reads every tensor of a safetensors file to the CPU, in its stored dtype.
pub fn read_tensors(file: &Path) -> Result<BTreeMap<String, Tensor>> {
    let mut tensors = BTreeMap::new();
    for_each_tensor(&ffi::map_file(file)?, file, |name, view| {
        let tensor = copy(view).with_context(|| format!("tensor `{name}`"))?;
        tensors.insert(name.to_owned(), tensor);
        Ok(())
    })?;
    Ok(tensors)
}

/// Checks that a tensor is floating-point and that all its numbers are finite.
pub(crate) fn check_numbers(name: &str, tensor: &Tensor) -> Result<()> {
    if !matches!(tensor.kind(), Kind::Float | Kind::Half | Kind::BFloat16 | Kind::Double) {
        bail!("tensor `{name}` has dtype `{:?}`; use f32, f16 or bf16", tensor.kind());
    }
    check_finite(name, tensor)
}

/// Checks that the numbers of a tensor are finite, in one pass without a copy.
///
/// # Errors
/// A NaN or an infinity, by the tensor's name.
pub(crate) fn check_finite(name: &str, tensor: &Tensor) -> Result<()> {
    if tensor.numel() == 0 || !tensor.is_floating_point() {
        return Ok(());
    }
    // a NaN is both the least and the largest number of a tensor that has one
    let (least, largest) = tensor.detach().f_aminmax(None, false)?;
    if !least.double_value(&[]).is_finite() || !largest.double_value(&[]).is_finite() {
        bail!("tensor `{name}` holds numbers that are not finite");
    }
    Ok(())
}

/// Checks that the numbers of all tensors are finite.
pub(crate) fn check_all_finite(tensors: &BTreeMap<String, Tensor>) -> Result<()> {
    tensors.iter().try_for_each(|(name, tensor)| check_finite(name, tensor))
}

/// Does the same as [`read_tensors`], and checks that all numbers are finite.
pub(crate) fn read_numbers(file: &Path) -> Result<BTreeMap<String, Tensor>> {
    let tensors = read_tensors(file)?;
    check_all_finite(&tensors).with_context(|| format!("in `{}`", file.display()))?;
    Ok(tensors)
}

/// A tensor that shares its bytes in `bytes`, or a copy if they are not aligned.
pub fn share(bytes: &FileBytes, view: &TensorView<'_>) -> Result<Tensor> {
    let (kind, shape) = (kind_of(view)?, shape_of(view));
    let at = view.data().as_ptr();
    if at.align_offset(kind.elt_size_in_bytes()) != 0 {
        return copy(view);
    }
    bytes.tensor(at.addr() - bytes.as_ptr().addr(), &shape, kind)
}

fn copy(view: &TensorView<'_>) -> Result<Tensor> {
    Ok(Tensor::f_from_data_size(view.data(), &shape_of(view), kind_of(view)?)?)
}

fn shape_of(view: &TensorView<'_>) -> Vec<i64> {
    view.shape().iter().map(|&n| n as i64).collect()
}

fn kind_of(view: &TensorView<'_>) -> Result<Kind> {
    Ok(match view.dtype() {
        Dtype::F32 => Kind::Float,
        Dtype::F16 => Kind::Half,
        Dtype::BF16 => Kind::BFloat16,
        Dtype::F64 => Kind::Double,
        Dtype::I64 => Kind::Int64,
        Dtype::U8 => Kind::Uint8,
        Dtype::BOOL => Kind::Bool,
        other => bail!("has dtype `{other:?}`; use f32, f16 or bf16"),
    })
}

/// A tensor that is ready to be written to a file.
struct Stored {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl safetensors::View for &Stored {
    fn dtype(&self) -> Dtype {
        self.dtype
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn data(&self) -> std::borrow::Cow<'_, [u8]> {
        (&self.bytes).into()
    }
    fn data_len(&self) -> usize {
        self.bytes.len()
    }
}

/// Writes `tensors` to a safetensors file and waits until it is on disk. Its metadata are
/// `format: pt`, which transformers and PEFT require.
pub fn write_tensors<'a>(
    file: &Path,
    tensors: impl IntoIterator<Item = (&'a str, &'a Tensor)>,
) -> Result<()> {
    let stored: Vec<(&str, Stored)> = tensors
        .into_iter()
        .map(|(name, tensor)| Ok((name, store(tensor)?)))
        .collect::<Result<_>>()?;
    let metadata = std::collections::HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let views = stored.iter().map(|(name, stored)| (*name, stored));
    let bytes = safetensors::serialize(views, Some(metadata)).context("cannot pack the tensors")?;
    durable::write(file, &bytes)
}

fn store(tensor: &Tensor) -> Result<Stored> {
    let tensor = tensor.detach().to_device(Device::Cpu).contiguous();
    let dtype = match tensor.kind() {
        Kind::Float => Dtype::F32,
        Kind::Half => Dtype::F16,
        Kind::BFloat16 => Dtype::BF16,
        Kind::Double => Dtype::F64,
        Kind::Int64 => Dtype::I64,
        Kind::Uint8 => Dtype::U8,
        Kind::Bool => Dtype::BOOL,
        other => bail!("no safetensors dtype for {other:?}"),
    };
    let shape = tensor.size().iter().map(|&n| n as usize).collect();
    Ok(Stored { dtype, shape, bytes: tensor_bytes(&tensor)? })
}

/// Adds the name, dtype, shape and bytes of each tensor to a hash, on all cores.
pub(crate) fn hash_tensors<'a, N: AsRef<str> + 'a>(
    hasher: &mut blake3::Hasher,
    tensors: impl IntoIterator<Item = &'a (N, Tensor)>,
) -> Result<()> {
    for (name, tensor) in tensors {
        // a view is laid out on its own device, which may be much faster at it
        let tensor = tensor.detach().contiguous().to_device(Device::Cpu);
        let (name, kind, size) = (name.as_ref(), tensor.kind(), tensor.size());
        hasher.update(format!("{name} {kind:?} {size:?}\n").as_bytes());
        ffi::with_bytes(&tensor, |bytes| hasher.update_rayon(bytes));
    }
    Ok(())
}

/// The bytes of a contiguous CPU tensor.
pub(crate) fn tensor_bytes(tensor: &Tensor) -> Result<Vec<u8>> {
    let mut bytes = vec![0u8; tensor.numel() * tensor.kind().elt_size_in_bytes()];
    tensor.f_copy_data_u8(&mut bytes, tensor.numel())?;
    Ok(bytes)
}
