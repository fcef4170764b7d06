"""What tests of several probes need."""

import pytest
import torch


@pytest.fixture
def break_outputs(monkeypatch):
    """`break_outputs(kind)`: from then on, probes of this kind are shown a method whose adapted models say NaN to
    episode 1."""

    def break_them(kind):
        plain = kind.probe

        def probe(self, method, episode, stage):
            with monkeypatch.context() as patch:
                if int(episode.index) == 1:
                    patch.setattr(method, "adapt", lambda x, y: lambda queries: method.network(queries) * torch.nan)
                return plain(self, method, episode, stage)

        monkeypatch.setattr(kind, "probe", probe)

    return break_them
