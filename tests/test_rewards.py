"""The rewards on tiny models of the real architectures, against independent computations.

Each model is made on the spot as a user's folder. The computations are transformers' own pipelines
and processors, the package `bert-score`, and numbers worked out by hand.
"""

import base64
import io
import json
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import ROOT, read_metrics, run_here, run_script
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_models import (
    TINY,
    WORDS,
    make_bert,
    make_blip,
    make_clip,
    make_deberta,
    make_detectors,
    make_hps,
    make_llava,
    pictures,
    randomise,
)

from common.rewards import NAMES, PromptError, RewardError, check_spec, load_reward, parse_sum
from common.rewards.llava_bertscore import BERTScore
from common.rewards.object_detection import objects_of
from common.rewards.statistical_parity import statistical_parity
from harness.rewards import load_reward_or_fail

PROMPTS = ["a cat", "a dog and a cup", "the red bottle in the park", "two"]


def pil(images: torch.Tensor) -> list[Image.Image]:
    """Written apart from the project's own conversion."""
    arrays = [np.rint(image.permute(1, 2, 0).numpy() * 255) for image in images]
    return [Image.fromarray(np.uint8(array)) for array in arrays]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return make_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def blip_folder(tmp_path_factory):
    return make_blip(tmp_path_factory.mktemp("blip"))


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory):
    return make_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def llava_folder(tmp_path_factory):
    return make_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def detector_folders(tmp_path_factory):
    return make_detectors(tmp_path_factory.mktemp("detectors"))


def test_aesthetic_is_laions_mlp_on_the_normalised_embedding(clip_folder):
    from transformers import CLIPModel, CLIPProcessor

    images = pictures(3)
    processor = CLIPProcessor.from_pretrained(clip_folder)
    inputs = processor(images=pil(images), text=["a cat"], return_tensors="pt")
    x = CLIPModel.from_pretrained(clip_folder)(**inputs).image_embeds.detach().double()
    assert torch.allclose(x.norm(dim=-1), torch.ones(3).double())
    state = torch.load(clip_folder / "sac+logos+ava1-l14-linearMSE.pth", weights_only=True)
    for i in (0, 2, 4, 6, 7):
        x = x @ state[f"layers.{i}.weight"].double().T + state[f"layers.{i}.bias"].double()
    scores = load_reward(f"aesthetic:{clip_folder}")(images, ["a cat"] * 3)
    assert scores.std() > 1e-3 and torch.allclose(scores.double(), x[:, 0], atol=1e-4)


def test_clip_score_equals_the_pipelines_similarity(clip_folder):
    from transformers import CLIPModel, pipeline

    images = pictures(4)
    scores = load_reward(f"clip_score:{clip_folder}")(images, PROMPTS)
    classify = pipeline("zero-shot-image-classification", model=str(clip_folder), device="cpu")
    scale = CLIPModel.from_pretrained(clip_folder).logit_scale.exp().item()
    for i, picture in enumerate(pil(images)):
        answers = classify(picture, candidate_labels=PROMPTS, hypothesis_template="{}")
        logits = {answer["label"]: np.log(answer["score"]) for answer in answers}
        for k, other in enumerate(PROMPTS):  # a softmax leaves differences of logits
            direct = load_reward(f"clip_score:{clip_folder}")(images[i : i + 1], [other]).item()
            expected = logits[other] - logits[PROMPTS[i]]
            assert scale * (direct - scores[i].item()) == pytest.approx(expected, abs=1e-3), k


def test_clip_score_is_the_cosine_of_clips_two_embeddings(clip_folder):
    from transformers import CLIPModel, CLIPProcessor

    images, model = pictures(4), CLIPModel.from_pretrained(clip_folder)
    scores = load_reward(f"clip_score:{clip_folder}")(images, PROMPTS)
    processor = CLIPProcessor.from_pretrained(clip_folder)
    for picture, prompt, score in zip(pil(images), PROMPTS, scores):
        inputs = processor(images=picture, text=prompt, return_tensors="pt")
        image = model.visual_projection(model.vision_model(inputs.pixel_values).pooler_output)
        text = model.text_projection(model.text_model(inputs.input_ids).pooler_output)
        assert score.item() == pytest.approx(torch.cosine_similarity(image, text).item(), abs=1e-5)
    assert scores.std() > 1e-3


def test_blip_score_is_the_cosine_of_blips_two_embeddings(blip_folder):
    from transformers import BlipForImageTextRetrieval, BlipProcessor

    images, model = pictures(4), BlipForImageTextRetrieval.from_pretrained(blip_folder)
    scores = load_reward(f"blip_score:{blip_folder}")(images, PROMPTS)
    processor = BlipProcessor.from_pretrained(blip_folder)
    for picture, prompt, score in zip(pil(images), PROMPTS, scores):
        inputs = processor(images=picture, text=prompt, return_tensors="pt")
        image = model.vision_proj(model.vision_model(inputs.pixel_values).last_hidden_state[:, 0])
        text = model.text_proj(model.text_encoder(inputs.input_ids).last_hidden_state[:, 0])
        assert score.item() == pytest.approx(torch.cosine_similarity(image, text).item(), abs=1e-5)
    assert scores.std() > 1e-3


SENTENCES = [
    "a cat",
    "a dog next to a cup",
    "two red cat on the moon .",
    "the green bottle beside a cat",
    "cup",
    "dog ?",
]


@pytest.mark.parametrize(
    "make, layer", [(make_bert, 0), (make_bert, 1), (make_bert, 2), (make_deberta, 1)]
)
def test_bertscore_recall_equals_the_package(tmp_path, make, layer):
    from bert_score import BERTScorer

    folder = make(tmp_path)
    rng = np.random.default_rng(layer)
    words = [w for w in WORDS if w != "<image>"]
    candidates = [" ".join(rng.choice(words, rng.integers(1, 12))) for _ in range(20)]
    references = [" ".join(rng.choice(words, rng.integers(1, 8))) for _ in range(20)]
    package = BERTScorer(str(folder), num_layers=layer, device="cpu", use_fast_tokenizer=True)
    expected = torch.cat([package.score([c], [r])[1] for c, r in zip(candidates, references)])
    ours = BERTScore(str(folder), layer, "cpu").recall(candidates, references)
    assert ours.std() > 1e-3 and torch.allclose(ours, expected, atol=1e-5)


def test_bertscore_of_nothing_is_a_number(bert_folder):
    scores = BERTScore(str(bert_folder), 2, "cpu").recall(["", "a cat", ""], ["a cat", "", ""])
    assert torch.isfinite(scores).all() and scores[0] < 1 and scores[1] == 0


def test_llava_bertscore_is_the_recall_of_what_the_vlm_says(llava_folder, bert_folder):
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    images = pictures(3, seed=3)
    spec = f"llava_bertscore:{llava_folder}?scorer={bert_folder}&layer=2&max_new_tokens=6"
    scores = load_reward(spec + "&question=what is this ?")(images, PROMPTS[:3])
    model = LlavaForConditionalGeneration.from_pretrained(llava_folder)
    processor = AutoProcessor.from_pretrained(llava_folder)
    said, text = [], "user : <image> what is this ? assistant :"
    for picture in pil(images):
        inputs = processor(images=picture, text=text, return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0]
        tokens = tokens[inputs.input_ids.shape[1] :]
        said.append(processor.decode(tokens, skip_special_tokens=True))
    assert len(set(said)) > 1, "the case should have different descriptions"
    expected = BERTScore(str(bert_folder), 2, "cpu").recall(said, PROMPTS[:3])
    assert torch.allclose(scores, expected, atol=1e-5)


class VisionServer(BaseHTTPRequestHandler):
    """An OpenAI-compatible vision server.

    `faults` are what the next pictures meet, `models` what it has.
    """

    faults, asked, times, parallel, most_parallel = [], [], [], 0, 0
    models = None
    lock = threading.Lock()

    def answer(self, body, code=200):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        self.answer({"data": [{"id": "tiny-vlm"}]} if self.models is None else self.models)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        cls = type(self)
        with cls.lock:
            fault = cls.faults.pop(0) if cls.faults else None
            cls.times.append(time.monotonic())
            cls.parallel += 1
            cls.most_parallel = max(cls.most_parallel, cls.parallel)
        time.sleep(0.05)
        with cls.lock:  # before the answer, upon which the client may send its next request
            cls.parallel -= 1
        try:
            if fault == "hang":
                time.sleep(3)
            elif fault == "garbage":
                self.answer(b"<html>")
            elif fault == "no HTTP":
                self.wfile.write(b"ready\r\n")
            elif fault in ("half", "drip"):  # of what it has announced
                self.send_response(200)
                self.send_header("Content-Length", "100")
                self.end_headers()
                for _ in range(1 if fault == "half" else 40):
                    self.wfile.write(b" ")
                    time.sleep(0.25)
            elif isinstance(fault, (dict, list)):
                self.answer(fault)
            elif isinstance(fault, int):
                self.answer({"error": "no"}, fault)
            else:
                image, question = body["messages"][0]["content"]
                data = base64.b64decode(image["image_url"]["url"].split(",")[1])
                red = np.asarray(Image.open(io.BytesIO(data)))[..., 0].mean()
                cls.asked.append((body["model"], question["text"]))
                text = "" if red < 64 else "a dog" if red < 192 else "a red cat"
                self.answer({"choices": [{"message": {"content": text}}]})
        except (BrokenPipeError, ConnectionResetError):
            pass

    def log_message(self, *args):
        pass


@pytest.fixture
def vision_server():
    VisionServer.faults, VisionServer.asked, VisionServer.times = [], [], []
    VisionServer.most_parallel, VisionServer.models = 0, None
    server = ThreadingHTTPServer(("127.0.0.1", 0), VisionServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def test_vlm_server_is_asked_in_parallel_and_order_is_kept(vision_server, bert_folder):
    spec = f"llava_bertscore:{vision_server}?scorer={bert_folder}&layer=2&concurrency=4"
    reward = load_reward(spec + "&question=What is it?")
    images = torch.tensor([0.0, 0.5, 1.0] * 4).view(12, 1, 1, 1).expand(12, 3, 16, 16)
    scores = reward(images, ["a red cat"] * 12)
    said, scorer = ["", "a dog", "a red cat"] * 4, BERTScore(str(bert_folder), 2, "cpu")
    expected = scorer.recall(said, ["a red cat"] * 12)
    assert torch.allclose(scores, expected, atol=1e-5) and scores[2] == pytest.approx(1)
    assert VisionServer.asked == [("tiny-vlm", "What is it?")] * 12
    assert 2 <= VisionServer.most_parallel <= 4


def test_passing_faults_of_a_vlm_server_are_tried_again(vision_server, bert_folder):
    spec = f"llava_bertscore:{vision_server}?scorer={bert_folder}&layer=2"
    reward = load_reward(spec + "&timeout=1&concurrency=4")
    VisionServer.faults = [500, "hang", "garbage", 429, "no HTTP", "half", "drip"]
    scores = reward(torch.ones(4, 3, 16, 16), ["a red cat"] * 4)
    assert torch.allclose(scores, torch.ones(4), atol=1e-5) and not VisionServer.faults


SAYS_CAT = [{"type": "text", "text": "a red"}, {"type": "text", "text": "cat"}]


def test_answers_of_a_vlm_server(vision_server, bert_folder):
    """A text in parts is read as one; what stays wrong is asked for once and named."""
    reward = load_reward(f"llava_bertscore:{vision_server}?scorer={bert_folder}&layer=2")
    VisionServer.faults = [{"choices": [{"message": {"content": SAYS_CAT}}]}]
    assert reward(torch.zeros(1, 3, 16, 16), ["a red cat"]).item() == pytest.approx(1, abs=1e-5)
    wrong = [{"error": "no memory"}, ["no", "memory"], {"choices": []}]
    for content in (3, [3], [{"type": "image"}]):
        wrong.append({"choices": [{"message": {"content": content}}]})
    for fault in (*wrong, 400):
        VisionServer.faults, VisionServer.times = [fault], []
        with pytest.raises(RewardError) as error:
            reward(torch.ones(1, 3, 16, 16), ["a red cat"])
        message = str(error.value)
        assert len(VisionServer.times) == 1 and vision_server in message and "\n" not in message
        named = 'HTTP 400 .*"error": "no"' if fault == 400 else "without a text"
        assert re.search(named, message)


def test_a_vlm_server_is_asked_a_bounded_number_of_times_ever_later(vision_server, bert_folder):
    spec = f"llava_bertscore:{vision_server}?scorer={bert_folder}&layer=2&timeout=1"
    VisionServer.faults = [503] * 100
    with pytest.raises(RewardError, match="failed 4 times, at last with: HTTP 503"):
        load_reward(spec + "&retries=3")(torch.ones(1, 3, 16, 16), ["a red cat"])
    waits = np.diff(VisionServer.times)
    assert len(waits) == 3 and (waits > [0.45, 0.9, 1.8]).all()
    VisionServer.faults, VisionServer.times, start = ["drip"] * 100, [], time.monotonic()
    message = "failed 1 times, at last with: no whole answer within 1 s"
    with pytest.raises(RewardError, match=message):
        load_reward(spec + "&retries=0")(torch.ones(1, 3, 16, 16), ["a red cat"])
    # The answer would take 10 s.
    assert len(VisionServer.times) == 1 and time.monotonic() - start < 5


@pytest.mark.parametrize("fault", ["dead", "dead, model named", "no model", "error"])
def test_a_vlm_server_that_fails_at_the_start_is_one_line(
    vision_server, bert_folder, fault, monkeypatch, capsys
):
    options = f"?scorer={bert_folder}&layer=2&retries=1"
    options += "&model=tiny" if "named" in fault else ""
    VisionServer.models = {"data": []} if fault == "no model" else {"error": "no memory"}
    if "dead" in fault:
        with socket.create_server(("127.0.0.1", 0)) as free:
            vision_server = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    monkeypatch.setattr(sys, "argv", ["dpok.py"])
    spec = f"llava_bertscore:{vision_server}{options}"
    with pytest.raises(SystemExit) as end:
        load_reward_or_fail(spec, torch.device("cpu"), ["a cat"], "--reward")
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 2
    assert len([line for line in lines if "dpok.py: error: --reward" in line]) == 1
    assert f"the VLM server {vision_server}/models" in lines[-1] or "lists no model" in lines[-1]
    assert ("failed 2 times" in lines[-1]) == ("dead" in fault)


def test_a_vlm_server_that_stays_down_stops_the_run_and_the_state_is_saved(
    vision_server, bert_folder, tiny_sd, tmp_path, monkeypatch
):
    """The server fails for good in the second iteration.

    Two ranks, so that neither waits for the other.
    """
    spec = f"llava_bertscore:{vision_server}?scorer={bert_folder}&layer=2"
    spec += "&timeout=5&retries=1&concurrency=1"
    flags = ["--model", tiny_sd, "--num-inference-steps", 2]
    flags += ["--samples-per-iteration", 4, "--num-iterations", 3]
    VisionServer.faults = [None] * 4 + [503] * 1000
    run = tmp_path / "run"
    result = run_script("dpok.py", *flags, "--reward", spec, "--output-dir", run, ranks=2)
    lines = [line for line in result.stderr.splitlines() if "error:" in line]
    assert result.returncode == 1 and len(lines) == 1, result.stderr
    assert lines[0].startswith("error:"), result.stderr
    assert "iteration 1" in lines[0] and "503" in lines[0] and str(run) in lines[0]
    VisionServer.faults = []
    run_here(monkeypatch, "dpok.py", "--resume", run, "--reward", spec)
    assert [line["iteration"] for line in read_metrics(run)] == [0, 1, 2]


def test_objects_of_prompts():
    assert objects_of("A cat and a dog.") == ["cat", "dog"]
    assert objects_of("an apple on side of a teddy bear") == ["apple", "teddy bear"]
    assert objects_of("a candle next to the sandwich") == ["candle", "sandwich"]
    assert objects_of("a cat near a dog") == objects_of("A CAT BESIDE AN DOG") == ["cat", "dog"]
    assert objects_of("A stand") == ["stand"]


@pytest.mark.parametrize("family", ["owlv2", "grounding-dino"])
def test_confidence_of_words_is_that_of_the_best_box(detector_folders, family):
    """Against the pipeline, asked for one object at a time."""
    from transformers import pipeline

    images, prompts = pictures(3), ["a cat and a dog", "a cup beside a cat", "a bottle"]
    scores = load_reward(f"object_detection:{detector_folders[family]}")(images, prompts)
    model = str(detector_folders[family])
    detect = pipeline("zero-shot-object-detection", model=model, device="cpu")
    template = "{}." if family == "grounding-dino" else "a photo of a {}"
    for picture, prompt, score in zip(pil(images), prompts, scores):
        best = []
        for name in objects_of(prompt):
            boxes = detect(picture, candidate_labels=[template.format(name)], threshold=0.0)
            best.append(max(box["score"] for box in boxes))
        assert score.item() == pytest.approx(np.mean(best), abs=2e-4)
    assert scores.std() > 1e-4


@pytest.mark.parametrize("family", ["detr", "rt-detr", "multi-label"])
def test_confidence_of_fixed_classes(detector_folders, family):
    from transformers import pipeline

    images, spec = pictures(3), f"object_detection:{detector_folders[family]}"
    reward = load_reward(spec, prompts=["a cat and a dog"])
    ours = {name: reward(images, [f"a {name}"] * 3) for name in ("cat", "dog", "cup")}
    task = "image-classification" if family == "multi-label" else "object-detection"
    run = pipeline(task, model=str(detector_folders[family]), device="cpu")
    for i, picture in enumerate(pil(images)):
        if family == "multi-label":
            for answer in run(picture, top_k=3):
                assert ours[answer["label"]][i].item() == pytest.approx(answer["score"], abs=1e-4)
        else:
            # The pipeline keeps a box's likeliest class, so only the best of all classes compares.
            best = max(run(picture, threshold=0.0), key=lambda box: box["score"])
            assert ours[best["label"]][i].item() == pytest.approx(best["score"], abs=1e-4)
            highest = max(scores[i] for scores in ours.values()).item()
            assert highest == pytest.approx(best["score"], abs=1e-4)
    pair = reward(images, ["a cat next to a cup"] * 3)
    assert torch.allclose(pair, (ours["cat"] + ours["cup"]) / 2, atol=1e-5)
    with pytest.raises(RewardError, match=r"'horse'.*it knows cat, dog, cup"):
        load_reward(spec, prompts=["a cat and a horse"])


def test_fixed_classes_with_a_repeated_name(detector_folders, tmp_path):
    """As in COCO's DETR: N/A stands for several of its 91 numbers.

    The same weights give the same confidence.
    """
    images, folder = pictures(3), shutil.copytree(detector_folders["detr"], tmp_path / "detr")
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] = {0: "cat", 1: "N/A", 2: "N/A"}
    (folder / "config.json").write_text(json.dumps(config))
    expected = load_reward(f"object_detection:{detector_folders['detr']}")(images, ["a cat"] * 3)
    assert torch.equal(load_reward(f"object_detection:{folder}")(images, ["a cat"] * 3), expected)
    with pytest.raises(PromptError, match=r"'n/a'; it knows cat$"):
        load_reward(f"object_detection:{folder}", prompts=["a N/A"])


@pytest.mark.parametrize("family, most", [("owlv2", 7), ("grounding-dino", 13)])
def test_objects_longer_than_a_detectors_text_are_refused(detector_folders, family, most):
    """At the start and at a call; the longest that is taken can be scored."""
    spec = f"object_detection:{detector_folders[family]}"
    longest, longer = most * " cup", (most + 1) * " cup"
    reward = load_reward(spec, prompts=["a cat", longest])
    assert torch.isfinite(reward(pictures(1), [longest])).all()
    message = f"up to 16 tokens, and the object '{longer.strip()}' takes 17"
    with pytest.raises(RewardError, match=message):
        reward(pictures(1), [longer])
    with pytest.raises(PromptError, match=message):
        load_reward(spec, prompts=["a cat", longer])


def test_a_missing_package_is_named_when_the_reward_is_loaded(detector_folders, monkeypatch):
    """OWLv2's processor needs scipy, which is not among the requirements."""
    from transformers.utils.import_utils import BACKENDS_MAPPING

    monkeypatch.setitem(BACKENDS_MAPPING, "scipy", (lambda: False, BACKENDS_MAPPING["scipy"][1]))
    with pytest.raises(RewardError, match="pip install scipy") as error:
        load_reward(f"object_detection:{detector_folders['owlv2']}")
    assert "\n" not in str(error.value)


def test_weights_of_another_model_are_refused(specs, tmp_path):
    """A folder without one of the model's tensors: transformers would draw it at random."""
    names = ["clip_score", "aesthetic", "blip_score", "owlv2", "detr", "multi-label"]
    for name in [*names, "llava_bertscore", "scorer"]:
        spec = specs["llava_bertscore" if name == "scorer" else name]
        folder = re.search(r"scorer=([^&]+)" if name == "scorer" else r":([^?]+)", spec)[1]
        copy = shutil.copytree(folder, tmp_path / name)
        state = load_file(copy / "model.safetensors")
        for key in [key for key in state if key.startswith("pooler")]:
            del state[key]  # the scorer does without
        biases = [key for key in sorted(state) if key.endswith(".bias")]
        lost = next(key for key in biases if "vision" in key or name != "aesthetic")
        rest = {key: value for key, value in state.items() if key != lost}
        save_file(rest, copy / "model.safetensors")
        changed, message = spec.replace(folder, str(copy)), "name the weights of such a model"
        with pytest.raises(RewardError, match=rf"lacks .*bias of a .*; {message}"):
            load_reward(changed)
        if name == "scorer":
            save_file(state, copy / "model.safetensors")
            images = pictures(2)
            ours, theirs = (load_reward(s)(images, PROMPTS[:2]) for s in (changed, spec))
            assert ours.equal(theirs)


LABELS = "a red cat,a green dog,the moon"


@pytest.fixture(scope="module")
def clip_classifier_folder(clip_folder, tmp_path_factory):
    """A CLIP with a classification head, and without a text encoder."""
    from transformers import CLIPConfig, CLIPForImageClassification, CLIPProcessor

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip-classifier")
    vision = TINY | {"image_size": 32, "patch_size": 8}
    labels = {"id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
    config = CLIPConfig(vision_config=vision, **labels)
    randomise(CLIPForImageClassification(config)).save_pretrained(folder)
    CLIPProcessor.from_pretrained(clip_folder).save_pretrained(folder)
    return folder


def test_a_clip_with_a_classification_head_is_a_classifier(clip_classifier_folder):
    from transformers import pipeline

    images = pictures(8)
    classify = pipeline("image-classification", model=str(clip_classifier_folder), device="cpu")
    answers = [classify(picture, top_k=1)[0]["label"] for picture in pil(images)]
    assert len(set(answers)) > 1, "the case should have several classes"
    shares = np.array([answers.count(label) / 8 for label in "abc"])
    scores = load_reward(f"statistical_parity:{clip_classifier_folder}")(images, ["a nurse"] * 8)
    assert scores.tolist() == pytest.approx([-np.sqrt(((shares - 1 / 3) ** 2).sum())] * 8, abs=1e-6)
    with pytest.raises(RewardError, match=r"lacks .* of a CLIPModel"):
        load_reward(f"clip_score:{clip_classifier_folder}")


def test_statistical_parity_of_known_histograms():
    assert statistical_parity([0, 1, 2, 3] * 3, 4) == pytest.approx(0)
    assert statistical_parity([2] * 16, 4) == pytest.approx(0.8660254)
    assert statistical_parity([0, 0, 1, 1], 4) == pytest.approx(0.5)
    assert statistical_parity([0, 0, 0, 1], 2) == pytest.approx(np.sqrt(2) / 4)


def test_statistical_parity_groups_by_prompt(clip_folder, detector_folders):
    from transformers import pipeline

    images, prompts = pictures(8), ["a nurse", "a chef"] * 4
    labels = LABELS.split(",")
    classify = pipeline("zero-shot-image-classification", model=str(clip_folder), device="cpu")
    asked = {"candidate_labels": labels, "hypothesis_template": "{}"}
    answers = [classify(picture, **asked)[0]["label"] for picture in pil(images)]
    assert len(set(answers)) > 1, "the case should have several classes"
    reward = load_reward(f"statistical_parity:{clip_folder}?labels={','.join(labels)}")
    scores = reward(images, prompts)
    for prompt in set(prompts):
        of_prompt = [a for a, p in zip(answers, prompts) if p == prompt]
        shares = np.array([of_prompt.count(label) / 4 for label in labels])
        expected = pytest.approx(-np.sqrt(((shares - 1 / 3) ** 2).sum()), abs=1e-6)
        found = [score for score, p in zip(scores.tolist(), prompts) if p == prompt]
        assert all(score == expected for score in found)
    reward = load_reward(f"statistical_parity:{detector_folders['multi-label']}")
    assert reward(images, prompts).shape == (8,)
    reward = load_reward(f"statistical_parity:{clip_folder}")
    message = r"several pictures.*'a chef' has one; draw more of each"
    with pytest.raises(RewardError, match=message):
        reward(images[:3], ["a nurse", "a nurse", "a chef"])


def test_statistical_parity_of_many_pictures(clip_folder):
    """More than a model sees at once, with extreme values; of any order and size."""
    from transformers import pipeline

    images, labels = pictures(64, seed=2), LABELS.split(",")
    prompts = ["a nurse", "a chef", "a chef", "a cook"] * 16
    images[4], images[5], images[6] = 0.0, 1.0, (images[6] * 255).round() / 255
    reward = load_reward(f"statistical_parity:{clip_folder}?labels={LABELS}")
    scores = reward(images, prompts)
    classify = pipeline("zero-shot-image-classification", model=str(clip_folder), device="cpu")
    answers = classify(pil(images), candidate_labels=labels, hypothesis_template="{}")
    answers = [answer[0]["label"] for answer in answers]
    for prompt in set(prompts):
        of_prompt = [a for a, p in zip(answers, prompts) if p == prompt]
        shares = np.array([of_prompt.count(label) / len(of_prompt) for label in labels])
        expected = pytest.approx(-np.sqrt(((shares - 1 / 3) ** 2).sum()), abs=1e-6)
        found = [score for score, p in zip(scores.tolist(), prompts) if p == prompt]
        assert all(score == expected for score in found)
    assert scores.dtype == torch.float32 and len(scores.unique()) > 1
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(reward(images[order], [prompts[i] for i in order]), scores[order])
    for height, width in ((24, 24), (96, 64), (50, 113)):
        scores = reward(pictures(4, height, width), ["a nurse", "a chef"] * 2)
        assert (scores >= -((2 / 3) ** 0.5) - 1e-6).all() and (scores <= 0).all()


RANKS_SCRIPT = """
import os, sys, torch, torch.distributed as dist
sys.path[:0] = [os.getcwd(), os.getcwd() + "/tests"]
from tiny_models import pictures
from common.rewards import RewardError, load_reward
from harness.rewards import everybodys

rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
folder = os.path.dirname(__file__)
reward = load_reward("SPEC", gather=everybodys)
if world > 1:
    dist.init_process_group("gloo")
images, prompts = pictures(12), ["a nurse", "a chef", "a chef"] * 4
own = list(range(12) if world == 1 else (range(4), range(4, 12))[rank])
images, prompts, faults = images[own], [prompts[i] for i in own], []
if world > 1:
    faulty = [(load_reward(f"1*{folder}/mine.py:f+1*SPEC", gather=everybodys), images)]
    faulty += [(reward, images * (torch.nan if rank == 1 else 1))]
    for function, own_images in faulty:
        try:
            function(own_images, prompts)
        except RewardError as error:
            faults.append(str(error))
torch.save((reward(images, prompts), faults), f"{folder}/{world}-{rank}.pt")
if world > 1:
    # Else gloo's threads may outlive the interpreter, which then aborts.
    dist.destroy_process_group()
"""


def test_ranks_share_a_prompts_pictures_and_faults(clip_folder, tmp_path):
    """Groups that are spread over two ranks have the values of one process.

    A fault on one rank is raised on both, none of which waits for the other, and the next call
    finds them in step.
    """
    spec = f"statistical_parity:{clip_folder}?labels={LABELS}"
    (tmp_path / "script.py").write_text(RANKS_SCRIPT.replace("SPEC", spec))
    (tmp_path / "mine.py").write_text(
        "import os, torch\n"
        "def f(images, prompts):\n"
        "    value = torch.nan if os.environ['RANK'] == '1' else 0.0\n"
        "    return torch.full((len(prompts),), value)\n"
    )
    for ranks in (1, 2):
        result = run_script(tmp_path / "script.py", ranks=ranks)
        assert result.returncode == 0, result.stderr
    whole, _ = torch.load(tmp_path / "1-0.pt")
    first, faults = torch.load(tmp_path / "2-0.pt")
    second, same_faults = torch.load(tmp_path / "2-1.pt")
    assert torch.equal(whole, torch.cat([first, second])) and len(whole.unique()) > 1
    assert faults == same_faults
    assert "mine.py:f' returned nan" in faults[0] and "is not finite" in faults[1]


GROUPS_SCRIPT = """
import os, sys, torch, torch.distributed as dist
sys.path[:0] = [os.getcwd(), os.getcwd() + "/tests"]
from tiny_models import pictures
from common.rewards import load_reward
from harness.rewards import everybodys

rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
reward = load_reward("SPEC", gather=everybodys)
dist.init_process_group("gloo")
prompts, groups = NURSES, [i // 5 for i in range(20)]
own = list(range(20 * rank // world, 20 * (rank + 1) // world))
groups = [groups[i] for i in own]
scores = reward(pictures(20)[own], [prompts[group] for group in groups], groups)
torch.save(scores, f"{os.path.dirname(__file__)}/{rank}.pt")
dist.destroy_process_group()
"""
NURSES = ["a nurse", "a chef", "a nurse", "a nurse"]
"""She is there three times: groups of five of her pictures, not one of fifteen."""


def test_parity_of_known_groups_with_repeated_prompts(clip_folder, tmp_path):
    """Each group's value is that of its own five pictures, on three processes too."""
    spec = f"statistical_parity:{clip_folder}?labels={LABELS}"
    (tmp_path / "script.py").write_text(
        GROUPS_SCRIPT.replace("SPEC", spec).replace("NURSES", f"{NURSES}")
    )
    alone = load_reward(spec)
    expected = [alone(pictures(20)[k : k + 5], ["a nurse"] * 5) for k in range(0, 20, 5)]
    assert len(torch.cat(expected).unique()) > 1
    groups = [i // 5 for i in range(20)]
    scores = alone(pictures(20), [NURSES[group] for group in groups], groups)
    assert torch.equal(scores, torch.cat(expected))
    result = run_script(tmp_path / "script.py", ranks=3)
    assert result.returncode == 0, result.stderr
    scores = torch.cat([torch.load(tmp_path / f"{rank}.pt") for rank in range(3)])
    assert torch.equal(scores, torch.cat(expected))


@pytest.fixture(scope="module")
def hps_folder(tmp_path_factory):
    return make_hps(tmp_path_factory.mktemp("hps"))


@pytest.fixture(scope="module")
def specs(clip_folder, blip_folder, hps_folder, bert_folder, llava_folder, detector_folders):
    """A spec for each reward that scores pictures one by one."""
    fixed = {name: f"object_detection:{detector_folders[name]}" for name in detector_folders}
    llava = f"llava_bertscore:{llava_folder}?scorer={bert_folder}"
    return fixed | {
        "image_reward": f"image_reward:{ROOT / 'zoo/image_reward'}",
        "aesthetic": f"aesthetic:{clip_folder}",
        "jpeg_compressibility": "jpeg_compressibility",
        "jpeg_incompressibility": "jpeg_incompressibility",
        "clip_score": f"clip_score:{clip_folder}",
        "blip_score": f"blip_score:{blip_folder}",
        "pick_score": f"pick_score:{clip_folder}",
        "hps_v2": f"hps_v2:{hps_folder}",
        "llava_bertscore": f"{llava}&layer=1&max_new_tokens=4",
        "sum": f"0.7*aesthetic:{clip_folder}+-2e-1*jpeg_incompressibility",
    }


SINGLE = ["owlv2", "grounding-dino", "detr", "rt-detr", "multi-label", "image_reward", "aesthetic"]
SINGLE += ["jpeg_compressibility", "jpeg_incompressibility"]
SINGLE += ["clip_score", "blip_score", "pick_score", "hps_v2", "llava_bertscore", "sum"]


@pytest.mark.parametrize("name", SINGLE)
def test_a_batch_equals_one_by_one(specs, name):
    """Order kept, extreme values, values that are 8 bits exactly, one picture and 64."""
    reward = load_reward(specs[name])
    images = pictures(6, seed=2)
    images[4], images[5] = 0.0, 1.0
    images[3] = (images[3] * 255).round() / 255
    prompts = ["a cat", "a dog", "a cat and a dog", "a cup", "a cat", "a dog near a cup"]
    scores = reward(images, prompts)
    assert scores.dtype == torch.float32 and scores.shape == (6,) and torch.isfinite(scores).all()
    alone = torch.cat([reward(images[i : i + 1], prompts[i : i + 1]) for i in range(6)])
    assert torch.allclose(scores, alone, atol=1e-4) and alone.std() > 0
    gaps = (alone[:, None] - alone).abs() + torch.eye(6)
    assert gaps.min() > 1e-3 or "jpeg_" in name  # plain pictures are of one size
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    shuffled = reward(images[order], [prompts[i] for i in order])
    assert torch.allclose(shuffled, scores[order], atol=1e-4)
    many = reward(images[torch.arange(64) % 6], [prompts[i % 6] for i in range(64)])
    assert torch.allclose(many, scores[torch.arange(64) % 6], atol=1e-4)


@pytest.mark.parametrize("name", SINGLE)
def test_pictures_of_any_size(specs, name):
    reward = load_reward(specs[name])
    for height, width in ((24, 24), (96, 64), (50, 113)):
        assert torch.isfinite(reward(pictures(2, height, width), ["a cat", "a dog"])).all()


def test_weighted_sum(clip_folder):
    images = pictures(3)
    spec = f"0.7*aesthetic:{clip_folder}+.3*clip_score:{clip_folder} + -1e-2*jpeg_incompressibility"
    parts = (f"aesthetic:{clip_folder}", f"clip_score:{clip_folder}", NAMES[3])
    a, b, c = (load_reward(part)(images, PROMPTS[:3]) for part in parts)
    found = load_reward(spec)(images, PROMPTS[:3])
    assert torch.allclose(found, 0.7 * a + 0.3 * b - 0.01 * c, atol=1e-5)
    assert parse_sum("aesthetic:a+b") == [(1.0, "aesthetic:a+b")]
    assert parse_sum("2*x.py:f+3*llava_bertscore:http://h:1/v1?question=a+b") == [
        (2.0, "x.py:f"),
        (3.0, "llava_bertscore:http://h:1/v1?question=a+b"),
    ]
    url = "http://[::1]:80/a+b/x.py?timeout=5"
    assert parse_sum(url) == [(1.0, url)]
    spec = f"-0.5*{url} + 2e-1*https://h/score+3*pick_score"
    assert parse_sum(spec) == [(-0.5, url), (0.2, "https://h/score"), (3.0, "pick_score")]
    check_spec(spec)


HALF_NAN = torch.stack([torch.zeros(3, 8, 8), torch.full((3, 8, 8), torch.nan)])


@pytest.mark.parametrize(
    "images, message",
    [
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "torch.uint8"),
        (np.zeros((2, 3, 8, 8), dtype=np.float32), "ndarray"),
        (torch.zeros(1, 3, 8, 8), r"\(2, 3, H, W\).*\(1, 3, 8, 8\)"),
        (torch.zeros(2, 8, 8, 3), r"\(2, 3, H, W\).*\(2, 8, 8, 3\)"),
        (torch.zeros(3, 8, 8), r"\(2, 3, H, W\).*\(3, 8, 8\)"),
        (HALF_NAN, "'a dog' is not finite"),
    ],
)
def test_pictures_of_another_kind_are_refused(images, message):
    with pytest.raises(RewardError, match=message):
        load_reward("jpeg_compressibility")(images, ["a cat", "a dog"])


def users(folder, text: str, name: str = "mine") -> str:
    """A file of the user's with this text, made on the spot, as the beginning of a spec."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.py").write_text(text)
    return f"{folder / name}.py"


@pytest.mark.parametrize(
    "returned, message",
    [
        ("None", "NoneType"),
        ("'a lot'", "a str"),
        ("torch.ones(1)", r"shape \(1,\)"),
        ("torch.tensor([0.0, torch.inf])", "inf for the prompt 'a dog'"),
        ("torch.ones(2, dtype=torch.float64) * 1e300", "inf for the prompt 'a cat'"),
    ],
)
def test_what_a_users_function_returns_is_checked(tmp_path, returned, message):
    path = users(tmp_path, f"import torch\ndef f(images, prompts): return {returned}\n")
    with pytest.raises(RewardError, match=message):
        load_reward(f"{path}:f")(pictures(2), ["a cat", "a dog"])


def test_a_fault_in_a_users_function_is_one_line_with_its_place(tmp_path):
    path = users(tmp_path, "def f(images, prompts):\n    return 1 / 0\n")
    message = r"mine.py:f' failed with ZeroDivisionError: .*\(.*mine.py:2\)$"
    with pytest.raises(RewardError, match=message):
        load_reward(f"{path}:f")(pictures(2), ["a cat", "a dog"])


def test_a_users_file_is_a_module_of_its_own(tmp_path):
    """Dataclasses look their module up in sys.modules.

    Files of one name stay apart, and shadow no other module.
    """
    text = "from __future__ import annotations\nfrom dataclasses import dataclass\nimport torch\n"
    text += "@dataclass\nclass Value:\n    value: float\n"
    text += "def f(images, prompts): return torch.full((len(prompts),), Value({}).value)\n"
    first, second = (users(tmp_path / str(k), text.format(k), "json") for k in (1.0, 2.0))
    scores = load_reward(f"1*{first}:f+10*{second}:f")(pictures(2), ["a cat"] * 2)
    assert scores.tolist() == [21, 21]
    assert sys.modules["json"] is json


def test_a_sum_that_is_not_finite_is_refused(tmp_path):
    code = "import torch\ndef f(images, prompts): return torch.full((len(prompts),), 3e38)\n"
    path = users(tmp_path, code)
    with pytest.raises(RewardError, match=r"1\*.*\+1\*.* returned inf for the prompt 'a cat'"):
        load_reward(f"1*{path}:f+1*{path}:f")(pictures(1), ["a cat"])


@pytest.mark.parametrize(
    "text", ["1 / 0", "def f(:", "import nothing_of_this_name", "assert False, 'a\\nb'"]
)
def test_whatever_a_loader_raises_is_one_line(tmp_path, text, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dpok.py"])
    with pytest.raises(SystemExit) as end:
        load_reward_or_fail(
            f"{users(tmp_path, text)}:f", torch.device("cpu"), ["a cat"], "--reward"
        )
    assert end.value.code == 2
    line = r"dpok.py: error: --reward .*the file of reward .*mine.py:f' failed with .*Error.*\n"
    assert re.fullmatch(line, capsys.readouterr().err)


def test_the_line_about_a_reward_names_the_prompts_and_the_remedy(tmp_path, monkeypatch, capsys):
    """However many labels the fault names: the middle of a long line is left out."""
    labels = ", ".join(f"class {i}" for i in range(200))
    monkeypatch.setattr(sys, "argv", ["dpok.py"])
    for error, remedy in (
        (RewardError(labels), "class 199"),
        (PromptError(labels), "change --prompt or --prompts-file"),
    ):
        monkeypatch.setattr("harness.rewards.load_reward", Mock(side_effect=error))
        with pytest.raises(SystemExit) as end:
            load_reward_or_fail("object_detection", torch.device("cpu"), ["a cat"], "--reward")
        stderr = capsys.readouterr().err
        assert end.value.code == 2 and stderr.count("\n") == 1
        assert labels[:200] in stderr and remedy in stderr and len(stderr) < 1000


WRONG = {
    "beauty": "no reward 'beauty'",
    "0.5*aesthetic+0.5*": "in '0.5*'",
    "0.5*+0.5*aesthetic": "0.7*aesthetic+-0.3*clip_score",
    "aesthetic+clip_score": "0.7*aesthetic+-0.3*clip_score",
    "1e999*aesthetic": "no finite weight",
    "mine.py": "write mine.py:FUNCTION",
    "mine.py:": "write mine.py:FUNCTION",
    "llava_bertscore:http://": "http://HOST:PORT/v1",
    "http://": "http://HOST:PORT/PATH",
    "https://localhost:port/score": "http://HOST:PORT/PATH",
    "http://localhost:1/score?batch_size=0": "batch_size=0 of a reward server",
    "0.5*aesthetic+0.5*http://localhost:1/score?model=x": "no option 'model'",
    "ftp://localhost/score": "no reward 'ftp'",
    "hps_v2?version=2": "there are: 2.0, 2.1",
    "hps_v2:docs": "holds no HPS_v2_compressed.pt or model.safetensors",
    "pick_score:docs": "'docs' holds no config.json",
    "llava_bertscore:http://localhost:port/v1": "http://HOST:PORT/v1",
    "llava_bertscore:http://local host/v1": "http://HOST:PORT/v1",
    "llava_bertscore:http://localhost:1/v1?retries=-1": "0 or more",
    "llava_bertscore?scorer=./nowhere": "no folder './nowhere'",
    "statistical_parity?labels=a,a,b": "all of them different",
    "statistical_parity?labels=a,,b": "at least two labels",
    "0.5*aesthetic+0.5*beauty": "no reward 'beauty'",
    "aesthetic:./nowhere": "no folder './nowhere'",
    "clip_score:docs": "'docs' holds no config.json",
    "llava_bertscore?colour=red": "no option 'colour'",
    "llava_bertscore:http://localhost:1/v1?timeout=0": "timeout=0",
    "llava_bertscore:http://localhost:1/v1?scorer=docs": "'docs' holds no config.json",
    "statistical_parity?labels=one": "at least two labels",
    "jpeg_compressibility:x": "takes no weights",
    "object_detection?x=1": "no option 'x'",
}


@pytest.mark.parametrize("spec", WRONG)
def test_wrong_specs_are_refused_before_anything_is_loaded(spec):
    with pytest.raises(RewardError) as error:
        check_spec(spec)
    assert WRONG[spec] in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "spec", ["llava_bertscore?scorer=roberta-large", "llava_bertscore:http://[::1]:80/v1?retries=0"]
)
def test_right_specs_are_not_refused(spec):
    check_spec(spec)


def test_import_is_quick_and_loads_no_models_library():
    code = "import sys, time, torch\n"
    code += "t = time.time(); import common.rewards; print(time.time() - t)\n"
    code += "large = ('transformers', 'diffusers', 'huggingface_hub')\n"
    code += "print([m for m in large if m in sys.modules])\n"
    code += "from common.rewards import check_spec, NAMES\n[check_spec(n) for n in NAMES]\n"
    code += "print([m for m in large[:2] if m in sys.modules])"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    seconds, after_import, after_check = result.stdout.splitlines()
    assert float(seconds) < 3 and after_import == after_check == "[]"
