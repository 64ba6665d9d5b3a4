"""Methods that did not pay off in our measurements, or that were never measured at size.

They are tested and keep their option names. Stages, optimizers and rank allocations are found as plug-ins
(:mod:`recursify.plugins`); the core never imports this package. To drop one, delete its module and entry point.

=======================  ===================================  ========================================================
module                   use                                  result
=======================  ===================================  ========================================================
``layer_healing``        ``uptrain --stage layers``           Perplexity 22.21 → 21.84 in 186 s, where ``heal``
                                                              reaches 19.16 in 183 s.
``soft_tying``           ``uptrain --stage tie``              Not measured.
``hfac``                 ``uptrain``, ``optimizer: hfac``     Not measured.
``rank_allocation``      ``convert --rank-allocation tail``   Perplexity 27.26, uniform ranks 24.39.
``rank_allocation``      ``… --rank-allocation fisher``       Not measured.
``adaptive_thresholds``  ``ExitSettings(adapt=…)``            Not measured.
``kernels``              –                                    ``route``, ``grouped_lora``: speed not measured, not
                                                              called by the engine.
=======================  ===================================  ========================================================

Figures are of SmolLM2-135M, from ``benchmarks/results/layer_healing.csv`` and ``quality.md``.
"""
