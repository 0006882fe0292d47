"""One module for each trainer that takes the training loop out of its user's hands.

Where people write the loop themselves, `bnfreeze.freeze` before it and `bnfreeze.guard` around it
are all there is to say; docs/recipes.md shows where these lines go. A trainer that owns the loop
wants the same two at the right moments, as a callback of its own kind: frozen before it wraps the
model and builds the optimizer, watched from the first step to the last. Nothing else is here, and
nothing imports these modules but who asks for them, as each imports its trainer.
"""
