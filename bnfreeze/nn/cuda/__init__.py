"""The fused CUDA kernel: its source, how it is compiled, and how it is launched.

``frozen_bn.cu``
    The kernel, in CUDA C++ without includes. The wheel has it as text.
`bnfreeze.nn.cuda.plan`
    Which variant of it computes a call, and with what grid. Pure arithmetic.
`bnfreeze.nn.cuda.layouts`
    What it requires of tensors.
`bnfreeze.nn.cuda.build`
    NVRTC and the cache on disk. Each variant is compiled when it is first used.
`bnfreeze.nn.cuda.launch`
    cuda.bindings: arguments, contexts, streams.
`bnfreeze.nn.cuda.load`
    Whether this process has a kernel, and if not, why not.

The wheel is pure Python, and the user needs no compiler: every CUDA build of torch since 2.10
installs NVRTC and cuda.bindings.
"""
