"""--config: a Python file whose get_config() returns the ConfigDict of an experiment or a probe.

Such files import each other as parts of `configs`. That is the directory of this name above the
file, wherever the command runs and whatever else is called `configs` there; what it lacks is looked
for in the working directory's, and in that of the checkout which this package is part of.
"""

import importlib.util
import sys
import sysconfig
import traceback
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from supmim_jax.config import SetupError

PACKAGE = "configs"
HERE = Path(__file__).resolve().parent
LONGEST = 500  # characters of what an error in a file says


def define(text: str) -> flags.FlagHolder:
    """The flag --config, with an override for each value: --config.optim.lr=3e-3."""
    holder = config_flags.DEFINE_config_file("config", None, text)
    flags.FLAGS["config"].parser = _Parser()
    return holder


def load(given: str) -> ConfigDict:
    """What get_config() of `path` or `path:argument` returns.

    Raises:
      SetupError: the file is missing, cannot be run, or returns something else; the message names
        it and the line.
    """
    name, colon, argument = given.partition(":")
    try:
        name = str(Path(name).expanduser())
        Path(name).read_bytes()
    except (OSError, ValueError, RuntimeError) as error:
        raise SetupError(
            f"--config names no readable file: {error}. Give the path of one, as in configs/."
        ) from None
    path = Path(name).resolve()
    try:
        _find_others(path)
        loader = SourceFileLoader("config_file", str(path))
        spec = importlib.util.spec_from_file_location("config_file", path, loader=loader)
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        config = module.get_config(*[argument] * bool(colon))
    except BaseException as error:  # the file may raise anything, SystemExit too
        said = " ".join(str(error).split())[:LONGEST]
        kind = "" if isinstance(error, SetupError) else f"{type(error).__name__}: "
        raise SetupError(f"{_place(error, path)}: {kind}{said}") from None
    if not isinstance(config, ConfigDict):
        raise SetupError(
            f"{path}: get_config() returns {type(config).__name__}; it must return the ConfigDict "
            f"that supmim_jax.configdict.to_configdict makes of a Config or ProbeConfig."
        )
    return config


class _Parser(flags.ArgumentParser):
    """In place of ml_collections' own, which lets most of what a file raises through."""

    def parse(self, argument: str) -> ConfigDict:
        return load(argument).lock()

    def flag_type(self) -> str:
        return "config object"


def _find_others(path: Path) -> None:
    """Makes `configs` the package that the file belongs to."""
    own = [parent for parent in path.parents if parent.name == PACKAGE][:1]
    among = [*own, Path.cwd() / PACKAGE, HERE.parent / PACKAGE]
    found = list(dict.fromkeys(str(x.resolve()) for x in among if x.is_dir()))
    known = sys.modules.get(PACKAGE)
    if not found or list(getattr(known, "__path__", ())) == found:
        return
    for name in [x for x in sys.modules if x.partition(".")[0] == PACKAGE]:
        del sys.modules[name]
    spec = ModuleSpec(PACKAGE, None, is_package=True)
    if (start := Path(found[0], "__init__.py")).exists():
        spec = importlib.util.spec_from_file_location(PACKAGE, start, submodule_search_locations=[])
    spec.submodule_search_locations[:] = found
    sys.modules[PACKAGE] = module = importlib.util.module_from_spec(spec)
    if spec.has_location:
        spec.loader.exec_module(module)


def _place(error: BaseException, path: Path) -> str:
    """The file and line of the user's code that raised the error."""
    if isinstance(error, SyntaxError) and error.filename and Path(error.filename).exists():
        return f"{error.filename}, line {error.lineno}"
    others = (str(HERE), *map(sysconfig.get_path, ("stdlib", "purelib", "platlib")), "<")
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith(others):
            return f"{frame.filename}, line {frame.lineno}"
    return str(path)
