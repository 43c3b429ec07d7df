"""A run: its settings, its directory, and the steps of training in it."""
