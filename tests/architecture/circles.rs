//! Finds circles in a graph of uses.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// A use of `to` by `from`.
#[derive(Debug, Clone)]
pub struct Edge {
    pub from: String,
    pub to: String,
    /// The line of the use, such as `src/a.rs:3`.
    pub at: String,
}

/// For each node, the nodes that it uses and the line of the first use of each.
type Graph<'a> = BTreeMap<&'a str, BTreeMap<&'a str, &'a str>>;

/// The circles with the lines of their uses, the shortest first. If several circles share a use,
/// only the first is reported, since opening it may open the others.
pub fn circles(edges: &[Edge]) -> Vec<String> {
    let mut graph = Graph::new();
    for edge in edges.iter().filter(|edge| edge.from != edge.to) {
        graph.entry(&edge.from).or_default().entry(&edge.to).or_insert(&edge.at);
    }
    let (mut found, mut reported) = (Vec::new(), BTreeSet::new());
    for circle in all_circles(&graph) {
        let closed = [circle.as_slice(), &circle[..1]].concat();
        let uses: Vec<_> = closed.windows(2).map(|pair| (pair[0], pair[1])).collect();
        if uses.iter().all(|pair| !reported.contains(pair)) {
            found.push(describe(&graph, &closed));
            reported.extend(uses);
        }
    }
    found
}

/// For each edge that is part of a circle, a shortest circle through it; sorted by length.
fn all_circles<'a>(graph: &Graph<'a>) -> Vec<Vec<&'a str>> {
    let mut found = BTreeSet::new();
    for (from, uses) in graph {
        for to in uses.keys() {
            if let Some(mut circle) = shortest_path(graph, to, from) {
                let least = (0..circle.len()).min_by_key(|&at| circle[at]).unwrap_or(0);
                circle.rotate_left(least);
                found.insert((circle.len(), circle));
            }
        }
    }
    found.into_iter().map(|(_, circle)| circle).collect()
}

/// The nodes on a shortest path from `from` to `to`, both included.
fn shortest_path<'a>(graph: &Graph<'a>, from: &'a str, to: &'a str) -> Option<Vec<&'a str>> {
    let mut previous = BTreeMap::from([(from, from)]);
    let mut queue = VecDeque::from([from]);
    while let Some(node) = queue.pop_front() {
        for &next in graph.get(node).into_iter().flat_map(BTreeMap::keys) {
            if !previous.contains_key(next) {
                previous.insert(next, node);
                queue.push_back(next);
            }
        }
    }
    previous.get(to)?;
    let mut path = vec![to];
    while path[0] != from {
        path.insert(0, previous[path[0]]);
    }
    Some(path)
}

/// A circle as `a -> b -> a`, followed by a line for each use.
fn describe(graph: &Graph, closed: &[&str]) -> String {
    let uses = closed.windows(2).map(|pair| {
        let at = graph[pair[0]][pair[1]];
        format!("\n    {at}: {} uses {}", pair[0], pair[1])
    });
    format!("{}{}", closed.join(" -> "), uses.collect::<String>())
}

fn edges(pairs: &[(&str, &str)]) -> Vec<Edge> {
    let edge = |(from, to): &(&str, &str)| Edge {
        from: (*from).to_owned(),
        to: (*to).to_owned(),
        at: format!("{from}.rs:1"),
    };
    pairs.iter().map(edge).collect()
}

#[test]
fn a_circle_is_found_once_with_its_lines() {
    let found = circles(&edges(&[("b", "c"), ("a", "b"), ("c", "a"), ("c", "d"), ("a", "a")]));
    let lines = "\n    a.rs:1: a uses b\n    b.rs:1: b uses c\n    c.rs:1: c uses a";
    assert_eq!(found, [format!("a -> b -> c -> a{lines}")]);
}

#[test]
fn circles_that_share_a_node_are_two() {
    let found = circles(&edges(&[("a", "b"), ("b", "a"), ("b", "c"), ("c", "b")]));
    assert_eq!(found.len(), 2);
}

#[test]
fn of_circles_that_share_a_use_the_shortest_is_reported() {
    let found = circles(&edges(&[("a", "b"), ("b", "c"), ("c", "a"), ("b", "a")]));
    assert_eq!(found.len(), 1);
    assert!(found[0].starts_with("a -> b -> a\n"));
}

#[test]
fn a_chain_of_uses_is_no_circle() {
    assert_eq!(circles(&edges(&[("a", "b"), ("a", "c"), ("b", "c")])), Vec::<String>::new());
}
