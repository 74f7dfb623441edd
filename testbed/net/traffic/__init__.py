"""Background traffic beside the trials."""
