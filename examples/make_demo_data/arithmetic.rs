//! The domain `arithmetic`: word problems with numbered steps, a check and an answer.
//!
//! A quarter of the problems count in the demo's own units, such as a crate of 12 jars. The
//! question does not state the size of the unit.

use rand::Rng;
use rand::seq::IndexedRandom;
use rand_chacha::ChaCha8Rng;

use crate::grammar::{Bindings, Grammar};
use crate::record::Body;

/// Draws the numbers of a problem and binds them.
type Numbers = fn(&mut Bindings, &mut ChaCha8Rng);

/// The kinds of problems: the name of each kind's rules and the function that draws its numbers.
const KINDS: [(&str, Numbers); 8] = [
    ("unit", unit),
    ("unit", unit),
    ("rows", rows),
    ("change", change),
    ("share", share),
    ("times", times),
    ("trip", trip),
    ("wage", wage),
];

/// The grammar of questions and steps.
pub fn grammar() -> Grammar {
    Grammar::parse(include_str!("grammars/arithmetic.txt"))
}

/// One problem and its steps.
pub fn generate(grammar: &Grammar, rng: &mut ChaCha8Rng) -> Body {
    let (kind, numbers) = *KINDS.choose(rng).expect("there are kinds");
    let mut problem = Bindings::new();
    grammar.expand("<bind unit>", &mut problem, rng);
    numbers(&mut problem, rng);
    let prompt = grammar.expand(&format!("<question {kind}>\n"), &mut problem, rng);
    Body::Pair { prompt, completion: grammar.expand(&format!("<steps {kind}>"), &mut problem, rng) }
}

/// Binds numbers to names.
fn bind<const N: usize>(problem: &mut Bindings, numbers: [(&str, i64); N]) {
    problem.extend(numbers.map(|(name, number)| (name.to_owned(), number.to_string())));
}

/// `n` containers of `size` things, bound by the grammar, hold `t`; with `k` loose ones there are
/// `u`.
fn unit(problem: &mut Bindings, rng: &mut ChaCha8Rng) {
    let size: i64 = problem["size"].parse().expect("the grammar's sizes are numbers");
    let (n, k) = (rng.random_range(2..=6), rng.random_range(2..=9));
    bind(problem, [("n", n), ("k", k), ("t", n * size), ("u", n * size + k)]);
}

/// `n` rows of `m` are `t`, of which `k` go away and `u` stay.
fn rows(problem: &mut Bindings, rng: &mut ChaCha8Rng) {
    let (n, m) = (rng.random_range(3..=9), rng.random_range(4..=12));
    let k = rng.random_range(2..=9);
    bind(problem, [("n", n), ("m", m), ("k", k), ("t", n * m), ("u", n * m - k)]);
}

/// `n` things at `m` crowns each cost `t` and are paid with a note of `k`; the change is `u`.
fn change(problem: &mut Bindings, rng: &mut ChaCha8Rng) {
    let (n, m) = (rng.random_range(2..=6), rng.random_range(2..=8));
    let total: i64 = n * m;
    let note = [20, 50, 100].into_iter().find(|note| *note > total).expect("totals are below 50");
    bind(problem, [("n", n), ("m", m), ("k", note), ("t", total), ("u", note - total)]);
}

/// `n` people share `t` things; one who already has `k` then has `u`.
fn share(problem: &mut Bindings, rng: &mut ChaCha8Rng) {
    let (n, m) = (rng.random_range(3..=8), rng.random_range(3..=9));
    let k = rng.random_range(2..=9);
    bind(problem, [("n", n), ("m", m), ("k", k), ("t", n * m), ("u", m + k)]);
}

/// One person has `m` things and another has `n` times as many, `t`; together they have `u`.
fn times(problem: &mut Bindings, rng: &mut ChaCha8Rng) {
    let (n, m) = (rng.random_range(2..=5), rng.random_range(3..=12));
    bind(problem, [("n", n), ("m", m), ("t", n * m), ("u", n * m + m)]);
}

/// `n` hours at `m` kilometres an hour are `t` kilometres; with `k` kilometres more they are `u`.
fn trip(problem: &mut Bindings, rng: &mut ChaCha8Rng) {
    let (n, m) = (rng.random_range(2..=6), 5 * rng.random_range(1..=6));
    let k = rng.random_range(2..=9);
    bind(problem, [("n", n), ("m", m), ("k", k), ("t", n * m), ("u", n * m + k)]);
}

/// `n` hours at `m` crowns an hour earn `t` crowns; `k` go for lunch and `u` are left.
fn wage(problem: &mut Bindings, rng: &mut ChaCha8Rng) {
    let (n, m) = (rng.random_range(3..=8), rng.random_range(6..=12));
    let k = rng.random_range(3..=9);
    bind(problem, [("n", n), ("m", m), ("k", k), ("t", n * m), ("u", n * m - k)]);
}
