"""`python -m training plan`: what a run needs of memory, time and money, before anybody rents the machines.

`counting` goes through a backbone by shapes alone, `state` and `memory` count bytes, `traffic` the collectives, `work`
the arithmetic; `rates` says how fast a device does it, from measurements; `planner` puts a plan together, `advice`
plans its neighbours, `show` prints.
"""
