"""How fast Ravine is, against what: every figure a ratio of two contestants measured in one run.

    python -m benchmarks                all rows, about five minutes; writes RESULTS.md
    python -m benchmarks S1 L1          these rows, to the terminal alone

A shared machine changes its speed from one minute to the next, so a number by itself says little. Two contestants that
take turns within one run meet the same machine, and the ratio of their figures stands still where the figures do
not. `measure` lets them take turns, `report` writes down what came out, and each group of rows has a module:

    core_rows      C1, C2    an Adam step, in two processes that are asked in turn (`adam`, `peers/adam_torch`)
    small_steps    S1, S2    many small JSON steps, sent by wrk (`wrk_steps.lua`)
    large_steps    L1, L2    one large safetensors step at a time, sent by a client made here

Beside the rows, `scale` takes what a request, a byte and a session cost, and `simulate` reckons larger systems from it.

`processes` starts and ends servers; those that the service is held against are in `servers/`.
"""
