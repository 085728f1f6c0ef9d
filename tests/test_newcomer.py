"""What once stopped somebody who tried this for the first time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from chassis_utils.__main__ import main
from chassis_utils.as_reported.sizes import scaled_rank
from chassis_utils.files import MODELS, ROOT, locate
from chassis_utils.lm.model import load
from chassis_utils.paper import report
from chassis_utils.paper.notebook import Notebook, PlanError
from chassis_utils.text import prompts


def test_a_plain_script_reads_natural_text_on_a_fresh_checkout(tmp_path: Path) -> None:
    script = tmp_path / "script.py"  # without a __main__ guard, and with no cache there yet
    script.write_text(
        "import chassis_utils.text.corpus as corpus\n"
        "from pathlib import Path\n"
        f"corpus.CACHE = Path({str(tmp_path)!r}) / 'cache'\n"
        "corpus.PACKAGES = {'seaborn': 'BSD-3-Clause', 'peft': 'Apache-2.0'}\n"
        "from chassis_utils.text import prompts\n"
        "print(len(prompts.take('natural', 'document', 'train', 5)))\n"
    )
    command = [sys.executable, str(script)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert (done.returncode, done.stdout) == (0, "5\n"), done.stderr


def test_a_package_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from chassis_utils.text import corpus

    monkeypatch.setattr(corpus, "CACHE", tmp_path)
    monkeypatch.setattr(corpus, "PACKAGES", {"seaborn": ""})
    monkeypatch.setattr(corpus, "package_versions", dict)
    monkeypatch.setattr(corpus, "PACKAGES", {"no_such_package": ""})
    with pytest.raises(ModuleNotFoundError, match="package 'no_such_package' is read for its docstrings"):
        corpus.read_documents("train")


def test_a_relative_path_is_taken_from_the_working_directory_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert locate("models/port-llama") == MODELS / "port-llama"  # what the repository ships, from anywhere
    (tmp_path / "models" / "port-llama").mkdir(parents=True)
    assert locate("models/port-llama") == Path("models/port-llama")
    with pytest.raises(ValueError, match="holds no weights"):
        load("models/port-llama")


def test_an_installed_wheel_keeps_its_cache_with_the_user(tmp_path: Path) -> None:
    package = tmp_path / "site" / "chassis_utils"
    package.mkdir(parents=True)
    for name in ("__init__.py", "files.py"):
        (package / name).write_bytes((ROOT / "chassis_utils" / name).read_bytes())
    home = {"PYTHONPATH": str(package.parent), "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    code = "from chassis_utils.files import CACHE, IN_REPOSITORY; print(IN_REPOSITORY, CACHE)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | home, cwd=tmp_path
    )
    assert done.stdout.split() == ["False", str(tmp_path / "cache" / "chassis-utils" / "cache")], done.stderr


@pytest.mark.parametrize("rank", [0, -4])
def test_no_rank_silently_becomes_one(rank: int) -> None:
    with pytest.raises(ValueError, match=f"rank {rank} is below 1"):
        scaled_rank(256, rank)


@pytest.mark.parametrize("n", [0, -3])
def test_no_prompts_are_refused_in_so_many_words(n: int) -> None:
    with pytest.raises(ValueError, match=f"{n} prompts of part 'test' are none: ask for at least one"):
        prompts.take("mixed", "index", "test", n)


def test_prompts_of_ones_own_stand_in_for_natural_text(tmp_path: Path) -> None:
    own = tmp_path / "own.txt"
    own.write_text("\n".join(f"line number {k}" for k in range(300)))
    sets = prompts.standard_sets(100, 20, str(own))
    train, tested = (set(prompts.texts(sets["document", part])) for part in ("train", "test"))
    assert len(train) == 100 and 5 < len(tested) <= 20 and not train & tested
    assert all(text.startswith("line number") for text in train | tested)
    assert sets["index", "train"] == prompts.standard_sets(100, 20)["index", "train"]
    own.write_text("one\ntwo\n")
    with pytest.raises(ValueError, match="has 2 different lines, too few to hold some out"):
        prompts.standard_sets(100, 20, str(own))


DEFAULTS = Notebook.read(ROOT / "notebooks" / "30_logit_bias_expert.ipynb").defaults


def test_a_mistyped_parameter_ends_the_run_before_it_begins() -> None:
    with pytest.raises(
        PlanError, match=r"this run sets .n_trian., a parameter that 30_logit_bias_expert\.ipynb does not"
    ):
        report.stamp("30_logit_bias_expert", DEFAULTS | {"n_trian": 5, "In": [], "_hidden": 1, "report": report})
    with pytest.raises(PlanError, match=r"sets 'n_train' to 'many', but .* declares it as int"):
        report.stamp("30_logit_bias_expert", DEFAULTS | {"n_train": "many"})


def test_a_run_by_hand_is_labelled_as_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.delenv("CHASSIS_RESULTS", raising=False)
    monkeypatch.setattr(report, "BUILD", tmp_path)
    import pandas as pd

    for n, folder in ((DEFAULTS["n_train"], "interactive"), (7, None), (8, None)):
        report.stamp("30_logit_bias_expert", DEFAULTS | {"n_train": n})
        report.save_table(pd.DataFrame({"rank": [n]}), "own")
        assert folder is None or (tmp_path / folder / "tables" / "own.csv").exists()
    folders = sorted(path.name for path in tmp_path.iterdir())
    assert len(folders) == 3 and folders[0] == "interactive" and all(name.startswith("own-") for name in folders[1:])
    assert "own-" in pd.read_csv(tmp_path / folders[1] / "tables" / "own.csv")["profile"].iloc[0]


COMMANDS = {
    "no such notebook": (["run", "99"], "notebook '99' is unknown: choose one of 00_models"),
    "no such parameter": (["run", "30", "--n-trian", "5"], "the command line sets 'n_trian', a parameter that"),
    "another type": (["run", "30", "--n-train", "many"], "sets 'n_train' to 'many', but 30_logit_bias_expert.ipynb"),
    "half a pair": (["run", "30", "--base"], "is no list of `--name value`"),
    "no such file": (["fit", "a", "b", "missing.txt"], "prompt file 'missing.txt' does not exist"),
    "no such model": (["fit", "no/such/model", "b", "{texts}"], "model 'no/such/model' is neither a folder nor"),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_the_command_line_ends_with_one_sentence(case: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "texts.txt").write_text("one\ntwo\n")
    arguments, sentence = COMMANDS[case]
    assert main([argument.format(texts=tmp_path / "texts.txt") for argument in arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("error: ") and sentence in printed.err
    assert printed.err.count("\n") == 1


def test_the_command_line_fits_and_saves_an_adapter(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.txt").write_text("\n".join(f"What is {i} + {i + 3}? It is {2 * i + 3}." for i in range(40)))
    assert main(["fit", "models/port-llama", "models/sibling-math", "texts.txt", "--out", "math"]) == 0
    assert "of the gap closed" in capsys.readouterr().out
    assert json.loads((tmp_path / "math" / "adapter_config.json").read_text())["held_out"]["n"] > 100


def test_the_command_line_runs_a_notebook_on_another_model(tmp_path: Path, monkeypatch, capsys) -> None:
    stories = ROOT.parent / "shared" / "models" / "stories260K"
    if not stories.is_dir():
        pytest.skip("shared/models/stories260K is absent: it is real test data kept beside the repository")
    monkeypatch.setenv("CHASSIS_RESULTS", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert main(["run", "30", "--base", str(stories), "--n-train", "200", "--n-test", "10"]) == 0
    assert (tmp_path / "tables" / "logit_bias.csv").exists()
    assert "own-" in (tmp_path / "tables" / "logit_bias.csv").read_text()
