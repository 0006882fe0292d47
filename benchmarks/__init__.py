"""How much time and memory each way of freezing batch norm takes: `python -m benchmarks`.

All arms are measured in one process, in turns, and reported as ratios with their ranges:

* `facts`: the results, as plain data; `runs` reads and writes them as JSON.
* `measure`: rounds in which every arm has its turn, in a new order each time.
* `peers`, `arms`, `folding`: the ways to freeze, each ready to be applied to a model.
* `work_*`: one module for each piece of work.
* `report`, `picture`: tables and the picture.
"""
