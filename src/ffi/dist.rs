//! Processes that compute together, through `csrc/dist.cpp`: c10d's TCPStore, over which they meet,
//! and its Gloo backend, which adds up tensors on the CPU.

use std::ffi::{CString, c_char, c_int};
use std::time::Duration;

use anyhow::Result;
use tch::Tensor;

use super::{TensorPtr, check, last_error};

/// The C++ objects.
mod raw {
    /// A client of the store, or the store itself.
    #[repr(C)]
    pub struct Store([u8; 0]);
    /// A group of processes.
    #[repr(C)]
    pub struct Group([u8; 0]);
    /// Work that was begun.
    #[repr(C)]
    pub struct Pending([u8; 0]);
}

unsafe extern "C" {
    fn dylora_hide_warnings();
    fn dylora_store_new(
        host: *const c_char,
        port: c_int,
        is_server: c_int,
        timeout_ms: i64,
    ) -> *mut raw::Store;
    fn dylora_store_set(
        store: *mut raw::Store,
        key: *const c_char,
        bytes: *const u8,
        n: usize,
    ) -> c_int;
    fn dylora_store_set_once(
        store: *mut raw::Store,
        key: *const c_char,
        bytes: *const u8,
        n: usize,
    ) -> c_int;
    fn dylora_store_get(store: *mut raw::Store, key: *const c_char, n: *mut usize) -> *mut u8;
    fn dylora_store_has(store: *mut raw::Store, key: *const c_char) -> c_int;
    fn dylora_store_delete(store: *mut raw::Store, key: *const c_char) -> c_int;
    fn dylora_store_free(store: *mut raw::Store);
    fn dylora_gloo_new(
        store: *mut raw::Store,
        prefix: *const c_char,
        dist_rank: c_int,
        size: c_int,
        address: *const c_char,
        is_interface: c_int,
        timeout_ms: i64,
    ) -> *mut raw::Group;
    fn dylora_gloo_all_reduce(group: *mut raw::Group, tensor: TensorPtr) -> *mut raw::Pending;
    fn dylora_gloo_broadcast(group: *mut raw::Group, tensor: TensorPtr) -> *mut raw::Pending;
    fn dylora_pending_wait(pending: *mut raw::Pending, wait_ms: i64) -> c_int;
    fn dylora_pending_free(pending: *mut raw::Pending);
    fn dylora_gloo_free(group: *mut raw::Group);
}

/// Keeps libtorch from logging what it also returns as errors, with long traces. To be called
/// before there are other threads.
pub fn hide_warnings() {
    // SAFETY: the call sets a number that libtorch reads when it logs
    unsafe { dylora_hide_warnings() }
}

/// A key-value store that processes share, by one connection. Its calls may come from any thread
/// and wait for each other.
#[derive(Debug)]
pub struct Store(*mut raw::Store);

// SAFETY: TCPStore guards its connection with a mutex
unsafe impl Send for Store {}
// SAFETY: as above
unsafe impl Sync for Store {}

impl Store {
    /// Connects to the store at `host`.
    ///
    /// - `is_server`: whether this process holds the store
    /// - `timeout`: the longest that connecting and each call may take
    pub fn new(host: &str, port: u16, is_server: bool, timeout: Duration) -> Result<Self> {
        let host = CString::new(host)?;
        // SAFETY: `host` is a C string
        let pointer = unsafe {
            dylora_store_new(host.as_ptr(), port.into(), c_int::from(is_server), millis(timeout))
        };
        if pointer.is_null() { Err(last_error()) } else { Ok(Self(pointer)) }
    }

    /// Sets a key.
    pub fn set(&self, key: &str, value: &[u8]) -> Result<()> {
        let key = CString::new(key)?;
        // SAFETY: a live store, a C string, and bytes that the shim copies
        check(unsafe { dylora_store_set(self.0, key.as_ptr(), value.as_ptr(), value.len()) })
    }

    /// Sets a key unless it is set already.
    pub fn set_once(&self, key: &str, value: &[u8]) -> Result<()> {
        let key = CString::new(key)?;
        // SAFETY: as in `set`
        check(unsafe { dylora_store_set_once(self.0, key.as_ptr(), value.as_ptr(), value.len()) })
    }

    /// The value of a key. Waits until it is set, for the store's timeout at most.
    pub fn get(&self, key: &str) -> Result<Vec<u8>> {
        let key = CString::new(key)?;
        let mut len = 0;
        // SAFETY: a live store and a C string; the shim returns `len` bytes from malloc, which are
        // copied and freed
        unsafe {
            let bytes = dylora_store_get(self.0, key.as_ptr(), &mut len);
            if bytes.is_null() {
                return Err(last_error());
            }
            let value = std::slice::from_raw_parts(bytes, len).to_vec();
            libc::free(bytes.cast());
            Ok(value)
        }
    }

    /// Whether a key is set.
    pub fn has(&self, key: &str) -> Result<bool> {
        let key = CString::new(key)?;
        // SAFETY: a live store and a C string
        let status = unsafe { dylora_store_has(self.0, key.as_ptr()) };
        check(status).map(|()| status == 1)
    }

    /// Removes a key.
    pub fn delete(&self, key: &str) -> Result<()> {
        let key = CString::new(key)?;
        // SAFETY: a live store and a C string
        check(unsafe { dylora_store_delete(self.0, key.as_ptr()) })
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        // SAFETY: `new` made it, and it is freed once; a Gloo group keeps its own reference
        unsafe { dylora_store_free(self.0) }
    }
}

/// Where the other processes of a group reach this one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// An address of this machine.
    Ip(std::net::IpAddr),
    /// The name of a network interface.
    Interface(String),
}

/// A group of processes that add up tensors on the CPU by Gloo.
///
/// A group that is dropped is not freed, because libtorch would wait for work that may never end
/// once a process has failed. [`Gloo::close`] frees it.
#[derive(Debug)]
pub struct Gloo(*mut raw::Group);

// SAFETY: ProcessGroupGloo guards its queue of work with a mutex
unsafe impl Send for Gloo {}
// SAFETY: as above
unsafe impl Sync for Gloo {}

impl Gloo {
    /// Meets the other processes of a group.
    ///
    /// - `prefix`: what the group's keys in the store begin with
    /// - `timeout`: the longest that meeting and each operation may take
    pub fn new(
        store: &Store,
        prefix: &str,
        dist_rank: usize,
        size: usize,
        address: &Address,
        timeout: Duration,
    ) -> Result<Self> {
        let prefix = CString::new(prefix)?;
        let (address, is_interface) = match address {
            Address::Ip(ip) => (CString::new(ip.to_string())?, 0),
            Address::Interface(name) => (CString::new(name.as_str())?, 1),
        };
        // SAFETY: a live store, of which the group keeps its own reference, and C strings
        let pointer = unsafe {
            let (rank, size) = (dist_rank as c_int, size as c_int);
            let (prefix, address) = (prefix.as_ptr(), address.as_ptr());
            dylora_gloo_new(store.0, prefix, rank, size, address, is_interface, millis(timeout))
        };
        if pointer.is_null() { Err(last_error()) } else { Ok(Self(pointer)) }
    }

    /// Begins to replace a contiguous tensor on the CPU by its sum over all processes.
    pub fn all_reduce(&self, tensor: &Tensor) -> Result<Pending> {
        // SAFETY: a live group, and a live tensor, to which the work keeps its own reference
        Pending::new(unsafe { dylora_gloo_all_reduce(self.0, tensor.as_ptr()) })
    }

    /// Begins to replace a contiguous tensor on the CPU by that of process 0.
    pub fn broadcast(&self, tensor: &Tensor) -> Result<Pending> {
        // SAFETY: as in `all_reduce`
        Pending::new(unsafe { dylora_gloo_broadcast(self.0, tensor.as_ptr()) })
    }

    /// Frees the group. All its work must have ended well.
    pub fn close(self) {
        // SAFETY: `new` made it, and `self` is used up
        unsafe { dylora_gloo_free(self.0) }
    }
}

/// Work that was begun.
#[derive(Debug)]
pub struct Pending(*mut raw::Pending);

impl Pending {
    fn new(pointer: *mut raw::Pending) -> Result<Self> {
        if pointer.is_null() { Err(last_error()) } else { Ok(Self(pointer)) }
    }

    /// Waits for some time. Returns whether the work is done.
    ///
    /// # Errors
    /// If the work has failed, as it does when a connection ends.
    pub fn wait(&self, time: Duration) -> Result<bool> {
        // SAFETY: live work
        let status = unsafe { dylora_pending_wait(self.0, millis(time)) };
        check(status).map(|()| status == 1)
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        // SAFETY: `new` received it, and it is freed once; the group keeps work that is not done
        unsafe { dylora_pending_free(self.0) }
    }
}

/// In milliseconds, and at least 1, because 0 means no limit to libtorch.
fn millis(time: Duration) -> i64 {
    (time.as_millis() as i64).max(1)
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, TcpListener};
    use std::thread::{scope, sleep};

    use tch::{Device, Kind};

    use super::*;

    /// Work that ends just when the time is over has not failed.
    #[test]
    fn work_that_ends_at_the_end_of_a_wait_is_done() -> Result<()> {
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port();
        let limit = Duration::from_secs(60);
        let run = |rank: usize| -> Result<()> {
            let store = Store::new("127.0.0.1", port, rank == 0, limit)?;
            let address = Address::Ip(Ipv4Addr::LOCALHOST.into());
            let group = Gloo::new(&store, "race", rank, 2, &address, limit)?;
            for round in 0..2000_u64 {
                if rank == 1 {
                    sleep(Duration::from_micros(800 + round % 400));
                }
                let pending = group.all_reduce(&Tensor::ones([1], (Kind::Float, Device::Cpu)))?;
                while !pending.wait(Duration::from_millis(1))? {}
            }
            Ok(())
        };
        scope(|scope| {
            let other = scope.spawn(|| run(1));
            run(0)?;
            other.join().expect("the thread does not panic")
        })
    }
}
