"""Methods that measurement showed not to pay, or that were never measured: tested, and not imported by the core."""
