//! The sentence at the end of a study. It says no more than the seeds show.

use super::arms::Arm;
use super::statistics::Interval;

/// The comparison that the verdict is about.
#[derive(Debug, Clone, PartialEq)]
pub struct Compared {
    /// The routed arm that is compared with [`Arm::Single`].
    pub routed: Arm,
    /// How much lower its loss is, nats: the paired differences `single - routed`.
    pub gain: Interval,
    /// Number of seeds.
    pub num_seeds: u64,
    /// What perfect routing could bring.
    pub possible: Possible,
}

/// What perfect routing could bring, by the arm [`Arm::Oracle`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Possible {
    /// The study has no oracle.
    Unknown,
    /// The oracle's gain over a single LoRA cannot be told from 0.
    Nothing,
    /// The routed arm has this share of the oracle's gain: the recovery.
    Share(f64),
}

/// The verdict of a study. `None` means that the arms to compare have not all finished.
pub fn verdict(compared: Option<&Compared>) -> String {
    let Some(Compared { routed, gain, num_seeds, possible }) = compared else {
        return "There is no verdict: it compares `supervised` or else `learned` with `single`, \
                and the study has no finished runs of both."
            .into();
    };
    let (single, size) = (Arm::Single, gain.mean.abs());
    let Some(half) = gain.half_width else {
        let place = if gain.mean >= 0.0 { "below" } else { "above" };
        return format!(
            "One seed can show no difference: the loss of {routed} is {size:.4} nats {place} that \
             of {single}, which may be chance."
        );
    };
    let setting = format!("{routed} against {single}, {num_seeds} seeds, 95 % t-interval");
    let nothing = "perfect routing by domain brings nothing that can be shown";
    if gain.is_above_zero() {
        let lowers = format!("Routing lowers the loss by {size:.4} ± {half:.4} nats ({setting})");
        return match possible {
            Possible::Unknown => format!("{lowers}."),
            Possible::Nothing => format!("{lowers}; {nothing}."),
            Possible::Share(share) if *share > 1.0 => {
                format!("{lowers}; perfect routing by domain brings less.")
            }
            Possible::Share(share) => {
                let percent = 100.0 * share;
                format!("{lowers}; that is {percent:.0} % of what perfect routing could bring.")
            }
        };
    }
    let sentence = if gain.is_below_zero() {
        format!("Routing raises the loss by {size:.4} ± {half:.4} nats ({setting})")
    } else {
        let difference = -gain.mean;
        format!(
            "No difference between {routed} and {single} can be shown: {difference:+.4} ± \
             {half:.4} nats ({num_seeds} seeds)"
        )
    };
    match possible {
        Possible::Nothing => format!("{sentence}; {nothing} either."),
        Possible::Unknown | Possible::Share(_) => format!("{sentence}."),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(mean: f64, half_width: Option<f64>, possible: Possible) -> String {
        let gain = Interval { mean, half_width };
        let num_seeds = if half_width.is_some() { 5 } else { 1 };
        verdict(Some(&Compared { routed: Arm::Supervised, gain, num_seeds, possible }))
    }

    #[test]
    fn a_gain_is_named_with_its_interval_and_its_share_of_the_possible() {
        let half = Some(0.0021);
        insta::assert_snapshot!(
            said(0.0104, half, Possible::Share(0.797)),
            @"Routing lowers the loss by 0.0104 ± 0.0021 nats (supervised against single, 5 seeds, \
              95 % t-interval); that is 80 % of what perfect routing could bring."
        );
        insta::assert_snapshot!(
            said(0.0104, half, Possible::Unknown),
            @"Routing lowers the loss by 0.0104 ± 0.0021 nats (supervised against single, 5 seeds, \
              95 % t-interval)."
        );
        insta::assert_snapshot!(
            said(0.0104, half, Possible::Nothing),
            @"Routing lowers the loss by 0.0104 ± 0.0021 nats (supervised against single, 5 seeds, \
              95 % t-interval); perfect routing by domain brings nothing that can be shown."
        );
        insta::assert_snapshot!(
            said(0.0104, half, Possible::Share(1.2)),
            @"Routing lowers the loss by 0.0104 ± 0.0021 nats (supervised against single, 5 seeds, \
              95 % t-interval); perfect routing by domain brings less."
        );
    }

    #[test]
    fn a_loss_by_routing_is_said_as_plainly() {
        insta::assert_snapshot!(
            said(-0.0104, Some(0.0021), Possible::Share(-0.4)),
            @"Routing raises the loss by 0.0104 ± 0.0021 nats (supervised against single, 5 seeds, \
              95 % t-interval)."
        );
        insta::assert_snapshot!(
            said(-0.0104, Some(0.0021), Possible::Nothing),
            @"Routing raises the loss by 0.0104 ± 0.0021 nats (supervised against single, 5 seeds, \
              95 % t-interval); perfect routing by domain brings nothing that can be shown either."
        );
    }

    #[test]
    fn an_interval_around_zero_shows_no_difference() {
        insta::assert_snapshot!(
            said(0.0003, Some(0.0021), Possible::Unknown),
            @"No difference between supervised and single can be shown: -0.0003 ± 0.0021 nats \
              (5 seeds)."
        );
        insta::assert_snapshot!(
            said(-0.0003, Some(0.0021), Possible::Nothing),
            @"No difference between supervised and single can be shown: +0.0003 ± 0.0021 nats \
              (5 seeds); perfect routing by domain brings nothing that can be shown either."
        );
        // the bound itself belongs to the interval
        assert!(said(0.5, Some(0.5), Possible::Unknown).starts_with("No difference"));
    }

    #[test]
    fn one_seed_shows_no_difference() {
        insta::assert_snapshot!(
            said(0.25, None, Possible::Nothing),
            @"One seed can show no difference: the loss of supervised is 0.2500 nats below that of \
              single, which may be chance."
        );
        assert!(said(-0.25, None, Possible::Unknown).contains("0.2500 nats above that of single"));
    }

    #[test]
    fn without_the_arms_to_compare_there_is_no_verdict() {
        assert!(verdict(None).starts_with("There is no verdict: it compares `supervised`"));
    }
}
