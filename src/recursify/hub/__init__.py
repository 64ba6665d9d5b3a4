"""Upload to the Hub: checks of the folder, the model card, the upload."""
