"""Evaluation: text, perplexity, tasks, exit statistics and the calibration of thresholds."""
