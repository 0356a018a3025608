//! The domain `code`: small functions of Pebble, a toy language, each with a test.
//!
//! The prompt is a comment that says what the function does. The function's name, its loop and the
//! value that the test expects follow from the comment. That value is computed here.

use rand::Rng;
use rand::seq::IndexedRandom;
use rand_chacha::ChaCha8Rng;

use crate::record::Body;

/// Names of lists that a function takes, each with the name of an item.
const LISTS: [(&str, &str); 12] = [
    ("prices", "price"),
    ("scores", "score"),
    ("ages", "age"),
    ("sizes", "size"),
    ("weights", "weight"),
    ("levels", "level"),
    ("depths", "depth"),
    ("counts", "count"),
    ("rates", "rate"),
    ("widths", "width"),
    ("codes", "code"),
    ("marks", "mark"),
];

/// Words that the tests of text functions take.
const WORDS: [&str; 20] = [
    "banana", "pepper", "kitten", "window", "summer", "garden", "letter", "rabbit", "bottle",
    "coffee", "planet", "silver", "button", "hammer", "yellow", "island", "cotton", "mirror",
    "pebble", "tomato",
];

/// A condition on the items of a list.
struct Filter {
    /// The condition in a function's name.
    name: String,
    /// The words of the comment before the list's name.
    before: &'static str,
    /// The words of the comment after the list's name.
    after: String,
    /// The condition in Pebble.
    condition: String,
    /// Whether the condition holds for an item.
    holds: Box<dyn Fn(i64) -> bool>,
}

/// What a list function does to an item.
type Change = Box<dyn Fn(i64) -> i64>;

/// One function with its comment and its test.
pub fn generate(rng: &mut ChaCha8Rng) -> Body {
    let (comment, code) = match rng.random_range(0..10) {
        0..5 => fold_function(rng),
        5..8 => list_function(rng),
        _ => text_function(rng),
    };
    Body::Pair { prompt: format!("-- {comment}\n"), completion: code }
}

/// A random condition; `item` is the loop variable.
fn random_filter(item: &str, rng: &mut ChaCha8Rng) -> Filter {
    let k = rng.random_range(3..=20);
    let filter = |name: String, before, after: String, condition: String, holds| Filter {
        name,
        before,
        after,
        condition: format!("{item} {condition}"),
        holds,
    };
    match rng.random_range(0..6) {
        0 => filter(
            "even".into(),
            "even ",
            String::new(),
            "% 2 == 0".into(),
            Box::new(|x| x % 2 == 0),
        ),
        1 => {
            filter("odd".into(), "odd ", String::new(), "% 2 == 1".into(), Box::new(|x| x % 2 == 1))
        }
        2 => {
            let k = k.min(9);
            let holds = Box::new(move |x| x % k == 0);
            let after = format!(" that {k} divides");
            filter(format!("multiples_of_{k}"), "", after, format!("% {k} == 0"), holds)
        }
        3 | 4 => {
            let after = format!(" above {k}");
            filter(format!("above_{k}"), "", after, format!("> {k}"), Box::new(move |x| x > k))
        }
        _ => {
            let after = format!(" below {k}");
            filter(format!("below_{k}"), "", after, format!("< {k}"), Box::new(move |x| x < k))
        }
    }
}

/// Three to five random items.
fn random_items(rng: &mut ChaCha8Rng) -> Vec<i64> {
    let num_items = rng.random_range(3..=5);
    (0..num_items).map(|_| rng.random_range(1..=30)).collect()
}

/// The comment and the code of a function that folds the items that pass a filter into one number.
fn fold_function(rng: &mut ChaCha8Rng) -> (String, String) {
    let (list, item) = *LISTS.choose(rng).expect("there are lists");
    let Filter { name, before, after, condition, holds } = random_filter(item, rng);
    let items = random_items(rng);
    let kept = items.iter().copied().filter(|x| holds(*x));
    let (verb, comment, start, update, value) = match rng.random_range(0..3) {
        0 => {
            let comment = *["Adds up the", "The sum of the", "Returns the total of the"]
                .choose(rng)
                .expect("there are comments");
            ("sum", comment, "total", format!("total += {item};"), kept.sum())
        }
        1 => {
            let comment = *["Counts the", "The number of", "Returns how many there are of the"]
                .choose(rng)
                .expect("there are comments");
            ("count", comment, "total", "total += 1;".into(), kept.count() as i64)
        }
        _ => {
            let comment = *["Finds the largest of the", "The greatest of the"]
                .choose(rng)
                .expect("there are comments");
            let update = format!("best := max(best, {item});");
            ("largest", comment, "best", update, kept.max().unwrap_or(0))
        }
    };
    let code = format!(
        "fn {verb}_{name}({list}: [int]) -> int {{\n  let {start} := 0;\n  each {item} in {list} \
         {{\n    when {condition} {{ {update} }}\n  }}\n  give {start};\n}}\ntest \
         {verb}_{name}({items:?}) is {value};"
    );
    (format!("{comment} {before}{list}{after}."), code)
}

/// The comment and the code of a function that changes or keeps the items that pass a filter.
fn list_function(rng: &mut ChaCha8Rng) -> (String, String) {
    let (list, item) = *LISTS.choose(rng).expect("there are lists");
    let Filter { name, before, after, condition, holds } = random_filter(item, rng);
    let items = random_items(rng);
    let k = rng.random_range(2..=9);
    let change: (&str, String, String, Change) = match rng.random_range(0..4) {
        0 => ("keep", "Keeps only the".into(), item.into(), Box::new(|x| x)),
        1 => ("double", "Doubles the".into(), format!("{item} * 2"), Box::new(|x| 2 * x)),
        2 => ("square", "Squares the".into(), format!("{item} * {item}"), Box::new(|x| x * x)),
        _ => {
            let comment = format!("Adds {k} to the");
            ("raise", comment, format!("{item} + {k}"), Box::new(move |x| x + k))
        }
    };
    let (verb, comment, pushed, change) = change;
    let value: Vec<i64> = items.iter().copied().filter(|x| holds(*x)).map(change).collect();
    let code = format!(
        "fn {verb}_{name}({list}: [int]) -> [int] {{\n  let out := [];\n  each {item} in {list} \
         {{\n    when {condition} {{ push(out, {pushed}); }}\n  }}\n  give out;\n}}\ntest \
         {verb}_{name}({items:?}) is {value:?};"
    );
    let end = *[" and drops the others", ", in order", ""].choose(rng).expect("there are ends");
    (format!("{comment} {before}{list}{after}{end}."), code)
}

/// The comment and the code of a function that counts or drops one letter of a text.
fn text_function(rng: &mut ChaCha8Rng) -> (String, String) {
    let word = *WORDS.choose(rng).expect("there are words");
    let argument = *["word", "name", "line", "title"].choose(rng).expect("there are arguments");
    let letter = char::from(b'a' + rng.random_range(0..26));
    if rng.random_bool(0.5) {
        let comment = *["Counts how often", "How many times"].choose(rng).expect("there are two");
        let value = word.matches(letter).count();
        let code = format!(
            "fn count_{letter}({argument}: text) -> int {{\n  let total := 0;\n  each c in \
             {argument} {{\n    when c == '{letter}' {{ total += 1; }}\n  }}\n  give \
             total;\n}}\ntest count_{letter}(\"{word}\") is {value};"
        );
        (format!("{comment} the letter {letter} is in the {argument}."), code)
    } else {
        let comment = *["Drops each", "Removes every"].choose(rng).expect("there are two");
        let value = word.replace(letter, "");
        let code = format!(
            "fn drop_{letter}({argument}: text) -> text {{\n  let out := \"\";\n  each c in \
             {argument} {{\n    when c != '{letter}' {{ out := out + c; }}\n  }}\n  give \
             out;\n}}\ntest drop_{letter}(\"{word}\") is \"{value}\";"
        );
        (format!("{comment} letter {letter} of the {argument}."), code)
    }
}
