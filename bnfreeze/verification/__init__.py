"""Verification: has anything changed that is frozen?

Read from the bottom up; each module imports only modules above it in this list.

============= ============================================================== ========
drift         `Drift`, one change; `DriftReport` and `DriftError`, all       no torch
values        two tensors: do their bits differ, where, by how much          no torch
state         what is known of a model at one moment: facts and values       no torch
on_device     do the bits differ, asked of live tensors on their own device
causes        the causes that are known, and which is the likeliest          no torch
compare       two states → the changes: the comparison that all others use   no torch
snapshot      `Snapshot`, in memory and as a file                            no torch
stored        a checkpoint compared with a snapshot                          no torch
diff          `diff`, of checkpoints, state_dicts and models                 no torch
live_state    the state of a live model
verify        `snapshot`, `verify`, on one rank or on all
assert_frozen `assert_frozen`
tracer        the operation that writes to a frozen tensor
guard         `guard`
============= ============================================================== ========
"""
