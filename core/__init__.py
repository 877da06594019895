"""The mathematics of Ravine: optimizers over flat arrays; NumPy alone, no I/O, no clock."""
