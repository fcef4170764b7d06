"""Operations of a meta-step of experiment=omniglot_speed, the part of Meta-RKHS-II's query sets apart.

    python docs/results/omniglot/operations.py data.root=PATH > operations.csv

Products and convolutions in GFLOP, and what all operations read and write in GB, of four tasks.
"""

import csv
import sys

from lightning_ntk.benchmark.counting import Operations, count
from lightning_ntk.energy import meta_rkhs_ii
from lightning_ntk.settings.config import compose_config
from lightning_ntk.train import build_data, build_method


def main(overrides: list[str]) -> None:
    rows = []
    for name in ("maml", "meta_rkhs_ii"):
        config = compose_config("train", ["experiment=omniglot_speed", f"method={name}", *overrides])
        data = build_data(config)
        method = build_method(config, data.spec)
        episodes = data.batch("train", range(4))
        rows.append((name, count(lambda m=method, e=episodes: m.meta_loss(e).backward())))
    queries = counted(meta_rkhs_ii, "_query_part")
    method.meta_loss(episodes).backward()
    rows.append(("meta_rkhs_ii, query sets", Operations(*map(sum, zip(*queries, strict=True)), by_kind={})))
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(("work", "gflop", "gbytes"))
    writer.writerows((name, f"{of.flop / 1e9:.2f}", f"{of.bytes / 1e9:.2f}") for name, of in rows)


def counted(module, name: str) -> list[tuple[int, int]]:
    """Has a module's function counted from now on: the flop and bytes of each call."""
    function, found = getattr(module, name), []

    def counting(*args):
        results = []
        of = count(lambda: results.append(function(*args)))
        found.append((of.flop, of.bytes))
        return results[0]

    setattr(module, name, counting)
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
