"""Tables of what studies found, as markdown, made from the results of their runs."""
import statistics

from resumable import markdown

# the arms in the order of the tables
ALL = ["single", "single_active", "uniform", "random", "learned", "supervised", "oracle", "per_domain"]
# Student's t for a 95 % interval, by degrees of freedom
T = [None, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262]


def selection_loss(result):
    measured = result["outcome"].get("trained")
    return measured["selection"]["loss"] if measured else float("inf")


class ArmRows:
    """The measurements of an arm at its best rate, by seed."""

    def __init__(self, results):
        by = {}
        for result in results:
            id = result["id"]
            by.setdefault(id["factor"], {}).setdefault(id["seed"], []).append(result)
        # an arm with a run for each domain counts where it has all of them
        whole = max(len(of) for seeds in by.values() for of in seeds.values())
        by = {
            factor: {seed: of for seed, of in seeds.items() if len(of) == whole}
            for factor, seeds in sorted(by.items())
        }
        self.trials = {
            factor: statistics.mean(map(selection_loss, seeds[0]))
            for factor, seeds in by.items()
            if 0 in seeds
        }
        self.factor = min(self.trials, key=self.trials.get)
        self.seeds = {
            seed: [result["outcome"]["trained"]["report"] for result in of]
            for seed, of in sorted(by[self.factor].items())
            if all("trained" in result["outcome"] for result in of)
        }
        self.rate = results[0]["learning_rate"] / results[0]["id"]["factor"] * self.factor
        self.is_at_edge = len(self.trials) > 1 and self.factor in (min(self.trials), max(self.trials))

    def losses(self, domain=None):
        """The loss by seed: the mean of the domains, or that of one domain."""
        if domain is None:
            return {seed: statistics.mean(of["loss"] for of in runs) for seed, runs in self.seeds.items()}
        of_seed = {seed: merged(runs) for seed, runs in self.seeds.items()}
        return {seed: losses[domain] for seed, losses in of_seed.items()}


def merged(reports):
    """The losses of the domains of all reports."""
    return {name: loss for report in reports for name, loss in report["domains"].items()}


def interval(values):
    """The mean with its 95 % interval, as text."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:+.4f}"
    half = T[len(values) - 1] * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:+.4f} ± {half:.4f}"


def below(single, other, domain=None):
    """How much lower the loss is than that of the single LoRA, for each seed that both have."""
    of_single, of_other = single.losses(domain), other.losses(domain)
    return [of_single[seed] - of_other[seed] for seed in of_single if seed in of_other]


def arms_of(results):
    """The arms that have a trial, in the order of `ALL`."""
    by = {arm: [r for r in results if r["id"]["arm"] == arm] for arm in ALL}
    return {arm: ArmRows(of) for arm, of in by.items() if any(r["id"]["seed"] == 0 for r in of)}


def recovery(arms):
    """What perfect routing brings, and the share of it that the supervised router has."""
    if not {"single", "supervised", "oracle"} <= set(arms):
        return None
    total, gain = (below(arms["single"], arms[arm]) for arm in ("oracle", "supervised"))
    if not (total and gain):
        return None
    text = f"Perfect routing brings {interval(total)} nats"
    share = 100 * statistics.mean(gain) / statistics.mean(total)
    return f"{text}; recovery {share:.0f} %." if statistics.mean(total) > 0 else f"{text}."


def worst(single, other, names):
    """The domain that loses most against the single LoRA, or gains least."""
    gains = {name: statistics.mean(below(single, other, name)) for name in names}
    name = min(gains, key=gains.get)
    return f"{name} {gains[name]:+.4f}"


COLUMNS = ["mean", "below single", "seeds below", "worst domain"]


def print_tables(title, rows, order):
    """Prints the tables of studies.

    - order: the domains in the order of their columns
    - rows: the text, the arm and its measurements, and the single LoRA that it is compared with
    """
    seeds = sorted({seed for _, of, _ in rows for seed in of.seeds})
    found = {name for _, of, _ in rows for reports in of.seeds.values() for name in merged(reports)}
    names = [name for name in order if name in found]
    losses, domains, trials = [], [], []
    factors = sorted({factor for _, of, _ in rows for factor in of.trials})
    for text, of, single in rows:
        of_seed = of.losses()
        gains = below(single, of) if single and single is not of else []
        losses.append([
            text, f"{of.rate:.2g}" + (" (edge)" if of.is_at_edge else ""),
            *(f"{of_seed[seed]:.4f}" if seed in of_seed else "" for seed in seeds),
            f"{statistics.mean(of_seed.values()):.4f}" if of_seed else "",
            interval(gains) if gains else "",
            f"{sum(gain > 0 for gain in gains)} of {len(gains)}" if gains else "",
            worst(single, of, names) if gains else "",
        ])
        cells = [
            interval(below(single, of, name)) if gains else f"{statistics.mean(of.losses(name).values()):.4f}"
            for name in names
        ] if of_seed else []
        domains.append([text, *cells])
        cells = (f"{of.trials[factor]:.4f}" if factor in of.trials else "" for factor in factors)
        trials.append([text, *cells])
    print(f"\n### {title}\n")
    print(markdown(["arm", "rate", *(f"seed {seed}" for seed in seeds), *COLUMNS], losses))
    print("\nBy domain: the loss of the single LoRA, and how much lower that of each other arm is.\n")
    print(markdown(["arm", *names], domains))
    print("\nThe loss of the first seed on the half that selects, by the factor of the rate 2e-3.\n")
    print(markdown(["arm", *(f"{factor:g}" for factor in factors)], trials))
