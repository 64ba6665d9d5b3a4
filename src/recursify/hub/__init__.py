"""Sharing a recursive model: what is checked, the model card, the upload."""
