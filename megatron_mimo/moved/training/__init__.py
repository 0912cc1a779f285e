"""Modules of version 0.1 that are gone from `megatron_mimo.training`; see `megatron_mimo.moved`."""
