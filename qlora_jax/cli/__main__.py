"""`python -m qlora_jax.cli` runs `qlora-jax`."""

from qlora_jax.cli.main import entry

if __name__ == "__main__":
    entry()
