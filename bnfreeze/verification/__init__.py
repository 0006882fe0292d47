"""The proof that nothing held has changed.

Read from the bottom up; each module imports only those above it in this list.

======== =====================================================================
bits     one tensor's bits: read, compared, the difference located, digested
facts    what is noted of a model besides its values: plain data
state    a model's facts and values at one instant, read from the live model
drift    one change (`Drift`) and all of them (`DriftReport`): data and words
causes   the likeliest cause of a change, from what the two states show
compare  two states → the changes
ranks    the same across the ranks of a process group
file     a snapshot as a file
snapshot `Snapshot`, `snapshot`, `verify`, `assert_frozen`
trace    the operation that writes to a held tensor
watch    `guard`
======== =====================================================================
"""
