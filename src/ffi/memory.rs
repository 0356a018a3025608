//! Tensors that share the bytes of a file, and access to the bytes of tensors, both without a copy.

use std::ffi::c_void;
use std::ops::Deref;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, ensure};
use memmap2::{MmapMut, MmapOptions};
use tch::{Device, Kind, Tensor};
use torch_sys::C_tensor;

unsafe extern "C" {
    fn dylora_owned_view(
        view: *const C_tensor,
        drop: extern "C" fn(*mut c_void),
        owner: *mut c_void,
    ) -> *mut C_tensor;
}

/// The alignment that [`FileBytes::read`] gives to the byte `at`, in bytes; libtorch's own tensors
/// have the same.
const ALIGNMENT: usize = 64;

/// The least number of bytes that are worth a thread of their own.
const MIN_PART_LEN: usize = 1 << 20;

/// The content of a file, which tensors can share. Writing into such a tensor changes only this
/// process's memory and never the file.
#[derive(Debug, Clone)]
pub struct FileBytes {
    map: Arc<MmapMut>,
    /// The offset at which the file begins in the map.
    start: usize,
    len: usize,
}

impl FileBytes {
    /// Maps a file into memory. A page is read when it is first used, and processes that map the
    /// same file share it. The file must not be written in place while it is mapped. Replacing it
    /// by renaming does not affect the map.
    pub fn map(path: &Path) -> Result<Self> {
        let file = fs_err::File::open(path)?;
        // SAFETY: the map is private; a writer that shrinks the file could end the process, but not
        // corrupt its memory
        let map = unsafe { MmapOptions::new().map_copy(file.file()) };
        let map = map.map_err(|error| anyhow!("cannot map `{}`: {error}", path.display()))?;
        let len = map.len();
        Ok(Self { map: Arc::new(map), start: 0, len })
    }

    /// Reads a file on all cores, and places its byte `at` at a multiple of 64, where libtorch's
    /// own tensors begin too.
    pub fn read(path: &Path, at: usize) -> Result<Self> {
        let file = fs_err::File::open(path)?;
        let len = usize::try_from(file.metadata()?.len())?;
        let start = at.next_multiple_of(ALIGNMENT) - at;
        let mut map = MmapMut::map_anon((start + len).max(1))?;
        // most of the time is spent on touching the pages first, which each core does for its part
        let num_parts = std::thread::available_parallelism().map_or(1, usize::from);
        let part_len = len.div_ceil(num_parts).max(MIN_PART_LEN);
        std::thread::scope(|scope| {
            let parts = map[start..start + len].chunks_mut(part_len).enumerate();
            let read = |(i, part): (usize, &mut [u8])| {
                file.file().read_exact_at(part, (i * part_len) as u64)
            };
            let threads: Vec<_> = parts.map(|part| scope.spawn(move || read(part))).collect();
            let mut done =
                threads.into_iter().map(|t| t.join().expect("reading returns its errors"));
            done.try_for_each(|done| done)
        })
        .with_context(|| format!("cannot read `{}`", path.display()))?;
        Ok(Self { map: Arc::new(map), start, len })
    }

    /// A CPU tensor over the bytes from `offset` on, without a copy. The bytes live as long as the
    /// tensor.
    ///
    /// # Errors
    /// If there are too few bytes, or if they are not aligned to the size of the dtype.
    pub fn tensor(&self, offset: usize, shape: &[i64], kind: Kind) -> Result<Tensor> {
        let element = kind.elt_size_in_bytes();
        let num_bytes = shape
            .iter()
            .try_fold(element, |bytes, &n| bytes.checked_mul(usize::try_from(n).ok()?))
            .and_then(|bytes| bytes.checked_add(offset));
        ensure!(num_bytes.is_some_and(|end| end <= self.len()), "the bytes end too early");
        let data = self[offset..].as_ptr();
        ensure!(data.align_offset(element) == 0, "the bytes are not aligned");
        let mut strides = vec![1; shape.len()];
        for i in (1..shape.len()).rev() {
            strides[i - 1] = strides[i] * shape[i];
        }
        let owner = Box::into_raw(Box::new(Arc::clone(&self.map)));
        // SAFETY: it was checked above that the bytes exist and are aligned; the map is writable
        // memory, and the returned tensor owns a share of it, which it drops once
        unsafe {
            let view = Tensor::from_blob(data, shape, &strides, kind, Device::Cpu);
            super::owned(dylora_owned_view(view.as_ptr(), drop_owner, owner.cast()))
        }
    }
}

impl Deref for FileBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.map[self.start..self.start + self.len]
    }
}

extern "C" fn drop_owner(owner: *mut c_void) {
    // SAFETY: called once, with the pointer that `FileBytes::tensor` got from `Box::into_raw`
    drop(unsafe { Box::from_raw(owner.cast::<Arc<MmapMut>>()) });
}

/// Passes the bytes of a contiguous CPU tensor to `take`, without a copy.
///
/// # Panics
/// If the tensor is not contiguous or not on the CPU.
pub fn with_bytes<T>(tensor: &Tensor, take: impl FnOnce(&[u8]) -> T) -> T {
    assert!(
        tensor.device() == Device::Cpu && tensor.is_contiguous(),
        "bytes lie in a row on the CPU"
    );
    let len = tensor.numel() * tensor.kind().elt_size_in_bytes();
    if len == 0 {
        return take(&[]);
    }
    // SAFETY: a contiguous tensor has this many bytes from its data pointer on; `tensor` keeps them
    // alive, and nothing writes to it while it is borrowed here
    take(unsafe { std::slice::from_raw_parts(tensor.data_ptr().cast(), len) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(bytes: &[u8]) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().expect("a temporary file can be made");
        fs_err::write(file.path(), bytes).expect("it is writable");
        file
    }

    #[test]
    fn tensors_share_the_bytes_and_keep_them() -> Result<()> {
        let numbers = [0.5f32, -1.0, 2.0, 3.0, 4.0, 5.0];
        let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
        for open in [FileBytes::map, |path: &Path| FileBytes::read(path, 4)] {
            let file = file(&bytes);
            let shared = open(file.path())?;
            assert_eq!(*shared, *bytes);
            let tensor = shared.tensor(4, &[2, 2], Kind::Float)?;
            let at = shared[4..].as_ptr();
            assert_eq!(tensor.data_ptr().cast_const().cast(), at, "no copy");
            assert_eq!(with_bytes(&tensor, <[u8]>::to_vec), &bytes[4..20]);
            let map = Arc::clone(&shared.map);
            drop((file, shared));
            assert_eq!(Vec::<f32>::try_from(tensor.get(1))?, &numbers[3..5]);
            assert_eq!(Arc::strong_count(&map), 2);
            drop(tensor);
            assert_eq!(Arc::strong_count(&map), 1, "the tensor gave its share back");
        }
        Ok(())
    }

    #[test]
    fn bytes_are_read_to_where_they_are_aligned() -> Result<()> {
        // the content has several parts, and the last one is short
        let content: Vec<u8> = (0..2 * MIN_PART_LEN as u32 + 5).map(|i| (i / 3) as u8).collect();
        let file = file(&content);
        for at in [0, 1, 63, 64, 99] {
            let bytes = FileBytes::read(file.path(), at)?;
            assert!(*bytes == *content, "{at}");
            assert_eq!(bytes[at..].as_ptr().align_offset(ALIGNMENT), 0, "{at}");
        }
        Ok(())
    }

    #[test]
    fn tensors_beyond_the_bytes_or_off_their_alignment_are_refused() -> Result<()> {
        let bytes = FileBytes::map(file(&[0; 16]).path())?;
        for (offset, shape) in [(0, vec![5]), (16, vec![1]), (8, vec![i64::MAX, 4]), (0, vec![-1])]
        {
            let error = bytes.tensor(offset, &shape, Kind::Float).expect_err("it is too long");
            assert_eq!(error.to_string(), "the bytes end too early", "{shape:?}");
        }
        let error = bytes.tensor(2, &[1], Kind::Float).expect_err("floats lie at multiples of 4");
        assert_eq!(error.to_string(), "the bytes are not aligned");
        assert_eq!(bytes.tensor(16, &[0, 3], Kind::Float)?.size(), [0, 3]);
        Ok(())
    }
}
