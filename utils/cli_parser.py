"""The parser behind every command line: jsonargparse's, with messages for the person at the keyboard.

It finds everything that is wrong with flags and config files before it raises one UserError: each problem with the flag
(or the file and key), the value, and what the setting takes. For that it overrides private methods of jsonargparse and
argparse; poetry.lock pins jsonargparse, and tests/test_command_line.py fails if a version no longer calls them.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import types
import typing
from collections.abc import Iterable
from typing import Any

import jsonargparse

from utils.errors import Problems, UserError

MAX_SHOWN_CHARACTERS = 80

# Configs are files on this machine's file system: no URL, no fsspec path.
jsonargparse.set_parsing_settings(
    docstring_parse_attribute_docstrings=True,
    config_read_mode_urls_enabled=False,
    config_read_mode_fsspec_enabled=False,
)


class ConfigFile(jsonargparse.ActionConfigFile):
    """`--config=FILE`."""

    def __call__(self, parser, namespace, path, option_string=None):
        if not os.path.exists(path):
            raise UserError(f"--config={path}: no such file.")
        if os.path.isdir(path) or not os.access(path, os.R_OK):
            raise UserError(f"--config={path}: is a directory, or cannot be read. Give a YAML file.")
        super().__call__(parser, namespace, path, option_string)


class Parser(jsonargparse.ArgumentParser):
    def __init__(self, *args, **kwargs):
        self.problems = Problems()
        self.file = None  # the --config that is being read
        super().__init__(*args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> typing.NoReturn:
        """Called with what the library itself found, where it stops."""
        fault = getattr(ex, "__cause__", None)
        if self.file is not None and message.startswith("Problems parsing config"):
            message = f"--config={self.file}: {_describe_yaml_error(fault)}"
        elif self.file is not None and message.startswith("Unexpected config"):
            message = f"--config={self.file}: holds no settings. Write them as KEY: VALUE lines."
        key = re.match(r'Parser key "([^"]+)"', message)
        if key and key[1] in self.groups:
            message = f"--{key[1]}: is a section. Give its settings one by one, as --{key[1]}.KEY=VALUE."
        elif key:  # an entry of a mapping, --data_mixture.DIRECTORY=WEIGHT
            hint = {action.dest: getattr(action, "_typehint", None) for action in self._actions}.get(key[1])
            message = f"--{key[1]}: must be {_describe(hint)}" if hint else message
        for prefix in ("Validation failed: ", "Parser ", "argument "):
            message = message.removeprefix(prefix)
        self.problems.add(message)
        self._raise_problems(ex)

    def _raise_problems(self, cause: Exception | None = None) -> None:
        *others, last = self.problems.found
        where = f"All settings: `python {self.prog} --help`; as YAML: `python {self.prog} --print_config`."
        raise UserError([*others, f"{last}\n{where}"]) from cause

    def parse_path(self, cfg_path, *args, **kwargs):
        outer, self.file = self.file, cfg_path
        try:
            return super().parse_path(cfg_path, *args, **kwargs)
        except UnicodeDecodeError as error:
            raise UserError(f"--config={cfg_path}: not a text file in UTF-8. Give a YAML file.") from error
        finally:
            self.file = outer

    def _apply_actions(self, cfg, parent_key: str = "", **kwargs):
        """A config file's content becomes settings."""
        if self.file is not None and isinstance(cfg, dict) and not parent_key:
            cfg = self._known(cfg)
        return super()._apply_actions(cfg, parent_key, **kwargs)

    def _known(self, section: dict, prefix: str = "") -> dict:
        """The section without unknown keys, which become problems, and without empty sections."""
        settings = [action.dest for action in self._actions if action.dest not in self.groups]
        known = {}
        for name, value in section.items():
            key = f"{prefix}{name}"
            if key in settings:
                known[name] = value
            elif not any(setting.startswith(f"{key}.") for setting in settings):
                self.problems.add(f"--config={self.file}: unknown key {key}.{_did_you_mean(key, settings)}")
            elif isinstance(value, dict):
                known[name] = self._known(value, f"{key}.")
            elif value is not None:
                self.problems.add(
                    f"--config={self.file}: {key}: {_shown(value)}: must be a section of KEY: VALUE lines"
                )
        return known

    def _get_values(self, action, arg_strings):
        """The words after a flag become its value, still a string; the flag's action turns it into a setting."""
        value = super()._get_values(action, arg_strings)
        hint = getattr(action, "_typehint", None)
        one_entry = any(word.startswith(f"--{action.dest}.") for word in self.args)  # --data_mixture.DIRECTORY=WEIGHT
        if hint is None or one_entry or not isinstance(value, str):
            return value
        num_before = len(self.problems.found)
        self._check_value_key(action, value, action.dest, None)
        if len(self.problems.found) == num_before:
            return _whole_number(value, hint)
        if action.dest in self.required_args:  # no default to go on with
            self._raise_problems()
        return action.default

    def _check_value_key(self, action, value, key, cfg, append=False):
        """The setting from a value of a flag or a file; a wrong one becomes a problem, and the default is used."""
        hint = getattr(action, "_typehint", None)
        if hint is None:
            return super()._check_value_key(action, value, key, cfg, append)
        optional = type(None) in typing.get_args(hint) or key in self.required_args
        try:
            if value is None and self.file is not None and not optional:
                raise TypeError("null")
            return super()._check_value_key(action, _whole_number(value, hint), key, cfg, append)
        except TypeError:
            place = f"--{key}=" if self.file is None else f"--config={self.file}: {key}: "
            near = _did_you_mean(value, _choices(hint)) if isinstance(value, str) else ""
            self.problems.add(f"{place}{_shown(value)}: must be {_describe(hint)}{'.' if near else ''}{near}")
            return action.default

    def _parse_known_args(self, *args, **kwargs):
        """All flags and files have been read: say what is wrong with them."""
        namespace, unknown = super()._parse_known_args(*args, **kwargs)
        for word, before in zip(unknown, ["", *unknown]):
            flag = word.partition("=")[0]
            if word.startswith("-"):
                self.problems.add(f"{flag}: unknown flag.{_did_you_mean(flag, self._option_string_actions)}")
            elif not before.startswith("-") or "=" in before:
                self.problems.add(f"{word}: unexpected argument. Flags start with --.")
        # A missing flag may be the one that was misspelt; --print_config does without it.
        if not self.problems.found and not hasattr(self, "print_config"):
            for action in self._actions:
                if action.dest in self.required_args and namespace.get(action.dest) is None:
                    name = f"--{action.dest}" if action.option_strings else action.dest
                    self.problems.add(f"{name} is missing. {' '.join(action.help.split())}")
        if self.problems.found:
            self._raise_problems()
        return namespace, unknown


def _did_you_mean(name: str, names: Iterable[str]) -> str:
    """A sentence with the nearest of the names; empty if none is near. A key may lack its section."""
    names = list(names)
    same_key = [other for other in names if other.lstrip("-").endswith(f".{name.lstrip('-')}")]
    near = same_key[:1] or difflib.get_close_matches(name, names, n=1)
    return f" Did you mean {near[0]}?" if near else ""


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= MAX_SHOWN_CHARACTERS else f"{text[:MAX_SHOWN_CHARACTERS]}..."


def _choices(hint: Any) -> list[str]:
    """The words that a setting takes, if it takes only certain ones."""
    if typing.get_origin(hint) is typing.Literal:
        return list(typing.get_args(hint))
    return [choice for part in typing.get_args(hint) for choice in _choices(part)]


def _describe(hint: Any) -> str:
    """What a setting takes, after the words 'must be'."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        described = " or ".join(_describe(part) for part in parts if part is not type(None))
        return f"{described}, or null" if type(None) in parts else described
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, parts))}"
    if origin is tuple:
        return f"a list of {len(parts)}, each {_describe(parts[0])}: [..., ...]"
    if origin is dict:
        value = "" if parts[1] is Any else f", each value {_describe(parts[1])}"
        return f"a mapping, {{KEY: VALUE, ...}}{value}"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text (quote it in YAML)"}
    return names.get(hint, f"of type {hint}")


def _whole_number(value: Any, hint: Any) -> Any:
    """1e6 becomes a whole number where one is wanted; anything else stays as it is."""
    if int not in (hint, *typing.get_args(hint)) or not isinstance(value, str | float):
        return value
    try:
        number = float(value)
    except ValueError:
        return value
    is_exact = number.is_integer() and abs(number) < 2**53
    return int(number) if is_exact else value


def _describe_yaml_error(error: Any) -> str:
    if getattr(error, "problem_mark", None) is None:
        return " ".join(str(error).replace(' in "<unicode string>",', "").split()) + ". Give a YAML file."
    context = f" ({error.context} from line {error.context_mark.line + 1} on)" if error.context_mark else ""
    return f"line {error.problem_mark.line + 1}: {error.problem}{context}. Fix the YAML there."


class Help(jsonargparse.DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def add_usage(self, usage, actions, groups, prefix=None):
        """The generated usage line of sixty flags helps nobody; the docstring has the command lines."""
