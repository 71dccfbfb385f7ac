"""Options that differ between a checkpoint's run and the resumed run: each is honoured or refused, never ignored.

What happens to each is declared beside the option, as `on_resume` (config/resume.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from slime_opd.config import Config
from slime_opd.config.options import flag, options_of
from slime_opd.config.resume import HONOURED


@dataclass(frozen=True)
class Difference:
    """An option whose value differs. `effect`: how the resumed run treats it."""

    name: str
    saved: Any
    now: Any
    effect: str
    is_refused: bool

    @property
    def flag(self) -> str:
        """The option as on a command line."""
        return flag(self.name)


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[Difference]:
    """Options that differ, in the order of their declarations; both arguments are `record.public_values`.

    An option that one of them lacks has its default there.
    """
    options = options_of(Config)
    loads_optimizer = not now.get("no_load_optim")
    result = []
    for name in dict.fromkeys((*options, *now, *saved)):
        option = options.get(name)
        default = None if option is None else option.default
        default = list(default) if isinstance(default, tuple) else default
        before, after = saved.get(name, default), now.get(name, default)
        if before != after and (option is None or option.on_resume.is_compared):
            effect, is_refused = effect_of(name, loads_optimizer=loads_optimizer)
            result.append(Difference(name, before, after, effect, is_refused))
    return result


def effect_of(name: str, *, loads_optimizer: bool = True) -> tuple[str, bool]:
    """What a resumed run does about a changed option, and whether it refuses."""
    option = options_of(Config).get(name)
    if option is None:
        # An option of SGLang's engines, which start anew; or one that this version no longer has.
        return HONOURED.effect if name.startswith("sglang-") else "unknown to this version", False
    rule = option.on_resume
    if rule.of_optimizer_state and not loads_optimizer:
        rule = HONOURED
    return rule.effect, rule.is_refused


def table(differing: list[Difference]) -> list[str]:
    """The differences as aligned lines, with a heading."""
    rows = [("option", "saved", "now", "on resume")]
    rows += [
        (one.flag, _shown(one.saved), _shown(one.now), f"refused: {one.effect}" if one.is_refused else one.effect)
        for one in differing
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def refusals(differing: list[Difference]) -> list[str]:
    """An error message for each option that may not change."""
    return [
        f"{one.flag} is {_shown(one.now)}, but the checkpoint was saved with {_shown(one.saved)}: {one.effect}"
        for one in differing
        if one.is_refused
    ]


def _shown(value: Any) -> str:
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return "on" if value else "off"
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 40 else f"…{text[-39:]}"
