"""Training after conversion: heal the model, and teach it to exit."""
