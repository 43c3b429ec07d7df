"""The command lines `qlora-jax` and `qlora-convert`: one module for each command."""
