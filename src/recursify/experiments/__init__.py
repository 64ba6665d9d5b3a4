"""Methods that do not pay off in our measurements, or that have not been measured at size.

They are tested, keep their option names, and are found as plug-ins (``recursify.plugins``); the core never imports this
package. Delete a module here, with its entry point in ``pyproject.toml``, and the rest works.

==========================  ===============================  ==========================================================
module                      option                           result
==========================  ===============================  ==========================================================
``layer_healing``           ``uptrain --stage layers``       Perplexity 22.2 → 21.8 in 186 s, where ``heal`` reaches
                                                             19.2 in 183 s (SmolLM2-135M, 1 CPU thread; a short run).
                                                             It needs less memory: no model is loaded as a whole.
``soft_tying``              ``uptrain --stage tie``          Not measured at size. It trains as many weights as the
                                                             dense model has.
``hfac``                    ``uptrain``, optimizer: hfac     Not measured at size.
``rank_allocation``         ``convert``, rank allocation     ``tail`` and ``fisher`` beside the uniform default.
``kernels``                 –                                ``route`` and ``grouped_lora``: not called by the engine.
==========================  ===============================  ==========================================================

``benchmarks/README.md`` has the programs and their results.
"""
