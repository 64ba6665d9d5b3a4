"""Conversion of dense models into recursive ones, and export to dense. Start at :mod:`recursify.convert.pipeline`."""
