"""How good is a file: KLD, perplexity, ARC and speed, through llama.cpp on the CPU.

``base`` is the one shape that all evaluations have; ``compare`` is the quick check of one file against its
float baseline.
"""
