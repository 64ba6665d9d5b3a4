"""The engine with Triton's kernels in the interpreter, run in a process of its own by device_loop/test_loop.py."""

import sys
import warnings

from helpers.schedules import expected, model_of, prompt, settings
from recursify.engine import Engine, SamplingParams

NEW_TOKENS = 4
LENGTHS = (0, 1)


def run(family: str, kv: str) -> int:
    """Compare requests of two lengths, with and without exits, with transformers; returns the number of engines run."""
    model = model_of(family, kv)
    is_routed = model.config.router is not None
    runs = 0
    for loop in (False,) if is_routed else (False, True):
        for how in (0,) if is_routed else (0, 3):
            engine = Engine(
                model,
                kv=kv,
                force_kv=True,
                max_num_seqs=2,
                page_size=4,
                num_pages=32,
                max_model_len=32,
                device_loop=loop,
                num_device_steps=3,
                implementation="triton",
            )
            params = SamplingParams(max_tokens=NEW_TOKENS, exit=settings(how, family, kv))
            for number, output in enumerate(engine.generate([prompt(length) for length in LENGTHS], params)):
                tokens, depths = expected(family, kv, number, how)
                assert output.token_ids == tokens[:NEW_TOKENS], (family, kv, loop, how)
                assert output.depths == depths[:NEW_TOKENS], (family, kv, loop, how)
            assert engine.stats.implementation == "triton"
            assert (engine.stats.loop_iterations > 0) == loop
            runs += 1
    return runs


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(sum(run(*case.split()) for case in sys.argv[1:]), "runs")
