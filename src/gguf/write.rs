//! Writing a file, one tensor after another, and comparing it with what was to be written.

use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result, bail};
use tch::Device;

use super::read::read;
use super::{
    ALIGNMENT, GgufFile, MAGIC, TensorSource, VERSION, Value, ValueType, aligned, type_of,
};
use crate::durable;
use crate::ffi::FileBytes;
use crate::tensor_file::tensor_bytes;

impl GgufFile<'_> {
    /// Writes the file and waits until it is on disk. It is read back and compared.
    ///
    /// # Errors
    /// A number that the dtype of its tensor cannot hold; the message names the tensor.
    pub fn write(&self, path: &Path) -> Result<()> {
        let header = self.header()?;
        durable::stream(path, |file| {
            file.write_all(&header)?;
            pad(file, header.len() as u64)?;
            for tensor in &self.tensors {
                file.write_all(&tensor.bytes()?)?;
                pad(file, tensor.num_bytes())?;
            }
            Ok(())
        })?;
        self.check(path).with_context(|| format!("`{}` was written", path.display()))
    }

    fn header(&self) -> Result<Vec<u8>> {
        let mut out = MAGIC.to_vec();
        out.extend(VERSION.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            put_text(&mut out, key);
            put_value(&mut out, value);
        }
        let mut offset = 0_u64;
        for tensor in &self.tensors {
            put_text(&mut out, &tensor.name);
            out.extend((tensor.shape.len() as u32).to_le_bytes());
            for size in tensor.shape.iter().rev() {
                out.extend((*size as u64).to_le_bytes());
            }
            out.extend(type_of(tensor.kind)?.to_le_bytes());
            out.extend(offset.to_le_bytes());
            offset += aligned(tensor.num_bytes());
        }
        Ok(out)
    }

    /// Checks that the file at `path` holds what it should.
    fn check(&self, path: &Path) -> Result<()> {
        let bytes = FileBytes::map(path)?;
        let found = read(&bytes).context("but cannot be read back")?;
        if found.metadata != self.metadata {
            bail!("but its metadata read back differently");
        }
        if found.tensors.len() != self.tensors.len() {
            bail!("but holds other tensors");
        }
        for (found, tensor) in found.tensors.iter().zip(&self.tensors) {
            let same = found.name == tensor.name
                && found.shape == tensor.shape
                && found.dtype == type_of(tensor.kind)?
                && bytes.get(found.at..found.at + tensor.num_bytes() as usize)
                    == Some(&tensor.bytes()?[..]);
            if !same {
                bail!("but tensor `{}` reads back differently", tensor.name);
            }
        }
        Ok(())
    }
}

impl TensorSource<'_> {
    /// The tensor's numbers in the file's dtype.
    fn bytes(&self) -> Result<Vec<u8>> {
        let tensor = (self.make)().detach().to_device(Device::Cpu);
        assert_eq!(tensor.size(), self.shape, "`{}` has the shape that was promised", self.name);
        let tensor = tensor.to_kind(self.kind).contiguous();
        if !bool::try_from(tensor.isfinite().all())? {
            bail!(
                "tensor `{}` holds numbers that {:?} cannot: they are infinite or not a number\n\
                 hint: `--save-dtype bf16` or `f32` holds larger numbers than `f16`",
                self.name,
                self.kind
            );
        }
        tensor_bytes(&tensor)
    }
}

fn pad(file: &mut dyn Write, written: u64) -> Result<()> {
    let zeros = [0; ALIGNMENT as usize];
    Ok(file.write_all(&zeros[..(aligned(written) - written) as usize])?)
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn put_type(out: &mut Vec<u8>, kind: ValueType) {
    out.extend((kind as u32).to_le_bytes());
}

fn put_array<T>(out: &mut Vec<u8>, kind: ValueType, items: &[T], put: impl Fn(&mut Vec<u8>, &T)) {
    put_type(out, ValueType::Array);
    put_type(out, kind);
    out.extend((items.len() as u64).to_le_bytes());
    items.iter().for_each(|item| put(out, item));
}

fn put_value(out: &mut Vec<u8>, value: &Value) {
    match value {
        Value::U32(number) => {
            put_type(out, ValueType::U32);
            out.extend(number.to_le_bytes());
        }
        Value::F32(number) => {
            put_type(out, ValueType::F32);
            out.extend(number.to_le_bytes());
        }
        Value::Bool(flag) => {
            put_type(out, ValueType::Bool);
            out.push(u8::from(*flag));
        }
        Value::String(text) => {
            put_type(out, ValueType::String);
            put_text(out, text);
        }
        Value::U32s(items) => {
            put_array(out, ValueType::U32, items, |out, item| out.extend(item.to_le_bytes()));
        }
        Value::I32s(items) => {
            put_array(out, ValueType::I32, items, |out, item| out.extend(item.to_le_bytes()));
        }
        Value::F32s(items) => {
            put_array(out, ValueType::F32, items, |out, item| out.extend(item.to_le_bytes()));
        }
        Value::Strings(items) => {
            put_array(out, ValueType::String, items, |out, item| put_text(out, item));
        }
    }
}
