//! Heat maps as PNG files, for TensorBoard: a shade and a number for each cell, the rows' names to
//! the left, and the experts' numbers above.

use anyhow::Result;
use font8x8::{BASIC_FONTS, LATIN_FONTS, UnicodeFonts};

type Rgb = [u8; 3];

const WHITE: Rgb = [0xff; 3];
const INK: Rgb = [0x1a, 0x1d, 0x21];
/// The shade of 1; that of 0 is white. The ink has enough contrast on all shades.
const HEAT: Rgb = [0x5b, 0xaf, 0xe3];
/// A cell that does not exist.
const ABSENT: Rgb = [0xd5, 0xd9, 0xdf];
/// The width and height of a character.
const GLYPH: usize = 8;
/// The width of a cell in characters, of which `0.00` needs four.
const CELL: usize = 6;
/// The height of a row in characters.
const ROW: usize = 2;
/// Most characters of a row's name.
const NAME: usize = 28;
/// Up to this number of rows, a pixel is drawn as 2 x 2.
const FEW_ROWS: usize = 24;
/// Most rows, so that an image has a sensible size.
const MAX_ROWS: usize = 1000;

/// A heat map. All values lie between 0 and 1.
#[derive(Debug, Clone)]
pub struct HeatImage {
    /// Number of columns.
    pub columns: usize,
    /// The rows' names and their values; `None` where there is no such cell.
    pub rows: Vec<(String, Vec<Option<f64>>)>,
}

impl HeatImage {
    /// The width and height, and the PNG file.
    pub fn png(&self) -> Result<([u32; 2], Vec<u8>)> {
        let canvas = self.draw();
        let scale = if self.rows.len() <= FEW_ROWS { 2 } else { 1 };
        let size = [canvas.width * scale, canvas.height() * scale].map(|pixels| pixels as u32);
        let mut pixels = Vec::with_capacity(3 * canvas.pixels.len() * scale * scale);
        for row in canvas.pixels.chunks(canvas.width) {
            for _ in 0..scale {
                pixels.extend(row.iter().flat_map(|pixel| pixel.repeat(scale)));
            }
        }
        let mut file = vec![];
        let mut encoder = png::Encoder::new(&mut file, size[0], size[1]);
        encoder.set_color(png::ColorType::Rgb);
        encoder.write_header()?.write_image_data(&pixels)?;
        Ok((size, file))
    }

    fn draw(&self) -> Canvas {
        let rows = &self.rows[..self.rows.len().min(MAX_ROWS)];
        let longest = rows.iter().map(|(name, _)| name.chars().count().min(NAME)).max();
        let left = longest.unwrap_or(0).max("expert".len()) + 1;
        let mut canvas = Canvas::new(left + CELL * self.columns, ROW * (rows.len() + 1));
        canvas.write("expert", [0, 0]);
        for column in 0..self.columns {
            canvas.write(&format!("{column:^CELL$}"), [left + CELL * column, 0]);
        }
        for (index, (name, values)) in rows.iter().enumerate() {
            let top = ROW * (index + 1);
            canvas.write(&shortened(name), [0, top]);
            for (column, value) in values.iter().enumerate() {
                let at = [left + CELL * column, top];
                canvas.fill(value.map_or(ABSENT, shade), at);
                if let Some(value) = value {
                    canvas.write(&format!("{value:.2}"), [at[0] + 1, top]);
                }
            }
        }
        canvas
    }
}

/// The end of a name, which tells the layers and modules of a family apart.
fn shortened(name: &str) -> String {
    let count = name.chars().count();
    name.chars().skip(count.saturating_sub(NAME)).collect()
}

/// The shade of a value.
fn shade(value: f64) -> Rgb {
    let share = value.clamp(0.0, 1.0);
    let of = |part: usize| {
        let (from, to) = (f64::from(WHITE[part]), f64::from(HEAT[part]));
        (from + (to - from) * share).round() as u8
    };
    [0, 1, 2].map(of)
}

/// Pixels, row by row. Places are in characters, as `[column, row]`.
struct Canvas {
    width: usize,
    pixels: Vec<Rgb>,
}

impl Canvas {
    fn new(columns: usize, rows: usize) -> Self {
        let (width, height) = (columns * GLYPH, rows * GLYPH);
        Self { width, pixels: vec![WHITE; width * height] }
    }

    fn height(&self) -> usize {
        self.pixels.len() / self.width
    }

    /// Fills a cell.
    fn fill(&mut self, colour: Rgb, [column, row]: [usize; 2]) {
        for y in row * GLYPH..(row + ROW) * GLYPH {
            let start = y * self.width + column * GLYPH;
            self.pixels[start..start + CELL * GLYPH].fill(colour);
        }
    }

    /// Writes a text into the middle of a row.
    fn write(&mut self, text: &str, [column, row]: [usize; 2]) {
        let top = row * GLYPH + (ROW - 1) * GLYPH / 2;
        for (index, character) in text.chars().enumerate() {
            for (y, line) in glyph(character).into_iter().enumerate() {
                let start = (top + y) * self.width + (column + index) * GLYPH;
                for x in (0..GLYPH).filter(|x| line >> x & 1 == 1) {
                    self.pixels[start + x] = INK;
                }
            }
        }
    }
}

/// A character's lines from the top, whose lowest bit is the leftmost pixel. A character that the
/// font lacks is a question mark.
fn glyph(character: char) -> [u8; GLYPH] {
    let found = BASIC_FONTS.get(character).or_else(|| LATIN_FONTS.get(character));
    found.or_else(|| BASIC_FONTS.get('?')).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reference: the decoder of the crate `png`, and shades by hand.
    #[test]
    fn a_cell_has_the_shade_of_its_value() -> Result<()> {
        let rows = vec![
            ("law".to_owned(), vec![Some(0.0), Some(1.0)]),
            ("medicine \u{1f600}".to_owned(), vec![Some(0.5), None]),
        ];
        let ([width, height], file) = HeatImage { columns: 2, rows }.png()?;
        // 10 characters and a space, then two cells; a heading and two rows
        assert_eq!([width, height], [2 * 8 * (10 + 1 + 2 * 6), 2 * 8 * 2 * 3]);
        let mut reader = png::Decoder::new(std::io::Cursor::new(file)).read_info()?;
        let mut pixels = vec![0; reader.output_buffer_size().expect("it is small")];
        reader.next_frame(&mut pixels)?;
        let corner = |column: u32, row: u32| -> Rgb {
            let (x, y) = (16 * (11 + 6 * column), 16 * 2 * (row + 1));
            let at = 3 * (y * width + x) as usize;
            [pixels[at], pixels[at + 1], pixels[at + 2]]
        };
        assert_eq!([corner(0, 0), corner(1, 0)], [WHITE, HEAT]);
        assert_eq!([corner(0, 1), corner(1, 1)], [[0xad, 0xd7, 0xf1], ABSENT]);
        let inked = pixels.chunks(3).filter(|pixel| *pixel == INK).count();
        assert!(inked > 500, "there is text");
        Ok(())
    }

    #[test]
    fn many_rows_make_a_smaller_image() -> Result<()> {
        let row = |index: usize| (format!("layers.{index}.self_attn.q_proj"), vec![Some(0.25); 4]);
        let map = HeatImage { columns: 4, rows: (0..200).map(row).collect() };
        assert_eq!(map.png()?.0, [8 * (27 + 1 + 4 * 6), 8 * 2 * 201]);
        Ok(())
    }
}
