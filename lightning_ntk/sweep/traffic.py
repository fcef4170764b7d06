"""`python -m lightning_ntk.sweep.traffic`: what DDP exchanges in a step, for the networks of conf/."""

import sys

from lightning_ntk.episode import TaskSpec
from lightning_ntk.settings.config import compose_config
from lightning_ntk.train import build_method

IMAGE28 = TaskSpec("classification", (1, 28, 28), 5)
IMAGE84 = TaskSpec("classification", (3, 84, 84), 5)
ROWS = (
    ("sine waves, mlp", ["data=sinusoid"], TaskSpec("regression", (1,), 1)),
    ("28x28, conv4", ["network=conv4"], IMAGE28),
    ("84x84, conv4", ["network=conv4", "network.downsample=pool"], IMAGE84),
    ("84x84, resnet12", ["network=resnet12"], IMAGE84),
)


def gradient_numbers(overrides: list[str], spec: TaskSpec) -> int:
    """How many numbers one rank's gradient has: the parameters that the method trains."""
    method = build_method(compose_config("train", ["method=meta_rkhs_ii", *overrides]), spec)
    return sum(parameter.numel() for parameter in method.parameters() if parameter.requires_grad)


def main() -> None:
    """Print the table in Markdown. A ring sends 2 (n - 1) / n of the gradient's bytes from each of n ranks."""
    lines = [["network", "parameters", "gradient, MB", "sent by each of 8 ranks, MB", "ms at 1 GB/s", "ms at 100 GB/s"]]
    lines.append(["---"] + ["---:"] * 5)
    for name, overrides, spec in ROWS:
        number = gradient_numbers(overrides, spec)
        megabytes = 4 * number / 1e6  # float32
        sent = megabytes * 2 * 7 / 8
        lines.append([name, f"{number:,}", f"{megabytes:.3f}", f"{sent:.3f}", f"{sent:.2f}", f"{sent / 100:.4f}"])
    sys.stdout.write("\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n")


if __name__ == "__main__":
    main()
