"""The native CPU library: the C++ headers that operations share, and Python code that builds, finds and loads it.

The functions of an operation are in `cpu.h` of its folder. The folder imports the room `base` alone.
"""
