//! Operations on numbers and short values of the host.

use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Result, bail};
use tch::Tensor;

use super::{LOOK, World};

/// What every process must have alike: its name in messages, and its value.
pub type Fact = (&'static str, String);

impl World {
    /// The sums of some numbers over all processes, in f64. A process that has none passes an empty
    /// list, which counts as zeros.
    pub fn sum(&self, numbers: &mut Vec<f64>) -> Result<()> {
        if self.is_single() {
            return Ok(());
        }
        // each length once: the others learn how long the list is from those that have one
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

    /// The value of each process, by its number. The values go through the store, so they should be
    /// short and seldom.
    pub fn exchange(&self, own: &[u8]) -> Result<Vec<Vec<u8>>> {
        let Some(link) = &self.link else { return Ok(vec![own.to_vec()]) };
        let number = link.num_exchanges.fetch_add(1, Ordering::Relaxed);
        link.watch.check()?;
        link.watch.begin();
        link.store.set(&link.keys.value(number, self.dist_rank()), own)?;
        // all processes have read the values before the last exchange but one
        if number >= 2 {
            link.store.delete(&link.keys.value(number - 2, self.dist_rank()))?;
        }
        let mut values = Vec::with_capacity(self.size());
        for dist_rank in 0..self.size() {
            let key = link.keys.value(number, dist_rank);
            link.wait(&mut || {
                let is_set = link.store.has(&key)?;
                if !is_set {
                    std::thread::sleep(LOOK.min(Duration::from_millis(5)));
                }
                Ok(is_set)
            })?;
            values.push(link.store.get(&key)?);
        }
        Ok(values)
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
