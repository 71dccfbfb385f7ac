"""The options of a run: declarations, command line, YAML file, and the checks of them."""

from slime_opd.config.config import Config
from slime_opd.config.parser import command_line, parse
from slime_opd.config.yaml_file import to_yaml

__all__ = ["Config", "command_line", "parse", "to_yaml"]
