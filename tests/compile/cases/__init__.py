"""Launches of every shipped configuration, a module per op: ``compile_cases()`` yields names and calls, which only allocate and launch.

``wgmma_kernels(name)``, where a module has it: the kernels of a case that must use the matrix instructions of sm_90 and sm_100 there.
"""
