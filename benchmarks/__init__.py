"""What freezing batch norm costs, in each way there is, on your machine: `python -m benchmarks`.

Everything is measured in one process, the arms in turns, and told as ratios with their ranges:

* `facts`: what is measured, as plain data; `runs` reads and writes it as JSON.
* `measure`: how: rounds in which every arm has its turn, in a new order each time.
* `peers`, `arms`, `folding`: whom: every way to freeze, each ready to be put into a model.
* `work_*`: what of: one module for each piece of work.
* `report`, `picture`, `readme`: how it is shown.
"""
