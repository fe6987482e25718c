"""Training rows straight from a running model, mixed in memory."""
