"""The rehearsal: one rank's training step at full size on a machine without a GPU.

torch's CPU build is made to believe in a CUDA device (`pretend_cuda`), its tensors have shapes and no memory (FakeTensorMode), and
its process groups communicate with nobody (`groups`). The product's own trainer then takes one step (`step`), and what it does is
recorded: live memory and what holds it (`memory`), kernels, and the places where the host waits for the device (`syncs`).

It is a rehearsal, and no run: nothing is computed. It does not cover Transformer Engine's layers, the scratch memory of flash
kernels, NCCL's and CUDA's own memory, fragmentation, speed, nor any number that a kernel would compute.

`pretend_cuda.load()` comes before torch is imported, so this package imports nothing by itself.
"""
