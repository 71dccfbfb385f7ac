"""User functions: how they are imported, and the arguments they are called with."""

import textwrap

import numpy as np
import pytest

from slime_opd.config import parse
from slime_opd.errors import ConfigError
from slime_opd.hooks import Arguments, load_hook, slime_sample
from slime_opd.types import Prompt, Sample, Status

FLAG = "--custom-rm-path"


@pytest.fixture
def module(tmp_path, monkeypatch, request):
    """Write a module with a unique name; returns the name."""
    monkeypatch.syspath_prepend(tmp_path)
    count = iter(range(100))

    def write(source: str) -> str:
        name = f"hook_{abs(hash(request.node.name)) % 10**8}_{next(count)}"
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(source))
        return name

    return write


def sample():
    made = Sample(Prompt(3, (1, 2), "p", "42", {"a": 1}), (5, 6, 7), "abc", Status.TRUNCATED)
    made.set("loss_mask", np.ones(3))
    made.set("reward", 0.5)
    return made


@pytest.mark.parametrize(
    ("definition", "takes_args"),
    [
        ("def f(sample): ...", False),
        ("def f(args, sample): ...", True),
        ("async def f(args, sample, **kwargs): ...", True),
        ("def f(sample, *, scale=1): ...", False),
        ("def f(sample, scale=1): ...", False),
        ("def f(*args): ...", False),
        ("class C:\n    def __call__(self, args, sample): ...\nf = C()", True),
        ("f = len", False),
        ("import functools\ndef g(scale, sample): ...\nf = functools.partial(g, 1)", False),
    ],
)
def test_the_number_of_required_parameters_decides_the_signature(module, definition, takes_args):
    assert load_hook(FLAG, f"{module(definition)}.f", "sample").takes_args is takes_args


@pytest.mark.parametrize(
    ("definition", "found"),
    [
        ("def f(): ...", "takes ()"),
        ("def f(a, b, c): ...", "takes (a, b, c)"),
        ("def f(sample, *, key): ...", "takes (sample, *, key)"),
        ("def f(sample, args): ...", "takes (sample, args)"),
        ("def f(**kwargs): ...", "takes (**kwargs)"),
    ],
)
def test_other_signatures_are_refused_with_the_two_that_are_accepted(module, definition, found):
    name = module(definition)
    with pytest.raises(ConfigError) as caught:
        load_hook(FLAG, f"{name}.f", "sample")
    assert str(caught.value).startswith(f"{FLAG} {name}.f: {found}, expected (sample) or slime's (args, sample)")


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("import not_installed_here", "imports not_installed_here, which is not installed here"),
        ("from json import not_in_json", "ImportError: cannot import name 'not_in_json'"),
        ("x = 1\ndef f(sample:\n    return 1", ".py, line 2: '(' was never closed"),
        ("import sys\nsys.exit()", "calls sys.exit"),
        ("import os\nos.environ['NOT_SET_ANYWHERE']", "raises KeyError: 'NOT_SET_ANYWHERE'"),
        ("f = 1", "'f' of"),
        ("", "has no function 'f'"),
    ],
)
def test_a_module_that_cannot_be_imported_is_refused_in_one_sentence(module, source, sentence):
    name = module(source)
    with pytest.raises(ConfigError) as caught:
        load_hook(FLAG, f"{name}.f", "sample")
    message = str(caught.value)
    assert message.startswith(f"{FLAG} {name}.f: ") and sentence in message and "\n" not in message


def test_an_exception_names_the_line_of_the_user_not_of_the_library(module):
    name = module("import os\n\nos.environ['NOT_SET_ANYWHERE']")
    with pytest.raises(ConfigError, match=rf"{name}\.py, line 3\)"):
        load_hook(FLAG, f"{name}.f", "sample")


def test_args_has_every_option_under_slimes_name_and_is_read_only():
    args = Arguments(parse(["--rollout-max-response-len", "7", "--hf-checkpoint", "x", "--rm-type", "math"]))
    assert (args.rollout_max_response_len, args.hf_checkpoint, args.rm_type, args.n_samples_per_prompt) == (
        7,
        "x",
        "math",
        1,
    )
    assert getattr(args, "reward_key", None) is None
    with pytest.raises(AttributeError, match=r"no option --reward-key"):
        args.reward_key  # noqa: B018
    with pytest.raises(AttributeError, match="read-only"):
        args.rm_type = "other"
    assert "rollout_max_response_len" in dir(args)


def test_a_function_gets_our_sample_or_slimes_args_and_sample(module):
    name = module(
        """
        def ours(sample): return sample.prompt.label
        def slimes(args, sample): return (args.rm_type, sample.label, sample.prompt, sample.response, sample.response_length, sample.tokens, sample.metadata)
        def group(args, samples): return [s.get_reward_value(args) for s in samples]
        """
    )
    config = parse(["--rm-type", "math"])
    assert load_hook(FLAG, f"{name}.ours", "sample").bind(config)(sample()) == "42"
    assert load_hook(FLAG, f"{name}.slimes", "sample").bind(config)(sample()) == (
        "math", "42", "p", "abc", 3, [1, 2, 5, 6, 7], {"a": 1},
    )  # fmt: skip
    assert load_hook(FLAG, f"{name}.group", "samples").bind(config)([sample(), sample()]) == [0.5, 0.5]


def test_a_sample_in_slimes_form_is_a_copy():
    original = sample()
    view = slime_sample(original)
    view.metadata["new"] = 1
    assert original.prompt.metadata == {"a": 1}
    assert view.status is view.Status.TRUNCATED and view.loss_mask == [1.0, 1.0, 1.0] and view.rollout_log_probs is None
