"""What stands between this library and the insides of Megatron, torch and Triton."""
