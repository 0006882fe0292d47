"""Whether the stored statistics fit the user's data (`probe`), and how to make them fit.

=========== ==================================================================
moments     mean and variance per channel, merged over samples, batches, ranks
batches     what a DataLoader gives, turned into calls of the model
=========== ==================================================================
"""
