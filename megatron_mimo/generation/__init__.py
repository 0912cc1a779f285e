"""Sampling with the language model in the loop."""
