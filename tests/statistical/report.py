"""Prints the statistics of the masks, in deviations: the numbers of docs/dropout.md.

python -m tests.statistical.report
python -m tests.statistical.report --draws 100000000 --dropped 1000000000      (minutes)
"""

from __future__ import annotations

import argparse

from tests.statistical.measures import dropped, frequencies, neighbours, one_bit_apart
from tests.statistical.streams import ORDERS, words

SEED = 20240229
BITS = (1, 2**31, 2**32, 2**63)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=10**7, help="words of each order")
    parser.add_argument("--dropped", type=int, default=10**7, help="decisions at p = 0.1")
    arguments = parser.parse_args()
    found, total, deviations = dropped(words("element", 1, arguments.dropped), 0.1)
    print(f"dropped at p = 0.1: {found:,} of {total:,}: {found / total:.9f}, {deviations:+.2f} deviations")
    for order in ORDERS:
        for name, measure, seed in (("frequencies", frequencies, SEED), ("neighbours", neighbours, SEED + 1)):
            results = measure(words(order, seed, arguments.draws))
            print(f"{order}, {name}: " + "; ".join(f"{one} {value:+.2f}" for one, value in results.items()), flush=True)
    for which in ("seed", "offset"):
        apart = (one_bit_apart(which, bit, SEED, arguments.draws // 10) for bit in BITS)
        print(f"{which} that differs in one bit: " + ", ".join(f"{value:+.2f}" for value in apart), flush=True)


if __name__ == "__main__":
    main()
