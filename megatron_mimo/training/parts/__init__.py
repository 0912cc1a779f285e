"""Which parts train, and how their forward passes run."""
