"""human_eval.py: its page in a real browser, and what the page does not tell.

And its tally against scipy, and wrong input.
"""

import base64
import io
import json
import re
import shutil
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, run_script
from PIL import Image
from scipy.stats import binomtest
from test_evaluate import make_lora

import human_eval
from evaluation.page import ANSWERS, QUESTIONNAIRES
from evaluation.pairs import shuffled_pairs
from evaluation.tally import wilson_interval

PROMPTS = [
    "A cat and a dog",
    "a </script><!-- dog --> & a \u201ccat\u201d",
    "A green colored rabbit",
]
QUESTIONS = ("fidelity", "relevance", "overall")


@pytest.fixture(scope="module")
def study(tiny_sd, tmp_path_factory):
    """A page as a user makes it: the base against a run, six pairs."""
    work = tmp_path_factory.mktemp("human")
    (work / "prompts.txt").write_text("\n".join(PROMPTS))
    make_lora(tiny_sd, work / "runs/my-secret-run", 3, 0.5)
    words = ["build", "--model", tiny_sd, "--lora", work / "runs/my-secret-run"]
    words += ["--prompts-file", work / "prompts.txt"]
    words += ["--images-per-prompt", 2, "--num-inference-steps", 3]
    words += ["--guidance-scale", 2, "--shuffle-seed", 5]
    result = run_script("human_eval.py", *words, "--output-dir", work / "study")
    assert result.returncode == 0, result.stderr
    return work / "study"


@pytest.fixture(scope="module")
def sets(study, tiny_sd, tmp_path_factory):
    """Pages of sets by the name of their questions, six pairs each, of the same models.

    The second one shows pictures that the first one has drawn.
    """
    work = tmp_path_factory.mktemp("sets")
    words = ["build", "--model", tiny_sd, "--lora", study.parent / "runs/my-secret-run"]
    words += ["--prompts-file", study.parent / "prompts.txt", "--num-inference-steps", 3]
    words += ["--guidance-scale", 2, "--shuffle-seed", 5]
    more = {
        "skin_tone": [*words, "--images-per-prompt", 12],
        "sets": ["build", "--evaluation", work / "skin_tone/pictures", "--images-per-prompt", 8],
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, words in more.items():
            run_here(patch, *words, "--questions", name, "--output-dir", work / name)
    return {name: work / name for name in more}


def run_here(monkeypatch, *words) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["human_eval.py", *map(str, words)])
    human_eval.main()


def read_page(study) -> dict:
    """What the page holds, as a rater who looks at its source sees it."""
    source = (study / "human_eval.html").read_text()
    held = re.findall(r'<script type="application/json" (.*?)>(.*?)</script>', source, re.DOTALL)
    assert [attribute for attribute, _ in held] == ['id="study"', *['class="pair"'] * 6]
    page, *sides = [json.loads(content) for _, content in held]
    assert all(list(pair) == ["left", "right"] for pair in sides)
    page["pairs"] = [
        {"prompt": prompt} | pair for prompt, pair in zip(page.pop("prompts"), sides, strict=True)
    ]
    return page


def to_array(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition("base64,")[2]))))


def test_key_says_whose_picture_is_where(study):
    key, page = json.loads((study / "key.json").read_text()), read_page(study)
    assert key["models"] == ["base", "my-secret-run"] and key["study"] == page["study"]
    drawn = {}
    for name in key["models"]:
        files = sorted((study / f"pictures/samples/{name}").glob("*.npz"))
        shards = [np.load(file)["images"] for file in files]
        drawn[name] = np.concatenate(shards).reshape(3, 2, 64, 64, 3)
    seen = set()
    for pair, shown in zip(key["pairs"], page["pairs"], strict=True):
        j = PROMPTS.index(pair["prompt"])
        assert shown["prompt"] == pair["prompt"]
        assert {pair["left"], pair["right"]} == set(key["models"])
        [left], [right] = map(to_array, shown["left"]), map(to_array, shown["right"])
        assert np.array_equal(left, drawn[pair["left"]][j, pair["image"]])
        assert np.array_equal(right, drawn[pair["right"]][j, pair["image"]])
        assert not np.array_equal(left, right), "a case in which they differ"
        seen.add((j, pair["image"]))
    assert len(seen) == 6
    assert [pair["left"] for pair in key["pairs"]].count("base") == 3


@pytest.mark.parametrize(("name", "size"), [("sets", 4), ("skin_tone", 6)])
def test_a_set_has_consecutive_pictures_of_one_prompt(name, size, sets):
    """Those of the same noise are in the same place on both sides, and none is shown twice."""
    study = sets[name]
    key, page = json.loads((study / "key.json").read_text()), read_page(study)
    assert (key["questions"], key["set_size"]) == (name, size) and len(key["pairs"]) == 6
    assert page["questions"] == QUESTIONNAIRES[name].questions
    drawn, seen = {}, set()
    for model in key["models"]:
        folder = sets["skin_tone"] / f"pictures/samples/{model}"
        shards = [np.load(file)["images"] for file in sorted(folder.glob("*.npz"))]
        drawn[model] = np.concatenate(shards).reshape(3, 12, 64, 64, 3)
    for pair, shown in zip(key["pairs"], page["pairs"], strict=True):
        j, first = PROMPTS.index(pair["prompt"]), pair["image"]
        assert {pair["left"], pair["right"]} == set(key["models"])
        for side in ("left", "right"):
            found = np.stack([*map(to_array, shown[side])])
            assert np.array_equal(found, drawn[pair[side]][j, first : first + size])
        seen.add((j, first))
    assert seen == {(j, first) for j in range(3) for first in (0, size)}
    assert [pair["left"] for pair in key["pairs"]].count("base") == 3


@pytest.mark.parametrize(
    ("words", "sizes"),
    [
        ({}, (1, 4)),
        ({"questions": "sets"}, (4, 40)),
        ({"questions": "skin_tone"}, (6, 6)),
        ({"questions": "sets", "set_size": 3, "images_per_prompt": 9}, (3, 9)),
    ],
)
def test_sizes_are_the_papers_unless_given(words, sizes):
    args = human_eval.with_sizes(human_eval.BuildArgs(**words))
    assert (args.set_size, args.images_per_prompt) == sizes


def test_nothing_in_the_page_tells_whose_picture_is_where(study, sets, tmp_path, monkeypatch):
    """Not its words, its structure, nor the pictures' files.

    And with the models exchanged the page is the same but for the shuffle.
    """
    pages = {study: 1, sets["sets"]: 4, sets["skin_tone"]: 6}
    for folder, size in pages.items():
        nothing_tells(folder, size)
    # Sides are balanced over many pairs, in no order that shows, and differ from seed to seed.
    sides = []
    for seed in range(200):
        args = human_eval.BuildArgs(set_size=1, images_per_prompt=2, shuffle_seed=seed)
        pairs, _ = shuffled_pairs(args, study / "pictures", ["base", "my-secret-run"])
        sides.append([pair["left"] == "base" for pair in pairs["pairs"]])
    assert (np.sum(sides, axis=1) == 3).all()
    assert all(binomtest(int(k), 200).pvalue > 1e-4 for k in np.sum(sides, axis=0))
    # Without --shuffle-seed two pages of the same pictures are not shuffled alike.
    keys = []
    for name in ("one", "two"):
        words = ["build", "--evaluation", study / "pictures"]
        words += ["--images-per-prompt", 2, "--output-dir", tmp_path / name]
        run_here(monkeypatch, *words)
        keys.append(json.loads((tmp_path / name / "key.json").read_text()))
    assert keys[0]["pairs"] != keys[1]["pairs"] and keys[0]["study"] != keys[1]["study"]


def nothing_tells(study, size: int) -> None:
    """Neither the page of sets of `size` pictures, nor the pictures' files, name a model."""
    source, page = (study / "human_eval.html").read_text(), read_page(study)
    words = re.sub(r"base64,[A-Za-z0-9+/=]+", "", source).lower()
    telling = ["my-secret-run", "secret", "base", "fine", "tuned", "lora", "model"]
    for word in [*telling, "key.json", "seed", str(ROOT)]:
        assert word not in words, word
    assert set(page) == {"study", "instructions", "questions", "answers", "pairs"}
    for pair in page["pairs"]:
        assert len(pair["left"]) == len(pair["right"]) == size
        for uri in pair["left"] + pair["right"]:
            file = base64.b64decode(uri.partition("base64,")[2])
            chunks, at = [], 8
            while at < len(file):
                length = int.from_bytes(file[at : at + 4], "big")
                chunks.append(file[at + 4 : at + 8])
                at += 12 + length
            assert set(chunks) == {b"IHDR", b"IDAT", b"IEND"}
            assert to_array(uri).shape == (64, 64, 3)


@pytest.fixture
def browser(tmp_path):
    """Headless Chromium, that saves what it downloads in tmp_path/downloads."""
    reason = "needs selenium: pip install -r requirements-test.txt"
    webdriver = pytest.importorskip("selenium.webdriver", reason=reason)
    names = ("chromium", "chromium-browser", "google-chrome")
    binary = next(filter(None, map(shutil.which, names)), None)
    driver = shutil.which("chromedriver")
    if not binary or not driver:
        pytest.skip("needs chromium and its driver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    flags = "headless no-sandbox disable-gpu disable-quic no-first-run disable-sync "
    flags += "disable-background-networking disable-component-update disable-dev-shm-usage"
    for flag in flags.split():
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path / 'profile'}")
    (tmp_path / "downloads").mkdir()
    prefs = {"download.default_directory": str(tmp_path / "downloads")}
    options.add_experimental_option("prefs", prefs)
    # With the driver's path given, selenium looks for none and downloads none.
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield browser
    browser.quit()


def widths(browser, side: str) -> list[int]:
    """Of the pictures of a side, in pixels of their files; 0 for one that has not been loaded."""
    pictures = f"Array.from(document.querySelectorAll('#{side} img'))"
    return browser.execute_script(f"return {pictures}.map(picture => picture.naturalWidth)")


def wait_for(file) -> None:
    clock = time.monotonic()
    while not file.exists() and time.monotonic() - clock < 30:
        time.sleep(0.1)


def test_page_in_a_browser(browser, study, tmp_path, monkeypatch, capsys):
    """Half of the pairs answered by mouse, half by keyboard, with a reload in between.

    Then saved, and tallied.
    """
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    key = json.loads((study / "key.json").read_text())
    # By question: the run wins 4 and loses 2; 2, 3 and a similar one; 1, 1, two similar ones and
    # two not loaded.
    run, base = "my-secret-run", "base"
    planned = {
        "fidelity": [run, run, base, run, base, run],
        "relevance": [base, run, "similar", base, run, base],
        "overall": ["similar", "not_loaded", run, "similar", "not_loaded", base],
    }

    def to_click(question: str, n: int) -> str:
        wanted = planned[question][n]
        return next((side for side in ("left", "right") if key["pairs"][n][side] == wanted), wanted)

    def element(name: str):
        return browser.find_element(By.ID, name)

    def pressed() -> dict:
        buttons = browser.find_elements(By.CSS_SELECTOR, "#questions button[aria-pressed=true]")
        questions = [button.find_element(By.XPATH, "../..") for button in buttons]
        return {
            question.get_attribute("id"): button.get_attribute("value")
            for question, button in zip(questions, buttons)
        }

    def type_keys(*keys: str):
        browser.switch_to.active_element.send_keys(*keys)

    url = (study / "human_eval.html").as_uri()
    browser.get(url)
    assert element("prompt").text == key["pairs"][0]["prompt"]
    assert widths(browser, "left") == widths(browser, "right") == [64]
    assert element("count").text == "pair 1 of 6, 0 answered"
    element("rater").send_keys("Ann 1")  # digits in a name are no answers
    assert pressed() == {} and not element("next").is_enabled()

    for n in range(3):  # by mouse
        for question in QUESTIONS:
            assert not element("next").is_enabled()
            button = f"#{question} button[value={to_click(question, n)}]"
            browser.find_element(By.CSS_SELECTOR, button).click()
        assert pressed() == {question: to_click(question, n) for question in QUESTIONS}
        element("next").click()
    assert element("count").text == "pair 4 of 6, 3 answered"
    values = list(ANSWERS)
    type_keys(str(values.index(to_click("fidelity", 3)) + 1))  # half a pair

    browser.get("about:blank")
    browser.get(url)
    assert element("count").text == "pair 4 of 6, 3 answered"
    assert element("rater").get_attribute("value") == "Ann 1"
    assert pressed() == {"fidelity": to_click("fidelity", 3)}
    assert element("prompt").text == key["pairs"][3]["prompt"]
    type_keys(Keys.ENTER)  # not before all three are answered
    assert element("count").text == "pair 4 of 6, 3 answered"
    for question in QUESTIONS[1:]:
        type_keys(str(values.index(to_click(question, 3)) + 1))
    type_keys(Keys.ENTER)
    # A wrong answer, put right after going back and forth, and up.
    type_keys("4", "4", "4", Keys.ARROW_LEFT, Keys.ARROW_RIGHT, *[Keys.ARROW_UP] * 3)
    for n in (4, 5):
        for question in QUESTIONS:
            type_keys(str(values.index(to_click(question, n)) + 1))
            if n == 4:  # all are answered, so the frame does not go on by itself
                type_keys(Keys.ARROW_DOWN)
        assert pressed() == {question: to_click(question, n) for question in QUESTIONS}
        type_keys(Keys.ENTER)
    assert element("count").text == "pair 6 of 6, 6 answered"
    assert "That was all" in element("message").text
    assert browser.execute_script("return document.getElementById('progress').value") == 6
    type_keys("s")
    file = tmp_path / "downloads/answers-Ann-1.json"
    wait_for(file)
    answers = json.loads(file.read_text())["answers"]
    assert answers == {
        str(n): {question: to_click(question, n) for question in QUESTIONS} for n in range(6)
    }
    assert not [line for line in browser.get_log("browser") if line["level"] == "SEVERE"]

    words = ["tally", file, "--key", study / "key.json", "--output", tmp_path / "tally.json"]
    run_here(monkeypatch, *words)
    found = json.loads((tmp_path / "tally.json").read_text())["answers"]
    assert {question: found[question]["preferred"] for question in QUESTIONS} == {
        "fidelity": {base: 2, run: 4},
        "relevance": {base: 3, run: 2},
        "overall": {base: 1, run: 1},
    }
    assert [found[question]["preference"] for question in QUESTIONS] == [4 / 6, 2 / 5, 1 / 2]
    assert [found[question]["similar"] for question in QUESTIONS] == [0, 1, 2]
    assert [found[question]["not_loaded"] for question in QUESTIONS] == [0, 0, 2]
    assert "| fidelity | 2 | 4 | 0 | 0 | 0 | 67% (30% to 90%) |" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "columns"), [("sets", 2), ("skin_tone", 3)])
def test_sets_in_a_browser(name, columns, browser, sets, tmp_path, monkeypatch, capsys):
    """Every picture of both sides is shown, in two rows; the answers are saved and tallied."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    study, asked = sets[name], QUESTIONNAIRES[name]
    key, page = json.loads((study / "key.json").read_text()), read_page(study)
    run, base = "my-secret-run", "base"
    planned = [run, run, "similar", run, base, "not_loaded"]
    browser.get((study / "human_eval.html").as_uri())
    told = browser.find_elements(By.CSS_SELECTOR, "#instructions p")
    assert [paragraph.text for paragraph in told] == [*asked.instructions]
    legends = browser.find_elements(By.CSS_SELECTOR, "#questions legend")
    assert [legend.text for legend in legends] == [*asked.questions.values()]
    # A rater who folds the instructions away goes on with the keyboard.
    browser.find_element(By.CSS_SELECTOR, "#instructions summary").click()
    assert not told[0].is_displayed()
    for n, (pair, wanted) in enumerate(zip(key["pairs"], planned, strict=True)):
        assert browser.find_element(By.ID, "prompt").text == pair["prompt"]
        for side in ("left", "right"):
            pictures = browser.find_elements(By.CSS_SELECTOR, f"#{side} img")
            sources = [picture.get_attribute("src") for picture in pictures]
            assert sources == page["pairs"][n][side]
            assert widths(browser, side) == [64] * asked.set_size
            places = [picture.location for picture in pictures]
            assert len({place["x"] for place in places}) == columns
            assert len({place["y"] for place in places}) == 2
        value = next((side for side in ("left", "right") if pair[side] == wanted), wanted)
        digit = str([*ANSWERS].index(value) + 1)
        browser.switch_to.active_element.send_keys(*digit * len(asked.questions), Keys.ENTER)
    assert browser.find_element(By.ID, "count").text == "pair 6 of 6, 6 answered"
    assert "That was all" in browser.find_element(By.ID, "message").text
    browser.switch_to.active_element.send_keys("s")
    session = browser.execute_script("return state.session")
    file = tmp_path / f"downloads/answers-{session}.json"
    wait_for(file)
    assert not [line for line in browser.get_log("browser") if line["level"] == "SEVERE"]

    words = ["tally", file, "--key", study / "key.json", "--output", tmp_path / "tally.json"]
    run_here(monkeypatch, *words)
    found = json.loads((tmp_path / "tally.json").read_text())
    assert list(found["answers"]) == [*asked.questions]
    for of_question in found["answers"].values():
        assert of_question["preferred"] == {base: 1, run: 3} and of_question["preference"] == 3 / 4
        assert (of_question["similar"], of_question["not_loaded"]) == (1, 1)
    output = capsys.readouterr().out
    assert f"1 raters, 6 pairs of sets of {asked.set_size} pictures, {base} and {run}" in output


def test_wilson_interval_equals_scipy():
    for n in (1, 2, 7, 40, 1000):
        for k in {0, 1, n // 3, n // 2, n - 1, n}:
            for confidence in (0.8, 0.95):
                expected = binomtest(k, n).proportion_ci(confidence, method="wilson")
                found = wilson_interval(k, n, confidence)
                assert found == pytest.approx((expected.low, expected.high), abs=1e-12), (k, n)
    assert wilson_interval(0, 0) == (0, 1)


def write_answers(key: dict, path, session: str, wanted: dict[int, dict[str, str]]) -> None:
    """A rater's file; `wanted` has a model, "similar" or "not_loaded" by pair and question."""
    sides = [{pair["left"]: "left", pair["right"]: "right"} for pair in key["pairs"]]
    given = {
        str(n): {q: sides[n].get(value, value) for q, value in pair.items()}
        for n, pair in wanted.items()
    }
    saved = {"study": key["study"], "session": session, "rater": "", "answers": given}
    path.write_text(json.dumps(saved))


def test_tally_of_several_raters(study, tmp_path, monkeypatch, capsys):
    """Pooled, and by the majority of each pair."""
    shutil.copy(study / "key.json", tmp_path / "key.json")
    (tmp_path / "answers").mkdir()
    key, run, base = json.loads((study / "key.json").read_text()), "my-secret-run", "base"
    votes = [  # of the raters, pair by pair
        [run, run, base],
        [run, "similar", None],
        [run, base, "similar"],
        ["not_loaded", "not_loaded", "not_loaded"],
        [base, base, run],
        [None, None, None],
    ]
    for rater in range(3):
        wanted = {n: {"overall": of[rater]} for n, of in enumerate(votes) if of[rater]}
        write_answers(key, tmp_path / f"answers/{rater}.json", f"s{rater}", wanted)
    files = sorted((tmp_path / "answers").glob("*.json"))
    # The key is found one folder up.
    run_here(monkeypatch, "tally", *files, "--output", tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())
    pooled, of_pairs = found["answers"]["overall"], found["majority"]["overall"]
    assert pooled["preferred"] == {base: 4, run: 5} and pooled["preference"] == 5 / 9
    assert (pooled["similar"], pooled["not_loaded"], pooled["not_answered"]) == (2, 3, 4)
    assert of_pairs["preferred"] == {base: 1, run: 2}
    assert (of_pairs["similar"], of_pairs["not_loaded"], of_pairs["not_answered"]) == (1, 1, 1)
    interval = binomtest(2, 3).proportion_ci(method="wilson")
    assert of_pairs["interval"] == pytest.approx([interval.low, interval.high])
    assert found["answers"]["fidelity"]["preference"] is None and found["raters"] == 3
    output = capsys.readouterr().out
    assert "3 raters, 6 pairs" in output and "| overall | 1 | 2 | 1 | 1 | 1 | 67%" in output
    # The key that was found is not written over.
    with pytest.raises(SystemExit) as end:
        run_here(monkeypatch, "tally", *files, "--output", tmp_path / "key.json")
    assert end.value.code == 2 and json.loads((tmp_path / "key.json").read_text()) == key


def test_tally_of_sets(sets, tmp_path, monkeypatch, capsys):
    """As that of single pictures, with its own questions, and no others."""
    key, run, base = json.loads((sets["sets"] / "key.json").read_text()), "my-secret-run", "base"
    wanted = {n: {"alignment": run, "quality": base if n < 2 else run} for n in range(6)}
    write_answers(key, tmp_path / "a.json", "a", wanted)
    words = ["tally", tmp_path / "a.json", "--key", sets["sets"] / "key.json"]
    run_here(monkeypatch, *words, "--output", tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())
    assert (found["questions"], found["set_size"], found["pairs"]) == ("sets", 4, 6)
    assert found["answers"]["alignment"]["preferred"] == {base: 0, run: 6}
    assert found["answers"]["quality"]["preference"] == 4 / 6
    interval = binomtest(4, 6).proportion_ci(method="wilson")
    expected = pytest.approx([interval.low, interval.high])
    assert found["answers"]["quality"]["interval"] == expected
    assert f"6 pairs of sets of 4 pictures, {base} and {run}" in capsys.readouterr().out

    write_answers(key, tmp_path / "b.json", "b", {0: {"overall": run}})
    with pytest.raises(SystemExit) as end:
        run_here(monkeypatch, "tally", tmp_path / "b.json", *words[2:])
    stderr = capsys.readouterr().err.strip()
    assert end.value.code == 2 and "b.json" in stderr and "overall" in stderr


def test_a_page_of_before_there_were_sets_is_tallied(study, tmp_path, monkeypatch):
    """Its key says neither what was asked nor of how many pictures."""
    key, run = json.loads((study / "key.json").read_text()), "my-secret-run"
    old = {name: key[name] for name in ("study", "models", "shuffle_seed", "pairs")}
    (tmp_path / "key.json").write_text(json.dumps(old))
    write_answers(old, tmp_path / "a.json", "a", {n: {"fidelity": run} for n in range(6)})
    found = []
    for folder in (tmp_path, study):
        words = ["tally", tmp_path / "a.json", "--key", folder / "key.json"]
        run_here(monkeypatch, *words, "--output", tmp_path / "out.json")
        found.append(json.loads((tmp_path / "out.json").read_text()))
    assert found[0] == found[1] and found[0]["answers"]["fidelity"]["preferred"][run] == 6
    assert list(found[0]["answers"]) == [*QUESTIONS]


def test_two_runs_against_each_other(tiny_sd, study, tmp_path, monkeypatch):
    """Without the base; the noise is that of the base's page, so the run's pictures are those."""
    run = study.parent / "runs/my-secret-run"
    other = make_lora(tiny_sd, tmp_path / "runs/other", 2, 0.3)
    words = ["build", "--model", tiny_sd, "--lora", run]
    words += ["--lora", other, "--num-inference-steps", 3]
    words += ["--guidance-scale", 2, "--images-per-prompt", 2]
    words += ["--prompts-file", study.parent / "prompts.txt"]
    run_here(monkeypatch, *words, "--output-dir", tmp_path / "study")
    key = json.loads((tmp_path / "study/key.json").read_text())
    assert key["models"] == ["my-secret-run", "other"]
    assert not (tmp_path / "study/pictures/samples/base").exists()
    drawn = []
    for folder in (study, tmp_path / "study"):
        file = next((folder / "pictures/samples/my-secret-run").glob("*.npz"))
        drawn.append(np.load(file)["images"].astype(int))
    # Rounding differs from process to process.
    assert np.abs(drawn[0] - drawn[1]).max() <= 1


BUILD_WRONG = {
    "no run": ([], "--lora"),
    "three runs": (["--lora", "RUN", "a", "b"], "--lora"),
    "folder without weights": (["--lora", "docs", "--prompt", "a cat"], "--lora docs"),
    "no prompts": (["--lora", "RUN", "--prompt", ""], "--prompt"),
    "models of nothing": (["--lora", "RUN", "--models", "base", "x"], "--models"),
    "two sources": (["--evaluation", "PICTURES", "--lora", "RUN"], "--lora"),
    "no evaluation": (["--evaluation", "docs"], "--evaluation"),
    "unknown model": (["--evaluation", "PICTURES", "--models", "base", "x"], "--models"),
    "a model and itself": (["--evaluation", "PICTURES", "--models", "base", "base"], "--models"),
    "too many pictures": (
        ["--evaluation", "PICTURES", "--images-per-prompt", 3],
        "--images-per-prompt",
    ),
    "a page that is there": (["--evaluation", "PICTURES", "--output-dir", "STUDY"], "--output-dir"),
    "sets of single pictures": (["--lora", "RUN", "--set-size", 4], "--questions sets"),
    "no whole sets": (
        ["--evaluation", "PICTURES", "--questions", "sets", "--images-per-prompt", 2],
        "multiple of --set-size",
    ),
    "sets of nothing": (["--lora", "RUN", "--questions", "sets", "--set-size", 0], "--set-size"),
    "fewer than the paper's": (
        ["--evaluation", "PICTURES", "--questions", "skin_tone"],
        "--images-per-prompt is 6",
    ),
    "questions of nobody": (["--lora", "RUN", "--questions", "beauty"], "--questions"),
    "unknown word": (["zooo"], "zooo"),
}


@pytest.mark.parametrize("name", BUILD_WRONG)
def test_wrong_input_of_build(name, study, tmp_path, monkeypatch, capsys):
    words, mentioned = BUILD_WRONG[name]
    places = {
        "RUN": study.parent / "runs/my-secret-run",
        "PICTURES": study / "pictures",
        "STUDY": study,
    }
    words = ["build", *(places.get(word, word) for word in words)]
    words += [] if "--output-dir" in words else ["--output-dir", tmp_path / "out"]
    words += [] if "--evaluation" in words else ["--model", "zoo/sd"]
    with pytest.raises(SystemExit) as end:
        run_here(monkeypatch, *words)
    stderr = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert end.value.code == 2 and len(stderr) == 1 and mentioned in stderr[0], stderr
    assert not (tmp_path / "out").exists()


def test_wrong_input_of_tally(study, tmp_path, monkeypatch, capsys):
    key = json.loads((study / "key.json").read_text())
    (tmp_path / "other.json").write_text(json.dumps(key | {"study": "0123"}))
    (tmp_path / "no.json").write_text("[1, 2")
    for name in ("a", "b"):
        write_answers(key, tmp_path / f"{name}.json", "the same", {0: {"overall": "similar"}})
    write_answers(key, tmp_path / "far.json", "far", {1: {"overall": "similar"}})
    (tmp_path / "far.json").write_text((tmp_path / "far.json").read_text().replace('"1"', '"17"'))
    write_answers(key, tmp_path / "odd.json", "odd", {1: {"overall": "better"}})
    good = ["--key", study / "key.json"]
    cases = {
        "no answers": ([], "answers"),
        "no key": ([tmp_path / "a.json"], "--key"),
        "another page's key": (
            [tmp_path / "a.json", "--key", tmp_path / "other.json"],
            "another page",
        ),
        "answers for a key": ([tmp_path / "a.json", "--key", tmp_path / "b.json"], "--key"),
        "a key for answers": ([study / "key.json", *good], "key.json"),
        "no such file": ([tmp_path / "nowhere.json", *good], "nowhere.json"),
        "no JSON": ([tmp_path / "no.json", *good], "no.json"),
        "one rater twice": ([tmp_path / "a.json", tmp_path / "b.json", *good], "b.json"),
        "a pair that is not there": ([tmp_path / "far.json", *good], "17"),
        "an answer that is none": ([tmp_path / "odd.json", *good], "odd.json"),
    }
    for name, (words, mentioned) in cases.items():
        with pytest.raises(SystemExit) as end:
            run_here(monkeypatch, "tally", *words)
        stderr = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
        assert end.value.code == 2 and len(stderr) == 1 and mentioned in stderr[0], (name, stderr)
    with pytest.raises(SystemExit) as end:
        run_here(monkeypatch, "tell")
    assert end.value.code == 2 and "'tell'" in capsys.readouterr().err
