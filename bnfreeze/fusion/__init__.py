"""The policies `fused-act` and `folded`: norm layers that run what is around them.

`tracing` traces a block's forward with torch.fx. `matching` finds in the graph what follows each
frozen norm layer, and rewrites it (`sums` has the add, `folded` the convolution before the layer).
`generated` makes a forward of the graph, with a guard that is asked at each call. `survey` does
this for each block of a model, and `blocks` puts the new forwards in place.
"""
