"""The page of a comparison: what it holds, that it needs nothing else, and what a browser makes of it."""

import html
import itertools
import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from test_compare import write_run

from lightning_ntk import compare
from lightning_ntk.comparison import page
from lightning_ntk.comparison.table import score_cell

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = "</script><script>console.error(1)</script><img src=x onerror=alert(1)>'\"&@@data@@"
EPS = (2, 8, 16)


def measured(accuracy: float, **more: float) -> dict[str, float]:
    """Metrics of a run that was attacked, tested out of distribution and looked into."""
    attacked = {f"adversarial/pgd_linf/eps_{eps}/accuracy": accuracy - eps / 100 for eps in EPS}
    attacked |= {"adversarial/clean/accuracy": accuracy, "adversarial/simba_dct/accuracy": accuracy - 0.25}
    intervals = {f"{name}_ci95": 0.02 for name in attacked}
    shifted = {"source": 0.0, "digits": 0.1, "flowers": 0.2, "corrupted_contrast": 0.3}
    shifted |= {f"corrupted_contrast/severity_{s}": s / 10 for s in (1, 5)}
    shifted = {f"ood/{name}/accuracy": accuracy - drop for name, drop in shifted.items()}
    return {"test/accuracy": accuracy, **attacked, **intervals, **shifted, "ntk/condition_number": 1234.5, **more}


def write_measured(name: str, method: str, accuracy: float, seconds: float, seed: int = 0, **more) -> None:
    scores = [accuracy - 0.05, accuracy + 0.05, accuracy]
    metrics = measured(accuracy)
    timings = {"meta_step_s": seconds / 100, "fit_s": seconds, "test_s": 1.0}
    write_run(f"all/{name}", method, scores, metrics=metrics, timings=timings, seed=seed, **more)
    rows = ["step,epoch,time/fit,val/accuracy,val/accuracy_ci95,ntk/condition_number,ntk/effective_rank,test/accuracy"]
    rows += [
        f"{50 * k + 49},{k},{seconds * (k + 1) / 3},{0.4 + 0.1 * k},0.03,{10 ** (k + 2)},{12.5 - k}," for k in range(3)
    ]
    rows += ["150,3,,,,77,99,0.7"]  # Of the test: no point of a curve over training.
    Path(f"all/{name}/metrics.csv").write_text("\n".join(rows) + "\n")


@pytest.fixture
def runs():
    write_measured("one", "meta_rkhs_ii", 0.8, 90.0)
    write_measured("two", "maml", 0.7, 9.0)
    write_measured("three", "anil", 0.6, 100.0)
    return Path("all")


def page_data(text: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])


def test_the_figures_hold_the_numbers_of_the_runs(runs):
    compare.compare([runs])
    data = page_data(Path("all/comparison.html").read_text())
    figures = {figure["title"]: figure for figure in data["figures"]}
    assert list(figures) == [
        "Validation over meta-steps",
        "Validation over seconds of training",
        "Condition number of the NTK",
        "Effective rank of the NTK",
        "Test against training time",
        "Accuracy under attack: pgd_linf",
        "Accuracy under attack, whatever the size of the change",
        "Out of distribution",
        "Corrupted images, mean over kinds",
    ]
    maml = data["labels"].index("maml")

    def points(title):
        (series,) = (s for s in figures[title]["series"] if s["label"] == maml)
        return [tuple(pytest.approx(v) for v in point if isinstance(v, float | int)) for point in series["points"]]

    assert points("Validation over meta-steps") == [(50, 40, 3), (100, 50, 3), (150, 60, 3)]
    assert points("Validation over seconds of training") == [(3, 40, 3), (6, 50, 3), (9, 60, 3)]
    assert points("Condition number of the NTK") == [(50, 100), (100, 1000), (150, 10000)]
    assert points("Effective rank of the NTK") == [(50, 12.5), (100, 11.5), (150, 10.5)]
    assert points("Out of distribution") == [(0, 70), (1, 60), (2, 50), (3, 40)]
    assert figures["Out of distribution"]["x"]["names"] == ["source", "digits", "flowers", "corrupted: contrast"]
    assert points("Corrupted images, mean over kinds") == [(0, 70), (1, 60), (5, 20)]
    assert points("Accuracy under attack, whatever the size of the change") == [(0, 70, 2), (1, 45, 2)]
    ticks = figures["Accuracy under attack: pgd_linf"]["x"]["ticks"]
    assert [name for _, name in ticks] == ["0", "2/255", "8/255", "16/255"]
    assert points("Accuracy under attack: pgd_linf") == [(0, 70, 2), (2, 68, 2), (8, 62, 2), (16, 54, 2)]
    assert points("Test against training time")[0][:2] == (9, 70)


def test_robust_accuracy_is_compared_with_the_baseline_in_pairs():
    name = "adversarial/pgd_linf/eps_8/accuracy"
    probe = {"a": [0.3, 0.5, 0.4], "b": [0.5, 0.6, 0.4], "c": [0.5, 0.6]}
    for method, values in probe.items():
        probes = {"adversarial": {"episodes": {name: values}, "series": {}}, "pictures": {}}
        write_measured(method, method, 0.6, 10.0, probes=probes)
    compare.compare([Path("all")], baseline="a")
    text = Path("all/comparison.html").read_text()
    (table,) = re.findall(r'<table id="differences">(.*?)</table>', text)
    cells = [html.unescape(cell) for cell in re.findall(r"<t[hd](?: [^>]*)?>(.*?)</t[hd]>", table)]
    # b less a: 0.2, 0.1, 0 have mean 0.1 and sample deviation 0.1. c was probed on fewer episodes.
    half_width = 100 * 1.96 * 0.1 / 3**0.5
    assert cells == ["attack", "eps", "b", "c", "pgd_linf", "8/255", f"+10.00 ± {half_width:.2f}", ""]
    # The interval over the episodes of the probe, not the logged one.
    figures = {figure["title"]: figure for figure in page_data(text)["figures"]}
    drawn = [p for p in figures["Accuracy under attack: pgd_linf"]["series"][1]["points"] if p[0] == 8]
    assert drawn[0][2] == pytest.approx(half_width)


def test_robust_accuracies_of_other_attacks_are_not_paired():
    name = "adversarial/pgd_linf/eps_8/accuracy"
    for method, steps in (("a", 20), ("b", 20), ("c", 5)):
        probes = {"adversarial": {"episodes": {name: [0.3, 0.5, 0.4]}, "series": {}}}
        config = {"callbacks": {"adversarial": {"steps": steps}}}
        write_measured(method, method, 0.6, 10.0, probes=probes, config=config)
    compare.compare([Path("all")], baseline="a")
    text = Path("all/comparison.html").read_text()
    (table,) = re.findall(r'<table id="differences">(.*?)</table>', text)
    assert re.findall(r"<th [^>]*>(.*?)</th>", table) == ["attack", "eps", "b"]
    compare.compare([Path("all")], baseline="c")
    assert '<table id="differences">' not in Path("all/comparison.html").read_text()


def test_means_called_alike_have_colours_of_their_own():
    for lr in (1, 2):
        for seed in (0, 1):
            write_measured(f"{lr}/{seed}", "maml", 0.5, 5.0, seed=seed, config={"method": {"lr": lr}})
    compare.compare([Path("all")])
    text = Path("all/comparison.html").read_text()
    assert sorted(re.findall(r'<tr data-label="(\d)" class="mean">', text)) == ["0", "1"]


@pytest.mark.parametrize(("low", "high"), [(2.2, 4.5), (5.5, 9.2), (1.1, 1.9), (0.9, 150.0)])
def test_every_axis_of_errors_has_ticks(tmp_path, low, high):
    metrics = {"test/mse": low}
    write_run("all/maml", "maml", [low, low], metrics=metrics, episodes={"test/mse": [low, low]})
    Path("all/maml/metrics.csv").write_text(f"step,epoch,time/fit,val/mse\n9,0,1,{low}\n19,1,2,{high}\n")
    compare.compare([Path("all")])
    dom = browse(Path("all/comparison.html"), tmp_path)
    first = dom.split("<figure>")[1]
    assert len(re.findall(r'text-anchor="end">[\d.]+</text>', first)) >= 2


def test_a_broken_end_of_metrics_csv_and_numbers_that_are_none_leave_the_rest(runs, tmp_path):
    metrics = {name: math.nan for name in measured(0.5)}
    write_run("all/diverged", "from_scratch", [math.nan, 0.5, 0.5], metrics=metrics)
    with open("all/diverged/metrics.csv", "ab") as file:
        file.write(b"149,2,nan,inf\n199,3,40.0,0.7\n2\x00\x00\xff")
    compare.compare([runs], baseline="maml")
    file = Path("all/comparison.html")
    data = page_data(file.read_text())
    drawn = data["figures"][0]["series"][data["labels"].index("from_scratch")]
    assert [point[:2] for point in drawn["points"]] == [[50, 40], [100, 60], [200, 70]]
    assert shown_rows(browse(file, tmp_path))[-1] == "from_scratch"


def test_numbers_that_an_axis_has_no_place_for(tmp_path):
    metrics = {"test/accuracy": 0.0, "ood/source/accuracy": 0.0, "ood/digits/accuracy": 0.0}
    write_run("all/maml", "maml", [0.0, 0.0], metrics=metrics)
    Path("all/maml/metrics.csv").write_text("step,epoch,time/fit,val/accuracy,ntk/condition_number\n9,0,1,0.2,-5\n")
    compare.compare([Path("all")])
    dom = browse(Path("all/comparison.html"), tmp_path)
    assert "Condition number" not in dom.split("<script")[0]
    assert "NaN" not in dom.split("<script")[0]


def test_signs_of_masked_gradients_are_told(runs):
    compare.compare([runs])
    assert 'id="masking"' not in Path("all/comparison.html").read_text()
    signs = {"zero_gradients": 0.5, "zero_gradients_ci95": 0.4, "rise_with_eps": 0.01, "noise_wins": math.nan}
    metrics = measured(0.5, **{f"adversarial/masking/{sign}": value for sign, value in signs.items()})
    write_run("all/masked", "from_scratch", [0.5, 0.5, 0.5], metrics=metrics)
    compare.compare([runs])
    assert "<ul><li>from_scratch: zero_gradients 0.5</li></ul>" in Path("all/comparison.html").read_text()


def test_sections_appear_only_where_there_is_data():
    write_run("all/maml", "maml", [0.5, 0.7])
    write_run("all/scratch", "from_scratch", [0.2, 0.3], curve=(), timings={"meta_step_s": None, "fit_s": 0.0})
    compare.compare([Path("all")])
    text = Path("all/comparison.html").read_text()
    first, *others = page_data(text)["figures"]
    assert [figure["title"] for figure in others] == [
        "Validation over seconds of training",
        "Test against training time",
    ]
    # What needs no training is a level line.
    assert [(s["name"], [p[:2] for p in s["points"]]) for s in first["series"]] == [
        ("maml", [[50, 40], [100, 60]]),
        ("from_scratch (test)", [[50, 25], [100, 25]]),
    ]
    assert "condition number" not in text.split("<style>")[0] + text.split("</style>")[1].split("<script")[0]


def test_nothing_is_loaded_and_what_users_wrote_stays_text(runs):
    write_measured("four", HOSTILE, 0.5, 5.0)
    compare.compare([runs], baseline=HOSTILE)
    text = Path("all/comparison.html").read_text()
    assert html.escape(HOSTILE) in text
    assert HOSTILE in page_data(text)["labels"]
    assert text.count("<script") == 2
    assert "<img" not in text
    loading = r"(?:src|href)\s*=|url\(|@import|https?://(?!www\.w3\.org/2000/svg)"
    assert not re.findall(loading, text.replace("src=x", ""))
    assert len(page.TEMPLATE.read_text()) < 25_000


def browse(file: Path, tmp_path: Path, script: str = "", width: int = 1200) -> str:
    """The DOM after the page's scripts and one more have run; an error on the console fails the test."""
    if CHROMIUM is None:
        pytest.skip("no Chromium here to open the page in")
    copy = tmp_path / "opened.html"
    csp = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
    text = file.read_text()
    assert csp.search(text)
    copy.write_text(text.replace("</body>", f"<script>{script}</script></body>"))
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --enable-logging=stderr"
    command = [CHROMIUM, *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900"]
    done = subprocess.run(
        [*command, "--dump-dom", copy.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    assert "CONSOLE" not in done.stderr, done.stderr
    return done.stdout


def shown_rows(dom: str) -> list[str]:
    body = re.search(r'<table id="results">.*?<tbody>(.*?)</tbody>', dom, re.DOTALL)[1]
    rows = [row for row in re.findall(r"<tr (.*?)</tr>", body, re.DOTALL) if " hidden" not in row.split(">")[0]]
    return [re.sub("<.*?>", "", re.search(r"<th scope=.*?</th>", row, re.DOTALL)[0]).strip() for row in rows]


def test_a_browser_sorts_filters_and_draws(runs, tmp_path):
    write_measured("four", HOSTILE, 0.5, 5.0)
    compare.compare([runs], baseline="maml")
    file = Path("all/comparison.html")
    head = "document.querySelectorAll('#results thead button')"
    dom = browse(file, tmp_path, f"[...{head}].find(b => b.textContent === 's of training').click()")
    hostile = html.escape(HOSTILE, quote=False)
    # As numbers: as text, 100 would come before 9.
    assert shown_rows(dom) == [hostile, "maml", "meta_rkhs_ii", "anil"]
    assert 'aria-sort="ascending"' in dom
    assert dom.count("<figure>") == 9
    assert len(re.findall(r'<g data-label="\d">', dom)) == 4 * 7 + 4 * 2 + 4 * 4
    dom = browse(file, tmp_path, f"{head}[1].click(); {head}[1].click();")
    assert shown_rows(dom) == ["meta_rkhs_ii", "maml", "anil", hostile]
    dom = browse(file, tmp_path, "f = byId('filter'); f.value = 'RKHS'; f.dispatchEvent(new Event('input'))")
    assert shown_rows(dom) == ["meta_rkhs_ii"]
    assert "1 of 4 rows" in dom
    assert len(re.findall(r'<g data-label="\d">', dom)) == 1 * 7 + 1 * 2 + 1 * 4


def test_a_name_in_the_legend_hides_its_lines_and_a_pointer_shows_numbers(runs, tmp_path):
    compare.compare([runs])
    point = "document.querySelector('#figures svg g path:last-child').getBoundingClientRect()"
    script = f"""
      document.querySelector('.chip').click();
      const at = {point};
      document.querySelector('#figures svg').dispatchEvent(new PointerEvent('pointermove',
        {{clientX: at.x + at.width / 2, clientY: at.y + at.height / 2}}));"""
    dom = browse(Path("all/comparison.html"), tmp_path, script)
    assert 'aria-pressed="false"' in dom
    assert len(re.findall(r'<g data-label="\d">', dom)) == 2 * 7 + 2 * 2 + 2 * 4
    assert re.search(r'<div id="tip"[^>]*>anil\nmeta-steps 150: 60 ± 3</div>', dom)


def test_on_a_phone_nothing_but_the_table_scrolls_sideways(tmp_path):
    for k in range(20):
        write_measured(f"{k}", f"a_method_with_quite_a_long_name_that_goes_on_and_on_{k}", 0.5 + k / 100, 10.0 + k)
    compare.compare([Path("all")])
    cut = "[...document.querySelectorAll('tbody th')].filter(head => head.scrollWidth > head.clientWidth).length"
    script = f"document.title = `${{document.documentElement.scrollWidth}} of ${{innerWidth}}, ${{{cut}}} names cut`"
    dom = browse(Path("all/comparison.html"), tmp_path, script, width=500)
    width, window, names = re.search(r"<title>(\d+) of (\d+), (\d+) names cut</title>", dom).groups()
    assert int(width) <= int(window) == 500
    assert int(names) == 0, "a finger has no tooltip"


def test_of_a_long_training_as_many_points_are_drawn_as_a_screen_shows(runs):
    rows = [f"{k},{k},{0.1 + k / 3000!r}" for k in range(2000)]
    Path("all/two/metrics.csv").write_text("\n".join(["step,time/fit,val/accuracy", *rows]) + "\n")
    compare.compare([runs])
    text = Path("all/comparison.html").read_text()
    maml = page_data(text)["labels"].index("maml")
    for figure in page_data(text)["figures"][:2]:
        (points,) = (series["points"] for series in figure["series"] if series["label"] == maml)
        assert len(points) == 300
        assert [points[0][1], points[-1][1]] == pytest.approx([10, 10 + 100 * 1999 / 3000])
        gaps = [after[0] - before[0] for before, after in itertools.pairwise(points)]
        assert min(gaps) >= 6
        assert max(gaps) <= 7
    assert "Of longer curves over training, 300 points are drawn." in text
    assert len(text) < 50_000


def test_figures_take_any_number_of_points(runs, tmp_path):
    compare.compare([runs])
    script = "document.title = scaleOf(Array.from({length: 500000}, (_, k) => k - 9), {}, 0, 1).ticks.length"
    assert "<title>3</title>" in browse(Path("all/comparison.html"), tmp_path, script)


def test_who_leads_is_a_mean_where_there_are_seeds():
    for seed, accuracy in enumerate((0.9, 0.5)):
        write_measured(f"maml{seed}", "maml", accuracy, 9.0, seed)
    write_measured("one", "meta_rkhs_ii", 0.8, 90.0)
    compare.compare([Path("all")])
    tiles = re.findall(r"<dt>(.*?)</dt><dd><b>(.*?)</b> (.*?)</dd>", Path("all/comparison.html").read_text())
    assert tiles[0] == ("highest accuracy, %", "80.00 ± 5.66", "meta_rkhs_ii seed 0")
    assert ("fewest s of training", "9", "maml, mean over 2 seeds") in tiles


def test_a_difference_that_rounds_to_nothing_has_no_sign():
    assert score_cell("accuracy", -1e-9, 0.02, "+") == "+0.00 ± 2.00"
    assert score_cell("mse", -1e-9, 0.02) == "0.0000 ± 0.0200"
