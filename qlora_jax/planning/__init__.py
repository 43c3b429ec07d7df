"""What a training step needs, before it runs.

plan -> step (the program and its memory) -> compile (for a GPU that is absent),
estimate (the closed form) -> gpus (data sheets).
"""
