//! Connections that carry nothing: each process holds one to the next, in a ring. However a process
//! ends, its kernel closes them, so that its neighbours know at once that something is wrong, even
//! while they compute or wait for a GPU. A machine that is cut off closes nothing; for that there
//! are signs of life.

use std::io::{ErrorKind, Read};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::keys::Keys;
use crate::ffi::dist::Store;

/// The longest that a connection may take, since all processes are there.
const LIMIT: Duration = Duration::from_secs(5);
/// Time between two looks for the connection from the process before.
const PAUSE: Duration = Duration::from_millis(10);

/// The connections to the next process and from the one before.
#[derive(Debug)]
pub(super) struct Lifeline([TcpStream; 2]);

impl Lifeline {
    /// Connects this process with its neighbours. All processes must call this.
    ///
    /// - `address`: the address of this machine that the others can reach
    pub fn tie(
        store: &Store,
        keys: &Keys,
        (dist_rank, size): (usize, usize),
        address: IpAddr,
    ) -> Result<Self> {
        let listener = TcpListener::bind((address, 0))?;
        listener.set_nonblocking(true)?;
        store.set(&keys.lifeline(dist_rank), listener.local_addr()?.to_string().as_bytes())?;
        let next = store.get(&keys.lifeline((dist_rank + 1) % size))?;
        let next: SocketAddr = String::from_utf8_lossy(&next).parse()?;
        let to_next = TcpStream::connect_timeout(&next, LIMIT)
            .with_context(|| format!("cannot reach `{next}`"))?;
        let both = [to_next, accept(&listener)?];
        for stream in &both {
            stream.set_nonblocking(true)?;
        }
        Ok(Self(both))
    }

    /// Whether a neighbour has ended.
    pub fn is_broken(&self) -> bool {
        let is_open = |mut stream: &TcpStream| match stream.read(&mut [0]) {
            Ok(count) => count > 0,
            Err(error) => matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted),
        };
        !self.0.iter().all(is_open)
    }
}

fn accept(listener: &TcpListener) -> Result<TcpStream> {
    let deadline = Instant::now() + LIMIT;
    loop {
        match listener.accept() {
            Ok((stream, _)) => return Ok(stream),
            Err(error) if error.kind() != ErrorKind::WouldBlock => return Err(error.into()),
            Err(_) if Instant::now() > deadline => bail!("the process before did not connect"),
            Err(_) => sleep(PAUSE),
        }
    }
}
