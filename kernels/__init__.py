"""Triton kernels of gcfast, installed as ``gcfast.kernels``: one file an operation.

The kernels of the operations of ``gcfast.ops`` live here. ``gcfast.ops`` decides which backend
runs; nothing in this package is imported before a kernel is asked for.
"""
