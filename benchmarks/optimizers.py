"""Optimizers side by side: bytes of their state, and perplexity after the same tokens of healing, at several rates.

    python benchmarks/optimizers.py DIR

Every optimizer has the same grid of learning rates: all three scale their updates to about the size of the rate. The
row to read of each is its best.
"""

from __future__ import annotations

from pathlib import Path

from uptrain_runs import at_rates, main

RATES = (1e-4, 3e-4, 1e-3)

CASES = [case for name in ("adamw_torch", "adafactor", "hfac") for case in at_rates(name, RATES, optimizer=name)]

if __name__ == "__main__":
    main(__doc__, CASES, Path("benchmarks/results/optimizers.csv"))
