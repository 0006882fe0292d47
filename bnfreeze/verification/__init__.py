"""Verification: has anything changed that is frozen?

Read from the bottom up; each module imports only modules above it in this list.

============= ================================================================= ===========
values        two tensors: do their bits differ, where, by how much             no torch
on_device     the same question for live tensors, asked on their own device
facts         what is known of a model besides values: plain data               no torch
state         facts and values at one moment                                    no torch
drift         one change (`Drift`)                                              no torch
messages      a change as text                                                  no torch
drift_report  all changes (`DriftReport`, `DriftError`)                         no torch
reasons       causes that follow from the kind of a drift alone                 no torch
causes        the likeliest cause of a change                                   no torch
compare       two states → the changes: the one comparison that all others use  no torch
snapshot_file a snapshot as a file                                              no torch
snapshot      `Snapshot`                                                        no torch
stored        a checkpoint compared with a snapshot                             no torch
diff          `diff`, of checkpoints, state_dicts and models                    no torch
live_state    the state of a live model
distributed   a check across the ranks of a process group
verify        `snapshot`, `verify`
assert_frozen `assert_frozen`
tracer        the operation that writes to a frozen tensor
guard         `guard`
============= ================================================================= ===========
"""
