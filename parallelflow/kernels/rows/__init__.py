"""Rows of every kind on a GPU: R rows a token that read, others that only write, any decay; the portable tier.

layout.py       how a chunk's rows lie, and what a kernel is compiled for
factors.py      device functions: a factor's rows, and the decay between two tokens of a chunk
gram.py         the kernel of readers, writers and Gram matrices
prepare.py      every chunk's readers, writers, Gram matrices and inverse
scan.py         the state from chunk to chunk; turned around in time, the same kernel carries the adjoint
pairs.py        gradients of the Gram matrices
slopes.py       device functions: what comes through pairs, and sums over later tokens
pull_kernel.py  the kernel of the rows' and the decays' gradients
pull_strong.py  the same where a channel's decays are strong
pull.py         gradients of the rows and of the decay
sums.py         zeros, and sums of a few arrays
engine.py       forward and backward from these stages
passes.py       the same, made again where such problems have been there before
"""
