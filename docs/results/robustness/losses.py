"""What an attack on finished runs should raise: accuracy in % under attack, by the loss that the attack raises.

    python docs/results/robustness/losses.py attack=queries episodes=5 runs/maml runs/meta_rkhs_ii > losses.csv
    python docs/results/robustness/losses.py attack=support episodes=10 runs/maml runs/meta_rkhs_ii > support.csv

`queries` are attacked by PGD and SimBA, the `support` through the adaptation, from the same attack that does not see
through it. Every loss gets the same test episodes, the same random starts and the same orders of directions.
"""

import csv
import sys
from pathlib import Path

import torch

from callbacks.base import episode_seed
from lightning_ntk.attacks.base import evaluate
from lightning_ntk.attacks.losses import LOSSES
from lightning_ntk.attacks.suite import Suite
from lightning_ntk.attacks.support import pgd_through_adaptation
from lightning_ntk.episode import Episode
from lightning_ntk.load import load_data, load_method
from lightning_ntk.methods.base import MetaLearner
from lightning_ntk.running.results import mean_and_ci95

QUERY_EPS, SUPPORT_EPS = (4 / 255, 8 / 255, 16 / 255), (8, 16)  # the latter in units of 1/255
DIRECTIONS = 40


def measure(folder: str, attack: str, episodes: int) -> dict[str, list[float]]:
    """Numbers by episode."""
    method, data = load_method(folder), load_data(folder)
    found: dict[str, list[float]] = {}
    for index, episode in enumerate(data.batch("test", range(episodes))):
        numbers = ATTACKS[attack](method, episode, episode_seed(data.eval_seed, "test", index))
        for name, value in numbers.items():
            found.setdefault(name, []).append(value)
        sys.stderr.write(f"{folder}, episode {index}: {numbers}\n")
    return found


def on_queries(method: MetaLearner, episode: Episode, seed: int) -> dict[str, float]:
    """Accuracies, and how large the logits are."""
    predict = method.adapt(episode.support_x, episode.support_y)
    outputs = evaluate(predict, episode.query_x)
    largest = outputs.topk(2, dim=-1).values
    numbers = {
        "clean": accuracy(outputs, episode),
        "largest logit over second": (largest[:, 0] - largest[:, 1]).mean().item(),
    }
    for loss in LOSSES:
        settings = {"loss": loss, "simba_loss": loss, "simba_directions": DIRECTIONS}
        suite = Suite(linf_eps=QUERY_EPS, coupled=method.couples_queries, **settings)
        for name, attack in suite.named().items():
            if name.startswith("pgd_linf") or name == "simba_dct":
                attacked = attack(predict, episode.query_x, episode.query_y, seed)
                numbers[f"{name}, {loss}"] = accuracy(attacked.outputs, episode)
    return numbers


def on_support(method: MetaLearner, episode: Episode, seed: int) -> dict[str, float]:
    """Accuracies on clean queries."""
    support_x, support_y, query_x, query_y = episode.support_x, episode.support_y, episode.query_x, episode.query_y
    suite = Suite(coupled=method.couples_queries)
    predict = method.adapt(support_x, support_y)
    numbers = {"clean": accuracy(evaluate(predict, query_x), episode)}
    for size in SUPPORT_EPS:
        eps = size / 255
        start = suite.pgd_linf(eps, predict, support_x, support_y, seed).images
        misled = evaluate(method.adapt(start, support_y), query_x)
        numbers[f"eps_{size}, not through the adaptation"] = accuracy(misled, episode)
        for loss in ("mistakes", "margin", "cross_entropy"):
            task = (support_x, support_y, query_x, query_y)
            attacked = pgd_through_adaptation(method.adapt, *task, eps, loss=loss, start=start)
            numbers[f"eps_{size}, {loss}"] = accuracy(attacked.outputs, episode)
    return numbers


ATTACKS = {"queries": on_queries, "support": on_support}


def accuracy(outputs: torch.Tensor, episode: Episode) -> float:
    return 100 * (outputs.argmax(-1) == episode.query_y).double().mean().item()


def main(words: list[str]) -> None:
    settings = {"attack": "queries", "episodes": "20"}
    settings |= dict(word.split("=", 1) for word in words if "=" in word)
    table = csv.writer(sys.stdout)
    table.writerow(["run", "what", "mean", "ci95", "episodes"])
    for folder in (word for word in words if "=" not in word):
        for name, values in measure(folder, settings["attack"], int(settings["episodes"])).items():
            mean, half_width = mean_and_ci95(values)
            table.writerow([Path(folder).name, name, f"{mean:.4g}", f"{half_width:.3g}", len(values)])


if __name__ == "__main__":
    main(sys.argv[1:])
