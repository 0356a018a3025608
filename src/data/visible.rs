//! Text and numbers for people.

/// A text in which what cannot be seen, or changes how the rest is shown, is visible: control
/// characters by their pictures (`␛`), and marks of direction and of no width by their numbers
/// (`[U+202E]`). Line feeds and tabs stay.
pub fn visible(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '\n' | '\t' => shown.push(character),
            '\0'..='\x1f' => shown.extend(char::from_u32(0x2400 + character as u32)),
            '\x7f' => shown.push('\u{2421}'),
            '\u{80}'..='\u{9f}'
            | '\u{ad}'
            | '\u{61c}'
            | '\u{200b}'
            | '\u{200e}'..='\u{200f}'
            | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}'
            | '\u{feff}'
            | '\u{fff9}'..='\u{fffb}'
            | '\u{e0000}'..='\u{e007f}' => shown += &format!("[U+{:04X}]", character as u32),
            character => shown.push(character),
        }
    }
    shown
}

/// A number with separators, as `1,234,567`.
pub fn count(number: impl TryInto<u64>) -> String {
    let digits = number.try_into().unwrap_or(0).to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i) % 3 == 0 {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_seen_is_made_visible() {
        assert_eq!(visible("a\x1b[31m\r\n\tb"), "a␛[31m␍\n\tb");
        assert_eq!(visible("\u{202e}cba\u{2066}\u{feff}\0"), "[U+202E]cba[U+2066][U+FEFF]␀");
        assert_eq!(visible("naïve שלום 👩‍💻"), "naïve שלום 👩‍💻");
    }
}
