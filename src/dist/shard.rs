//! How the items of a step, or of an evaluation, are shared among processes.
//!
//! Each process gets `floor(n / N)` or `ceil(n / N)` of `n` items, since what an item costs is for
//! the most part the same. Within this bound, their costs decide: from the dearest item on, each
//! goes to the process whose items cost least so far (longest processing time first, Graham 1969).
//! All processes compute the same shares.

/// The indices of the items of each of `num_shares` processes, in rising order.
///
/// - `costs`: what each item costs
pub fn shares(costs: &[f64], num_shares: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..costs.len()).collect();
    order.sort_by(|&a, &b| costs[b].total_cmp(&costs[a]).then(a.cmp(&b)));
    let (least, rest) = (costs.len() / num_shares, costs.len() % num_shares);
    let mut shares = vec![(0.0_f64, vec![]); num_shares];
    for item in order {
        // while `rest` shares may have one item more, no more than that do
        let num_full = shares.iter().filter(|(_, items)| items.len() > least).count();
        let most = if num_full < rest { least + 1 } else { least };
        let open = shares.iter_mut().filter(|(_, items)| items.len() < most);
        let cheapest = open.min_by(|a, b| a.0.total_cmp(&b.0));
        let (cost, items) = cheapest.expect("the shares have room for all items");
        *cost += costs[item];
        items.push(item);
    }
    let sorted = |(_, mut items): (f64, Vec<usize>)| {
        items.sort_unstable();
        items
    };
    shares.into_iter().map(sorted).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_item_is_in_one_share_and_counts_differ_by_at_most_one() {
        for num_items in 0..20 {
            for num_shares in 1..7 {
                let costs: Vec<f64> = (0..num_items).map(|i| f64::from(i * 7 % 5)).collect();
                let shares = shares(&costs, num_shares);
                let mut all = shares.concat();
                all.sort_unstable();
                assert_eq!(all, (0..costs.len()).collect::<Vec<_>>());
                let counts = shares.iter().map(Vec::len);
                let (least, most) = (counts.clone().min(), counts.max());
                assert!(most <= least.map(|n| n + 1), "{shares:?}");
            }
        }
    }

    #[test]
    fn costs_are_balanced() {
        assert_eq!(shares(&[9.0, 8.0, 1.0, 2.0], 2), [[0, 2], [1, 3]]);
        assert_eq!(shares(&[1.0, 5.0, 1.0, 5.0, 1.0, 5.0], 3), [[0, 1], [2, 3], [4, 5]]);
    }

    #[test]
    fn a_single_share_is_in_order() {
        assert_eq!(shares(&[1.0, 3.0, 2.0], 1), [[0, 1, 2]]);
    }
}
