//! Reading a file's metadata and where its tensors lie.

use anyhow::{Context, Result, bail};

use super::{MAGIC, VERSION, Value, ValueType, aligned};

/// What a file says of itself.
pub(super) struct Header {
    pub metadata: Vec<(String, Value)>,
    pub tensors: Vec<TensorInfo>,
}

/// A tensor of a file.
pub(super) struct TensorInfo {
    pub name: String,
    /// In libtorch's order.
    pub shape: Vec<i64>,
    /// The number of the dtype in files.
    pub dtype: u32,
    /// The first byte of its numbers, counted from the begin of the file.
    pub at: usize,
}

/// Reads the header of the file that `bytes` are.
pub(super) fn read(bytes: &[u8]) -> Result<Header> {
    let mut bytes_left = Bytes { bytes, at: 0 };
    let found = &mut bytes_left;
    if found.take(MAGIC.len())? != MAGIC || found.u32()? != VERSION {
        bail!("it is no GGUF file of version {VERSION}");
    }
    let (num_tensors, num_pairs) = (found.u64()?, found.u64()?);
    let metadata = (0..num_pairs).map(|_| Ok((found.text()?, found.value()?)));
    let metadata = metadata.collect::<Result<_>>()?;
    let mut tensors: Vec<TensorInfo> =
        (0..num_tensors).map(|_| found.tensor()).collect::<Result<_>>()?;
    let data = aligned(found.at as u64) as usize;
    tensors.iter_mut().for_each(|tensor| tensor.at += data);
    Ok(Header { metadata, tensors })
}

/// The bytes of a file from some place on.
struct Bytes<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Bytes<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8]> {
        let taken = self.bytes.get(self.at..).and_then(|left| left.get(..count));
        self.at += count;
        taken.with_context(|| format!("it ends before byte {}", self.at))
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        Ok(self.take(N)?.try_into().expect("so many were taken"))
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    fn f32(&mut self) -> Result<f32> {
        Ok(f32::from_le_bytes(self.array()?))
    }

    fn text(&mut self) -> Result<String> {
        let length = self.u64()? as usize;
        Ok(String::from_utf8(self.take(length)?.to_vec())?)
    }

    fn kind(&mut self) -> Result<ValueType> {
        use ValueType::{Array, Bool, F32, I32, String, U32};
        let number = self.u32()?;
        let known = [U32, I32, F32, Bool, String, Array];
        let found = known.into_iter().find(|kind| *kind as u32 == number);
        found.with_context(|| format!("it has a value of type {number}"))
    }

    fn value(&mut self) -> Result<Value> {
        Ok(match self.kind()? {
            ValueType::U32 => Value::U32(self.u32()?),
            ValueType::F32 => Value::F32(self.f32()?),
            ValueType::Bool => Value::Bool(self.array::<1>()? == [1]),
            ValueType::String => Value::String(self.text()?),
            ValueType::I32 => bail!("it has a value of a type that is written in arrays only"),
            ValueType::Array => {
                let (kind, count) = (self.kind()?, self.u64()?);
                match kind {
                    ValueType::U32 => Value::U32s(self.items(count, Self::u32)?),
                    ValueType::I32 => {
                        Value::I32s(self.items(count, |b| Ok(i32::from_le_bytes(b.array()?)))?)
                    }
                    ValueType::F32 => Value::F32s(self.items(count, Self::f32)?),
                    ValueType::String => Value::Strings(self.items(count, Self::text)?),
                    kind => bail!("it has an array of {kind:?}"),
                }
            }
        })
    }

    fn items<T>(&mut self, count: u64, read: impl Fn(&mut Self) -> Result<T>) -> Result<Vec<T>> {
        (0..count).map(|_| read(self)).collect()
    }

    fn tensor(&mut self) -> Result<TensorInfo> {
        let name = self.text()?;
        let num_dims = self.u32()?;
        let mut shape: Vec<i64> =
            (0..num_dims).map(|_| Ok(self.u64()? as i64)).collect::<Result<_>>()?;
        shape.reverse();
        let (dtype, at) = (self.u32()?, self.u64()? as usize);
        Ok(TensorInfo { name, shape, dtype, at })
    }
}
