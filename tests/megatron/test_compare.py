"""A whole comparison on the CPU: real Megatron, emulated FP8, a negative control, the page in a browser."""

from __future__ import annotations

import html.parser
import json
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ENTRY, MODEL, TRAINING, run

pytestmark = pytest.mark.megatron
STEPS, SEEDS = 40, (1236, 1237, 1238)
WINDOW = range(33, 41)  # the last fifth
CLI = [sys.executable, "-m", "megatron_fp8_ext.cli"]


def command(corpus, output, recipes, seeds):
    data = ["--data-path", str(corpus), "--data-cache-path", str(corpus.parent / "cache")]
    return [
        *CLI, "compare", "--recipes", recipes, "--seeds", str(seeds), "--steps", str(STEPS),
        "--output", str(output), "--parallel", "2", "--stats-interval", "20",
        "--", sys.executable, str(ENTRY), *MODEL, *TRAINING, *data, "--use-distributed-optimizer",
        "--micro-batch-size", "8", "--global-batch-size", "8", "--lr", "2e-3",
        "--lr-wsd-decay-iters", "10", "--tensorboard-dir", "replaced",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def compared(corpus, tmp_path_factory):
    """One seed of infir2, three of the control (two have a t of 12.7); (folder, last command)."""
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    output = tmp_path_factory.mktemp("compare")
    for recipes, seeds in (("bf16,infir2", 1), ("bf16,control-e5m2", len(SEEDS))):
        asked = command(corpus, output, recipes, seeds)
        outcome = run(asked)
        assert outcome.code == 0, outcome.output[-4000:]
    assert "1 of 6 runs had finished before" in outcome.output
    return output, asked


class Page(html.parser.HTMLParser):
    """The tables of the page by id, as rows of text, and every address it names."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.addresses: list[str] = []
        self._table: list[list[str]] | None = None
        self._cell = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "srcset", "action", "data"):
                self.addresses.append(value or "")
        if tag == "table":
            self._table = self.tables.setdefault(dict(attrs)["id"], [])
        elif tag == "tr" and self._table is not None:
            self._table.append([])
        elif tag in ("td", "th") and self._table:
            self._table[-1].append("")
            self._cell = True

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self._cell = False
        elif tag == "table":
            self._table = None

    def handle_data(self, data):
        if self._cell and self._table:
            self._table[-1][-1] += data

    def rows(self, table: str) -> dict[str, dict[str, str]]:
        head, *rows = self.tables[table]
        return {row[0]: dict(zip(head, row, strict=True)) for row in rows}


@pytest.fixture(scope="module")
def page(compared):
    return Page((compared[0] / "report.html").read_text())


def test_verdicts(page):
    rows = page.rows("verdicts")
    assert rows["control-e5m2 (negative control)"]["verdict"] == "not lossless"
    assert rows["control-e5m2 (negative control)"]["runs finished"] == "3 of 3"
    # One seed, and steps that are too few to call anything lossless whatever the gap.
    assert rows["infir2"]["verdict"] == "inconclusive"
    assert rows["infir2"]["runs finished"] == "1 of 3"


def test_quantized_gemms_are_counted(page, compared):
    # 2 layers x 4 linears x (fprop, dgrad, wgrad)
    rows = page.rows("verdicts")
    assert rows["bf16"]["FP8 GEMMs per iteration"] == "0"
    assert rows["infir2"]["FP8 GEMMs per iteration"] == "24"
    folder = compared[0] / "infir2-seed1236"
    samples = [json.loads(x) for x in (folder / "fp8_stats-rank0.jsonl").read_text().splitlines()]
    assert [s["iteration"] for s in samples] == [20, 40]
    for sample in samples:
        assert sample["gemms"] == {"fprop": 8, "dgrad": 8, "wgrad": 8}
        assert len(sample["layers"]) == 2 * 4 * 5
        for row in sample["layers"]:
            assert 25 < row["sqnr_db"] < 40 and row["saturation"] == 0
    control = compared[0] / "control-e5m2-seed1236" / "fp8_stats-rank0.jsonl"
    rows = json.loads(control.read_text().splitlines()[0])["layers"]
    assert all(row["underflow"] > 0.3 for row in rows if row["operand"] == "grad rows")


def event_losses(folder) -> dict[int, float]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {e.step: e.value for e in events.Scalars("lm loss")}


def test_numbers_are_those_of_the_event_files(page, compared):
    """Final loss and gap of every run, from TensorBoard's files, by arithmetic of our own."""
    rows = page.rows("runs")
    assert len(rows) == 7
    final = {}
    for name, row in rows.items():
        losses = event_losses(compared[0] / name)
        final[name] = sum(losses[i] for i in WINDOW) / len(WINDOW)
        assert float(row["final loss"]) == pytest.approx(final[name], abs=2e-5), name
        assert row["iterations"] == "40 of 40" and row["status"] == "finished"
    verdicts = page.rows("verdicts")
    for recipe, seeds in (("infir2", SEEDS[:1]), ("control-e5m2", SEEDS)):
        gaps = []
        for seed in seeds:
            gap = final[f"{recipe}-seed{seed}"] / final[f"bf16-seed{seed}"] - 1
            shown = float(rows[f"{recipe}-seed{seed}"]["gap"].removesuffix(" %"))
            assert shown == pytest.approx(100 * gap, abs=2e-3)
            gaps.append(gap)
        row = next(row for name, row in verdicts.items() if name.split()[0] == recipe)
        shown = float(row["gap"].removesuffix(" %"))
        assert shown == pytest.approx(100 * sum(gaps) / len(gaps), abs=2e-3)
    # The control's interval, with the printed t of two degrees of freedom.
    mean = sum(gaps) / 3
    half = 4.30265 * (sum((g - mean) ** 2 for g in gaps) / 2 / 3) ** 0.5
    low, high = (float(end.removesuffix(" %")) for end in row["95 % interval"].split(" to "))
    assert (low, high) == pytest.approx((100 * (mean - half), 100 * (mean + half)), abs=5e-3)


def test_event_files_hold_the_cast_errors(compared):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = compared[0] / "infir2-seed1236"
    events = accumulator.EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    tag = "fp8 sqnr_db/layer 2 mlp.linear_fc1 grad rows"
    sample = json.loads((folder / "fp8_stats-rank0.jsonl").read_text().splitlines()[0])
    written = next(
        row["sqnr_db"]
        for row in sample["layers"]
        if f"layer {row['layer']} {row['linear']} {row['operand']}" == tag.partition("/")[2]
    )
    first = events.Scalars(tag)[0]
    assert (first.step, first.value) == (20, pytest.approx(written, rel=1e-6))


def test_page_is_self_contained(page, compared):
    text = (compared[0] / "report.html").read_text()
    assert all(address.startswith("#") for address in page.addresses), page.addresses
    assert "<script" not in text and "@import" not in text
    outside = re.findall(r"(?:url\((?!#)|https?://(?!www\.w3\.org/(?:2000/svg|1999/xlink)))", text)
    assert not outside
    markdown = (compared[0] / "report.md").read_text()
    for row in page.tables["verdicts"][1:]:
        assert "| " + " | ".join(row) + " |" in markdown


@pytest.mark.parametrize("width", [1280, 390])
def test_page_fits_a_browser(width, compared, tmp_path):
    """Headless Chromium: nothing but tables' own scroll areas is wider than the screen."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("needs chromium")
    # Only for measuring: headless Chromium has no smaller window than 500, a frame has.
    frame = tmp_path / "frame.html"
    page = tmp_path / "page.html"
    text = (compared[0] / "report.html").read_text()
    text = re.sub(r'<meta http-equiv="Content-Security-Policy".*?>', "", text)
    script = (
        "<script>addEventListener('load', () => parent.postMessage([document.documentElement.scrollWidth,"
        "document.querySelectorAll('svg').length], '*'))</script>"
    )
    page.write_text(text.replace("</body>", script + "</body>"))
    frame.write_text(
        f"<iframe src=page.html width={width} height=800></iframe><pre id=out></pre><script>"
        "addEventListener('message', e => out.textContent = 'SIZE ' + e.data.join(' '))</script>"
    )
    shown = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=8000",
         f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", f"file://{frame}"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    found = re.search(r"SIZE (\d+) (\d+)", shown.stdout)
    assert found, shown.stdout[-500:] + shown.stderr[-500:]
    assert int(found.group(1)) <= width
    assert int(found.group(2)) >= 7


def test_finished_runs_are_not_run_again(compared):
    output, command = compared
    logs = {file: file.stat().st_mtime_ns for file in output.rglob("log.txt")}
    outcome = run(command)
    assert outcome.code == 0 and "6 of 6 runs had finished before" in outcome.output
    assert {file: file.stat().st_mtime_ns for file in output.rglob("log.txt")} == logs


def test_another_command_in_the_same_folder_is_refused(compared):
    _, command = compared
    outcome = run([*command[:-2], "--tensorboard-dir", "x", "--weight-decay", "0.5"])
    assert outcome.code == 2 and "'--weight-decay 0.5' in the other" in outcome.output


@pytest.mark.slow
def test_statistics_flag_is_checked(train):
    infir2 = ("--fp8-recipe", "infir2", "--fp8-stats-interval")
    refused = train(*infir2, "0", "--fp8-stats-dir", "x", ok=False)
    assert refused.code == 2 and "takes a number of iterations" in refused.said[-1]
    refused = train(*infir2, "10", ok=False)
    assert refused.code == 2 and "add --fp8-stats-dir DIR" in refused.said[-1]


@pytest.mark.slow
def test_sampling_changes_no_number(train, infir2_run, tmp_path):
    tapped = train(
        "--use-distributed-optimizer", "--fp8-recipe", "infir2", "--fp8-stats-interval", "2",
        "--fp8-stats-dir", str(tmp_path), "--recompute-granularity", "full",
        "--recompute-method", "uniform", "--recompute-num-layers", "1",
    )  # fmt: skip
    assert tapped.losses == infir2_run.losses
    samples = (tmp_path / "fp8_stats-rank0.jsonl").read_text().splitlines()
    # Recomputation runs each layer twice; a GEMM of the model counts once.
    assert [json.loads(s)["gemms"]["fprop"] for s in samples] == [16] * 4
