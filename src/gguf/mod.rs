//! GGUF, the format of llama.cpp's files, in version 3 (ggml's `docs/gguf.md`). All numbers are
//! little-endian.
//!
//! ```text
//! file      "GGUF"  u32 3  u64 number of tensors  u64 number of pairs
//!           pairs  tensor infos  padding  data
//! pair      string key  u32 type  value
//! tensor    string name  u32 number of dimensions  u64 dimensions..  u32 type  u64 offset
//! string    u64 length in bytes  UTF-8
//! array     u32 type of the items  u64 number of items  items..
//! ```
//!
//! The data and each tensor in it begin at multiples of `ALIGNMENT`, and offsets count from the
//! begin of the data. A tensor's dimensions stand in reverse order: a weight `[out, in]` has the
//! dimensions `in, out`.

mod read;
mod write;

use anyhow::{Result, bail};
use tch::{Kind, Tensor};

/// The first bytes of a file.
const MAGIC: &[u8; 4] = b"GGUF";
/// The version of the format.
const VERSION: u32 = 3;
/// What the offset of each tensor is a multiple of, in bytes. It is the format's default.
const ALIGNMENT: u64 = 32;

/// A value of the metadata.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// A count or an id.
    U32(u32),
    /// A number.
    F32(f32),
    /// A flag.
    Bool(bool),
    /// A text.
    String(String),
    /// Ids.
    U32s(Vec<u32>),
    /// Kinds of tokens.
    I32s(Vec<i32>),
    /// Scores of tokens.
    F32s(Vec<f32>),
    /// Texts.
    Strings(Vec<String>),
}

/// A type of the metadata's values, by its number in files.
#[repr(u32)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ValueType {
    U32 = 4,
    I32 = 5,
    F32 = 6,
    Bool = 7,
    String = 8,
    Array = 9,
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Self::String(text.to_owned())
    }
}

/// A tensor that is to be written. It is made when its turn comes, so that one at a time is in
/// memory.
pub(crate) struct TensorSource<'a> {
    /// The name, such as `blk.0.attn_q.weight`.
    pub name: String,
    /// The shape in libtorch's order, such as `[out, in]`.
    pub shape: Vec<i64>,
    /// The dtype in the file: f32, f16 or bf16.
    pub kind: Kind,
    /// Makes the tensor, of that shape, in any dtype and on any device.
    pub make: Box<dyn Fn() -> Tensor + 'a>,
}

/// A file that is to be written.
#[derive(Default)]
pub(crate) struct GgufFile<'a> {
    /// The metadata, in the order of the file.
    pub metadata: Vec<(String, Value)>,
    /// The tensors, in the order of the file.
    pub tensors: Vec<TensorSource<'a>>,
}

/// The number of a dtype in files (`ggml_type`).
fn type_of(kind: Kind) -> Result<u32> {
    Ok(match kind {
        Kind::Float => 0,
        Kind::Half => 1,
        Kind::BFloat16 => 30,
        other => bail!("no dtype of GGUF for {other:?}"),
    })
}

/// The next multiple of [`ALIGNMENT`].
fn aligned(bytes: u64) -> u64 {
    bytes.next_multiple_of(ALIGNMENT)
}

impl TensorSource<'_> {
    /// The tensor's size in the file.
    fn num_bytes(&self) -> u64 {
        self.shape.iter().product::<i64>() as u64 * self.kind.elt_size_in_bytes() as u64
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;
    use tch::Device;

    use super::*;

    fn value() -> impl Strategy<Value = Value> {
        prop_oneof![
            any::<u32>().prop_map(Value::U32),
            (-1e30_f32..1e30).prop_map(Value::F32),
            any::<bool>().prop_map(Value::Bool),
            any::<String>().prop_map(Value::String),
            vec(any::<u32>(), 0..5).prop_map(Value::U32s),
            vec(any::<i32>(), 0..5).prop_map(Value::I32s),
            vec(-1e30_f32..1e30, 0..5).prop_map(Value::F32s),
            vec(any::<String>(), 0..5).prop_map(Value::Strings),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(50))]

        /// Writing reads the file back and compares it, so that an `Ok` says they are equal.
        #[test]
        fn what_is_written_reads_back(
            values in vec(value(), 0..6),
            shapes in vec(vec(1_i64..6, 1..4), 0..5),
            kind in 0..3_usize,
        ) {
            let kind = [Kind::Float, Kind::Half, Kind::BFloat16][kind];
            let metadata = values.into_iter().enumerate();
            let tensors = shapes.into_iter().enumerate().map(|(number, shape)| TensorSource {
                name: format!("tensor.{number}"),
                shape: shape.clone(),
                kind,
                make: Box::new(move || {
                    let count = shape.iter().product::<i64>();
                    Tensor::arange(count, (Kind::Float, Device::Cpu)).reshape(&shape)
                }),
            });
            let file = GgufFile {
                metadata: metadata.map(|(n, value)| (format!("key.{n}"), value)).collect(),
                tensors: tensors.collect(),
            };
            let dir = tempfile::tempdir().expect("a folder");
            let path = dir.path().join("file.gguf");
            file.write(&path).expect("it is written and read back");
            // a reader must notice that something is missing
            let whole = fs_err::read(&path).expect("it is there");
            let header = read::read(&whole).expect("it is whole");
            prop_assert_eq!(header.tensors.len(), file.tensors.len());
            prop_assert!(read::read(&whole[..20]).is_err());
        }
    }
}
