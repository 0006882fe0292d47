"""One module for each trainer that runs the training loop for its user.

If you write the loop yourself, call `bnfreeze.freeze` before it and `bnfreeze.guard` around it:
docs/recipes.md shows where. A trainer that owns the loop needs the same two at the right moments,
as a callback of its own kind: freeze before it wraps the model and builds the optimizer, guard from
the first step to the last.

`callback` has what all of them share. A new trainer is one module here, with a class that derives
from `FreezeCallback` and from the trainer's own callback, and one test in tests/ecosystem. Each
module imports its trainer, so nothing else imports these modules.
"""
