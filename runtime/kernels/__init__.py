"""Kernels of our own, for the one place where engines are far from the limit: linear layers with
int4 and int8 weights. C++ with a C interface (kernels.h), compiled when dfc is installed; without a
compiler the ops mean the same and run as PyTorch runs them, and `dfc doctor` says so.
"""
