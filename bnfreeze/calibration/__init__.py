"""Whether the stored statistics fit the user's data (`probe`), and how to make them fit.

=========== ==================================================================
moments     mean and variance per channel, merged over samples, batches, ranks
batches     what a DataLoader gives, turned into calls of the model; how far a run has come
measuring   the model run over the data, with nothing changed
fit         one layer's statistics against its data: numbers, and a verdict
report      `ProbeReport` and `RecalibrationReport`: data, and tables
advice      findings, and what to do
probe       `probe`
recalibrate `recalibrate`
=========== ==================================================================
"""
