"""The engine with Triton's kernels in the interpreter; run in a process of its own by test_device_loop.py."""

import sys
import warnings

from helpers.schedules import expected, model_of, prompt, settings
from recursify.engine import Engine, SamplingParams

NEW_TOKENS = 4
LENGTHS = (0, 1)


def run(family: str, kv: str) -> int:
    """Requests of two lengths, with and without exits; how many times."""
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
            for which, output in enumerate(engine.generate([prompt(number) for number in LENGTHS], params)):
                tokens, depths = expected(family, kv, which, how)
                assert output.token_ids == tokens[:NEW_TOKENS], (family, kv, loop, how)
                assert output.depths == depths[:NEW_TOKENS], (family, kv, loop, how)
            assert engine.stats.implementation == "triton"
            assert (engine.stats.loop_iterations > 0) == loop
            runs += 1
    return runs


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(sum(run(*case.split()) for case in sys.argv[1:]), "runs")
