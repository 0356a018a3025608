//! Applies a function to many items on several threads.

use std::sync::atomic::{AtomicUsize, Ordering};

/// What `work` makes of each item, in order, on up to `num_threads` threads.
pub(super) fn map<T: Sync, R: Send>(
    items: &[T],
    num_threads: usize,
    work: impl Fn(&T) -> R + Sync,
) -> Vec<R> {
    let num_threads = num_threads.min(items.len());
    if num_threads <= 1 {
        return items.iter().map(work).collect();
    }
    let next = AtomicUsize::new(0);
    let take = || {
        let index = next.fetch_add(1, Ordering::Relaxed);
        Some((index, items.get(index)?))
    };
    let run = || -> Vec<(usize, R)> {
        std::iter::from_fn(take).map(|(index, item)| (index, work(item))).collect()
    };
    let mut all: Vec<Option<R>> = items.iter().map(|_| None).collect();
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..num_threads).map(|_| scope.spawn(run)).collect();
        for thread in threads {
            for (index, result) in thread.join().expect("`work` returns its errors") {
                all[index] = Some(result);
            }
        }
    });
    all.into_iter().map(|result| result.expect("each item was taken once")).collect()
}
