"""The policies: one module for each way to freeze a norm layer.

=========== ==========================================================================
policy      `Policy`: the names, the flags, what each promises
record      what freezing notes on a layer, so that the way back is exact
class_swap  how a layer's behaviour is changed: its class is swapped
eval        the layer always normalises with its running statistics
stats       the running statistics do not change; train mode uses the batch
fused       the layer becomes a `FrozenBatchNorm1d/2d/3d`
choice      which class keeps which policy's promise
=========== ==========================================================================

``affine`` and ``weights`` need no module of their own: they set ``requires_grad`` alone.
"""
