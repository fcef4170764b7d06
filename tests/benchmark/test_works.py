"""What is measured is what it is called: kernels against a naive one, steps that learn, memory that is there."""

import copy
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from reference import dense_jacobian

from lightning_ntk.benchmark import kernels, steps
from lightning_ntk.benchmark.goals import figures
from lightning_ntk.benchmark.measure import Timing
from lightning_ntk.benchmark.memory import measure_memory, probe
from lightning_ntk.benchmark.peers import IMPLEMENTATIONS, NeuralTangents, find_python, neural_tangents, to_numpy
from lightning_ntk.benchmark.problem import make_problem
from lightning_ntk.benchmark.settings import QUICK, Settings
from lightning_ntk.benchmark.tables import measure_tables, steps_table
from lightning_ntk.errors import ConfigError
from lightning_ntk.ntk import functional
from lightning_ntk.running.allocation import ENVIRONMENT

SMALL = Settings(**QUICK)


def say(text):
    pass


@pytest.fixture(scope="module")
def problem():
    return make_problem(SMALL, tasks=2)


def naive_kernels(problem):
    network, params = functional(problem.network)
    jacobians = [dense_jacobian(network, params, x).detach().view(len(x), 5, -1) for x in problem.episodes.support_x]
    return torch.stack([torch.einsum("nap,mbp->nmab", j, j) for j in jacobians])


def test_every_implementation_in_torch_computes_the_kernel(problem):
    works = kernels.make_kernels(problem)
    assert len(works) == 4
    for work in works:
        torch.testing.assert_close(work.run().detach(), naive_kernels(problem), rtol=1e-4, atol=1e-6, msg=work.name)


def test_the_problem_is_one_of_its_seed_and_leaves_the_generator_alone():
    state = torch.get_rng_state()
    one, same, other = make_problem(SMALL), make_problem(SMALL), make_problem(Settings(**{**QUICK, "seed": 1}))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(one.episodes.query_x, same.episodes.query_x)
    assert all(torch.equal(a, b) for a, b in zip(one.network.parameters(), same.network.parameters(), strict=True))
    assert not torch.equal(one.episodes.query_x, other.episodes.query_x)
    x, y = one.episodes.support_x, one.episodes.support_y
    assert x.shape == (1, 5, 3, 16, 16)
    assert 0 <= x.min() < x.max() <= 1
    assert y.tolist() == [[0, 1, 2, 3, 4]]
    assert one.episodes.query_y.shape == (1, 10)


def weights(work):
    """The module that a step trains, by the closure it restores."""
    contents = [cell.cell_contents for cell in work.reset.__wrapped__.__closure__]
    (module,) = (content for content in contents if isinstance(content, torch.nn.Module))
    return module


@pytest.mark.parametrize(
    "name", [steps.RKHS_II, steps.RKHS_II_INF, steps.RKHS_I, *steps.LAST, *steps.LAST.values(), steps.PASS]
)
def test_a_step_moves_the_weights_and_reset_takes_it_back(name, problem):
    work = steps.make_step(name, problem)
    module = weights(work)
    before = copy.deepcopy(list(module.parameters()))
    work.run()
    assert all(not torch.equal(a, b) for a, b in zip(module.parameters(), before, strict=True))
    assert all(torch.isfinite(p).all() for p in module.parameters())
    work.reset()
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), before, strict=True))
    assert work.tasks == 2


def test_infinite_time_is_another_step(problem):
    finite, infinite = (steps.make_step(name, problem) for name in (steps.RKHS_II, steps.RKHS_II_INF))
    finite.run()
    infinite.run()
    pairs = zip(weights(finite).parameters(), weights(infinite).parameters(), strict=True)
    assert any(not torch.allclose(a.grad, b.grad, rtol=0.1) for a, b in pairs)


def test_the_settings_of_a_method_are_those_of_its_yaml(problem):
    assert problem.method("meta_rkhs_ii").how.t == 10.0
    assert problem.method("meta_rkhs_ii", t=float("inf")).how.t == float("inf")
    assert problem.method("meta_rkhs_i").energy == "euler"


def test_compiled_steps_stand_beside_the_same_uncompiled(monkeypatch):
    compiled = []

    def compile_nothing(function):
        compiled.append(function)
        return function

    monkeypatch.setattr("lightning_ntk.energy.compiled._compiled", compile_nothing)
    (table,) = measure_tables(dataclasses.replace(SMALL, tables=("compiled",)), say, {})
    assert compiled
    assert [row.work for row in table.rows] == [
        "Meta-RKHS-II",
        "Meta-RKHS-II, compiled",
        "Meta-RKHS-I",
        "Meta-RKHS-I, compiled",
    ]
    assert all(len(row.rounds) == 2 for row in table.rows)
    assert ["compiles" in row.note for row in table.rows] == [False, True, False, True]
    found = figures([table], SMALL)
    assert [figure.value for figure in found] == [b.seconds / a.seconds for a, b in (table.rows[:2], table.rows[2:])]
    assert "norm=group: Meta-RKHS-II compiled over uncompiled" in found[0].what


def test_a_step_that_cannot_be_compiled_says_so(monkeypatch):
    def fail(function, network, *args):
        raise ConfigError("no compiler")

    monkeypatch.setattr("lightning_ntk.energy.meta_rkhs_ii.compiled", fail)
    (table,) = measure_tables(dataclasses.replace(SMALL, tables=("compiled",)), say, {})
    assert table.rows[0].seconds
    assert table.rows[1].seconds is None
    assert "no compiler" in table.rows[1].note
    assert figures([table], SMALL)[0].value is None


def test_learn2learn_takes_five_inner_steps_and_second_order_only_in_maml(problem):
    def loss_of(params, x, y):
        return F.cross_entropy(torch.func.functional_call(problem.network, params, (x,)), y)

    def gradient(first_order):
        total = [torch.zeros_like(p) for p in problem.network.parameters()]
        for task in problem.episodes:
            start = {name: p.detach().requires_grad_(True) for name, p in problem.network.named_parameters()}
            fast = start
            for _ in range(5):
                loss = loss_of(fast, task.support_x, task.support_y)
                grads = torch.autograd.grad(loss, list(fast.values()), create_graph=not first_order)
                fast = {name: p - 0.1 * g for (name, p), g in zip(fast.items(), grads, strict=True)}
            loss = loss_of(fast, task.query_x, task.query_y)
            grads = torch.autograd.grad(loss, list(start.values()))
            total = [t + g / 2 for t, g in zip(total, grads, strict=True)]
        return total

    for name in (*steps.LAST, *steps.LAST.values()):
        first_order = "FOMAML" in name
        work = steps.make_step(name, problem)
        assert weights(work).module.channels_last is (name not in steps.LAST)
        work.run()
        found = [p.grad for p in weights(work).parameters()]
        for a, b in zip(found, gradient(first_order), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


HOLD = """
import torch
from lightning_ntk.benchmark.memory import MIB, peak_of

def hold(mib):
    torch.ones(mib * MIB // 4)

print(peak_of(lambda: hold(200), "cpu"), peak_of(lambda: (hold(50), hold(50)), "cpu"))
"""


def test_peak_memory_is_what_a_call_held_at_once():
    # In a process of its own, as the benchmark does it: in a grown heap, freed blocks may stay resident.
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", HOLD], capture_output=True, text=True, check=True)
    once, twice = map(float, run.stdout.split())
    # The system may take back some of the rest meanwhile.
    assert 150 < once < 250
    assert 25 < twice < 75, "what was freed does not add up"


def test_memory_is_measured_in_a_process_of_its_own():
    found = measure_memory(SMALL, steps.RKHS_II, tasks=2, repeats=2)
    assert found.note == ""
    assert found.mib > 0.1
    assert len(found.seconds) == 3


def test_why_memory_was_not_measured_is_said(monkeypatch):
    request = {"settings": {**QUICK, "tables": ()}, "step": steps.RKHS_II, "network": "none_such", "tasks": 1}
    request["repeats"] = 0
    assert "no network=none_such" in probe(request).note
    monkeypatch.setattr("lightning_ntk.benchmark.memory.sys.executable", str(fake_peer("kill -9 $$")))
    assert measure_memory(SMALL, steps.RKHS_II).note == "not measured: killed, out of memory?"
    monkeypatch.setattr("lightning_ntk.benchmark.memory.sys.executable", str(fake_peer("echo why >&2; exit 1")))
    assert measure_memory(SMALL, steps.RKHS_II).note == "not measured: why"


def test_peers_are_found_where_make_puts_them(monkeypatch):
    monkeypatch.setattr("lightning_ntk.benchmark.peers.__file__", str(Path.cwd() / "a" / "b" / "peers.py"))
    assert find_python(None) is None
    folder = Path(".venv-peers") / "bin"
    folder.mkdir(parents=True)
    (folder / "python").touch()
    assert find_python(None) is None, "half installed"
    (folder.parent / "installed").touch()
    assert find_python(None) == Path.cwd() / ".venv-peers" / "bin" / "python"
    assert find_python(".venv-peers") == Path.cwd() / ".venv-peers" / "bin" / "python"
    assert find_python("none") is None
    with pytest.raises(ConfigError, match="peers=other is no Python"):
        find_python("other")


def fake_peer(text):
    """A stand-in for the peers' Python: it gets the script's arguments and answers as `text` says."""
    file = Path("peer")
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(0o755)
    return file.absolute()


FAKE = """
echo '{"versions": {"jax": "0"}}'
while read command name; do
  case "$command $name" in
    compile*STRUCTURED*) echo '{"error": "XlaRuntimeError: RESOURCE_EXHAUSTED"}';;
    compile*) echo '{"seconds": 2.5, "flop": 1e9}';;
    *) echo '{"seconds": 0.25}';;
  esac
done
"""


def test_the_peer_keeps_freed_memory_as_this_process_does(problem):
    text = """echo "{\\"versions\\": {\\"trim\\": \\"$MALLOC_TRIM_THRESHOLD_\\"}}"; cat > /dev/null"""
    found = NeuralTangents(fake_peer(text), problem, Settings(**QUICK), Path.cwd())
    found.stop()
    assert found.versions == {"trim": ENVIRONMENT["MALLOC_TRIM_THRESHOLD_"]}


def test_the_peer_is_asked_in_turns_and_what_it_cannot_do_is_a_note(problem):
    settings = Settings(**QUICK, peers=str(fake_peer(FAKE)))
    with neural_tangents(problem, settings, say) as (works, peer):
        assert [work.absent for work in works] == ["", "", "neural-tangents: XlaRuntimeError: RESOURCE_EXHAUSTED"]
        assert works[0].clock() == 0.25
        assert "compiled in 2.5 s" in works[0].note
        assert peer.flop[works[0].name] == 1e9
        assert peer.versions == {"jax": "0"}
    assert peer.process.poll() is not None, "it ends with the context"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("echo 'ModuleNotFoundError: no jax' >&2; exit 1", "process ended: ModuleNotFoundError: no jax"),
        ("""echo '{"error": "this jax sees no GPU"}'""", "neural-tangents: this jax sees no GPU"),
    ],
)
def test_a_peer_that_does_not_start_is_a_note(problem, text, why):
    settings = Settings(**QUICK, peers=str(fake_peer(text)))
    with neural_tangents(problem, settings, say) as (works, peer):
        assert peer is None
        assert all(why in work.absent for work in works)
    assert len(works) == len(IMPLEMENTATIONS)


def test_weights_reach_the_peer_in_its_layout(problem):
    arrays = to_numpy(problem)
    assert arrays["x"].shape == (2, 5, 16, 16, 3)
    assert arrays["w0"].shape == (3, 3, 3, 8)
    assert arrays["w3"].shape == (3, 3, 8, 8)
    assert arrays["w"].shape == (8, 5)
    weight = dict(problem.network.named_parameters())["features.0.weight"]
    assert arrays["w0"][1, 2, 0, 5] == weight[5, 0, 1, 2]


@pytest.mark.slow
@pytest.mark.skipif(find_python(None) is None, reason="needs `make peers`")
def test_neural_tangents_computes_the_same_kernels(tmp_path, problem):
    peer = NeuralTangents(find_python(None), problem, SMALL, tmp_path)
    try:
        for name in IMPLEMENTATIONS:
            peer.compile(name)
            torch.testing.assert_close(peer.kernel(name), naive_kernels(problem), rtol=1e-4, atol=1e-6)
            assert peer.run(name) > 0
    finally:
        peer.stop()


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_meta_steps_of_each_norm_take_the_rounds_that_are_asked_for(norm, monkeypatch):
    asked = []

    def interleave(works, repeats, *others):
        asked.append(repeats)
        return {work.name: Timing() for work in works}

    monkeypatch.setattr("lightning_ntk.benchmark.tables.interleave", interleave)
    steps_table(Settings(**{**QUICK, "repeats": 5}), print, norm)
    assert asked == [5]
