//! Continues a text with a mixture, and prints how its router weighed the experts.
//!
//! ```sh
//! cargo run --release --example train -- runs/library 100
//! cargo run --release --example generate -- runs/library "Anna finds 7 apples."
//! ```

use anyhow::{Result, bail};
use dylora::base::Base;
use dylora::checkpoint::{self, Preferred};
use dylora::generate::{
    Engine, EngineLimits, GenerationDefaults, Request, Route, Sampling, TextStream, prompt,
};
use dylora::hub::HubSettings;
use tch::Device;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [run, text] = &arguments[..] else { bail!("usage: generate RUN TEXT") };
    let dir = checkpoint::find(run.as_ref(), Preferred::Best)?;
    let config = checkpoint::read_config(&dir)?;
    let base = Base::open(&config.base, &HubSettings::offline(""), &())?;
    let model = checkpoint::load_model(&dir, &config, &base, Device::Cpu)?;
    let tokenizer = base.tokenizer()?;

    let prompt = prompt::text_ids(tokenizer, text)?;
    let request = Request {
        key: 0,
        prompt: prompt.clone(),
        max_new_tokens: 24,
        sampling: Sampling { temperature: 0.8, top_p: 0.95, ..Sampling::GREEDY },
        route: Route::Router,
        end_tokens: GenerationDefaults::of_base(&base)?.end_tokens.into(),
        num_alternatives: 0,
        wants_weights: true,
    };
    let context = base.spec.max_positions as usize;
    let mut engine = Engine::new(&model, EngineLimits { max_texts: 1, context })?;
    engine.add(request)?;

    let mut stream = TextStream::new(tokenizer, &prompt, &[]);
    let mut sums = vec![0.0; model.num_experts() as usize];
    let mut num_tokens = 0.0;
    // each step brings a token to every text; here there is one text
    while !engine.is_idle() {
        for event in engine.step() {
            stream.take(&event)?;
            num_tokens += 1.0;
            for (sum, weight) in sums.iter_mut().zip(&event.token.weights) {
                *sum += weight;
            }
        }
    }
    let weights: Vec<f64> = sums.iter().map(|sum| sum / num_tokens).collect();
    println!("{text}{}", stream.text());
    println!("mean routing weights: {weights:.2?}");
    Ok(())
}
