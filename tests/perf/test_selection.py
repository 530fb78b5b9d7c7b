"""Selection of configurations by sets, crossed options and test ids, without importing torch."""

from __future__ import annotations

import subprocess
import sys

import pytest
from inner_session import inner_fixture, machine_fixture  # noqa: F401

from perf.analysis.verdicts import ExitCode
from perf.configurations.configuration import CHOICES, usual
from perf.configurations.sets import SETS
from perf.launch.process import ROOT, Interpreter
from perf.plugin import selection
from sd.choices import OPTIMISE_PRESETS

FIVE = ["original", "original-xformers", "mha-math", "mha-mem_efficient", "mha-mem_efficient-compile"]
PUBLISHED_TINY = [f"tiny-{name}-b{batch}" for batch in (1, 2, 4) for name in FIVE]


@pytest.fixture
def chosen(inner):
    """The ids that a command line selects, by collection only."""

    def choose(*arguments) -> list[str]:
        result = inner.pytester.runpytest_inprocess("--collect-only", "-q", "-p", "no:xdist", *arguments)
        assert result.ret in (0, pytest.ExitCode.NO_TESTS_COLLECTED), result.stdout.str() + result.stderr.str()
        assert inner.machine.opened == []
        return [line[:-1].partition("[")[2] for line in result.outlines if line.endswith("]") and "::" in line]

    return choose


def ids(name: str) -> list[str]:
    return [one.id for one in SETS[name]]


def test_default_set_of_a_cpu(chosen):
    assert chosen() == ids("smoke") == chosen("--device=cpu")


@pytest.mark.parametrize(
    "arguments, selected",
    [
        ((), False),
        (("--benchmark-disable",), True),  # called once without timing
        (("test_long.py",), True),
        (("test_long.py::test_long",), True),
        (("-m", "slow"), True),
        (("-m", "smoke"), False),
    ],
)
def test_slow_benchmark_without_a_configuration_runs_only_if_named(inner, arguments, selected):
    long = "import pytest\n\n\n@pytest.mark.slow\ndef test_long(benchmark): benchmark(int)\n"
    inner.pytester.makepyfile(
        test_long=long, test_tests="import pytest\n\n\n@pytest.mark.slow\ndef test_slow(): pass\n"
    )
    inner.pytester.makeini("[pytest]\nmarkers = slow\n")
    result = inner.pytester.runpytest_inprocess("--collect-only", "-q", "-p", "no:xdist", *arguments)
    assert ("test_long.py::test_long" in result.outlines) == selected, result.stdout.str()
    if not arguments:
        assert "test_tests.py::test_slow" in result.outlines  # a test, not a benchmark


def test_default_set_of_a_gpu(chosen):
    assert sorted(chosen("--device=cuda")) == sorted(ids("batches"))


@pytest.mark.parametrize("name", SETS)
def test_set_by_its_marker(chosen, name):
    assert sorted(chosen("-m", name)) == sorted(ids(name))


def test_published_on_the_embedded_model(chosen):
    assert chosen("-m", "published", "--model=tiny") == PUBLISHED_TINY


def test_published_at_one_batch(chosen):
    assert chosen("-m", "published", "--model=tiny", "--batch=2") == [f"tiny-{name}-b2" for name in FIVE]


def test_two_sets(chosen):
    assert sorted(chosen("-m", "smoke or stages")) == sorted(ids("smoke") + ids("stages"))


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--model=tiny", "--model=sd1"], ["tiny-sdpa-b1", "sd1-sdpa-b1"]),
        (["--attention=original", "--attention=mha"], ["tiny-original-b1", "tiny-mha-b1"]),
        (["--sdpa-kernels=math,flash", "--sdpa-kernels=math"], ["tiny-sdpa-math-flash-b1", "tiny-sdpa-math-b1"]),
        (["--compile=none", "--compile=default"], ["tiny-sdpa-b1", "tiny-sdpa-compile-b1"]),
        (["--compile=default", "--compile-scope=blocks"], ["tiny-sdpa-compile-blocks-b1"]),
        (["--precision=bf16", "--precision=full"], ["tiny-sdpa-bf16-b1", "tiny-sdpa-b1"]),
        (["--optimise=fast", "--optimise=none"], ["tiny-preset-fast-b1", "tiny-preset-none-b1"]),
        (["--batch=1", "--batch=4"], ["tiny-sdpa-b1", "tiny-sdpa-b4"]),
        (["--steps=2", "--steps=50"], ["tiny-sdpa-plms2-b1", "tiny-sdpa-b1"]),
        (["--sampler=ddim", "--sampler=euler"], ["tiny-sdpa-ddim50-b1", "tiny-sdpa-euler50-b1"]),
        (["--size=64", "--size=64x128"], ["tiny-sdpa-64x64-b1", "tiny-sdpa-64x128-b1"]),
        (["--device=cpu", "--device=cuda", "--model=tiny"], ["tiny-sdpa-cpu-b1", "tiny-sdpa-cuda-b1"]),
        (["--device=cpu", "--batch=2"], ["tiny-sdpa-b2"]),
        (["--attention=mha", "--attention=original", "--sdpa-kernels=math"], ["tiny-mha-math-b1", "tiny-original-b1"]),
        (["--batch=2", "--batch=2"], ["tiny-sdpa-b2"]),
        (["--model=tiny", f"--perf-python=this={sys.executable}"], ["tiny-sdpa-b1", "tiny-sdpa-this-b1"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else "",
)
def test_options_cross(chosen, arguments, expected):
    assert chosen(*arguments) == expected


def test_all_options_are_crossed_with_each_other(chosen):
    arguments = [f"--{name}={value}" for name, values in (("attention", "original mha"), ("batch", "1 2"), ("steps", "2 3"))
                 for value in values.split()]  # fmt: skip
    expected = [f"tiny-{a}-plms{s}-b{b}" for a in ("original", "mha") for b in (1, 2) for s in (2, 3)]
    assert sorted(chosen(*arguments)) == sorted(expected)


def test_weights_by_their_file(chosen, inner):
    (inner.path / "mine.safetensors").write_text("")
    (inner.path / "mine.yaml").write_text("")
    assert chosen("--model=tiny", "--ckpt=mine.safetensors", "--config=mine.yaml") == ["tiny-mine-sdpa-b1"]


def test_keyword(chosen):
    assert chosen("-k", "mha") == [id for id in ids("smoke") if "mha" in id]


def test_node_id_of_another_set(chosen):
    assert chosen("suite/test_measured.py::test_txt2img[sd2-original-b4]") == ["sd2-original-b4"]


def test_node_id_beside_the_default_set(chosen):
    named = "suite/test_measured.py::test_txt2img[sd2-original-b4]"
    assert sorted(chosen(named, "suite")) == sorted(["sd2-original-b4", *ids("smoke")])


def test_empty_selection(inner):
    assert inner.run("-m", "smoke and published").ret == pytest.ExitCode.NO_TESTS_COLLECTED
    assert inner.machine.opened == []


def test_unknown_set(inner):
    """pytest 9 rejects the name; older versions select no test, which is a failure too."""
    assert inner.run("-m", "nonsense").ret in (ExitCode.REFUSED, pytest.ExitCode.NO_TESTS_COLLECTED)
    assert inner.machine.opened == []


def test_two_weights_of_one_name(inner):
    for folder in ("a", "b"):
        (inner.path / folder).mkdir()
        (inner.path / folder / "mine.ckpt").write_text("")
    assert inner.run("--model=tiny", "--ckpt=a/mine.ckpt", "--ckpt=b/mine.ckpt", what=()).ret == ExitCode.REFUSED
    inner.prints("two configurations are both called tiny-mine-original-b1")


def test_markers_have_summaries():
    lines = selection.markers()
    assert len(lines) == len(SETS) + 2 and all(line.partition(": ")[2] for line in lines)


CROSSED = {
    **{field: values for field, values in CHOICES.items() if field not in ("engine", "workload")},
    "sdpa_kernels": tuple((kernel,) for kernel in CHOICES["sdpa_kernels"]),
    "optimise": (*OPTIMISE_PRESETS, "channels_last", "fast,channels_last"),
    "batch": (1, 3),
}


@pytest.mark.parametrize("device", CHOICES["device"])
@pytest.mark.parametrize("field", CROSSED)
def test_ids_stay_unique_for_every_option_value(field, device):
    """Options cross into all sets, and two configurations with one id are an error in any of them."""
    for values in ([[one] for one in CROSSED[field]], [list(CROSSED[field])]):
        for chosen in values:
            parameters = selection.parameters({field: chosen}, device)
            assert len({one.id for one in parameters}) == len(parameters) > 0


def test_matrix_starts_from_the_defaults():
    values = {"batch": [2]}
    for device, model in (("cuda", "sd2"), ("cpu", "tiny")):
        matrix = [
            one.values[0] for one in selection.parameters(values, device) if any(m.name == "matrix" for m in one.marks)
        ]
        assert [(one.model, one.batch, one.attention) for one in matrix] == [(model, 2, usual(model).attention)]


def test_collecting_imports_no_torch(tmp_path):
    """Editors collect the real tree all the time."""
    code = (
        "import sys, pytest\n"
        "status = pytest.main(['perf/test_txt2img.py', '--collect-only', '-q', '-p', 'no:cacheprovider'])\n"
        "sys.exit(status or ('torch' in sys.modules and 'torch was imported') or 0)\n"
    )
    environment = {**Interpreter().variables(), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_txt2img[tiny-sdpa-" in done.stdout
