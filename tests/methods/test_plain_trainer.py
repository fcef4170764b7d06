"""Methods under a Trainer of one's own, without the command line: checkpoints that no run wrote."""

import pytest
import torch
from plain_trainer import plain_trainer
from test_contract import METHODS, tasks

from lightning_ntk import evaluate, load_data, load_method, train
from lightning_ntk.episode import TaskSpec
from lightning_ntk.errors import ConfigError
from lightning_ntk.methods.from_scratch import FromScratch
from lightning_ntk.methods.meta_rkhs_ii import MetaRKHSII
from lightning_ntk.networks.mlp import MLP

# No validation data, and loaders without workers.
pytestmark = pytest.mark.filterwarnings("ignore::lightning_fabric.utilities.warnings.PossibleUserWarning")
SPEC = TaskSpec("regression", (1,), 1)


def batches():
    """Three meta-batches of two tasks."""
    return torch.utils.data.DataLoader([tasks("regression") for _ in range(3)], batch_size=None)


@pytest.mark.parametrize("name", ["meta_rkhs_ii", "meta_rkhs_i", "reptile", "maml"])
def test_a_checkpoint_is_gone_on_with_tested_and_loaded(name, tmp_path):
    def method(seed):
        torch.manual_seed(seed)
        return METHODS[name](MLP((1,), 1), SPEC)

    trained = method(0)
    first = plain_trainer()
    first.fit(trained, batches())
    first.save_checkpoint(tmp_path / "model.ckpt")
    (scores,) = first.test(trained, batches(), verbose=False)

    (found,) = plain_trainer().test(method(1), batches(), ckpt_path=tmp_path / "model.ckpt", verbose=False)
    assert found == scores
    onward, whole = plain_trainer(epochs=2), method(0)
    again = method(1)
    onward.fit(again, batches(), ckpt_path=tmp_path / "model.ckpt")
    assert onward.global_step == 6
    plain_trainer(epochs=2).fit(whole, batches())
    for p, q in zip(again.parameters(), whole.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_parameters_of_16_bits_are_refused_where_a_kernel_is_solved(precision):
    method = MetaRKHSII(MLP((1,), 1), SPEC)
    for work in ("fit", "test"):
        trainer = plain_trainer(precision=precision)
        with pytest.raises(ConfigError, match=rf"trainer\.precision={precision} rounds the parameters"):
            getattr(trainer, work)(method, batches())
    assert method.dtype == torch.float32


def test_training_in_half_precision_is_refused():
    with pytest.raises(ConfigError, match=r"trainer\.precision=16-true .* Adam's eps"):
        plain_trainer(precision="16-true").fit(METHODS["maml"](MLP((1,), 1), SPEC), batches())


def test_a_method_without_training_says_so():
    with pytest.raises(ConfigError, match="FromScratch has no training: leave"):
        plain_trainer().fit(FromScratch(MLP((1,), 1), SPEC), batches())


def test_a_method_is_loaded_with_its_network_given(tmp_path):
    method = MetaRKHSII(MLP((1,), 1), SPEC)
    first = plain_trainer()
    first.fit(method, batches())
    first.save_checkpoint(tmp_path / "model.ckpt")
    for lr in (1e-2, 1e-3):  # Another learning rate is nothing that the checkpoint could object to.
        loaded = MetaRKHSII.load_from_checkpoint(tmp_path / "model.ckpt", network=MLP((1,), 1), spec=SPEC, lr=lr)
        for p, q in zip(loaded.parameters(), method.parameters(), strict=True):
            assert torch.equal(p, q)


def test_a_checkpoint_that_no_run_wrote_says_how_it_is_loaded(tmp_path):
    method, trainer = MetaRKHSII(MLP((1,), 1), SPEC), plain_trainer()
    trainer.fit(method, batches())
    file = tmp_path / "model.ckpt"
    trainer.save_checkpoint(file)
    commands = (lambda: evaluate.main([f"run={file}"]), lambda: train.main([f"ckpt={file}"]))
    for command in (lambda: load_method(file), lambda: load_data(file), *commands):
        with pytest.raises(
            ConfigError, match=r"under a Trainer of your own.*load_state_dict\(torch\.load\(.*model\.ckpt"
        ):
            command()
    method.load_state_dict(torch.load(file)["state_dict"])  # As it says.
