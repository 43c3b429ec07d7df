"""The Llama model: its configuration, layers and parameters.

config -> layers, attention -> llama; params (names, shapes and counts), vocabulary
(untrained and new tokens), sharding (devices and host memory).
"""
