"""What a user can say, and the checks of it."""

from slime_opd.config.checks import notes, problems, validate
from slime_opd.config.config import Config
from slime_opd.config.help import difference_to_defaults
from slime_opd.config.parser import command_line, parse
from slime_opd.config.yaml_file import to_yaml

__all__ = ["Config", "command_line", "difference_to_defaults", "notes", "parse", "problems", "to_yaml", "validate"]
