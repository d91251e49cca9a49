"""The page as a reader gets it: whole, self-contained, honest about what is missing."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest

from earthshine.errors import ConfigError, DataError
from earthshine.report.markup import SCRIPT
from earthshine.report.page import write_report

VOID = {"meta", "link", "br", "img", "input", "hr"}
SECTIONS = ("summary", "curves", "reproduce", "runs", "heldout", "dynamics", "experts", "updates", "verification",
            "samples", "environment")  # fmt: skip


class Page(HTMLParser):
    """Checks that tags nest, and collects ids, references, tag names and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open, self.ids, self.tags, self.attributes, self.words, self.scripts = [], [], set(), [], [], []
        self.feed(html)
        self.close()
        assert self.open == []
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        self.tags.add(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["script"]:
            self.scripts.append(data)
        elif "style" not in self.open:
            self.words.append(data)


def read(path):
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture
def page(pair, tmp_path):
    return write_report([run.path for run in pair], tmp_path / "out", "Dense and upcycled")


def test_three_files_and_every_section(page):
    assert sorted(p.name for p in page.parent.iterdir()) == ["report.html", "report.json", "report.md"]
    html = read(page)
    assert [i for i in html.ids if i in SECTIONS] == list(SECTIONS)
    assert "Dense and upcycled" in html.text
    for words in ("283,185,216", "155,778,624", "32,760", "smollm2-e8t2", "Muon", "not installed", "fresh optimizer"):
        assert words in html.text
    assert len(re.findall("^## ", (page.parent / "report.md").read_text(), re.M)) == len(SECTIONS)


def test_nothing_is_fetched_and_only_the_page_s_own_script_runs(page):
    html = read(page)
    assert not html.tags & {"iframe", "object", "embed", "img", "form", "base"}
    assert not [a for a in html.attributes if a[1].startswith("on")]
    allowed = ("#", "data:,", "report.md", "report.json")
    assert all(v.startswith(allowed) for _, name, v in html.attributes if name in ("href", "src", "xlink:href"))
    assert html.scripts == [SCRIPT]
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page.read_text()
    text = page.read_text()
    assert "@import" not in text and "url(" not in text.replace("url(#", "")
    assert "default-src 'none'" in text


def test_the_page_can_be_heard_and_steered(page):
    html = read(page)
    assert len(html.ids) == len(set(html.ids))
    for _, name, value in html.attributes:
        if name == "aria-labelledby":
            assert set(value.split()) <= set(html.ids)
        if name == "href" and value.startswith("#"):
            assert value[1:] in html.ids
    assert ("html", "lang", "en") in html.attributes
    assert "prefers-color-scheme:dark" in page.read_text()


def test_texts_are_escaped(page):
    text = page.read_text()
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "&lt;b&gt;not bold&lt;/b&gt; ⟨U+202E⟩ ⟨U+0000⟩" in text


def test_verdicts(page):
    report = json.loads((page.parent / "report.json").read_text())
    verdicts = {c["label"]: (c["verdict"], c["exceeds_bar"]) for c in report["comparisons"]}
    assert verdicts == {
        "smollm2-dense: after − before": ("lower", True),
        "smollm2-e8t2: after − before": ("lower", True),
        "before: smollm2-e8t2 − smollm2-dense": ("equal", False),
        "after: smollm2-e8t2 − smollm2-dense": ("unclear", False),
    }
    text = read(page).text
    assert "times its standard error of 0.0017: significant at 2 standard errors" in text
    assert "not significant at 2 standard errors" in text
    assert "to float32 rounding" in text


def test_verification_beside_its_tolerance(page, pair):
    assert "1.93×10⁻⁶ 10⁻⁵ 19 % pass largest logit 43.1" in read(page).text
    name = "eval/verify-upcycle.json"
    failed = json.loads((pair[1].path / name).read_text())
    failed["ok"] = failed["rows"][0]["ok"] = False
    failed["rows"][0]["measured"] = 3e-5
    pair[1].write(name, failed)
    text = read(write_report([pair[1].path])).text
    assert "3×10⁻⁵ 10⁻⁵ 300 % FAIL" in text
    assert "2 of 3" in text and "does not hold" in text


def test_config_differences_and_commands(page, pair):
    text = read(page).text
    assert (
        '--- smollm2-dense +++ smollm2-e8t2 -name = "smollm2-dense" +name = "smollm2-e8t2" -init.path = "smollm2"'
        in text
    )
    assert f"earthshine train {pair[0].path}/config.json --run {pair[0].path}-again" in text


def test_a_copy_button_beside_each_text_to_copy_is_hidden_until_the_script_shows_it(page):
    text = page.read_text()
    assert (
        text.count('<button type="button" class="copy" aria-live="polite" hidden>')
        == text.count('<pre class="code"')
        == 4
    )


def test_a_run_s_card_has_its_cost(page):
    text = read(page).text
    assert re.search(
        r"Training time \d+s Tokens per second \d+ Compute [\d.]+ TFLOP MFU 5\d\.?\d* % Peak memory 3\.02 GiB", text
    )


def test_an_mfu_above_the_peak_says_so(folder):
    run = folder("r")
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    run.write("metrics.jsonl", "".join(json.dumps(x | {"mfu": 20.25}) + "\n" for x in lines))
    assert "MFU 2,025 % (above the measured peak)" in read(write_report([run.path])).text


def test_an_exported_model_is_linked_where_it_is(pair, tmp_path):
    """In the run folder by its files, elsewhere by the check that names it; a name stays a name."""
    for folder in (pair[1].path / "javascript:alert(1)", tmp_path / "models" / "a b"):
        folder.mkdir(parents=True)
        for name in ("config.json", "model.safetensors"):
            (folder / name).write_text("{}")
    (tmp_path / "models" / "a b" / "README.md").write_text("card")
    check = {"check": "huggingface", "ok": True, "rows": [], "subject": {"model": str(tmp_path / "models" / "a b")}}
    pair[1].write("eval/verify-huggingface.json", check)
    html = read(write_report([run.path for run in pair], tmp_path / "out"))
    links = [v for _, name, v in html.attributes if name == "href" and v.startswith("..")]
    inside = "../smollm2-e8t2/javascript%3Aalert%281%29/"
    assert links == [inside, "../models/a%20b/", "../models/a%20b/README.md"]
    assert "Model card of a b" in html.text
    elsewhere = json.dumps(check).replace("a b", "gone")
    pair[1].write("eval/verify-huggingface.json", elsewhere)
    assert (
        "gone" not in read(write_report([run.path for run in pair], tmp_path / "out")).text.partition("Loss curves")[0]
    )


def test_the_footer_links_to_the_files_beside_the_page(pair, tmp_path):
    html = read(write_report([pair[0].path], tmp_path / "my tour.html"))
    assert [v for _, name, v in html.attributes if name == "href"][-2:] == ["my%20tour.md", "my%20tour.json"]


def test_no_difference_is_a_failure(pair, heldout_json):
    """A significantly higher loss has an arrow; a cross is for a check that does not hold."""
    pair[1].write("eval/heldout-after.json", heldout_json(2.4, 3))
    html = write_report([run.path for run in pair]).read_text()
    assert '<li class="up">' in html and '<span class="chip up">higher</span>' in html
    assert 'class="bad"' not in html and "chip bad" not in html
    assert '<li class="down">' in html and '<li class="quiet">' in html


def test_same_samples_are_told_from_others(page, pair):
    assert "saw the same samples in each of their 4 common steps" in read(page).text
    path = pair[1].path / "metrics.jsonl"
    path.write_text(path.read_text().replace('"samples": "2', '"samples": "f'))
    text = read(write_report([run.path for run in pair])).text
    assert "saw different samples in 1 of 4 steps" in text


def test_samples_of_lines_that_stand_for_other_steps_are_not_compared(pair):
    """`log_every` of one run is 2: a line's hash is of the samples of both steps."""

    def report(*hashes: str) -> str:
        for run, head in zip(pair, hashes, strict=True):
            lines = [{"kind": "step", "step": step, "steps": 2, "loss": 2.0, "samples": head * 64} for step in (2, 4)]
            run.write("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        return read(write_report([run.path for run in pair])).text

    assert "saw the same samples in each of their 4 common steps" in report("a", "a")
    assert "saw different samples within 4 of 4 steps" in report("a", "b")
    each = [{"kind": "step", "step": step, "loss": 2.0, "samples": "c" * 64} for step in (1, 2, 3, 4)]
    pair[0].write("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in each))
    text = read(write_report([run.path for run in pair])).text
    assert "same samples" not in text and "different samples" not in text


def test_lines_that_stand_for_several_steps_are_called_logged_steps(folder):
    run = folder("long", num_steps=1)
    steps = ({"kind": "step", "step": 10 * i, "steps": 10, "loss": 2 + 1 / i} for i in range(1, 5001))
    run.write("metrics.jsonl", "".join(json.dumps(s) + "\n" for s in steps))
    assert "its 5,000 logged steps are drawn as 455 means of 11 each" in read(write_report([run.path])).text


def test_long_runs_are_thinned_and_the_caption_says_so(folder):
    run = folder("long", num_steps=1)
    steps = ({"kind": "step", "step": i, "loss": 2 + 1 / i, "lr": 0.1} for i in range(1, 5001))
    run.write("metrics.jsonl", "".join(json.dumps(s) + "\n" for s in steps))
    page = write_report([run.path])
    assert "its 5,000 steps are drawn as 455 means of 11 each, shaded from lowest" in read(page).text
    assert page.stat().st_size < 250_000
    series = json.loads((run.path / "report.json").read_text())["runs"][0]["series"]
    assert series["loss"]["steps_averaged"] == 11 and len(series["loss"]["value"]) == 455


@pytest.mark.parametrize("num_steps", [2, 6, 70])
def test_runs_of_any_length(folder, num_steps):
    text = read(write_report([folder("r", num_steps=num_steps, sparse=True).path])).text
    assert f"after {num_steps} steps on" in text
    assert ("mean over 5 neighboring steps" in text) == (num_steps > 60)


def test_what_is_missing_is_reported(folder):
    run = folder("bare")
    run.remove("plan.json", "env.json", "metrics.jsonl")
    for name in ("heldout-before", "heldout-after", "samples-before", "samples-after"):
        run.remove(f"eval/{name}.json")
    text = read(write_report([run.path])).text
    for words in (
        "No held-out loss was measured both before and after",
        "bare has no held-out loss before or after training",
        "bare has no training loss",
        "No run recorded its learning rate, gradient norm, tokens per second",
        "bare has no expert load",
        "bare has no update RMS",
        "bare has no verification result",
        "bare has no text samples",
        "bare has no env.json",
        "Parameters and compute are not recorded for bare",
        "metrics.jsonl is absent",
    ):
        assert words in text


def test_only_metrics(folder):
    run = folder("lines")
    run.remove("config.json", "plan.json", "eval/heldout-before.json", "eval/heldout-after.json")
    text = read(write_report([run.path])).text
    assert "cannot be repeated from its folder" in text
    assert "before (step 0)" in text and "after (step 4)" in text  # from metrics.jsonl
    assert "the losses of individual sequences are not recorded" in text


def test_a_single_sequence_proves_nothing(folder, heldout_json):
    run = folder("r")
    run.write("eval/heldout-before.json", heldout_json(2.0, 1, 0.01, 1))
    run.write("eval/heldout-after.json", heldout_json(1.5, 2, 0.01, 1))
    assert "measured on a single sequence, so without a standard error" in read(write_report([run.path])).text


def test_bits_per_byte_of_a_text_that_cannot_be_spelled_are_marked(folder, heldout_json):
    run = folder("r")
    result = heldout_json(1.5, 2, 0.01, 5)
    run.write("eval/heldout-after.json", result | {"lost": ""})
    assert "lossy" not in read(write_report([run.path])).text
    run.write("eval/heldout-after.json", result | {"lost": "9.00% of the tokens are unknown"})
    assert "(lossy: unknown tokens)" in read(write_report([run.path])).text


def test_other_masks_are_not_compared(pair, heldout_json):
    for run, within in zip(pair, (True, False), strict=True):
        run.write("eval/heldout-after.json", heldout_json(2.2, 5, 0.01, 48) | {"document_attention": within})
    text = read(write_report([run.path for run in pair])).text
    assert "they were measured on different held-out sequences" in text


def test_other_heldout_texts_are_not_compared(pair, heldout_json):
    pair[1].write("eval/heldout-after.json", heldout_json(2.2, 5, 0.01, 40))
    text = read(write_report([run.path for run in pair])).text
    assert text.count("they were measured on different held-out sequences") == 2  # two comparisons


def test_a_diverged_run_is_drawn_without_its_last_step(folder):
    run = folder("r")
    path = run.path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"kind": "step", "step": 5, "loss": NaN, "grad_norm": Infinity}\n')
    page = write_report([run.path])
    assert "1 steps have no finite value and are left out" in read(page).text
    json.loads((run.path / "report.json").read_text(), parse_constant=pytest.fail)  # strict JSON


def test_unused_experts_are_reported(folder):
    run = folder("r", num_steps=1)
    line = {"kind": "step", "step": 1, "loss": 1.0, "expert_load": {"0": [0.5, 0.5, 0.0, 0.0], "1": [0, 0, 0, 0]}}
    run.write("metrics.jsonl", json.dumps(line) + "\n")
    assert "6 experts received no token (gray)" in read(write_report([run.path])).text


def test_how_experts_were_balanced_is_reported(pair, folder):
    text = read(write_report([run.path for run in pair])).text
    words = "switch loss per micro-batch, 0.01; z-loss, 0.001; capacity factor 1.25 per assignment"
    assert f"Expert balancing no experts {words}" in text
    assert "Compute, recomputed forward 0 FLOP 8.4 TFLOP" in text
    config = json.loads((pair[1].path / "config.json").read_text())
    config["capacity"]["meaning"] = config["capacity"].pop("relative_to")  # as older runs have it
    pair[1].write("config.json", json.dumps(config))
    assert words in read(write_report([run.path for run in pair])).text
    dense = read(write_report([folder("alone").path])).text
    assert "Expert balancing" not in dense and "recomputed forward" not in dense


def test_balance_is_drawn_where_it_was_recorded(folder):
    """A panel each for what any run has above 0; nothing was unused here, and a dense run has none of it."""
    sparse, dense = folder("sparse", sparse=True), folder("dense")
    page = write_report([dense.path, sparse.path])
    text = read(page).text
    assert "Balance by step" in text and "The balance loss is the mean over layers," in text
    assert "Choices are dropped where" in text and "Dead experts" not in text
    series = json.loads(page.with_suffix(".json").read_text())["runs"][1]["series"]
    last = json.loads((sparse.path / "metrics.jsonl").read_text().splitlines()[-2])
    for column in ("balance", "balance_loss", "max_violation", "drop_rate", "dead_experts"):
        assert series[column]["value"][-1] == last[column]
    lines = [json.loads(line) for line in (sparse.path / "metrics.jsonl").read_text().splitlines()]
    sparse.write("metrics.jsonl", "".join(json.dumps(x | {"dead_experts": 3}) + "\n" for x in lines))
    assert "Dead experts received no token" in read(write_report([sparse.path])).text
    bare = folder("bare", sparse=True)
    without_balance = [{k: v for k, v in x.items() if k not in ("balance", "drop_rate")} for x in lines]
    bare.write("metrics.jsonl", "".join(json.dumps(x) + "\n" for x in without_balance))
    assert "Balance by step" not in read(write_report([bare.path])).text


def test_max_violation_of_each_layer_is_drawn(folder):
    """At most 24 layers, the one that ends highest among them; a single step draws none."""
    text = read(write_report([folder("r", sparse=True).path])).text
    assert "MaxVio by layer, steps 1 to 4" in text and "layers are drawn" not in text
    deep = folder("deep", num_steps=1)
    for steps in (1, 2):
        load = {str(i): [0.5 + 0.1 * (i == 31), 0.5] for i in range(61)}
        each = ({"kind": "step", "step": s + 1, "loss": 1.0, "expert_load": load} for s in range(steps))
        deep.write("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in each))
        html = write_report([deep.path]).read_text()
        assert ("MaxVio by layer" in html) == (steps == 2)
    assert "24 of 61 layers are drawn" in read(deep.path / "report.html").text
    assert html.count(">layer 31<") == 2  # wide and narrow


def test_qk_clip_is_drawn_where_it_was_recorded(folder):
    run = folder("r")
    assert "QK-Clip" not in write_report([run.path]).read_text()
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    numbers = {"max_attention_logit": 98.5, "heads_clipped": 3}
    run.write("metrics.jsonl", "".join(json.dumps(x | numbers) + "\n" for x in lines))
    config = json.loads((run.path / "config.json").read_text())
    config["optimizer"]["qk_clip_threshold"] = 100.0
    run.write("config.json", config)
    text = read(write_report([run.path])).text
    assert "weight decay 0.1, QK-Clip at 100" in text
    assert "exceeds the threshold of 100 (dashed, where in range)" in text and "clipped at 100" not in text
    assert "98.5" in text
    series = json.loads((run.path / "report.json").read_text())["runs"][0]["series"]
    assert series["heads_clipped"]["value"] == [3] * 4


def test_a_run_without_frozen_parameters_has_none(folder):
    runs = folder("a"), folder("b")
    for run, frozen in zip(runs, (0, 9216), strict=True):
        plan = json.loads((run.path / "plan.json").read_text())
        run.write("plan.json", plan | {"frozen_parameters": frozen, "scion_parameters": 0})
    write_report([run.path for run in runs])
    markdown = (runs[0].path / "report.md").read_text()
    assert "| Parameters frozen | none | 9,216 |" in markdown and "trained by Scion" not in markdown


def test_the_qk_clip_figure_says_when_layers_are_left_out(folder):
    run = folder("r")
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    run.write("metrics.jsonl", "".join(json.dumps(x | {"max_attention_logit": 98.5}) + "\n" for x in lines))
    plan = json.loads((run.path / "plan.json").read_text())
    num_layers = plan["model"]["num_hidden_layers"]
    for clipped, left_out in ((num_layers, False), (num_layers - 1, True)):
        run.write("plan.json", plan | {"qk_clip_layers": list(range(clipped))})
        assert ("Layers with a frozen query or key" in read(write_report([run.path])).text) == left_out


def test_same_folders_same_bytes(pair, tmp_path):
    pages = [write_report([r.path for r in pair], tmp_path / name) for name in ("a", "b")]
    for suffix in (".html", ".md", ".json"):
        first, second = (p.with_suffix(suffix).read_bytes() for p in pages)
        assert first == second


def test_where_it_is_written(pair, tmp_path):
    runs = [run.path for run in pair]
    assert write_report(runs) == runs[0] / "report.html"
    assert write_report(runs, tmp_path / "x" / "tour.html") == tmp_path / "x" / "tour.html"
    assert (tmp_path / "x" / "tour.json").exists()
    (tmp_path / "file.txt").write_text("")
    with pytest.raises(ConfigError, match=r"file\.txt is a file that is not \.html"):
        write_report(runs, tmp_path / "file.txt")
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(ConfigError, match="is a folder"):
        write_report(runs, tmp_path / "folder.html")
    with pytest.raises(ConfigError, match="cannot be written"):
        write_report(runs, tmp_path / "file.txt" / "report.html")


def test_a_damaged_run_leaves_nothing(pair, tmp_path):
    pair[1].write("plan.json", "{")
    with pytest.raises(DataError, match=r"plan\.json is not readable JSON"):
        write_report([run.path for run in pair], tmp_path / "out")
    assert not (tmp_path / "out").exists()
