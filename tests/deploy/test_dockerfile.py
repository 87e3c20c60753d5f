"""The Dockerfile: a linter's opinion, and what the image must be. It is not built here: that takes an engine."""

import json
import re
import subprocess
import sys
from pathlib import Path

from gateway.api import health
from gavel.settings import PREFIX, Settings
from tests.deploy.manifests import DOCKERFILE, ROOT

INSTRUCTIONS = [
    # An instruction with its continued lines, without comments.
    (instruction, re.sub(r"\\\n\s*", "", arguments).strip())
    for instruction, arguments in re.findall(
        r"^([A-Z]+) ((?:.*\\\n)*.*)$", DOCKERFILE.read_text(encoding="utf-8"), re.MULTILINE
    )
]
LAST_STAGE = INSTRUCTIONS[max(index for index, (name, _) in enumerate(INSTRUCTIONS) if name == "FROM") :]


def only(name: str) -> str:
    """The arguments of the one instruction of this name in the stage that becomes the image."""
    (arguments,) = (given for instruction, given in LAST_STAGE if instruction == name)
    return arguments


def test_the_linter_has_nothing_to_say() -> None:
    linter = Path(sys.executable).with_name("hadolint")
    ran = subprocess.run([linter, "--failure-threshold", "style", DOCKERFILE], check=False, capture_output=True)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, b"", b"")


def test_it_stands_on_a_version() -> None:
    bases = {arguments.split()[0] for name, arguments in INSTRUCTIONS if name == "FROM"}
    (base,) = bases
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", base)


def test_all_libraries_are_from_the_lock_with_their_hashes() -> None:
    installs = [given for name, given in INSTRUCTIONS if name == "RUN" and "pip install" in given]
    locked, ours = installs
    assert "--require-hashes --requirement requirements.lock" in locked
    assert "--no-deps --no-build-isolation ." in ours


def test_it_runs_as_nobody_special() -> None:
    assert int(only("USER").split(":")[0]) > 0


def test_it_holds_no_secret() -> None:
    assert not [name for name, _ in INSTRUCTIONS if name == "ARG"]
    for name, arguments in INSTRUCTIONS:
        if name == "ENV":
            assert not re.search(r"SECRET|PASSWORD|TOKEN|KEY|DATABASE_URL", arguments)


def test_its_settings_are_settings() -> None:
    given = {name.removeprefix(PREFIX).lower() for name in re.findall(rf"({PREFIX}\w+)=", only("ENV"))}
    assert given == {"host", "data_dir"}
    assert given <= Settings.model_fields.keys()


def test_signals_reach_gavel_up() -> None:
    assert json.loads(only("ENTRYPOINT")) == ["tini", "--", "gavel", "up"]


def test_the_port_and_the_health_are_those_of_the_gateway() -> None:
    port = Settings.model_fields["port"].default
    assert only("EXPOSE") == str(port)
    paths = {getattr(route, "path", None) for route in health.root.routes}
    (asked,) = re.findall(rf"http://127\.0\.0\.1:{port}(/\w+)'", only("HEALTHCHECK"))
    assert asked in paths


def test_its_health_check_is_python() -> None:
    command = json.loads(only("HEALTHCHECK").split("CMD", 1)[1])
    assert command[:2] == ["python", "-c"]
    compile(command[2], "HEALTHCHECK", "exec")


def test_it_is_made_of_all_packages_and_of_nothing_else() -> None:
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    lines = [line for line in ignored if line and not line.startswith("#")]
    assert lines[0] == "*"
    let_in = {line[1:] for line in lines if line.startswith("!")}
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
    assert let_in == packages | {"pyproject.toml", "README.md", "requirements.lock"}
