"""The server of Ravine."""

import os

__version__ = "0.1.0"

# The linear algebra of the matrix methods must give the same bits on every replica, whatever its cores. This is read
# when NumPy is first imported, so it has to stand here.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
