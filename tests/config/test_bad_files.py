"""Every file under tests/policies/ says itself what is wrong with it, or loads.

`bad_*.yaml` opens with `# expect: [FILE:]LINE: TEXT` comments: all the problems it has, in order. Files named
`bad_policy_*` and `good_policy_*` are policies, all others stand for gateway.yaml.
"""

import re
import shutil
from pathlib import Path

import pytest

from gateway.config import Settings, load
from gateway.errors import ConfigError

EXAMPLES = Path(__file__).parents[1] / "policies"
BAD = sorted(EXAMPLES.glob("bad_*.yaml"))
GOOD = sorted(EXAMPLES.glob("good_*.yaml"))
ENVIRON = {"NOT_A_NUMBER": "many", "ROUTER_PORT": "3000", "JWT_SECRET": "a-shared-secret-of-enough-characters"}


def load_example(example: Path, directory: Path) -> Settings:
    """The settings of a directory that holds the example and good files for everything else."""
    is_policy = example.name.startswith(("bad_policy_", "good_policy_"))
    (directory / "policies").mkdir()
    shutil.copy(EXAMPLES / "good_smallest.yaml", directory / "gateway.yaml")
    if example.name != "good_policy_trial.yaml":
        shutil.copy(EXAMPLES / "good_policy_trial.yaml", directory / "policies" / "trial.yaml")
    shutil.copy(example, directory / "policies" / example.name if is_policy else directory / "gateway.yaml")
    return load("gateway.yaml", ENVIRON)


def expectations(example: Path) -> list[str]:
    own_name = f"policies/{example.name}" if example.name.startswith("bad_policy_") else "gateway.yaml"
    lines = example.read_bytes().decode("utf-8", "replace").splitlines()
    found = [line.removeprefix("# expect: ") for line in lines if line.startswith("# expect: ")]
    return [f"{own_name}:{line}" if re.match(r"\d+: ", line) else line for line in found]


@pytest.mark.parametrize("example", BAD, ids=lambda path: path.stem)
def test_a_bad_file_is_answered_with_file_line_and_reason(
    example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load_example(example, tmp_path)
    assert expectations(example)
    assert list(caught.value.problems) == expectations(example)


@pytest.mark.parametrize("example", GOOD, ids=lambda path: path.stem)
def test_a_good_file_loads(example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "issuer.pem").write_text("-----BEGIN PUBLIC KEY-----\n")
    assert load_example(example, tmp_path).routes


def test_there_are_at_least_25_bad_files() -> None:
    assert len(BAD) >= 25
