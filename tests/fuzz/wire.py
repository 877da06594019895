"""Coverage-guided fuzzing of one reader of bytes: `python -m tests.fuzz.wire NAME --seconds 60 --seed 1`.

Needs atheris (`make fuzz` sets it up). What breaks a reader is written to a file in the working directory, whose
name is printed; `--run FILE` gives it to the reader again.
"""

import argparse
import sys
import tempfile
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.wire")
    parser.add_argument("name")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--run", type=Path)
    given = parser.parse_args()

    import atheris

    with atheris.instrument_imports(include=["core", "service"]):
        from tests.fuzz.targets import TARGETS, seeds_of

    if given.run is not None:
        TARGETS[given.name](given.run.read_bytes())
        return
    with tempfile.TemporaryDirectory() as corpus:
        for number, seed in enumerate(seeds_of(given.name)):
            (Path(corpus) / str(number)).write_bytes(seed)
        limits = [f"-max_total_time={given.seconds}", f"-seed={given.seed}", "-max_len=8192", "-rss_limit_mb=2048"]
        atheris.Setup([sys.argv[0], corpus, *limits, "-timeout=20", "-print_final_stats=1"], TARGETS[given.name])
        atheris.Fuzz()


if __name__ == "__main__":
    main()
