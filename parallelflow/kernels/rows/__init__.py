"""Rows of every kind on a GPU: R rows a token that read, others that only write, any decay; the portable tier.

layout.py    how a chunk's rows lie, and what a kernel is compiled for
factors.py   device functions: a factor's rows, and the decay between two tokens of a chunk
prepare.py   every chunk's readers, writers, Gram matrices and inverse
scan.py      the state from chunk to chunk; turned around in time, the same kernel carries the adjoint
pairs.py     gradients of the Gram matrices
pull.py      gradients of the rows and of the decay
engine.py    forward and backward from these stages
"""
