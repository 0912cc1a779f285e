"""What `examples/pretrain_mimo.py` trains: a model and its data each, with a command line beside it."""
