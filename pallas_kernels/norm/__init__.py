"""RMSNorm together with the low-rank products of its output, and their derivative.

api        normed_input: checks, the choice of an implementation, the derivative
reference  plain JAX
gpu        the kernels for Hopper GPUs, one pass over memory in each direction
fragments  how a block of rows is spread over threads, and multiplied
"""
