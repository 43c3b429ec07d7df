"""The gated activation of an MLP with the low-rank products around it.

api        forward and backward: checks, the choice of an implementation
reference  plain JAX
gpu        the kernels for Hopper GPUs, one pass over memory in each direction
fragments  how a block of tokens is spread over threads, and multiplied
"""
