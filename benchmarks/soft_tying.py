"""Soft tying beside healing: perplexity after the same tokens, at several rates.

    python benchmarks/soft_tying.py DIR

Soft tying is tried with and without random mixtures, and with a longer and a shorter way to the mean. A step of it
costs what a step of healing costs, and mixing weights; the tokens are the same, the memory is not.
"""

from __future__ import annotations

from pathlib import Path

from uptrain_runs import at_rates, main

RATES = (1e-4, 3e-4, 1e-3)

CASES = at_rates("heal", RATES)
for noise in (1.0, 0.0):
    for fraction in (0.75, 0.25):
        CASES += at_rates(
            f"tie {fraction:g} noise {noise:g}", RATES, stage="tie", tie_fraction=fraction, tie_noise=noise
        )

if __name__ == "__main__":
    main(__doc__, CASES, Path("benchmarks/results/soft_tying.csv"))
