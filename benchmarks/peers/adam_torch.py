"""torch's Adam in a process that is asked, line by line, to take so many steps: the other side of C1 and C2.

    python adam_torch.py fused|default SIZE

It runs in the environment that `make bench-peers` makes, where nothing of Ravine is, and speaks the lines that
`benchmarks/adam.py` describes.
"""

import json
import sys
import time

import torch

PROBED = 8


def main() -> None:
    form, size = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(1)
    params = torch.zeros(size, requires_grad=True)
    params.grad = ((torch.arange(size) * 7919 % 1001 - 500).double() / 500).float()
    optimizer = torch.optim.Adam([params], **({"fused": True} if form == "fused" else {}))
    say({"version": f"torch {torch.__version__}"})
    for line in sys.stdin:
        if line.strip() == "end":
            break
        steps = int(line)
        started = time.perf_counter()
        for _ in range(steps):
            optimizer.step()
        say({"seconds": time.perf_counter() - started})
    found = params.detach()
    probe = [float(found[i * (size - 1) // PROBED]) for i in range(PROBED + 1)]
    say({"probe": probe, "extra": {}})


def say(message: dict[str, object]) -> None:
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    main()
