"""The fused CUDA kernel: its source, how it is compiled, and how it is launched.

``frozen_bn.cu``
    The kernel, in CUDA C++ without includes. It travels in the wheel as text.
`bnfreeze.nn.cuda.plan`
    Which variant of it serves a call, with what grid. Pure arithmetic.
`bnfreeze.nn.cuda.layouts`
    What it asks of the tensors it is given.
`bnfreeze.nn.cuda.build`
    NVRTC, and the cache on disk. Each variant is compiled when it is first used.
`bnfreeze.nn.cuda.launch`
    cuda.bindings: arguments, contexts, streams. What surrounds it is in `bnfreeze.nn.cuda.host`.
`bnfreeze.nn.cuda.load`
    Whether there is a kernel in this process, and if not, why not.

A wheel of pure Python that brings its kernel as source needs no compiler on the user's machine:
every CUDA build of torch since 2.10 installs NVRTC and cuda.bindings along.
"""
