//! The colours of experts and runs, for the report's page and for terminals. They can be told apart
//! with the common kinds of colour blindness (after Okabe and Ito, jfly.uni-koeln.de/color), and
//! repeat after eight. Wherever they are used, a number or a letter says the same.

/// A colour of the page, as red, green and blue.
pub(crate) type Rgb = [u8; 3];

/// A hue: what stands for an expert or a run.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Hue {
    /// The colour of lines and bars on a light page.
    pub light: Rgb,
    /// The same on a dark page.
    pub dark: Rgb,
    /// The code of the colour in a terminal, ECMA-48's `SGR`.
    pub ansi: u8,
}

/// All hues, in the order in which they are given away.
pub(crate) const HUES: [Hue; 8] = [
    Hue { light: [0x00, 0x72, 0xb2], dark: [0x56, 0xb4, 0xe9], ansi: 36 },
    Hue { light: [0xb4, 0x53, 0x09], dark: [0xf0, 0xa0, 0x20], ansi: 33 },
    Hue { light: [0xa8, 0x3f, 0x7c], dark: [0xe0, 0x8f, 0xc0], ansi: 35 },
    Hue { light: [0x00, 0x79, 0x5a], dark: [0x35, 0xc9, 0x9a], ansi: 32 },
    Hue { light: [0x4f, 0x46, 0xc8], dark: [0xa5, 0xac, 0xfc], ansi: 34 },
    Hue { light: [0xc0, 0x2d, 0x1d], dark: [0xff, 0x7a, 0x66], ansi: 31 },
    Hue { light: [0x75, 0x66, 0x00], dark: [0xf0, 0xe4, 0x42], ansi: 93 },
    Hue { light: [0x4b, 0x55, 0x63], dark: [0xb0, 0xb8, 0xc4], ansi: 90 },
];

/// The colours of a page that do not depend on its data.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Mode {
    /// The background.
    pub page: Rgb,
    /// The background of boxes.
    pub card: Rgb,
    /// Text.
    pub text: Rgb,
    /// Text of less weight: captions, and the numbers of axes.
    pub muted: Rgb,
    /// Lines of tables and charts.
    pub rule: Rgb,
    /// Links.
    pub link: Rgb,
    /// The strongest shade of heat maps.
    pub heat: Rgb,
    /// The share of a hue in the background of a token.
    tint: f64,
}

/// The light page, on which a report is also printed.
pub(crate) const LIGHT: Mode = Mode {
    page: [0xf6, 0xf7, 0xf9],
    card: [0xff, 0xff, 0xff],
    text: [0x1a, 0x1d, 0x21],
    muted: [0x55, 0x5d, 0x68],
    rule: [0xd5, 0xd9, 0xdf],
    link: [0x00, 0x5a, 0x96],
    heat: [0x5b, 0xaf, 0xe3],
    tint: 0.20,
};

/// The dark page.
pub(crate) const DARK: Mode = Mode {
    page: [0x12, 0x15, 0x1a],
    card: [0x1b, 0x1f, 0x26],
    text: [0xec, 0xee, 0xf1],
    muted: [0xa9, 0xb1, 0xbd],
    rule: [0x3a, 0x41, 0x4c],
    link: [0x7c, 0xc4, 0xf5],
    heat: [0x56, 0xb4, 0xe9],
    tint: 0.28,
};

/// Number of shades of a heat map, with the one for 0.
pub(crate) const NUM_SHADES: usize = 11;

impl Mode {
    /// The background of a token whose expert has this hue.
    pub(crate) fn tint(&self, hue: Rgb) -> Rgb {
        mix(self.card, hue, self.tint)
    }

    /// A shade of a heat map, and the colour of the text on it.
    pub(crate) fn shade(&self, level: usize) -> [Rgb; 2] {
        let shade = mix(self.card, self.heat, level as f64 / (NUM_SHADES - 1) as f64);
        let [black, white] = [[0; 3], [0xff; 3]];
        [shade, if contrast(shade, black) >= contrast(shade, white) { black } else { white }]
    }
}

/// The shade of a value between 0 and `most`.
pub fn level(value: f64, most: f64) -> usize {
    let share = if most > 0.0 { (value / most).clamp(0.0, 1.0) } else { 0.0 };
    (share * (NUM_SHADES - 1) as f64).round() as usize
}

fn mix(from: Rgb, to: Rgb, share: f64) -> Rgb {
    let of = |i: usize| f64::from(from[i]) + (f64::from(to[i]) - f64::from(from[i])) * share;
    [0, 1, 2].map(|i| of(i).round() as u8)
}

/// The contrast of two colours, from 1 to 21 (WCAG 2.2, "contrast ratio").
pub(crate) fn contrast(a: Rgb, b: Rgb) -> f64 {
    let [a, b] = [luminance(a), luminance(b)];
    (a.max(b) + 0.05) / (a.min(b) + 0.05)
}

/// WCAG 2.2, "relative luminance".
fn luminance(colour: Rgb) -> f64 {
    let linear = |part: u8| {
        let part = f64::from(part) / 255.0;
        if part <= 0.04045 { part / 12.92 } else { ((part + 0.055) / 1.055).powf(2.4) }
    };
    0.2126 * linear(colour[0]) + 0.7152 * linear(colour[1]) + 0.0722 * linear(colour[2])
}

/// A text in the colour of an expert, for a terminal.
pub(crate) fn coloured(text: &str, expert: usize) -> String {
    match text.is_empty() {
        true => String::new(),
        false => format!("\x1b[{}m{text}\x1b[0m", HUES[expert % HUES.len()].ansi),
    }
}

/// The index of the largest weight.
pub fn largest(weights: &[f64]) -> usize {
    let by_weight = |a: &(usize, &f64), b: &(usize, &f64)| a.1.total_cmp(b.1);
    weights.iter().enumerate().max_by(by_weight).map_or(0, |(index, _)| index)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// WCAG 2.2: 4.5 for text (1.4.3) and 3 for what a chart draws (1.4.11).
    #[test]
    fn text_and_lines_have_enough_contrast_on_light_and_dark_pages() {
        for (name, mode) in [("light", LIGHT), ("dark", DARK)] {
            for ground in [mode.page, mode.card] {
                for (what, ink) in [("text", mode.text), ("muted", mode.muted), ("link", mode.link)]
                {
                    let found = contrast(ground, ink);
                    assert!(found >= 4.5, "{name}, {what}: {found:.2}");
                }
            }
            for (index, hue) in HUES.iter().enumerate() {
                let ink = if name == "light" { hue.light } else { hue.dark };
                // the letters at the ends of lines have the lines' colours
                let [line, token] = [
                    contrast(mode.card, ink).min(contrast(mode.page, ink)),
                    contrast(mode.tint(ink), mode.text).min(contrast(mode.tint(ink), mode.text)),
                ];
                assert!(line >= 4.5 && token >= 4.5, "{name} {index}: {line:.2} {token:.2}");
            }
            for level in 0..NUM_SHADES {
                let [shade, ink] = mode.shade(level);
                let found = contrast(shade, ink);
                assert!(found >= 4.5, "{name}, shade {level}: {found:.2}");
            }
        }
    }

    #[test]
    fn contrast_is_that_of_the_standard() {
        assert!((contrast([0; 3], [255; 3]) - 21.0).abs() < 1e-9);
        // a grey that is known to be the lightest on white with 4.5
        assert!((contrast([0x76; 3], [255; 3]) - 4.54).abs() < 0.01);
    }

    #[test]
    fn shades_go_from_nothing_to_the_most() {
        assert_eq!([level(0.0, 0.5), level(0.25, 0.5), level(0.5, 0.5)], [0, 5, 10]);
        assert_eq!([level(2.0, 1.0), level(1.0, 0.0), level(f64::NAN, 1.0)], [10, 0, 0]);
    }
}
