"""Which loss makes the strongest attack on finished runs: accuracy under PGD and SimBA by the loss that they raise.

    python docs/results/robustness/losses.py episodes=20 runs/maml runs/meta_rkhs_ii > losses.csv

Every loss gets the same test episodes, the same random starts and the same orders of directions.
"""

import csv
import sys
from pathlib import Path

import torch
from omegaconf import OmegaConf

from callbacks.base import episode_seed
from datamodules.base import as_unit_floats
from lightning_ntk.attacks.losses import LOSSES
from lightning_ntk.attacks.suite import Suite
from lightning_ntk.running.results import mean_and_ci95
from lightning_ntk.running.run_folder import load_checkpoint
from lightning_ntk.train import build_data, build_method

EPS = (4 / 255, 8 / 255, 16 / 255)
DIRECTIONS = 40


def measure(folder: str, episodes: int) -> dict[str, list[float]]:
    """Numbers by episode: accuracies, and how large the logits are."""
    checkpoint = load_checkpoint(folder, "run", "best")
    config = OmegaConf.create(checkpoint.config)
    data = build_data(config)
    method = build_method(config, data.spec)
    method.load_state_dict(checkpoint.content["state_dict"])
    coupled = method.couples_queries
    found: dict[str, list[float]] = {}
    for index in range(episodes):
        episode = data.draw("test", 0, index)
        x, y = as_unit_floats(episode.query_x, torch.float32), episode.query_y
        predict = method.adapt(as_unit_floats(episode.support_x, torch.float32), episode.support_y)
        seed = episode_seed(data.eval_seed, "test", index)
        with torch.no_grad():
            outputs = predict(x)
        largest = outputs.topk(2, dim=-1).values
        numbers = {
            "clean": accuracy(outputs, y),
            "largest logit over second": (largest[:, 0] - largest[:, 1]).mean().item(),
        }
        for loss in LOSSES:
            suite = Suite(linf_eps=EPS, loss=loss, simba_loss=loss, simba_directions=DIRECTIONS, coupled=coupled)
            for name, attack in suite.named().items():
                if name.startswith("pgd_linf") or name == "simba_dct":
                    numbers[f"{name}, {loss}"] = accuracy(attack(predict, x, y, seed).outputs, y)
        for name, value in numbers.items():
            found.setdefault(name, []).append(value)
        sys.stderr.write(f"{folder}, episode {index}: {numbers}\n")
    return found


def accuracy(outputs: torch.Tensor, y: torch.Tensor) -> float:
    return 100 * (outputs.argmax(-1) == y).double().mean().item()


def main(words: list[str]) -> None:
    episodes = next((int(word.removeprefix("episodes=")) for word in words if word.startswith("episodes=")), 20)
    table = csv.writer(sys.stdout)
    table.writerow(["run", "what", "mean", "ci95", "episodes"])
    for folder in (word for word in words if not word.startswith("episodes=")):
        for name, values in measure(folder, episodes).items():
            mean, half_width = mean_and_ci95(values)
            table.writerow([Path(folder).name, name, f"{mean:.4g}", f"{half_width:.3g}", episodes])


if __name__ == "__main__":
    main(sys.argv[1:])
