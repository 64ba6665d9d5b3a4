"""Text to measure on, and what is measured: used by every command, below all of them."""
