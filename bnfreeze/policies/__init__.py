"""The policies: one module for each way to freeze a norm layer.

=========== ==========================================================================
policy      `Policy`: the names, the flags, what each promises
record      what freezing writes down about a layer, so that undo is exact
class_swap  how a layer's behaviour is changed: its class is swapped
eval        the layer always normalises with its running statistics
stats       the running statistics do not change; train mode uses the batch
fused       the layer becomes a `FrozenBatchNorm1d/2d/3d`
transaction putting back what was changed on modules
=========== ==========================================================================

``affine`` and ``weights`` need no module of their own: they only set ``requires_grad``.

A new policy is one entry in the table of `Policy`, and, if it changes what a layer computes, a
module here and a line in `bnfreeze.freezing.plan`, which says which class a layer gets.
"""
