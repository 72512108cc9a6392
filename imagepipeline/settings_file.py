"""The settings file: settings that are no secrets, as TOML. `settings` checks what they mean."""

import json
import os
import stat
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from imagepipeline.errors import SettingsError

NAME = "imagepipeline.toml"
PREFIX = "IMAGEPIPELINE_"
CHOICE = f"{PREFIX}CONFIG"


def name_key(variable: str) -> str:
    """What the file calls the setting of an environment variable."""
    return variable.removeprefix(PREFIX).lower()


def find(chosen: str | None) -> Path | None:
    """The absolute path of the file: the chosen one, or that of the working directory, if any.

    Raises:
        SettingsError: the one in the working directory is not ours alone to write.
    """
    if chosen:
        return Path(chosen).expanduser().absolute()
    path = Path(NAME).absolute()
    if not path.exists():
        return None
    found = path.stat()
    # It says, for example, to which address the keys are sent.
    if found.st_uid not in (os.geteuid(), 0) or found.st_mode & stat.S_IWOTH:
        raise SettingsError(
            f"{path} can be changed by other users: give it to this user with mode 0644, or name "
            f"the file to use in {CHOICE}"
        )
    return path


def read(path: Path) -> dict[str, Any]:
    """The values in the file, by key.

    Raises:
        SettingsError: it cannot be read, or is not TOML; the message says where.
    """
    try:
        return tomllib.loads(path.read_text("utf-8-sig"))
    except OSError as error:
        problem = error.strerror or type(error).__name__
        raise SettingsError(
            f"{path} cannot be read ({problem}): correct the path in {CHOICE}, or the file's mode"
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"{path} is not TOML: {error}; texts need quotes") from None
    except UnicodeDecodeError:
        raise SettingsError(f"{path} is not UTF-8 text: save it as UTF-8") from None
    except RecursionError:
        raise SettingsError(f"{path} is nested too deeply") from None


def to_variable(value: Any) -> str:
    """A value as one would write it in the environment: words comma-separated, objects as JSON."""
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, list) and all(isinstance(word, str) for word in value):
        return ",".join(value)
    return json.dumps(value, default=str) if isinstance(value, list | dict) else str(value)


def find_text(value: Any, is_wrong: Callable[[str], bool]) -> bool:
    """Whether a value, which may be nested, contains a text of which `is_wrong` is true."""
    if isinstance(value, dict):
        return find_text([*value, *value.values()], is_wrong)
    if isinstance(value, list):
        return any(find_text(part, is_wrong) for part in value)
    return isinstance(value, str) and is_wrong(value)
