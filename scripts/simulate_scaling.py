#!/usr/bin/env python3
"""Simulates how runs and evaluations scale over processes, and prints two tables.

    scripts/simulate_scaling.py [--steps N] [--seed N] [--check]

A step ends when the slowest process has done its share and the gradients are added up:

    step = max over processes (fixed + sum of its blocks' costs * speed * jitter + pause) + wait

The efficiency of N processes is the mean step of one process that has an Nth of the blocks, without
jitter, pauses or wait, over that of N processes. What is assumed:

- A step of one process takes the seconds of `SHAPES`, as measured on one H100 at batch 16 and
  estimated at batch 4. A share of `FIXED` of it does not depend on the blocks.
- The costs of blocks vary around their mean with a standard deviation of `SPREAD`, which comes from
  their label tokens and the lengths of their documents. Each process gets equally many blocks, by
  longest processing time first, as `src/dist/shard.rs` shares them, or in turn.
- Jitter is normal with a standard deviation of 0.5 % of the share. With a probability of 1 in 2,000
  steps, a process pauses for 30 ms. A slow process computes 3 % slower, always.
- The operation takes 2 (N - 1) / N * bytes / bandwidth + 2 (N - 1) * latency by a ring, and by a tree
  2 * bytes / bandwidth + 2 log2(N) * latency: the smaller of both. A machine has 8 GPUs with 400 GB/s
  and 4 us between them; between machines, there are 50 GB/s for each GPU and 10 us.
- The step waits for the whole operation if there are less than `OVERLAP_BYTES`. Otherwise two operations
  share the bytes: the second has those of a share of `LOWER` of the layers, and the first runs while
  these layers are differentiated, which takes this share of the backward pass, of `BACKWARD` of the step.

In an evaluation, blocks that all cost the same are computed in batches by the process that they
belong to, and the last process decides. With `--check`, the simulation is compared with closed forms.
"""

import argparse
import heapq
import math
import random

FIXED, SPREAD = 0.1, 0.1
LOWER, BACKWARD, OVERLAP_BYTES = 1 / 6, 0.6, 2**25
JITTER, PAUSE_SHARE, PAUSE, SLOW = 0.005, 1 / 2000, 0.030, 1.03
SHAPES = {"S1, batch 16": (0.0239, 16, 4.7e6), "S2, batch 16": (0.0298, 16, 75.5e6),
          "S1, batch 4": (0.0072, 4, 4.7e6), "S2, batch 4": (0.0095, 4, 75.5e6)}
WORLDS = (2, 4, 8, 16, 32, 64, 128)


def operation(size, num_bytes):
    """Seconds of an all-reduce, by a ring or a tree, whichever takes less."""
    if size == 1:
        return 0.0
    bandwidth, latency = (400e9, 4e-6) if size <= 8 else (50e9, 10e-6)
    ring = 2 * (size - 1) / size * num_bytes / bandwidth + 2 * (size - 1) * latency
    tree = 2 * num_bytes / bandwidth + 2 * math.log2(size) * latency
    return min(ring, tree)


def wait(size, num_bytes, seconds):
    """Seconds for which a step of `seconds` waits for the sum over its gradients."""
    if num_bytes < OVERLAP_BYTES:
        return operation(size, num_bytes)
    first = operation(size, num_bytes * (1 - LOWER)) - LOWER * BACKWARD * seconds
    return max(first, 0.0) + operation(size, num_bytes * LOWER)


def shares(costs, size):
    """The costs of each process's blocks: equally many each, longest processing time first."""
    assert len(costs) % size == 0
    most, counts = len(costs) // size, [0] * size
    totals, done = [(0.0, rank) for rank in range(size)], []
    for cost in sorted(costs, reverse=True):
        total, rank = heapq.heappop(totals)
        counts[rank] += 1
        if counts[rank] < most:
            heapq.heappush(totals, (total + cost, rank))
        else:
            done.append(total + cost)
    return done


def in_turn(costs, size):
    return [sum(costs[rank::size]) for rank in range(size)]


def efficiency(draw, shape, size, steps, *, share=shares, jitter=JITTER, pause=PAUSE_SHARE, slow=0):
    """The efficiency of `size` processes, `slow` of which are slower."""
    seconds, blocks, num_bytes = shape
    per_block = seconds * (1 - FIXED) / blocks
    total = 0.0
    for _ in range(steps):
        costs = [max(0.0, draw.gauss(1, SPREAD)) * per_block for _ in range(size * blocks)]
        times = []
        for rank, own in enumerate(share(costs, size)):
            time = (seconds * FIXED + own) * (SLOW if rank < slow else 1) * draw.gauss(1, jitter)
            times.append(time + (PAUSE if draw.random() < pause else 0))
        total += max(times) + wait(size, num_bytes, seconds)
    return seconds * steps / total


def evaluation(num_blocks, size, batch):
    """The efficiency of an evaluation whose blocks all cost the same."""
    batches = math.ceil(math.ceil(num_blocks / size) / batch)
    return math.ceil(num_blocks / batch) / (size * batches)


def check():
    """Compares the simulation with what is known."""
    draw, plain = random.Random(0), {"jitter": 0.0, "pause": 0.0}
    shape = (1.0, 16, 0.0)
    global SPREAD, FIXED
    kept, SPREAD = SPREAD, 0.0
    found = efficiency(draw, shape, 8, 50, **plain)
    assert abs(found - 1 / (1 + operation(8, 0))) < 1e-9, found
    # one slow process decides every step
    found = efficiency(draw, shape, 4, 50, slow=1, **plain)
    assert abs(found - 1 / (SLOW + operation(4, 0))) < 1e-9, found
    # the largest of two normal variables has the mean sigma / sqrt(pi)
    found = 1 / efficiency(draw, shape, 2, 40_000, jitter=0.1, pause=0.0) - operation(2, 0)
    assert abs(found - (1 + 0.1 / math.sqrt(math.pi))) < 2e-3, found
    # the share of steps in which somebody pauses
    found = 1 / efficiency(draw, shape, 4, 40_000, jitter=0.0, pause=0.1) - operation(4, 0)
    assert abs(found - (1 + PAUSE * (1 - 0.9**4))) < 1e-3, found
    # 2^30 bytes in a ring of two take 2^30 / bandwidth: hidden for a tenth of a second, or not at all
    whole = 2**30 / 400e9
    found = wait(2, 2**30, 1.0) - wait(2, 2**30, 0.0)
    assert abs(found + min(LOWER * BACKWARD, whole * (1 - LOWER) + 8e-6)) < 1e-9, found
    assert abs(wait(2, 2**30, 0.0) - whole - 16e-6) < 1e-9
    SPREAD = kept
    assert (evaluation(64, 4, 8), evaluation(65, 4, 8), evaluation(3, 4, 1)) == (1, 0.75, 0.75)
    assert sorted(shares([9, 8, 1, 2], 2)) == [10, 10] and in_turn([1, 2, 3, 4], 2) == [4, 6]
    print("the simulation agrees with the closed forms")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    if args.check:
        return check()
    draw = random.Random(args.seed)
    print("| efficiency of training, % | " + " | ".join(f"N = {size}" for size in WORLDS) + " |")
    print("|---|" + "--:|" * len(WORLDS))

    def row(name, shape, **kind):
        found = (efficiency(draw, shape, size, args.steps, **kind) for size in WORLDS)
        print(f"| {name} | " + " | ".join(f"{100 * value:.1f}" for value in found) + " |")

    for name, shape in SHAPES.items():
        row(name, shape)
    shape = SHAPES["S1, batch 16"]
    row("S1, batch 16, blocks in turn", shape, share=in_turn)
    row("S1, batch 16, one slow process", shape, slow=1)
    row("S1, batch 16, without jitter and pauses", shape, jitter=0.0, pause=0.0)
    print()
    print("| efficiency of an evaluation in batches of 8, % | " + " | ".join(f"N = {size}" for size in WORLDS) + " |")
    print("|---|" + "--:|" * len(WORLDS))
    for blocks in (100, 1_000, 10_000):
        found = (f"{100 * evaluation(blocks, size, 8):.1f}" for size in WORLDS)
        print(f"| {blocks:,} blocks | " + " | ".join(found) + " |")


main()
