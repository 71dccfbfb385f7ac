"""The rehearsal: one rank's training step at full size on a machine without a GPU.

A CUDA device is simulated in torch's CPU build (`simulated_cuda`), tensors have shapes but no memory (FakeTensorMode),
and process groups communicate nothing (`groups`). The product's trainer takes a step (`step`), which records live
memory and the lines that hold it (`memory`), kernels, and the lines where the host waits for the device (`syncs`).

Nothing is computed. The rehearsal does not cover Transformer Engine's layers, scratch memory of flash kernels, memory
of NCCL and CUDA, fragmentation, speed, or any number that a kernel would compute.

`simulated_cuda.load()` must run before torch is imported, so this package imports nothing by itself.
"""
