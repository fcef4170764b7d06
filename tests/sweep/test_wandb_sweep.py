"""Sweeps in W&B's format: the real agent, against a stand-in for the few calls that it makes to W&B's server."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
import yaml
from omegaconf import OmegaConf

from lightning_ntk.errors import ConfigError
from lightning_ntk.running.results import read_results
from lightning_ntk.settings.config import compose_config, conf_folder
from lightning_ntk.sweep.settings import load_yaml, read_named
from lightning_ntk.sweep.wandb_sweep import check_parameters, is_wandb

FILES = sorted((conf_folder() / "sweep").glob("wandb_*.yaml"))
TINY = {
    "steps": 2,
    "val_every": 1,
    "data.tasks_per_step": 2,
    "data.queries": 2,
    "data.val_episodes": 3,
    "data.test_episodes": 4,
    "network.filters": 4,
    "trainer.accelerator": "cpu",
    "trainer.enable_progress_bar": False,
}


class Server:
    """What `wandb.Api()` is for the agent: it hands out runs, then tells the agent to end."""

    settings = {"entity": "me", "project": "ours"}  # noqa: RUF012

    def __init__(self, file: Path, runs: list[dict]) -> None:
        self.config, self.left, self.states = file.read_text(), list(enumerate(runs)), []
        self._service_api = self

    def execute_graphql(self, query, variables, timeout=None):
        if "SweepWithRuns" in query:
            return {"project": {"sweep": {"config": self.config, "runs": {"edges": []}}}}
        if "CreateAgent" in query:
            return {"createAgent": {"agent": {"id": "agent"}}}
        assert "Heartbeat" in query
        running = json.loads(variables["runState"])
        self.states.append(running)
        if running:
            commands = []
        elif self.left:
            number, values = self.left.pop(0)
            arguments = {key: {"value": value} for key, value in values.items()}
            program = yaml.safe_load(self.config)["program"]
            commands = [{"type": "run", "run_id": f"run{number}", "program": program, "args": arguments}]
        else:
            commands = [{"type": "exit"}]
        return {"agentHeartbeat": {"commands": json.dumps(commands)}}


@pytest.fixture
def agent(monkeypatch, tmp_path):
    """Runs the agent of the installed wandb on a sweep file with the runs that a server would choose."""
    from wandb import wandb_agent

    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(conf_folder().parent))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_RUN_ID", "none")
    monkeypatch.setenv("WANDB_SWEEP_PARAM_PATH", "none")
    monkeypatch.setattr(wandb_agent.Agent, "POLL_INTERVAL", 0.2)
    monkeypatch.setattr(wandb_agent.wandb, "teardown", lambda *_: None)

    def run(file, runs):
        server = Server(file, runs)
        monkeypatch.setattr(wandb_agent.wandb, "Api", lambda: server)
        import queue

        made = wandb_agent.Agent(server, queue.Queue(), sweep_id="sweep")
        made.run()
        return made

    return run


RECORDER = """import json, os, sys
open(os.environ["RECORD"], "a").write(json.dumps(sys.argv[1:]) + "\\n")
"""


def test_the_commands_that_the_agent_makes_are_ours(agent, tmp_path, monkeypatch):
    (tmp_path / "recorder.py").write_text(RECORDER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("RECORD", str(tmp_path / "record"))
    file = tmp_path / "sweep.yaml"
    file.write_text((conf_folder() / "sweep" / "wandb_bayes.yaml").read_text().replace("lightning_ntk.cli", "recorder"))
    runs = [{"method.lr": 3.1e-05, "method.inner_lr": 0.5, "method.adapt_steps": 7}, {"network.hidden": [7, 8]}]
    agent(file, runs)
    first, second = (json.loads(line) for line in (tmp_path / "record").read_text().splitlines())
    assert first[0] == "train"
    config = compose_config("train", first[1:])
    assert (config.method.lr, config.method.inner_lr, config.method.adapt_steps) == (3.1e-05, 0.5, 7)
    assert (config.choices.method, config.logger.wandb.mode, config.test) == ("maml", "online", False)
    assert compose_config("train", [*second[1:], "network=mlp"]).network.hidden == [7, 8]


@pytest.mark.slow
def test_the_agent_runs_our_command_and_every_rank_gets_the_parameters(agent, tmp_path):
    runs = [{"method": "anil", "seed": 3, "run_dir": "run", "trainer.devices": 2, **TINY}]
    made = agent(conf_folder() / "sweep" / "wandb_grid.yaml", runs)
    assert made._failed == 0
    result = read_results(Path("run"))
    assert (result.method, result.seed, result.config["network"]["filters"]) == ("anil", 3, 4)
    assert len(result.episodes["test/accuracy"]) == 4, "an episode was counted twice, or by one rank alone"
    assert torch.load("run/checkpoints/last.ckpt", weights_only=True)["global_step"] == 2
    assert result.config["trainer"]["devices"] == 2
    (offline,) = Path("run/wandb").glob("offline-run-*")
    assert offline.name.endswith("run0"), "the run must be the one that the server knows"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_parameter_is_a_setting_of_ours_and_the_score_is_logged(file):
    content = load_yaml(file)
    assert is_wandb(content)
    check_parameters(content)
    assert content["command"][:4] == ["${env}", "${interpreter}", "-m", "${program}"]
    assert content["command"][-1] == "${args_no_hyphens}"
    assert content["metric"] == {"name": "val/accuracy", "goal": "maximize"}
    assert file.read_text().startswith("# W&B ")


def test_a_wandb_sweep_is_explained_and_a_misspelt_parameter_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"`wandb sweep .*wandb_bayes\.yaml`, then `wandb agent"):
        read_named("wandb_bayes", None)
    content = load_yaml(FILES[0])
    content["parameters"]["method.lrr"] = {"values": [1]}
    (tmp_path / "sweep").mkdir()
    OmegaConf.save(OmegaConf.create(content), tmp_path / "sweep" / "mine.yaml")
    with pytest.raises(ConfigError, match=r"Did you mean 'method\.lr'"):
        read_named("mine", str(tmp_path))
