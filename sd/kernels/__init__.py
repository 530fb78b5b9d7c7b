"""Kernels of our own for CPUs, in C++."""

from sd.kernels import avx2, avx512

OWN_ATTENTION = {"avx2": avx2, "avx512": avx512}
