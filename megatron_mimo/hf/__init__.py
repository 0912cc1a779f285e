"""Weights of Hugging Face models in and out: one table of names a family, one engine for all of them."""
