"""The pre-commit hook and the GitHub Action: the command line's own lines, run as those two would run them."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import GPT2LMHeadModel

from tests.checkpoints import gpt2, save

ROOT = Path(__file__).parents[1]


@pytest.fixture
def models(tmp_path: Path) -> Path:
    save(GPT2LMHeadModel(gpt2()), tmp_path / "good")
    save(GPT2LMHeadModel(gpt2()), tmp_path / "bad", flag=False)
    return tmp_path


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **more}


@pytest.mark.slow
def test_the_pre_commit_hook(models: Path) -> None:
    def git(*arguments: str, at: Path) -> str:
        who = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        done = subprocess.run(["git", *who, *arguments], cwd=at, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    hooks, user = models / "hooks", models / "user"
    for folder in (hooks, user):
        folder.mkdir()
        git("init", "--quiet", at=folder)
    (hooks / ".pre-commit-hooks.yaml").write_text((ROOT / ".pre-commit-hooks.yaml").read_text())
    git("add", ".", at=hooks)
    git("commit", "--quiet", "-m", "x", at=hooks)
    for name, status in (("good", 0), ("bad", 1)):
        hook = {"id": "tiedquiet-check", "args": [str(models / name)]}
        repo = {"repo": str(hooks), "rev": git("rev-parse", "HEAD", at=hooks), "hooks": [hook]}
        (user / ".pre-commit-config.yaml").write_text(yaml.safe_dump({"repos": [repo]}))
        git("add", ".", at=user)
        where = environment(PRE_COMMIT_HOME=str(models / "cache"))
        done = subprocess.run(
            [sys.executable, "-m", "pre_commit", "run", "-a"], cwd=user, env=where, capture_output=True, text=True
        )
        assert done.returncode == status, done.stdout + done.stderr
        assert ("lm_head.weight  untied" in done.stdout) == bool(status)


@pytest.mark.slow
def test_the_action(models: Path) -> None:
    action = yaml.safe_load((ROOT / "action.yml").read_text())
    install, check = action["runs"]["steps"]
    assert install["run"] == 'python -m pip install --quiet "$ACTION" $PACKAGES'
    assert set(action["inputs"]) == {"path", "arguments", "packages"}
    for name, arguments, status in (("good", "--dtype bfloat16", 0), ("bad", "", 1)):
        done = act(check, models, str(models / name), arguments)
        assert done.returncode == status, done.stderr
        assert "16 of 16 tensors hold the file's bytes" in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python does not know PYTHONSAFEPATH")
def test_the_action_in_the_workspace_of_strangers(models: Path) -> None:
    """Neither the name of a folder nor a file there makes it pass."""
    install, check = yaml.safe_load((ROOT / "action.yml").read_text())["runs"]["steps"]
    assert install["env"]["PYTHONSAFEPATH"] == check["env"]["PYTHONSAFEPATH"] == "1"
    (models / "tiedquiet.py").write_text("raise SystemExit(0)")
    for name in ("--help", "bad"):
        assert act(check, models, name).returncode == (1 if name == "bad" else 2)


def act(step: dict[str, Any], workspace: Path, name: str, arguments: str = "") -> "subprocess.CompletedProcess[str]":
    safe = step["env"]["PYTHONSAFEPATH"]
    where = environment(CHECKED=name, ARGUMENTS=arguments, PYTHONSAFEPATH=safe)
    return subprocess.run(["bash", "-e", "-c", step["run"]], cwd=workspace, env=where, capture_output=True, text=True)
