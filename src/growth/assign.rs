//! Which experts belong to which domain, where the config does not say it, and the ranks that
//! follow from the sizes of domains.
//!
//! With `D` trained domains and `E` experts:
//!
//! ```text
//! E >= D    each domain has E / D experts, and the E mod D largest domains have one more
//! E < D     the domains are joined into E groups, one expert each: at first each is a group, and
//!           the two groups whose domains have the largest mean cosine are joined until E are left
//!           (average linkage)
//! ```
//!
//! The cosine is that of two [skills](super::skills). The size of a domain is its share of the
//! training blocks.

use anyhow::{Context, Result};
use tch::Device;

use super::skills::{Skill, SkillCenter, SkillLibrary, embed};
use crate::base::Base;
use crate::config::{Capacity, Config, DomainExperts};
use crate::data::TokenDataset;
use crate::model::decoder::spec::DecoderSpec;
use crate::model::experts::spec::ExpertSpec;
use crate::model::{RoutedModel, kind_of};

/// Largest number of a domain's blocks that are read for its embedding.
const SKILL_BLOCKS: usize = 32;

/// Gives each trained domain of a run its experts, if the run needs them and its config does not
/// name them.
///
/// # Errors
/// Fails if the base cannot be read or its hidden states are not finite.
pub fn assign_experts(
    config: &mut Config,
    train: &TokenDataset,
    base: &Base,
    device: Device,
) -> Result<()> {
    let domains: Vec<usize> = config.trained_domains().map(|(index, _)| index).collect();
    let names_some = domains.iter().any(|&at| config.data.domains[at].expert.is_some());
    if !config.reads_domains() || names_some {
        return Ok(());
    }
    let num_experts = config.lora.num_experts as usize;
    let groups = match num_experts < domains.len() {
        false => experts_of(&shares(train, &domains), num_experts),
        true => {
            let cosines = similarities(config, train, &domains, base, device)?;
            join(&cosines, num_experts).into_iter().map(|expert| vec![expert]).collect()
        }
    };
    for (&domain, experts) in domains.iter().zip(groups) {
        let experts: Vec<i64> = experts.into_iter().map(|expert| expert as i64).collect();
        config.data.domains[domain].expert = Some(experts.into());
    }
    Ok(())
}

/// Settles what depends on which experts the domains have: assigns these, and gives the experts of
/// a new mixture the alphas of `lora.scale` and the ranks of `lora.capacity`.
///
/// - `specs`: the experts by [`ExpertSpec::of_config`]
///
/// # Errors
/// As for [`assign_experts`] and [`set_capacity`].
pub fn settle_experts(
    config: &mut Config,
    specs: &mut [ExpertSpec],
    train: &TokenDataset,
    base: &Base,
    device: Device,
) -> Result<()> {
    let before: Vec<f64> = (0..specs.len()).map(|expert| config.scale_factor(expert)).collect();
    assign_experts(config, train, base, device)?;
    for (expert, (spec, before)) in specs.iter_mut().zip(before).enumerate() {
        let ratio = config.scale_factor(expert) / before;
        spec.modules.values_mut().for_each(|size| size.alpha *= ratio);
    }
    set_capacity(specs, config, train, &base.spec)
}

/// Sets the ranks of a new mixture's routed experts by `lora.capacity`.
///
/// # Errors
/// Fails if PiSSA or OLoRA gets a rank above that of the base's weight.
pub fn set_capacity(
    specs: &mut [ExpertSpec],
    config: &Config,
    train: &TokenDataset,
    base: &DecoderSpec,
) -> Result<()> {
    if config.lora.capacity == Capacity::Even {
        return Ok(());
    }
    let num_experts = config.lora.num_experts as usize;
    let domains: Vec<usize> = config.trained_domains().map(|(index, _)| index).collect();
    let mut sizes = vec![0.0; num_experts];
    for (&domain, share) in domains.iter().zip(shares(train, &domains)) {
        let experts = config.data.domains[domain].expert.as_ref();
        let experts = experts.map_or(&[][..], DomainExperts::experts);
        for &expert in experts {
            sizes[expert as usize] += share / experts.len() as f64;
        }
    }
    let ranks = divide(config.lora.rank * config.lora.num_experts, &sizes);
    for (expert, (spec, rank)) in specs.iter_mut().zip(ranks).enumerate() {
        spec.set_rank(&|_| rank);
        spec.check_ranks(base)
            .with_context(|| format!("expert {expert} by `lora.capacity = \"by_domain\"`"))?;
    }
    Ok(())
}

/// The shares of some domains in the training blocks.
fn shares(train: &TokenDataset, domains: &[usize]) -> Vec<f64> {
    let all = train.mix();
    domains.iter().map(|&domain| all[domain]).collect()
}

/// The experts of each domain, for at least as many experts as domains.
fn experts_of(shares: &[f64], num_experts: usize) -> Vec<Vec<usize>> {
    let (each, rest) = (num_experts / shares.len(), num_experts % shares.len());
    let mut by_size: Vec<usize> = (0..shares.len()).collect();
    by_size.sort_by(|&a, &b| shares[b].total_cmp(&shares[a]).then(a.cmp(&b)));
    let mut next = 0;
    let of = |domain: usize| {
        let count = each + usize::from(by_size[..rest].contains(&domain));
        next += count;
        (next - count..next).collect()
    };
    (0..shares.len()).map(of).collect()
}

/// Divides `total` into whole parts of at least 1, in proportion to `sizes` (largest remainders).
fn divide(total: i64, sizes: &[f64]) -> Vec<i64> {
    let sum: f64 = sizes.iter().sum();
    let free = (total - sizes.len() as i64) as f64;
    // what a part gets beyond its first, so that the whole is in proportion where this is possible
    let beyond: Vec<f64> =
        sizes.iter().map(|size| (total as f64 * size / sum - 1.0).max(0.0)).collect();
    let scale = free / beyond.iter().sum::<f64>().max(f64::MIN_POSITIVE);
    let exact: Vec<f64> = beyond.iter().map(|part| part * scale).collect();
    let mut parts: Vec<i64> = exact.iter().map(|part| 1 + part.floor() as i64).collect();
    let mut by_remainder: Vec<usize> = (0..sizes.len()).collect();
    let remainder = |at: usize| exact[at] - exact[at].floor();
    by_remainder.sort_by(|&a, &b| remainder(b).total_cmp(&remainder(a)).then(a.cmp(&b)));
    let missing = (total - parts.iter().sum::<i64>()).max(0) as usize;
    for &at in by_remainder.iter().cycle().take(missing) {
        parts[at] += 1;
    }
    parts
}

/// The cosine of every two domains' skills, `[d][d]`.
fn similarities(
    config: &Config,
    train: &TokenDataset,
    domains: &[usize],
    base: &Base,
    device: Device,
) -> Result<Vec<Vec<f64>>> {
    let model = RoutedModel::plain(&base.weights()?, device, kind_of(config.base.dtype), false);
    let mut library = SkillLibrary::new(SkillCenter::default().of(&model)?);
    for &domain in domains {
        let embedding = embed(&model, train, domain, 8, Some(SKILL_BLOCKS))?;
        library.skills.push(Skill {
            name: train.domains[domain].name.clone(),
            embedding: embedding.mean,
            label_tokens: embedding.label_tokens,
            expert: None,
        });
    }
    Ok(library.cosines())
}

/// The group of each domain, from 0 in the order of their first domains.
fn join(cosines: &[Vec<f64>], num_groups: usize) -> Vec<usize> {
    let mut groups: Vec<Vec<usize>> = (0..cosines.len()).map(|domain| vec![domain]).collect();
    while groups.len() > num_groups {
        let mean = |a: &[usize], b: &[usize]| {
            let pairs = a.iter().flat_map(|&i| b.iter().map(move |&j| cosines[i][j]));
            pairs.sum::<f64>() / (a.len() * b.len()) as f64
        };
        let pairs = (0..groups.len()).flat_map(|b| (0..b).map(move |a| (a, b)));
        let alike = |&(a, b): &(usize, usize)| mean(&groups[a], &groups[b]);
        let (a, b) = pairs
            .max_by(|x, y| alike(x).total_cmp(&alike(y)).then(y.cmp(x)))
            .expect("there are two groups");
        let joined = groups.remove(b);
        groups[a].extend(joined);
    }
    let group = |domain: usize| groups.iter().position(|group| group.contains(&domain));
    (0..cosines.len()).map(|domain| group(domain).expect("each domain has a group")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_domain_has_equally_many_experts_and_the_largest_have_those_left_over() {
        assert_eq!(experts_of(&[0.5, 0.5], 2), [vec![0], vec![1]]);
        assert_eq!(experts_of(&[0.2, 0.5, 0.3], 8), [vec![0, 1], vec![2, 3, 4], vec![5, 6, 7]]);
    }

    #[test]
    fn ranks_are_divided_in_proportion_with_at_least_one_for_each() {
        assert_eq!(divide(32, &[1.0, 1.0, 2.0]), [8, 8, 16]);
        assert_eq!(divide(32, &[0.4, 0.2, 0.2, 0.2]), [13, 7, 6, 6]);
        assert_eq!(divide(8, &[0.001, 1.0]), [1, 7]);
        assert_eq!(divide(3, &[0.2, 0.2, 0.6]), [1, 1, 1]);
    }

    #[test]
    fn the_domains_that_are_most_alike_share_an_expert() {
        let cosines = vec![
            vec![1.0, 0.1, 0.9, 0.2],
            vec![0.1, 1.0, 0.3, 0.5],
            vec![0.9, 0.3, 1.0, 0.1],
            vec![0.2, 0.5, 0.1, 1.0],
        ];
        assert_eq!(join(&cosines, 3), [0, 1, 0, 2]);
        assert_eq!(join(&cosines, 2), [0, 1, 0, 1]);
        assert_eq!(join(&cosines, 1), [0, 0, 0, 0]);
    }
}
