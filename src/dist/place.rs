//! The place of a process in a world, by the names of environment variables that torchrun sets and
//! that launchers of other systems can set as well.
//!
//! | variable | meaning |
//! |---|---|
//! | `WORLD_SIZE` | number of processes |
//! | `RANK` | the number of this process among them, from 0 |
//! | `LOCAL_RANK` | its number among those of its machine, from 0; by default 0 |
//! | `MASTER_ADDR`, `MASTER_PORT` | where process 0, or torchrun's agent, holds the store |
//! | `TORCHELASTIC_USE_AGENT_STORE` | `True` if torchrun's agent holds the store |
//! | `TORCHELASTIC_RESTART_COUNT` | how often the processes were restarted; by default 0 |

use anyhow::{Result, bail};

/// The place of a process in a world.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The process's number in the world, from 0.
    pub dist_rank: usize,
    /// The process's number on its machine, from 0.
    pub local_rank: usize,
    /// Number of processes.
    pub world_size: usize,
    /// The host that holds the store.
    pub host: String,
    /// The store's port.
    pub port: u16,
    /// Whether torchrun's agent holds the store, and not process 0.
    pub agent_holds_store: bool,
    /// How often the world was restarted.
    pub attempt: u64,
}

impl Place {
    /// Reads the place from environment variables. `None` if they name neither a rank nor a world.
    ///
    /// - `variable`: the value of a variable that is set and not empty
    ///
    /// # Errors
    /// A variable that is missing or has no sound value; the message names all of them.
    pub fn read(variable: &dyn Fn(&str) -> Option<String>) -> Result<Option<Self>> {
        if variable("RANK").is_none() && variable("WORLD_SIZE").is_none() {
            return Ok(None);
        }
        let mut faults = vec![];
        let mut number = |name: &str, default: Option<u64>| -> u64 {
            let Some(text) = variable(name) else {
                return default.unwrap_or_else(|| {
                    faults.push(format!("`{name}` is not set"));
                    0
                });
            };
            text.trim().parse().unwrap_or_else(|_| {
                faults.push(format!("`{name}` must be a whole number, got `{text}`"));
                0
            })
        };
        let world_size = number("WORLD_SIZE", None);
        let dist_rank = number("RANK", None);
        let local_rank = number("LOCAL_RANK", Some(0));
        let attempt = number("TORCHELASTIC_RESTART_COUNT", Some(0));
        // a process that is alone needs no store
        let alone = (world_size == 1).then_some(0);
        let port = number("MASTER_PORT", alone);
        let host = variable("MASTER_ADDR").unwrap_or_default();
        if host.is_empty() && alone.is_none() {
            faults.push("`MASTER_ADDR` is not set".into());
        }
        if faults.is_empty() {
            if world_size == 0 {
                faults.push("`WORLD_SIZE` must be at least 1".into());
            } else if dist_rank >= world_size {
                faults.push(format!(
                    "`RANK` must be below `WORLD_SIZE` {world_size}, got {dist_rank}"
                ));
            }
            if alone.is_none() && !(1..=u64::from(u16::MAX)).contains(&port) {
                faults.push(format!("`MASTER_PORT` must be from 1 to 65535, got {port}"));
            }
        }
        if !faults.is_empty() {
            bail!(
                "the environment does not say where this process belongs: {}\nhint: start the \
                 processes by `dylora launch` or `torchrun --no-python`, or unset `RANK` and \
                 `WORLD_SIZE` for a single process",
                faults.join("; ")
            );
        }
        let agent_holds_store =
            variable("TORCHELASTIC_USE_AGENT_STORE").is_some_and(|value| value == "True");
        Ok(Some(Self {
            dist_rank: dist_rank as usize,
            local_rank: local_rank as usize,
            world_size: world_size as usize,
            host,
            port: port as u16,
            agent_holds_store,
            attempt,
        }))
    }

    /// Whether this process holds the store.
    pub fn holds_store(&self) -> bool {
        self.dist_rank == 0 && !self.agent_holds_store
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(pairs: &[(&str, &str)]) -> Result<Option<Place>> {
        Place::read(&|name| {
            pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn torchruns_variables_give_the_place() -> Result<()> {
        let place = read(&[
            ("RANK", "5"),
            ("LOCAL_RANK", "1"),
            ("WORLD_SIZE", "8"),
            ("MASTER_ADDR", "node0"),
            ("MASTER_PORT", "29500"),
            ("TORCHELASTIC_USE_AGENT_STORE", "True"),
            ("TORCHELASTIC_RESTART_COUNT", "2"),
        ])?
        .expect("a rank is set");
        let expected = Place {
            dist_rank: 5,
            local_rank: 1,
            world_size: 8,
            host: "node0".into(),
            port: 29500,
            agent_holds_store: true,
            attempt: 2,
        };
        assert_eq!(place, expected);
        assert!(!place.holds_store());
        Ok(())
    }

    #[test]
    fn without_a_rank_and_a_world_there_is_no_place() -> Result<()> {
        assert_eq!(read(&[("MASTER_ADDR", "a"), ("LOCAL_RANK", "3")])?, None);
        Ok(())
    }

    #[test]
    fn a_process_that_is_alone_needs_no_store() -> Result<()> {
        let place = read(&[("RANK", "0"), ("WORLD_SIZE", "1")])?.expect("a rank is set");
        assert_eq!((place.dist_rank, place.world_size), (0, 1));
        Ok(())
    }

    #[test]
    fn all_faults_are_named_at_once() {
        let message = |pairs: &[(&str, &str)]| format!("{:#}", read(pairs).unwrap_err());
        let text = message(&[("RANK", "x")]);
        for fault in ["`RANK` must be a whole number, got `x`", "`WORLD_SIZE` is not set"] {
            assert!(text.contains(fault), "{text}");
        }
        let text = message(&[("RANK", "1"), ("WORLD_SIZE", "2")]);
        for fault in ["`MASTER_ADDR` is not set", "`MASTER_PORT` is not set"] {
            assert!(text.contains(fault), "{text}");
        }
        let with = |rank, size, port| {
            let rest = [("MASTER_ADDR", "a"), ("MASTER_PORT", port)];
            message(&[[("RANK", rank), ("WORLD_SIZE", size)], rest].concat())
        };
        assert!(with("2", "2", "1").contains("`RANK` must be below `WORLD_SIZE` 2, got 2"));
        assert!(with("0", "0", "1").contains("`WORLD_SIZE` must be at least 1"));
        assert!(with("0", "2", "70000").contains("`MASTER_PORT` must be from 1 to 65535"));
    }
}
