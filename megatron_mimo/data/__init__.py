"""Batches on the host: their order, their way to the ranks."""
