//! Tables that fit the width of the terminal. One that is too wide is divided: each part has the
//! columns that name its rows and some of the others. Long texts are broken into several lines.

use comfy_table::{CellAlignment, ContentArrangement, Table, presets};

/// Columns between two cells, and at both ends of a row.
const SEPARATOR: usize = 3;

/// A table whose first column is text and whose other columns are numbers, in at most `width`
/// columns of text where that is possible.
pub fn fitted(header: &[String], rows: &[Vec<String>], width: usize) -> String {
    let widths = widths(header, rows);
    let total =
        |columns: &[usize]| columns.iter().map(|&c| widths[c] + SEPARATOR).sum::<usize>() + 1;
    let all: Vec<usize> = (0..header.len()).collect();
    if total(&all) <= width {
        return part(header, rows, &all, None);
    }
    let names: Vec<usize> = all.iter().copied().take(num_names(header, rows)).collect();
    let numbers = &all[names.len()..];
    let is_narrow = |&number: &usize| total(&[&names[..], &[number]].concat()) <= width;
    if numbers.is_empty() || !numbers.iter().all(is_narrow) {
        return part(header, rows, &all, Some(width));
    }
    let mut parts: Vec<Vec<usize>> = vec![];
    for &number in numbers {
        match parts.last_mut() {
            Some(last) if total(&[&last[..], &[number]].concat()) <= width => last.push(number),
            _ => parts.push([&names[..], &[number]].concat()),
        }
    }
    let parts = parts.iter().map(|columns| part(header, rows, columns, None));
    parts.collect::<Vec<_>>().join("\n\n")
}

/// How many columns name the rows: the first, and those behind it that hold no numbers.
fn num_names(header: &[String], rows: &[Vec<String>]) -> usize {
    let is_number =
        |cell: &String| cell.starts_with(|c: char| c.is_ascii_digit() || "+-".contains(c));
    let has_numbers = |column: usize| rows.iter().filter_map(|row| row.get(column)).any(is_number);
    (1..header.len()).find(|&column| has_numbers(column)).unwrap_or(header.len())
}

/// The number of characters of the longest cell of each column.
fn widths(header: &[String], rows: &[Vec<String>]) -> Vec<usize> {
    let length =
        |cell: &String| cell.lines().map(|line| line.chars().count()).max().unwrap_or_default();
    let of_column = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        cells.chain([&header[column]]).map(length).max().unwrap_or_default()
    };
    (0..header.len()).map(of_column).collect()
}

/// Some columns of a table, broken to `width` if there is one.
fn part(
    header: &[String],
    rows: &[Vec<String>],
    columns: &[usize],
    width: Option<usize>,
) -> String {
    let mut table = Table::new();
    if let Some(width) = width.and_then(|width| u16::try_from(width).ok()) {
        table.set_content_arrangement(ContentArrangement::Dynamic).set_width(width);
    }
    let of = |row: &[String]| -> Vec<String> {
        columns.iter().filter_map(|&column| row.get(column).cloned()).collect()
    };
    table.load_preset(presets::ASCII_MARKDOWN).set_header(of(header));
    table.add_rows(rows.iter().map(|row| of(row)));
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strings(cells: &[&str]) -> Vec<String> {
        cells.iter().map(|cell| (*cell).to_owned()).collect()
    }

    fn widest(text: &str) -> usize {
        text.lines().map(|line| line.chars().count()).max().unwrap_or_default()
    }

    #[test]
    fn a_wide_table_is_divided_and_keeps_the_names_of_its_rows() {
        let header = strings(&["domain", "split", "expert_0", "expert_1", "expert_2"]);
        let rows = [
            strings(&["code", "train", "0.100", "0.200", "0.700"]),
            strings(&["verse", "train", "0.100", "0.200", "0.700"]),
        ];
        let text = fitted(&header, &rows, 45);
        assert!(widest(&text) <= 45, "{text}");
        let parts: Vec<&str> = text.split("\n\n").collect();
        assert_eq!(parts.len(), 2, "{text}");
        assert!(parts.iter().all(|part| part.starts_with("| domain | split |")), "{text}");
        assert_eq!(text.matches("0.700").count(), 2, "{text}");
        assert_eq!(fitted(&header, &rows, 80).split("\n\n").count(), 1);
    }

    #[test]
    fn long_texts_are_broken_into_lines() {
        let header = strings(&["key", "matches", "layers"]);
        let long = "self_attn.q_proj, self_attn.k_proj, self_attn.v_proj, self_attn.o_proj";
        let rows = [strings(&["lora.target_modules", long, "30"])];
        let text = fitted(&header, &rows, 60);
        assert!(widest(&text) <= 60 && text.lines().count() > 3, "{text}");
    }
}
