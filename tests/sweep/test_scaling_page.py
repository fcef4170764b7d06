"""docs/SCALING.md: its tables are what the commands print, and its commands are understood."""

import re
import shlex

import pytest

from lightning_ntk import cli
from lightning_ntk.settings.config import conf_folder
from lightning_ntk.sweep import simulate, traffic

PAGE = (conf_folder().parent / "docs" / "SCALING.md").read_text()


def table(name):
    return re.search(rf"<!-- {name} -->\n\n(.*?)\n\n<!-- end {name} -->", PAGE, re.DOTALL).group(1)


def test_the_traffic_is_that_of_the_networks(capsys):
    traffic.main()
    assert capsys.readouterr().out.strip() == table("traffic")


@pytest.mark.slow
def test_the_simulated_schedule_is_what_the_command_prints(capsys):
    simulate.main()
    assert capsys.readouterr().out.strip() == table("simulate")


def test_every_sweep_of_the_page_composes(capsys):
    lines = [line.split(" #")[0] for line in PAGE.splitlines() if line.startswith("    lightning-ntk sweep")]
    assert len(lines) >= 4
    for line in lines:
        assert cli.main([*shlex.split(line)[1:], "--cfg"]) == 0, capsys.readouterr().err
