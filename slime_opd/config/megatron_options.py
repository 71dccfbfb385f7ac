"""Options of Megatron-core: the fields of its dataclasses, read from the installed package's source.

The source is parsed, not imported: the import takes torch along, and a wrong flag should be reported at once. A field
that is not set keeps the value of the model, the run or Megatron.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slime_opd.config.conditions import is_set
from slime_opd.config.megatron_rules import RULES
from slime_opd.config.megatron_support import MANAGED, OF_MODEL, SUPPORT
from slime_opd.config.options import flag, option
from slime_opd.config.resume import ARCHITECTURE, COMPARED_SHAPES

# Source file and name of each dataclass, and the part of the run that it configures.
_SOURCES = (
    ("model_parallel_config.py", "ModelParallelConfig", "transformer"),
    ("transformer/transformer_config.py", "TransformerConfig", "transformer"),
    ("transformer/transformer_config.py", "MLATransformerConfig", "latent_attention"),
    ("optimizer/optimizer_config.py", "OptimizerConfig", "optimizer"),
    ("distributed/distributed_data_parallel_config.py", "DistributedDataParallelConfig", "gradients"),
)

_KINDS: dict[str, type] = {"bool": bool, "int": int, "float": float, "str": str}
DTYPES = ("fp32", "bf16", "fp16", "fp8")
# Types with one value per layer: a number, or Megatron-LM's expression of lists such as ([0]*3+[1]*45).
_PATTERNS = ("Union[int, List[int]]",)

# Flags of slime's and Megatron-LM's that are known and not supported, and why.
REFUSED = {
    "--enable-mtp-training": "layers for multi-token prediction stay as they are (see --mtp-num-layers): drop the flag",
}

# Megatron-LM's flags for fields with another name, and the value that a switch stands for.
NAMES: dict[str, tuple[str, str | None]] = {
    "--num-experts": ("num_moe_experts", None),
    "--fp8-format": ("fp8", None),
    "--fp4-format": ("fp4", None),
    "--te-rng-tracker": ("use_te_rng_tracker", "true"),
    "--apply-layernorm-1p": ("layernorm_zero_centered_gamma", "true"),
    "--decoder-first-pipeline-num-layers": ("num_layers_in_first_pipeline_stage", None),
    "--decoder-last-pipeline-num-layers": ("num_layers_in_last_pipeline_stage", None),
    "--overlap-p2p-communication-warmup-flush": ("overlap_p2p_comm_warmup_flush", "true"),
    "--microbatch-group-size-per-virtual-pipeline-stage": ("microbatch_group_size_per_vp_stage", None),
    "--ddp-bucket-size": ("bucket_size", None),
    "--ddp-average-in-collective": ("average_in_collective", "true"),
    # Megatron-LM's one flag for both; here both are one check, which skips the step instead of ending the run.
    "--check-for-nan-in-loss-and-grad": ("check_for_nan_in_grad", "true"),
    "--no-check-for-nan-in-loss-and-grad": ("check_for_nan_in_grad", "false"),
    "--no-masked-softmax-fusion": ("masked_softmax_fusion", "false"),
    "--no-rope-fusion": ("apply_rope_fusion", "false"),
    "--no-bias-gelu-fusion": ("bias_activation_fusion", "false"),
    "--no-bias-swiglu-fusion": ("bias_activation_fusion", "false"),
    "--no-bias-dropout-fusion": ("bias_dropout_fusion", "false"),
    "--no-persist-layer-norm": ("persist_layer_norm", "false"),
    "--no-gradient-accumulation-fusion": ("gradient_accumulation_fusion", "false"),
    "--no-async-tensor-model-parallel-allreduce": ("async_tensor_model_parallel_allreduce", "false"),
    "--disable-tp-comm-overlap-ag": ("tp_comm_overlap_ag", "false"),
    "--disable-tp-comm-overlap-rs": ("tp_comm_overlap_rs", "false"),
    "--disable-tp-comm-bulk-dgrad": ("tp_comm_bulk_dgrad", "false"),
    "--disable-tp-comm-bulk-wgrad": ("tp_comm_bulk_wgrad", "false"),
    "--no-barrier-with-level-1-timing": ("barrier_with_L1_time", "false"),
    "--no-overlap-p2p-communication": ("overlap_p2p_comm", "false"),
    "--no-pin-cpu-grads": ("pin_cpu_grads", "false"),
    "--no-pin-cpu-params": ("pin_cpu_params", "false"),
}

_NO = "--no-"


@dataclass(frozen=True)
class Field:
    """One field of Megatron's: name, the parts of the run that have it, annotation and default as text, and help."""

    name: str
    parts: tuple[str, ...]
    annotation: str
    default: str
    help: str

    @property
    def declared(self) -> tuple[Any, tuple[str, ...]] | None:
        """Its annotation as an option and its choices; None for a type that a command line cannot give."""
        inner = _without_none(self.annotation)
        if inner in _KINDS:
            return _KINDS[inner] | None, ()
        if inner == "torch.dtype":
            return str | None, DTYPES
        if inner.startswith("Literal["):
            return str | None, tuple(ast.literal_eval(inner.removeprefix("Literal")))
        if inner in _PATTERNS:
            return str | None, ()
        for kind in ("int", "str", "float"):
            if inner in (f"List[{kind}]", f"list[{kind}]", f"Tuple[{kind}, {kind}]", f"Union[{kind}, List[{kind}]]"):
                return tuple[_KINDS[kind], ...], ()
        if inner.startswith("Union[str,"):
            return tuple[str, ...], ()
        return None


@functools.cache
def megatron_fields() -> Mapping[str, Field]:
    """Every field of the installed Megatron-core's dataclasses, by name; {} where it is not installed."""
    root = _root()
    found: dict[str, Field] = {}
    if root is None:
        return found
    trees = {file: ast.parse((root / file).read_text(encoding="utf-8")) for file, _, _ in _SOURCES}
    for file, class_name, part in _SOURCES:
        for field in _fields_of(trees[file], class_name, part):
            before = found.get(field.name)
            # The first that has a name describes it; latent attention only changes defaults of what attention has.
            found[field.name] = (
                field
                if before is None
                else dataclasses.replace(before, parts=tuple(dict.fromkeys((*before.parts, part))))
            )
    return found


def make_stage(taken: set[str]) -> type:
    """A configuration stage with an option for each field that a command line can give and that is not in `taken`.

    An option that is not set is None, and keeps what the model, the run or Megatron gives it.
    """
    rows = [
        _declare(field)
        for field in megatron_fields().values()
        if field.name not in taken and field.name not in MANAGED and not field.name.startswith("_") and field.declared
    ]
    stage = dataclasses.make_dataclass(
        "MegatronConfig", rows, frozen=True, kw_only=True, namespace={"on_resume": COMPARED_SHAPES}
    )
    stage.__doc__ = "Megatron-core: its own options under their own names; unset: what the model and the run give"
    return stage


def _declare(field: Field) -> tuple[str, Any, Any]:
    """A field as a row of `dataclasses.make_dataclass`."""
    annotation, choices = field.declared or (None, ())
    is_many = annotation not in [kind | None for kind in _KINDS.values()]
    support = SUPPORT.get(field.name)
    refused = f"not supported: {support.reason}" if support is not None and support.is_refused else ""
    declaration = {
        "help": f"{refused or field.help} (Megatron: {field.default})",
        "choices": choices,
        "metavar": "N or LIST" if _without_none(field.annotation) in _PATTERNS else None,
        "aliases": tuple((alias, value) for alias, (name, value) in NAMES.items() if name == field.name),
        "on_resume": ARCHITECTURE if field.name in OF_MODEL else None,
    }
    if field.parts == ("latent_attention",):
        # Even Megatron's default describes latent attention; a switch that is off does not.
        declaration |= {"only_with": (is_set("multi_latent_attention"),), "is_implied": lambda value: value is False}
    else:
        declaration["is_implied"] = functools.partial(is_default, field.name)
    return field.name, annotation, option(() if is_many else None, **(declaration | RULES.get(field.name, {})))


def resolve_alias(flag_name: str, stage_names: set[str]) -> tuple[str, str | None] | None:
    """The field of a flag that is not a field's name, and the value that the flag stands for, if any.

    Megatron-LM's names (`NAMES`), and `--no-X` for a switch X.
    """
    if flag_name in NAMES:
        return NAMES[flag_name]
    name = flag_name.removeprefix(_NO).replace("-", "_")
    field = megatron_fields().get(name)
    is_switch = field is not None and _without_none(field.annotation) == "bool"
    return (name, "false") if flag_name.startswith(_NO) and is_switch and name in stage_names else None


def values_for(stage: Any, part: str, skip: frozenset[str] = frozenset()) -> dict[str, Any]:
    """The fields of one part of the run that a stage sets, as Megatron's dataclasses take them; dtypes by name.

    Fields in `skip` are left out. Raises ValueError where a pattern of layers cannot be read.
    """
    found = {}
    for row in dataclasses.fields(stage):
        value, field = getattr(stage, row.name), megatron_fields()[row.name]
        if value is None or value == () or part not in field.parts or row.name in skip:
            continue
        inner = _without_none(field.annotation)
        if inner in _PATTERNS:
            value = layer_pattern(value)
        elif inner.startswith("Union[") and isinstance(value, tuple):
            value = value[0] if len(value) == 1 else list(value)
        elif inner.startswith(("List[", "list[")):
            value = list(value)
        found[row.name] = value
    return found


def pattern_problems(stage: Any) -> list[str]:
    """Patterns of layers that cannot be read."""
    problems = []
    for name, field in megatron_fields().items():
        value = getattr(stage, name, None)
        if value is None or _without_none(field.annotation) not in _PATTERNS:
            continue
        try:
            layer_pattern(value)
        except ValueError as error:
            problems.append(f"{flag(name)}: {error}")
    return problems


def is_default(name: str, value: Any) -> bool:
    """Whether an option's value is the default of Megatron's dataclass."""
    text = megatron_fields()[name].default
    values = value if isinstance(value, tuple) else (value,)
    if len(values) != 1:
        return False
    (one,) = values
    if isinstance(one, bool):
        return text == ("on" if one else "off")
    if isinstance(one, str):
        return text == {"fp32": "float32"}.get(one, one)
    try:
        return float(text) == one
    except ValueError:
        return False


def layer_pattern(text: str) -> int | list[int]:
    """`4`, `[0,1,1]` or `([0]*3+[1]*45)`: one number, or one for each layer. Raises ValueError for anything else.

    Quotes around it, which some scripts carry through the shell, are taken off.
    """
    try:
        return _pattern_of(ast.parse(text.strip().strip("'\""), mode="eval").body)
    except (SyntaxError, TypeError, ValueError):
        raise ValueError(f"found {text!r}, expected a whole number or lists of them such as [0]*3+[1]*45") from None


def _pattern_of(node: ast.expr) -> Any:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.List):
        return [_pattern_of(item) for item in node.elts]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Mult):
        left, right = _pattern_of(node.left), _pattern_of(node.right)
        if isinstance(node.op, ast.Add) and isinstance(left, list) and isinstance(right, list):
            return left + right
        # A longer list is a typing error.
        if (
            isinstance(node.op, ast.Mult)
            and isinstance(left, list)
            and type(right) is int
            and len(left) * right < 10**5
        ):
            return left * right
    raise ValueError(ast.dump(node))


def _root() -> Path | None:
    spec = importlib.util.find_spec("megatron")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(place) / "core" / _SOURCES[0][0]).is_file():
            return Path(place) / "core"
    return None


def _fields_of(tree: ast.Module, class_name: str, part: str) -> Iterator[Field]:
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == class_name)
    for node, after in zip(body, [*body[1:], None], strict=True):
        if not isinstance(node, ast.AnnAssign):
            continue
        text = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else ""
        yield Field(node.target.id, (part,), ast.unparse(node.annotation), _default(node.value), _first_sentence(text))


def _default(node: ast.expr | None) -> str:
    """A default as text; that of `field(default=x, …)` is x."""
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "field":
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        node = given.get("default")
    text = "none" if node is None else ast.unparse(node)
    return {"None": "none", "True": "on", "False": "off"}.get(text, text.strip("'").removeprefix("torch."))


def _first_sentence(text: str) -> str:
    words = " ".join(text.split())
    sentence, _, _ = words.partition(". ")
    return sentence.rstrip(".") or "no description"


def _without_none(annotation: str) -> str:
    """`Optional[X]`, `Union[X, None]` and X are all X."""
    if annotation.startswith("Optional["):
        return annotation.removeprefix("Optional[").removesuffix("]")
    return annotation
