"""The policy `fused-act`: blocks whose norm layers compute along what follows them.

From the bottom up: a block's code is read (`bytecode`, `vouching`), and its forward traced on
shadows of its modules (`shadows`, `tracing`); in the graph the norm layers take in what follows
(`following`, `sums`); that becomes a generated forward, and the conditions under which it stands
in (`watched`, `program`). `survey` does so for a whole model, and `blocks` puts it in place.
"""
