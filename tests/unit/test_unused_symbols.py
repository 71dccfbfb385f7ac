"""No function, class, constant or attribute of the package is there for nothing: slime_opd/ or tools/ reads its name.

A use by tests alone is no use. Parameters and local variables are ruff's part (ARG, F841).
"""

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(file for folder in ("slime_opd", "tools") for file in (ROOT / folder).rglob("*.py"))

# What a library, a user's function or a reader of a file calls or reads by name.
CALLED_FROM_OUTSIDE = {
    "checkpoint/formats/torch_dist.py": {"resolve_tensor", "commit_tensor", "resolve_data"},  # torch's LoadPlanner
    "checkpoint/start_table.py": {"rules_as_markdown", "meanings_as_markdown"},  # a test prints docs/ from them
    "checkpoint/safe_metadata.py": {"find_class"},  # pickle.Unpickler
    # Accepted and without effect in any run, as scripts for slime and Megatron-LM have them.
    "config/stages.py": {"num_gpus_per_node"},
    "config/model_stages.py": {"mtp_num_layers", "no_position_embedding", "use_rotary_position_embeddings"},
    "config/training_stages.py": {"balance_data", "seq_length"},
    "engine/cpu_launcher.py": {"create_module", "exec_module"},  # importlib's Loader
    "hooks.py": {"get_reward_value"},  # functions written for slime's Sample
    "model/hidden_states.py": {"_postprocess"},  # megatron-core's GPTModel
    "model/experts.py": {"backward_dw"},  # megatron-core's experts
    "model/families/deepseek_v3.py": {"DeepseekV3", "_build_config"},  # registered by decorator; mbridge's Bridge
    "model/families/glm4.py": {"Glm4", "_ATTENTION_MAPPING", "_build_config"},
    "model/families/glm4_moe.py": {"Glm4Moe", "_build_config"},
    "model/families/mimo.py": {"MiMo"},
    "model/families/mixtral.py": {"Mixtral", "_build_config"},
    "rehearsal/syncs.py": {"avoid_device_init"},  # torch's FakeTensorMode
    "drill/results.py": {"output_lines", "steps_known"},  # in the drill's file of results
}
# Symbols that predate this check and are to be deleted; only shrinks.
TO_DELETE: dict[str, set[str]] = {
    "distill/token_reward.py": {"WEIGHT_MODES"},
    "engine/control.py": {"destroy_weights_update_group"},
    "engine/protocol.py": {"has_tokenizer"},
    "lifetimes/__init__.py": {"scope_mapping", "scope_of_process"},
    "rehearsal/step.py": {"setup_syncs"},
    "types.py": {"loaded_from"},
}


def definitions(tree: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Names that a file defines, with their definitions: functions, classes, constants, fields, attributes of self."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, node
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.attr, node
        if isinstance(node, ast.Module | ast.ClassDef):
            for statement in node.body:
                if isinstance(statement, ast.Assign | ast.AnnAssign):
                    targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
                    names = [name for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]
                    yield from ((name.id, statement) for name in names)


def uses(tree: ast.AST) -> Counter[str]:
    """How often each name is read; a string that is equal to a name reads it, except in `__all__`."""
    counts: Counter[str] = Counter()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            counts[node.id] += isinstance(node.ctx, ast.Load)
        elif isinstance(node, ast.Attribute):
            counts[node.attr] += not isinstance(node.ctx, ast.Store)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            counts[node.value] += 1
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            counts.subtract(uses(node.value))
    return counts


def unused(trees: dict[str, ast.AST]) -> dict[str, set[str]]:
    """For each file, the names it defines that no file reads outside their own definition."""
    total: Counter[str] = Counter()
    for tree in trees.values():
        total.update(uses(tree))
    found: dict[str, set[str]] = {}
    for file, tree in trees.items():
        for name, definition in definitions(tree):
            if not name.startswith("__") and total[name] <= uses(definition)[name]:
                found.setdefault(file, set()).add(name)
    return found


def test_every_symbol_is_used():
    trees = {
        str(file.relative_to(ROOT)).split("/", 1)[1]: ast.parse(file.read_text(encoding="utf-8")) for file in FILES
    }
    found = unused(trees)
    expected = {
        file: CALLED_FROM_OUTSIDE.get(file, set()) | TO_DELETE.get(file, set())
        for file in CALLED_FROM_OUTSIDE | TO_DELETE
    }
    assert found == expected


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def f(): return f()", {"f"}),
        ("class A:\n  x: int = 0\n  def g(self): self.y = 1\nA().g()", {"x", "y"}),
        ("A = 1\n__all__ = ['A']", {"A"}),
        ("def f(): pass\ngetattr(m, 'f')", set()),
        ("class A:\n  x = 1\nprint(A.x)", set()),
    ],
)
def test_an_unused_symbol_would_be_seen(source, expected):
    assert unused({"file": ast.parse(source)}).get("file", set()) == expected
