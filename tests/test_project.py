"""Paths of the project: absolute in other folders, and stored and compared without its place."""

import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from evaluation.models import Model, was_trained_on
from harness import project
from large_scale_ppo import PRESETS as TASKS
from raft import PRESETS

ARGS = PRESETS["zoo"]


@pytest.fixture(params=["plain", "with a blank", "it's"])
def elsewhere(request, tmp_path, monkeypatch):
    """A project in a folder of this name, while another folder is the current one."""
    place = tmp_path / request.param
    for name in ("zoo/sd", "zoo/image_reward", "zoo/detector", "zoo/skin_tone"):
        (place / name).mkdir(parents=True)
    (place / "prompts").mkdir()
    for name in ("zoo_preference", "zoo_composition", "zoo_portraits"):
        (place / f"prompts/{name}.txt").touch()
    (place / "zoo/pairs.py").touch()
    monkeypatch.setattr(project, "PROJECT", place)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return place


def test_presets_are_absolute_and_portable(elsewhere):
    args = project.of_project(ARGS)
    assert args.model == str(elsewhere / "zoo/sd")
    assert args.prompts_file == elsewhere / "prompts/zoo_preference.txt"
    assert args.reward == f"image_reward:{elsewhere}/zoo/image_reward"
    assert args.pretrain_data == f"{elsewhere}/zoo/pairs.py:biased"
    assert project.portable(vars(args)) == vars(ARGS)


def test_tasks_are_words(elsewhere):
    tasks = project.of_project(TASKS["zoo"]).tasks
    for task, written in zip(tasks, TASKS["zoo"].tasks):
        reward, prompts, size = shlex.split(task)
        name, weights, source = *written.split()[0].split(":"), written.split()[1]
        assert reward == f"{name}:{elsewhere / weights}" and prompts == str(elsewhere / source)
        assert size == written.split()[2]
    assert project.portable(tasks) == TASKS["zoo"].tasks


def test_files_of_this_folder_come_first(elsewhere):
    here = Path.cwd()
    (here / "prompts").mkdir()
    (here / "prompts/zoo_preference.txt").touch()
    args = project.found(ARGS)
    assert args.prompts_file == here / "prompts/zoo_preference.txt"
    assert project.portable(args.prompts_file) == args.prompts_file
    assert args.model == str(elsewhere / "zoo/sd")
    mine = replace(ARGS, prompts_file=Path("prompts/mine.txt"), model="zoo/of-mine")
    assert project.found(mine).prompts_file == Path("prompts/mine.txt")
    assert project.found(mine).model == "zoo/of-mine"


def test_what_is_no_path_of_the_project_stays(elsewhere):
    (Path.cwd() / "zoo/sd copy").mkdir(parents=True)
    values = {"prompt": "a zoo/sd", "push_to_hub": "zoo/sd", "output_dir": Path("zoo/sd")}
    args = replace(ARGS, model="zoo/sd copy", **values)
    for given in (project.found(args), project.of_project(args)):
        assert {name: getattr(given, name) for name in values} == values
    assert project.found(args).model == "zoo/sd copy"
    others = f"/backup{elsewhere}/zoo/sd {elsewhere}/runs/zoo/sd"
    assert project.portable(others) == others


def test_a_reward_is_the_same_from_every_folder(elsewhere):
    """The run was begun in the project, whose folder was the current one, or in another."""
    model = Model("run", Path("run"), "", ["image_reward:zoo/image_reward"])
    assert was_trained_on(model, f"image_reward:{elsewhere}/zoo/image_reward")
    assert was_trained_on(model, "image_reward:zoo/image_reward")
    assert not was_trained_on(model, f"image_reward:{elsewhere}/zoo/detector")
    assert not was_trained_on(model, f"image_reward:{Path.cwd()}/zoo/image_reward")
