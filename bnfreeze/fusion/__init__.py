"""The policy `fused-act`: norm layers that run the activation and the add after them.

`tracing` traces a block's forward with torch.fx. `matching` finds in the graph what follows each
frozen norm layer, and rewrites it (`sums` has the add). `generated` makes a forward of the graph,
with a guard that is asked at each call. `survey` does this for a whole model, and `blocks` puts the
new forwards in place.
"""
