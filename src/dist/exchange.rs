//! Operations on numbers and short values of the host.

use anyhow::{Context, Result, bail};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tch::Tensor;

use super::World;

/// What every process must have alike: its name in messages, and its value.
pub type Fact = (&'static str, String);

impl World {
    /// The sums of some numbers over all processes, in f64. A process that has none passes an empty
    /// list, which counts as zeros.
    pub fn sum(&self, numbers: &mut Vec<f64>) -> Result<()> {
        if self.is_single() {
            return Ok(());
        }
        // processes without numbers learn from the others how many there are
        let mut len = vec![0.0; self.size()];
        len[self.dist_rank()] = numbers.len() as f64;
        let lens = Tensor::from_slice(&len);
        self.all_reduce(std::slice::from_ref(&lens))?;
        let lens = Vec::<f64>::try_from(lens)?;
        let longest = lens.iter().copied().fold(0.0, f64::max) as usize;
        if let Some(other) = lens.iter().position(|&len| len > 0.0 && len as usize != longest) {
            bail!("rank {other} adds {} numbers, another rank {longest}", lens[other]);
        }
        numbers.resize(longest, 0.0);
        if longest > 0 {
            let sums = Tensor::from_slice(numbers);
            self.all_reduce(std::slice::from_ref(&sums))?;
            *numbers = Vec::<f64>::try_from(sums)?;
        }
        Ok(())
    }

    /// Whether the flag is set in any process.
    pub fn any(&self, flag: bool) -> Result<bool> {
        if self.is_single() {
            return Ok(flag);
        }
        let count = Tensor::from_slice(&[f64::from(u8::from(flag))]);
        self.all_reduce(std::slice::from_ref(&count))?;
        Ok(count.double_value(&[0]) > 0.0)
    }

    /// The first process's number.
    pub fn first(&self, number: f64) -> Result<f64> {
        let number = Tensor::from_slice(&[number]);
        self.broadcast(std::slice::from_ref(&number))?;
        Ok(number.double_value(&[0]))
    }

    /// Replaces tensors on any device by those of the first process.
    pub fn spread(&self, tensors: &[Tensor]) -> Result<()> {
        if self.is_single() {
            return Ok(());
        }
        let _no_grad = tch::no_grad_guard();
        for tensor in tensors {
            let copy = tensor.detach().contiguous();
            self.broadcast(std::slice::from_ref(&copy))?;
            tensor.detach().copy_(&copy);
        }
        Ok(())
    }

    /// The items that this process takes if the processes take them in turn.
    pub fn own_turns<T>(&self, items: Vec<T>) -> Vec<T> {
        items.into_iter().skip(self.dist_rank()).step_by(self.size()).collect()
    }

    /// What the processes have made of their [`Self::own_turns`], one value for each item, in the
    /// order of all items. It waits for the slowest process, since one may be long done when
    /// another begins its last item.
    pub fn join_turns<T: Serialize + DeserializeOwned>(&self, own: Vec<T>) -> Result<Vec<T>> {
        if self.is_single() {
            return Ok(own);
        }
        self.meet()?;
        let all = self.exchange(&serde_json::to_vec(&own)?)?;
        let read = |own: &Vec<u8>| Ok(serde_json::from_slice::<Vec<T>>(own)?.into_iter());
        let mut shares = all.iter().map(read).collect::<Result<Vec<_>>>()?;
        let num_items: usize = shares.iter().map(ExactSizeIterator::len).sum();
        let mut next = |index: usize| shares[index % all.len()].next();
        (0..num_items).map(|index| next(index).context("a process has left out an item")).collect()
    }

    /// The value of each process, by its number. Its length may differ from process to process.
    pub fn exchange(&self, own: &[u8]) -> Result<Vec<Vec<u8>>> {
        if self.is_single() {
            return Ok(vec![own.to_vec()]);
        }
        let mut lens = vec![0_i64; self.size()];
        lens[self.dist_rank()] = own.len() as i64;
        let lens = Tensor::from_slice(&lens);
        self.all_reduce(std::slice::from_ref(&lens))?;
        let lens = Vec::<i64>::try_from(lens)?;
        // each process fills its place and leaves zeros in those of the others
        let mut bytes = vec![0_u8; lens.iter().sum::<i64>() as usize];
        let start = lens[..self.dist_rank()].iter().sum::<i64>() as usize;
        bytes[start..start + own.len()].copy_from_slice(own);
        if !bytes.is_empty() {
            let all = Tensor::from_slice(&bytes);
            self.all_reduce(std::slice::from_ref(&all))?;
            bytes = Vec::<u8>::try_from(all)?;
        }
        let mut rest = bytes.as_slice();
        let part = |len: &i64| {
            let (part, after) = rest.split_at(*len as usize);
            rest = after;
            part.to_vec()
        };
        Ok(lens.iter().map(part).collect())
    }

    /// Checks that all processes have the same facts.
    ///
    /// # Errors
    /// Names the first process and fact that differ from those of the first process.
    pub fn agree(&self, facts: &[Fact]) -> Result<()> {
        if self.is_single() {
            return Ok(());
        }
        let own = serde_json::to_vec(facts)?;
        let values = self.exchange(&own)?;
        let read =
            |value: &[u8]| -> Result<Vec<(String, String)>> { Ok(serde_json::from_slice(value)?) };
        let first = read(&values[0])?;
        for (dist_rank, value) in values.iter().enumerate().skip(1) {
            let theirs = read(value)?;
            let pairs = first.iter().zip(&theirs);
            if let Some(((name, of_first), (_, own))) = pairs.clone().find(|(a, b)| a != b) {
                bail!(
                    "rank {dist_rank} differs from rank 0 in its {name}: {}\nhint: all processes \
                     need the same version, config, base and data",
                    difference(own, of_first)
                );
            }
            if first.len() != theirs.len() {
                bail!("rank {dist_rank} differs from rank 0 in its version");
            }
        }
        Ok(())
    }
}

/// The first lines in which two values differ.
fn difference(own: &str, of_first: &str) -> String {
    let mut lines = own.lines().zip(of_first.lines());
    let (own, of_first) = lines.find(|(a, b)| a != b).unwrap_or((own, of_first));
    format!("`{own}`, and rank 0 has `{of_first}`")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_is_alone_keeps_what_it_has() -> Result<()> {
        let world = World::single();
        let mut numbers = vec![1.0, 2.0];
        world.sum(&mut numbers)?;
        assert_eq!(numbers, [1.0, 2.0]);
        assert_eq!((world.any(true)?, world.any(false)?, world.first(3.0)?), (true, false, 3.0));
        assert_eq!(world.exchange(b"a")?, [b"a"]);
        world.agree(&[("config", "x".into())])?;
        world.leave(None)
    }

    #[test]
    fn the_first_line_that_differs_is_named() {
        let text = difference("a = 1\nb = 2\nc = 3", "a = 1\nb = 5\nc = 4");
        assert_eq!(text, "`b = 2`, and rank 0 has `b = 5`");
    }
}
