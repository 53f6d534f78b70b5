"""The same operators for CPUs: calls of the kernels in C++, and a fallback in torch calls.

``native`` and ``native_resize`` hand tensors to ``csrc/`` as addresses; they run where the kernels
are built. ``lookup``, ``compose``, ``update`` and ``resize`` do the same in torch calls: short
rather than fast, on any device, and what runs where nothing else can.
"""
