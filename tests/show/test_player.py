"""The page shows, step by step, exactly the states that it was made of: as its data says, and in a
browser where there is one."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from nar_kernels.data.sequence_spec import SequenceSpec
from nar_kernels.data.tokenizers.byte_level import ByteTokenizer
from nar_kernels.sampling.decode import DecodeState
from nar_kernels.sampling.states import Blocks
from nar_kernels.show import pictures
from nar_kernels.show.player import page

pytestmark = [pytest.mark.seconds, pytest.mark.usefixtures("one_thread")]

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)
STEPS = 7
TITLE = 'A <b>title</b> & </script> "{{data}}"'
TEXT = b"def f(x):\n\treturn '</script><!--' # caf\xc3\xa9\n\n  & <b> \x00\xff"


class Case(NamedTuple):
    states: list[DecodeState]
    spec: SequenceSpec


class Shown(NamedTuple):
    """A state as it can be seen: ids, step of the fill and -1 where masked, probabilities."""

    ids: list[int]
    filled_at: list[int]
    probability: list[float]


def fabricate(final: Tensor, prompt: Tensor, mask_id: int, *, remask: bool) -> list[DecodeState]:
    """States that end in ``final`` [B, L]. With ``remask``, ids go, come back as others, are
    replaced at once, or become more or less probable."""
    generator = torch.Generator().manual_seed(0)

    def noise() -> Tensor:
        return torch.rand(final.shape, generator=generator)

    order = noise()
    ids = final.where(prompt, mask_id)
    log_prob = torch.zeros(final.shape).where(prompt, torch.nan)
    states = [DecodeState(0, STEPS, ids, ids == mask_id, log_prob)]
    for step in range(1, STEPS + 1):
        drawn, fresh = final, ids == mask_id
        if remask:
            order = noise()
            log_prob = (log_prob + 0.2 * (noise() - 0.5)).clamp(max=0)
            if step < STEPS:
                drawn = torch.randint(mask_id, final.shape, generator=generator)
                fresh = fresh | (noise() < 0.2)
            else:
                fresh = torch.ones_like(fresh)
        masked = ~prompt & (order < 1 - step / STEPS)
        ids = drawn.where(fresh & ~prompt, ids).where(~masked, mask_id)
        log_prob = noise().log().where(fresh, log_prob).where(~prompt, 0).where(~masked, torch.nan)
        states.append(DecodeState(step, STEPS, ids, masked, log_prob))
    return states


def make_cases() -> dict[str, Case]:
    generator = torch.Generator().manual_seed(1)

    def no_prompt(ids: Tensor) -> Tensor:
        return torch.zeros_like(ids, dtype=torch.bool)

    digits = torch.randint(16, (5, 24), generator=generator)
    text = torch.tensor(list(TEXT)).repeat(2, 1)
    tokens = torch.randint(50257, (3, 10), generator=generator)
    given = no_prompt(text)
    given[0, :12], given[1, 20:30] = True, True
    cases = {
        "image": Case(
            fabricate(digits, no_prompt(digits), 16, remask=False),
            SequenceSpec(17, 24, "image", (4, 6)),
        ),
        "image, remasked": Case(
            fabricate(digits, digits < 3, 16, remask=True), SequenceSpec(17, 24, "image", (4, 6))
        ),
        "bytes": Case(
            fabricate(text, given, 256, remask=False),
            SequenceSpec(257, len(TEXT), "bytes", None),
        ),
        "text": Case(
            fabricate(text, given, 256, remask=False),
            SequenceSpec(257, len(TEXT), "text", None, tokenizer=ByteTokenizer().to_json()),
        ),
        "ids, remasked": Case(
            fabricate(tokens, no_prompt(tokens), 50257, remask=True),
            SequenceSpec(50258, 10, "ids", None),
        ),
        "nothing to fill": Case(
            [DecodeState(0, 0, tokens, no_prompt(tokens), torch.zeros(tokens.shape))],
            SequenceSpec(50258, 10, "ids", None),
        ),
    }
    for name in ("bytes", "text", "ids, remasked"):
        last = cases[name].states[-1].log_prob
        last[1, :3] = torch.tensor([-torch.inf, -2000.0, -1e-6])
    return cases


CASES = make_cases()
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def expected(case: Case, step: int) -> Shown:
    mask_id = case.spec.mask_id
    before = torch.full_like(case.states[0].ids, mask_id)
    filled_at = torch.full_like(before, -1)
    for number, state in enumerate(case.states[: step + 1]):
        filled_at[state.ids != before] = number
        filled_at[state.masked] = -1
        before = state.ids
    state = case.states[step]
    probability = state.log_prob.exp().where(~state.masked, -1)
    return Shown(*(tensor.flatten().tolist() for tensor in (state.ids, filled_at, probability)))


def agree(shown: Shown, case: Case, step: int) -> None:
    right = expected(case, step)
    assert shown.ids == right.ids
    assert shown.filled_at == right.filled_at
    assert shown.probability == pytest.approx(right.probability, rel=0.006, abs=1e-9)


def data_of(html: str) -> str:
    parts = re.findall(r'<script id="data" type="application/json">(.*?)</script>', html, re.DOTALL)
    assert len(parts) == 1
    return parts[0]


def rows(numbers: list[int], size: int) -> list[tuple[int, ...]]:
    """Rows of a flat list, with places in place of distances."""
    place, result = 0, []
    for first in range(0, len(numbers), size):
        place += numbers[first]
        result.append((place, *numbers[first + 1 : first + size]))
    return result


@every_case
def test_the_data_holds_every_state(case: Case) -> None:
    text = data_of(page(case.states, case.spec, title=TITLE))
    assert "<" not in text and text.isascii()
    data = json.loads(text)
    assert len(data["changes"]) == len(case.states)
    size = data["num_sequences"] * data["seq_len"]
    ids, costs, filled_at = [data["mask_id"]] * size, [0] * size, [-1] * size
    for step, change in enumerate(data["changes"]):
        for place, token, cost in rows(change["filled"], 3):
            ids[place], costs[place], filled_at[place] = token, cost, step
        for (place,) in rows(change["masked"], 1):
            ids[place], costs[place], filled_at[place] = data["mask_id"], 0, -1
        for place, rise in rows(change["revised"], 2):
            assert filled_at[place] >= 0
            costs[place] += rise
        probability = (torch.tensor(costs) / -100).exp().where(torch.tensor(filled_at) >= 0, -1)
        agree(Shown(ids, filled_at, probability.tolist()), case, step)


def test_remasking_is_among_the_cases() -> None:
    for name in ("image, remasked", "ids, remasked"):
        changes = json.loads(data_of(page(*CASES[name], title="")))["changes"]
        assert sum(bool(change["masked"]) for change in changes) > 2
        assert sum(bool(change["revised"]) for change in changes) > 2
    pairs = zip(CASES["ids, remasked"].states, CASES["ids, remasked"].states[1:], strict=False)
    assert any((~a.masked & ~b.masked & (a.ids != b.ids)).any() for a, b in pairs)


@every_case
def test_the_page_needs_nothing_else(case: Case) -> None:
    html = page(case.states, case.spec, title="title")
    assert re.findall(r"\w*:?//(?! )|\b(?:src|href)\s*=|url\(|@import|fetch\(|XMLHttp", html) == []
    assert "default-src 'none'" in html
    assert "{{" not in html


def test_the_title_is_text() -> None:
    html = page(*CASES["image"], title=TITLE)
    escaped = "A &lt;b&gt;title&lt;/b&gt; &amp; &lt;/script&gt; &quot;{{data}}&quot;"
    assert html.count(escaped) == 2
    assert "5 sequences of 24 positions, filled in 7 steps" in html


@pytest.mark.parametrize(("remask", "most"), [(False, 300_000), (True, 600_000)])
def test_a_page_is_small(remask: bool, most: int) -> None:
    ids = torch.randint(255, (16, 1024), generator=torch.Generator().manual_seed(0))
    states = fabricate(ids, torch.zeros_like(ids, dtype=torch.bool), 255, remask=remask)
    assert len(page(states, SequenceSpec(256, 1024, "image", (32, 32)), title="")) < most


def test_wrong_arguments() -> None:
    states, spec = CASES["image"]
    with pytest.raises(ValueError, match="states is empty"):
        page([], spec, title="")
    with pytest.raises(ValueError, match=r"24 positions.*\(4, 5\)"):
        page(states, spec._replace(image_shape=(4, 5)), title="")


def test_colours_are_those_of_the_pictures() -> None:
    template = resources.files("nar_kernels.show").joinpath("player.html").read_text("utf-8")
    for colour in ("_PAPER", "_INK", "_TABLE", "_TRAIN", "_HELD_OUT", "_MASKED"):
        assert getattr(pictures, colour) in template, colour


class Document(HTMLParser):
    """What a browser made of the page: its positions, and elements by id."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.attributes: dict[str, dict[str, str | None]] = {}
        self.text: dict[str, str] = {}
        self.cells: list[dict[str, Any]] = []
        self.breaks: list[int] = []
        self._open = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        name = attributes.get("id") or (tag if tag in ("html", "body") else "")
        if name:
            self.attributes[name] = attributes
        if "data-place" in attributes:
            assert int(attributes["data-place"] or "") == len(self.cells)
            self.cells.append({**attributes, "text": ""})
        if tag == "br":
            self.breaks.append(len(self.cells))
        self._open = "cell" if "data-place" in attributes else name

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open == "cell":
            self.cells[-1]["text"] += data
        elif self._open:
            self.text[self._open] = self.text.get(self._open, "") + data

    def shown(self) -> Shown:
        return Shown(
            [int(cell["data-id"]) for cell in self.cells],
            [int(cell.get("data-step", -1)) for cell in self.cells],
            [float(cell.get("data-p", -1)) for cell in self.cells],
        )


Browse = Callable[..., str]


@pytest.fixture
def browse(tmp_path: Path) -> Browse:
    """Opens a page at a fragment in a headless browser; returns what it prints."""
    found = [path for path in map(shutil.which, BROWSERS) if path]
    if not found:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is on PATH")

    def run(html: str, fragment: str, *options: str) -> str:
        file = tmp_path / "page.html"
        file.write_text(html, "utf-8")
        profile = tmp_path / "profile"
        shutil.rmtree(profile, ignore_errors=True)
        address = file.as_uri() + fragment
        command = [found[0], *OPTIONS, f"--user-data-dir={profile}", *options, address]
        result = subprocess.run(command, capture_output=True, timeout=120)
        assert result.returncode == 0, result.stderr.decode(errors="replace")
        return result.stdout.decode()

    return run


def document(browse: Browse, html: str, fragment: str = "") -> Document:
    result = Document(browse(html, fragment, "--virtual-time-budget=10000", "--dump-dom"))
    assert result.attributes["html"].get("data-error") is None
    return result


def with_script(html: str, script: str) -> str:
    """With a script that runs after those of the page and leaves its ``result`` as JSON."""
    head, end, tail = html.rpartition("</body>")
    wrapped = f"(async () => {{ let result; {script}; show(result); }})()"
    show = (
        "const show = (result) => { const box = document.createElement('pre'); box.id = 'result';"
        "box.textContent = JSON.stringify(result); document.body.append(box); };"
    )
    return f"{head}<script>{show}{wrapped}</script>{end}{tail}"


def label(case: Case, step: int) -> str:
    percent = 100 * case.states[step].masked.float().mean().item()
    return f"step {step} of {len(case.states) - 1}, {int(percent + 0.5)} % masked"


def text_of(case: Case, token: int) -> str:
    """What stands in a position that is filled."""
    if case.spec.render == "bytes":
        names = {ord("\n"): "↵", ord("\t"): "⇥"}
        return names.get(token) or (chr(token) if 32 <= token < 127 else "·")
    if case.spec.render == "text":
        names = {"\n": "↵", "\t": "⇥", "\0": "·"}
        piece = bytes([token]).decode(errors="replace")
        return names.get(piece, piece)
    return str(token) if case.spec.render == "ids" else ""


def check_looks(looks: list[tuple[str, str]], case: Case, step: int) -> None:
    """Class and text of each position."""
    right = expected(case, step)
    for look, token, at in zip(looks, right.ids, right.filled_at, strict=True):
        if at < 0:
            assert look == ("masked", "" if case.spec.render == "image" else "░")
        else:
            kind = "given" if at == 0 else "new" if at == step else ""
            assert look == (kind, text_of(case, token))


@pytest.mark.parametrize(
    ("name", "step"),
    [("image", 4), ("image, remasked", 99), ("bytes", 4), ("text", 3), ("ids, remasked", 0)],
)
def test_a_browser_shows_the_step_of_the_fragment(browse: Browse, name: str, step: int) -> None:
    case = CASES[name]
    shown = document(browse, page(*case, title=TITLE), f"#step={step}")
    step = min(step, STEPS)
    agree(shown.shown(), case, step)
    check_looks([(cell["class"], cell["text"]) for cell in shown.cells], case, step)
    assert shown.text["label"] == label(case, step)
    assert shown.attributes["slider"]["max"] == str(STEPS)
    assert ("data-given" in shown.attributes["body"]) == (
        name in ("image, remasked", "bytes", "text")
    )
    # Lines end where they will in the end, so that they do not move while they fill.
    ends = [place + 1 for place, byte in enumerate(TEXT * 2) if byte == ord("\n")]
    assert shown.breaks == (ends if name in ("bytes", "text") else [])


@every_case
def test_all_steps_in_any_order(browse: Browse, case: Case) -> None:
    last = len(case.states) - 1
    order = [*range(last + 1), *range(last, -1, -1), last, 0, last // 2, last // 3]
    script = f"""
        const look = (cell) => [cell.dataset.id, cell.dataset.step ?? -1, cell.dataset.p ?? -1,
            cell.className, cell.textContent];
        result = {order}.map((step) => {{
            player.go(step);
            return [player.step, document.getElementById("label").textContent,
                [...document.querySelectorAll("[data-place]")].map(look)];
        }})"""
    html = with_script(page(*case, title=TITLE), script)
    seen = json.loads(document(browse, html).text["result"])
    for step, (number, words, cells) in zip(order, seen, strict=True):
        assert (number, words) == (step, label(case, step))
        ids, filled_at, probability, kinds, texts = zip(*cells, strict=True)
        shown = Shown([*map(int, ids)], [*map(int, filled_at)], [*map(float, probability)])
        agree(shown, case, step)
        check_looks([*zip(kinds, texts, strict=True)], case, step)


BLOCKS = Blocks(length=4, first=[0, 3], cached=True)


def numbers_of_blocks(blocks: Blocks, length: int) -> Tensor:
    """Of each position ``[B, L]``; the first block of a sequence may be a part of one."""
    place = torch.arange(length)
    return torch.stack(
        [(place + -first % blocks.length) // blocks.length for first in blocks.first]
    )


def block_by_block() -> Case:
    """States of two sequences, the second with a prompt: one block of each in a step."""
    final = torch.randint(255, (2, 12), generator=torch.Generator().manual_seed(2))
    block, prompt = numbers_of_blocks(BLOCKS, 12), torch.zeros(2, 12, dtype=torch.bool)
    prompt[1, :3] = True
    states = []
    for step in range(4):
        first = torch.tensor([[0], [1]])  # the prompt is a block
        masked = ~prompt & (block >= step + first)
        log_prob = torch.zeros(2, 12).where(~masked, torch.nan)
        states.append(DecodeState(step, 3, final.where(~masked, 255), masked, log_prob))
    return Case(states, SequenceSpec(256, 12, "ids", None))


def test_what_the_page_says_of_blocks() -> None:
    case = block_by_block()
    html = page(*case, title="", blocks=BLOCKS)
    assert "in 3 steps, in blocks of 4; keys and values of finished blocks are kept" in html
    assert "in blocks of 4</p>" in page(*case, title="", blocks=BLOCKS._replace(cached=False))
    assert json.loads(data_of(html))["blocks"] == {"length": 4, "first": [0, 3], "cached": True}
    assert json.loads(data_of(page(*case, title="")))["blocks"] is None
    assert "in blocks" not in page(*case, title="")


@pytest.mark.parametrize("cached", [True, False])
def test_a_browser_shows_which_block_is_filled(browse: Browse, cached: bool) -> None:
    case = block_by_block()
    html = page(*case, title="", blocks=BLOCKS._replace(cached=cached))
    order = [0, 1, 2, 3, 1]  # back, too
    script = f"""
        result = {order}.map((step) => {{
            player.go(step);
            return [...document.querySelectorAll("[data-place]")]
                .map((cell) => [cell.dataset.block ?? "", "edge" in cell.dataset]);
        }})"""
    shown = document(browse, with_script(html, script))
    assert ("data-cached" in shown.attributes["body"]) == cached
    number = numbers_of_blocks(BLOCKS, 12)
    edges = (number.diff(dim=1, prepend=number[:, :1]) > 0).flatten().tolist()
    for step, cells in zip(order, json.loads(shown.text["result"]), strict=True):
        now = torch.tensor([[step - 1], [step]])
        kept = "kept" if cached else ""
        current = "" if step == 3 else "now"  # nothing is left to fill
        right = [
            "" if step == 0 or of > latest else current if of == latest else kept
            for of, latest in zip(
                number.flatten().tolist(), now.expand_as(number).flatten().tolist(), strict=True
            )
        ]
        assert cells == [[name, edge] for name, edge in zip(right, edges, strict=True)]


def test_controls(browse: Browse) -> None:
    case = CASES["image, remasked"]
    script = """
        const wait = (ms) => new Promise((done) => setTimeout(done, ms));
        const press = (key, target = document.body) =>
            target.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
        const [button, slider] = ["play", "slider"].map((id) => document.getElementById(id));
        const [value, confidence] = document.querySelectorAll("#views button");
        const state = () => [player.step, button.getAttribute("aria-label"), Number(slider.value)];
        result = { numSteps: player.numSteps, views: [document.body.dataset.view] };
        result.keys = ["Home", "ArrowLeft", "ArrowRight", "ArrowRight", "End", "ArrowRight",
            "ArrowLeft"].map((key) => { press(key); return player.step; });
        slider.value = 3;
        slider.dispatchEvent(new Event("input"));
        result.slid = state();
        player.go(5);
        press(" ");
        result.started = state();
        await wait(3000);
        result.stopped = state();
        button.click();
        await wait(500);
        result.again = state();
        press(" ");
        result.paused = state();
        await wait(1000);
        result.still = state();
        player.play(); player.play(); player.pause();
        await wait(1000);
        result.pausedOnce = state();
        confidence.click();
        result.views.push(document.body.dataset.view, confidence.getAttribute("aria-pressed"));
        value.click();
        result.views.push(document.body.dataset.view, confidence.getAttribute("aria-pressed"));
        const cell = document.querySelector("[data-place='31']");
        const tips = (step) => {
            player.go(step);
            cell.dispatchEvent(new PointerEvent("pointerover", { bubbles: true }));
            return document.getElementById("tip").textContent;
        };
        result.tips = [tips(0), tips(player.numSteps)];
        location.hash = "#step=2&view=confidence";
        await wait(100);
        result.moved = [player.step, document.body.dataset.view]"""
    shown = document(browse, with_script(page(*case, title="t"), script), "#step=1")
    result = json.loads(shown.text["result"])
    place = "sequence 2 · row 2, column 2 · "
    token, at, p = (column[31] for column in expected(case, STEPS))
    first, last = result.pop("tips")
    assert first == f"{place}masked"
    assert last.startswith(f"{place}id {token} · step {at} · probability ")
    assert float(last.split()[-1]) == pytest.approx(p, rel=0.06)
    again = result.pop("again")
    assert 1 <= again[0] <= 4 and again[1:] == ["Pause", again[0]]
    assert result == {
        "numSteps": STEPS,
        "views": ["value", "confidence", "true", "value", "false"],
        "keys": [0, 0, 1, 2, STEPS, STEPS, STEPS - 1],
        "slid": [3, "Play", 3],
        "started": [5, "Pause", 5],
        "stopped": [STEPS, "Play", STEPS],
        "paused": [again[0], "Play", again[0]],
        "still": [again[0], "Play", again[0]],
        "pausedOnce": [again[0], "Play", again[0]],
        "moved": [2, "confidence"],
    }


def test_an_error_is_left_in_the_document(browse: Browse) -> None:
    """Else the other tests would not see one."""
    html = with_script(page(*CASES["image"], title="t"), "null.nothing")
    shown = Document(browse(html, "", "--virtual-time-budget=1000", "--dump-dom"))
    assert "nothing" in (shown.attributes["html"]["data-error"] or "")


@pytest.mark.parametrize(
    ("scheme", "name", "paper"), [("light", "image", "#e4e8ed"), ("dark", "bytes", "#12171d")]
)
def test_a_screenshot(browse: Browse, tmp_path: Path, scheme: str, name: str, paper: str) -> None:
    image = pytest.importorskip("matplotlib.image")
    file = tmp_path / "page.png"
    browse(
        page(*CASES[name], title="A title"),
        "#step=3",
        f"--screenshot={file}",
        "--window-size=1100,800",
        "--virtual-time-budget=1000",
        f"--blink-settings=preferredColorScheme={int(scheme == 'light')}",
    )
    pixels = (torch.tensor(image.imread(file)) * 255).round().long()[..., :3]
    assert pixels.shape == (800, 1100, 3)
    colours, counts = pixels.flatten(0, 1).unique(dim=0, return_counts=True)
    assert len(colours) > 20
    assert colours[counts.argmax()].tolist() == list(bytes.fromhex(paper[1:]))
    if name == "image":
        masked = torch.tensor([*bytes.fromhex(pictures._MASKED[1:])])
        assert (pixels == masked).all(-1).sum() > 1000
