"""What an attack on the support through the adaptation should climb: accuracy on the queries by what it climbs.

    python docs/results/robustness/support.py episodes=10 runs/maml runs/meta_rkhs_ii > support.csv

Everything starts from the same attack that does not see through the adaptation, on the same test episodes.
"""

import csv
import sys
from pathlib import Path

import torch
from omegaconf import OmegaConf

from callbacks.base import episode_seed
from datamodules.base import as_unit_floats
from lightning_ntk.attacks.base import evaluate
from lightning_ntk.attacks.suite import Suite
from lightning_ntk.attacks.support import pgd_through_adaptation
from lightning_ntk.running.results import mean_and_ci95
from lightning_ntk.running.run_folder import load_checkpoint
from lightning_ntk.train import build_data, build_method

EPS = (8, 16)  # in units of 1/255
CLIMBED = ("mistakes", "margin", "cross_entropy")


def measure(folder: str, episodes: int) -> dict[str, list[float]]:
    """Accuracies in % by episode."""
    checkpoint = load_checkpoint(folder, "run", "best")
    config = OmegaConf.create(checkpoint.config)
    data = build_data(config)
    method = build_method(config, data.spec)
    method.load_state_dict(checkpoint.content["state_dict"])
    suite = Suite(coupled=method.couples_queries)
    found: dict[str, list[float]] = {}
    for index in range(episodes):
        episode = data.draw("test", 0, index)
        support, queries = (as_unit_floats(x, torch.float32) for x in (episode.support_x, episode.query_x))
        seed = episode_seed(data.eval_seed, "test", index)
        predict = method.adapt(support, episode.support_y)
        numbers = {"clean": accuracy(evaluate(predict, queries), episode.query_y)}
        for size in EPS:
            eps = size / 255
            start = suite.pgd_linf(eps, predict, support, episode.support_y, seed).images
            misled = evaluate(method.adapt(start, episode.support_y), queries)
            numbers[f"eps_{size}, not through the adaptation"] = accuracy(misled, episode.query_y)
            for loss in CLIMBED:
                task = (support, episode.support_y, queries, episode.query_y)
                attacked = pgd_through_adaptation(method.adapt, *task, eps, loss=loss, start=start)
                numbers[f"eps_{size}, {loss}"] = accuracy(attacked.outputs, episode.query_y)
        for name, value in numbers.items():
            found.setdefault(name, []).append(value)
        sys.stderr.write(f"{folder}, episode {index}: {numbers}\n")
    return found


def accuracy(outputs: torch.Tensor, y: torch.Tensor) -> float:
    return 100 * (outputs.argmax(-1) == y).double().mean().item()


def main(words: list[str]) -> None:
    episodes = next((int(word.removeprefix("episodes=")) for word in words if word.startswith("episodes=")), 10)
    table = csv.writer(sys.stdout)
    table.writerow(["run", "what", "mean", "ci95", "episodes"])
    for folder in (word for word in words if not word.startswith("episodes=")):
        for name, values in measure(folder, episodes).items():
            mean, half_width = mean_and_ci95(values)
            table.writerow([Path(folder).name, name, f"{mean:.4g}", f"{half_width:.3g}", episodes])


if __name__ == "__main__":
    main(sys.argv[1:])
